"""Compares up-scaling methods: ``midus compare`` under the name that Megatron users look for."""

from megatron_midus import cli, command

make_parser, main = command.tool("compare")

if __name__ == "__main__":
    cli.run(main)
