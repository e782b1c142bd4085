"""What test_converter_memory.py runs: one tool, and how much memory it took above an interpreter with its imports.

python converter_memory_program.py TOOL.py [arguments of the tool]    prints "peak above imports: N bytes"

Arguments before THEN are those of a first call whose peak does not count: tools import most of what they need late.
"""

import importlib.util
import sys

from megatron_midus import cli


def status(entry):
    """Bytes of an entry of /proc/self/status, for instance VmHWM, the highest resident size so far."""
    with open("/proc/self/status") as stream:
        return next(int(line.split()[1]) * 1024 for line in stream if line.startswith(f"{entry}:"))


def main():
    tool, *arguments = sys.argv[1:]
    spec = importlib.util.spec_from_file_location("tool", tool)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    import torch.distributed.checkpoint.filesystem  # noqa: F401

    if "THEN" in arguments:
        place = arguments.index("THEN")
        module.main(arguments[:place])
        arguments = arguments[place + 1 :]
    before = status("VmRSS")
    with open("/proc/self/clear_refs", "w") as stream:
        stream.write("5")  # VmHWM begins anew
    code = module.main(arguments)
    print(f"peak above imports: {status('VmHWM') - before} bytes")
    return code


if __name__ == "__main__":
    cli.run(main)
