"""``python -m megatron_midus VERB …`` is ``midus VERB …``; torchrun starts training this way."""

from megatron_midus.command import main

# Checkpoint writers are processes of their own that import this file again.
if __name__ == "__main__":
    main()
