"""Shows what a trained memory learnt: ``midus analyze`` under the name that Megatron users look for."""

from megatron_midus import cli, command

make_parser, main = command.tool("analyze")

if __name__ == "__main__":
    cli.run(main)
