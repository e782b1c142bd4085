"""Finds layouts of a cluster: ``midus plan`` under the name that Megatron users look for."""

from megatron_midus import cli, command

make_parser, main = command.tool("plan")

if __name__ == "__main__":
    cli.run(main)
