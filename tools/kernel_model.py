"""Modelled, not measured: times of the Triton kernels on an H200 from their instructions, bytes and products.

python tools/kernel_model.py --json modelled.json

Each kernel is compiled for compute capability 9.0 without a GPU. The instructions of each loop of its machine code times
the loop's rounds, over what the schedulers issue, is one bound; bytes that leave HBM, bytes that leave the L2 cache, and
products over the tensor cores' rate are the others. A kernel takes the largest bound over a share of the peak that
kernels of its kind reach, and a launch. What libraries do (sort, fills, sums) is modelled by bytes alone.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_midus.cli import run
from megatron_midus.config.parser import ArgumentParser
from megatron_midus.errors import UserError
from megatron_midus.files import write_text_atomically

SHAPE = "1b-n512-k16"
TARGETS = {"forward": 0.6, "backward": 0.9}  # milliseconds
TARGET_SAVED = 70e6  # bytes

# H200 SXM: 132 multiprocessors of four schedulers, one warp instruction a cycle each; vendor's datasheet for the rest.
ISSUE_RATE = 132 * 4 * 1.755e9
HBM_RATE = 4.8e12
L2_RATE = 5.5e12  # reads that hit, as measured by others on the same processor (H100)
TENSOR_RATE = 989e12  # dense bf16
# Shares of the peaks that well-made kernels reach; of HBM by a radix sort, from Adinets and Merrill, arXiv 2206.01784.
SHARE = {"issue": 0.7, "hbm": 0.85, "l2": 0.7, "tensor": 0.6, "sort": 0.68}
LAUNCH = 2e-6  # seconds between kernels in one stream


class Work(NamedTuple):
    """What one kernel does at a shape, besides its instructions."""

    rounds: Sequence[int]
    """Rounds of each loop, in the order of the machine code; an inner loop's are per round of the outer."""
    hbm: float
    l2: float = 0
    flops: float = 0


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="File to write the table to as well.")
    args = parser.parse_args()
    table = model()
    print_table(table)
    if args.json:
        write_text_atomically(args.json, json.dumps(table, indent=1) + "\n")


def model() -> dict:
    from megatron_midus.ops.triton import launches

    shape = launches.SHAPES[SHAPE]
    phases: dict[str, list[dict]] = {"forward": [], "backward": []}
    for launch in launches.launches(shape, capability=90):
        phase = "forward" if launch.kernel in ("select_kernel", "project_kernel") else "backward"
        phases[phase].append(kernel_row(launch, work_of(launch, shape)))
    phases["backward"] += library_rows(shape)
    selections = shape.tokens * shape.heads * shape.topk
    return {
        "note": "modelled, not measured",
        "shape": {name: str(value) for name, value in shape._asdict().items()},
        "assumptions": {
            "issue_rate": ISSUE_RATE, "hbm_rate": HBM_RATE, "l2_rate": L2_RATE, "tensor_rate": TENSOR_RATE,
            "shares": SHARE, "launch_s": LAUNCH,
        },
        "phases": {
            name: {"target_ms": TARGETS[name], "modelled_ms": sum(row["ms"] for row in rows), "kernels": rows}
            for name, rows in phases.items()
        },
        "saved_bytes": selections * 8 + shape.tokens * shape.heads * shape.latent * 2,
        "target_saved_bytes": TARGET_SAVED,
    }  # fmt: skip


# -- work ------------------------------------------------------------------------------------------------------------
def work_of(launch, shape) -> Work:
    arguments = launch.arguments
    bags = shape.tokens * shape.heads
    entries = bags * shape.topk
    metadata = entries * 8  # index and weight
    latent, out, query = (bags * 2 * width for width in (shape.latent, shape.out, shape.channels))
    bank = shape.num_keys**2 * shape.latent * 2
    keys = 2 * shape.heads * shape.num_keys * shape.channels
    gathered = entries * shape.latent * 2
    if launch.kernel == "select_kernel":
        tiles = shape.num_keys // arguments["BLOCK_N"]
        programs = math.prod(launch.grid)
        return Work(
            2 * [tiles, tiles - 1] + [shape.topk],  # of the second pass over the scores the first tile stands apart
            hbm=query + keys + metadata,
            l2=programs * 2 * 2 * shape.num_keys * shape.channels,
            flops=2 * 2 * bags * shape.num_keys * shape.channels,
        )
    if launch.kernel == "project_kernel":
        rounds = shape.topk // unrolled()
        return Work([rounds], metadata + bank + latent + out, gathered, 2 * bags * shape.latent * shape.out)
    if launch.kernel == "_projection_backward_kernel":
        partial = launch.grid[1] * shape.heads * shape.latent * shape.out * 4
        rounds = arguments["per_split"] // arguments["BLOCK_T"]
        return Work([rounds], 2 * latent + out + 2 * partial, 0, 4 * bags * shape.latent * shape.out)
    if launch.kernel == "_sum_runs_kernel":
        partial = 2 * math.ceil(entries / arguments["CHUNK"]) * shape.latent * 4
        # Rows, slots and positions (int64), weights and products scattered over sectors of 32 bytes, the bank twice.
        return Work([1, arguments["CHUNK"]], latent + 2 * bank + entries * 20 + partial, gathered + entries * 76 + bank)
    if launch.kernel == "_sum_cut_runs_kernel":
        return Work([1], 2 * launch.grid[0] * shape.latent * 4)
    if launch.kernel == "_query_backward_kernel":
        # Gathered keys lie in the L1 cache: all tokens of a head follow each other.
        return Work([shape.topk], metadata + query + keys)
    assert launch.kernel == "_sub_keys_backward_kernel"
    return sub_keys_work(launch, shape, metadata, query, keys)


