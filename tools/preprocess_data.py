"""Encodes a corpus into indexed datasets: ``midus preprocess`` under the name that Megatron users look for."""

from megatron_midus import cli, command

make_parser, main = command.tool("preprocess")

if __name__ == "__main__":
    cli.run(main)
