"""Registers, spills and shared memory of every Triton kernel at the shapes of real models; needs no GPU.

python tools/kernel_resources.py                                                     prints the table
python tools/kernel_resources.py --write tests/unit/ops/triton_resources.json        after a kernel was changed
python tools/kernel_resources.py --check tests/unit/ops/triton_resources.json        fails where a kernel needs more
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_midus.cli import run
from megatron_midus.config.parser import ArgumentParser
from megatron_midus.errors import UserError
from megatron_midus.files import write_text_atomically

CAPABILITIES = (90, 80)


def main() -> None:
    args = parse_arguments()
    table = measure(args.capability, args.shapes)
    if args.write:
        write_text_atomically(args.write, json.dumps(table, indent=1) + "\n")
    if args.check:
        check(table, json.loads(args.check.read_text()))
    for name, found in table.items():
        print(
            f"{name:72} {found['registers']:4} registers {found['spill_bytes']:5} B spilled {found['shared_bytes']:7} B shared"
        )


def parse_arguments() -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", help="Names of shapes; all when left out.")
    parser.add_argument("--capability", nargs="+", type=int, default=CAPABILITIES, help="90 = Hopper, 80 = Ampere.")
    parser.add_argument("--write", type=Path, help="JSON file to write the table to.")
    parser.add_argument("--check", type=Path, help="JSON file of the table that must hold.")
    return parser.parse_args()


def measure(capabilities: list[int], names: list[str] | None) -> dict[str, dict[str, int]]:
    """``{"sm_90 shape kernel": {registers, spill_bytes, shared_bytes}}``, the largest need where one is launched twice."""
    from megatron_midus.ops.triton import launches, resources

    unknown = set(names or ()) - set(launches.SHAPES)
    if unknown:
        raise UserError(f"shapes {sorted(unknown)} are not known; choose from {list(launches.SHAPES)}")
    table: dict[str, dict[str, int]] = {}
    for capability in capabilities:
        for name in names or launches.SHAPES:
            for launch in launches.launches(launches.SHAPES[name], capability=capability):
                found = resources.resources(launch)._asdict()
                key = f"sm_{capability} {name} {launch.kernel}"
                table[key] = {part: max(n, table.get(key, found)[part]) for part, n in found.items()}
    return table


def check(table: dict[str, dict[str, int]], expected: dict[str, dict[str, int]]) -> None:
    """Raises ``ValueError`` where a kernel is new or needs more than was committed."""
    worse = [
        f"{name}: {part} {n}, committed {expected.get(name, {}).get(part)}"
        for name, found in table.items()
        for part, n in found.items()
        if n > expected.get(name, {}).get(part, -1)
    ]
    if worse:
        raise UserError(f"kernels need more than the committed table says, look, then --write it: {'; '.join(worse)}")


if __name__ == "__main__":
    run(main)