def sub_keys_work(launch, shape, metadata: float, query: float, keys: float) -> Work:
    arguments = launch.arguments
    rounds = arguments["per_split"] // arguments["BLOCK_T"]
    partial = arguments["splits"] * keys * 2
    blocks = launch.grid[2] // 2
    flops = 2 * shape.tokens * shape.heads * shape.num_keys * shape.channels
    return Work([rounds], metadata + query + 2 * partial, 2 * blocks * metadata + blocks * query, flops)


def unrolled() -> int:
    """Rounds of the value look-up's loop that one of the machine code holds."""
    from megatron_midus.ops.triton import values

    return values.UNROLL.value


def library_rows(shape) -> list[dict]:
    entries = shape.tokens * shape.heads * shape.topk
    bank = shape.num_keys**2 * shape.latent * 2
    sort = entries * (4 * 2 * (4 + 8) + 4 + 8)  # four passes of int32 keys with int64 positions, a histogram, a fill
    return [
        library_row("torch.sort (stable)", sort, "sort", launches=8),
        library_row("zero the bank's gradient", bank, "hbm"),
        library_row("activation backward", 3 * entries * 4, "hbm"),
        library_row("sums and casts of partial key and projection gradients", 0, "hbm", launches=5),
    ]


# -- time ------------------------------------------------------------------------------------------------------------
def kernel_row(launch, work: Work) -> dict:
    from megatron_midus.ops.triton import resources

    per_warp = executed_instructions(resources.machine_code(launch), work.rounds, launch.kernel)
    instructions = per_warp * launch.num_warps * math.prod(launch.grid)
    bounds = {
        "issue": instructions / ISSUE_RATE,
        "hbm": work.hbm / HBM_RATE,
        "l2": work.l2 / L2_RATE,
        "tensor": work.flops / TENSOR_RATE,
    }
    seconds = {name: bound / SHARE[name] for name, bound in bounds.items()}
    limit = max(seconds, key=seconds.__getitem__)
    return {
        "name": launch.kernel, "ms": 1e3 * (seconds[limit] + LAUNCH), "limit": limit,
        **{f"{name}_ms": 1e3 * value for name, value in bounds.items()}, "instructions_per_warp": per_warp,
    }  # fmt: skip


def library_row(name: str, size: float, share: str, launches: int = 1) -> dict:
    seconds = size / HBM_RATE / SHARE[share] + launches * LAUNCH
    return {"name": name, "ms": 1e3 * seconds, "limit": "hbm", "hbm_ms": 1e3 * size / HBM_RATE}


def executed_instructions(sass: str, rounds: Sequence[int], kernel: str) -> int:
    """Instructions that one warp executes: each counts as often as the loops around it turn."""
    instructions = re.findall(r"^\s+/\*([0-9a-f]{4,5})\*/\s+(.*?);", sass, re.MULTILINE)
    spans = []
    for address, text in instructions:
        target = re.search(r"\bBRA\b.*?\b0x([0-9a-f]+)", text)
        if target and int(target[1], 16) < int(address, 16):
            spans.append((int(target[1], 16), int(address, 16)))
    spans.sort()
    if len(spans) != len(rounds):
        raise UserError(
            f"{kernel} has {len(spans)} loops and the model knows {len(rounds)}; update tools/kernel_model.py"
        )
    return sum(
        math.prod(n for (first, last), n in zip(spans, rounds) if first <= int(address, 16) <= last)
        for address, _ in instructions
    )


def print_table(table: dict) -> None:
    print(f"MODELLED, NOT MEASURED: NVIDIA H200, {table['shape']}")
    columns = ("issue", "hbm", "l2", "tensor")
    for phase, found in table["phases"].items():
        print(f"\n{phase:56}" + "".join(f"{name:>9}" for name in columns) + "     time  limit")
        for row in found["kernels"]:
            bounds = "".join(f"{row.get(f'{name}_ms', 0):9.3f}" for name in columns)
            print(f"  {row['name']:54}{bounds}{row['ms']:9.3f}  {row['limit']}")
        verdict = "met" if found["modelled_ms"] <= found["target_ms"] else "MISSED"
        print(f"  {'total (ms)':54}{'':36}{found['modelled_ms']:9.3f}  target {found['target_ms']}: {verdict}")
    verdict = "met" if table["saved_bytes"] <= table["target_saved_bytes"] else "MISSED"
    print(
        f"\nsaved for backward {table['saved_bytes'] / 1e6:.1f} MB, target {table['target_saved_bytes'] / 1e6:.0f}: {verdict}"
    )


if __name__ == "__main__":
    run(main)
