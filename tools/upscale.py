"""Up-scales a Hugging Face model: ``midus upscale`` under the name that Megatron users look for."""

from megatron_midus import cli, command

make_parser, main = command.tool("upscale")

if __name__ == "__main__":
    cli.run(main)
