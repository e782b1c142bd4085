"""Converts between Megatron checkpoints and Hugging Face directories: ``midus convert`` under the name that Megatron users look for."""

from megatron_midus import cli, command

make_parser, main = command.tool("convert")

if __name__ == "__main__":
    cli.run(main)
