"""``midus merge``: the datasets of a corpus from its shards."""

from __future__ import annotations

from megatron_midus.config.preprocess import MergeConfig
from megatron_midus.data import shards
from megatron_midus.data.statistics import PreprocessResult
from megatron_midus.progress import Progress
from megatron_midus.verbs.preprocess import print_datasets
from megatron_midus.verbs.verb import verb


@verb(MergeConfig)
def merge(config: MergeConfig, progress: Progress) -> PreprocessResult:
    """Joins shards. See ``MergeConfig`` for the settings; returns what was written and left out.

    Raises:
        UserError: shards that are missing, damaged or of different settings, outputs that exist.
    """
    return shards.merge(config, progress)


def command(config: MergeConfig) -> int:
    """``midus merge``."""
    print_datasets(merge(config))
    return 0
