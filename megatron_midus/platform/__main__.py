"""``python -m megatron_midus.platform``: versions and devices of this environment, one a line."""

import megatron.core  # noqa: F401  an environment in which this fails cannot train

from megatron_midus.platform import describe

if __name__ == "__main__":
    print(describe())
