"""The last step of a datatrove pipeline: writes what arrives into Megatron-Core indexed datasets, a shard of each for every task.

``midus merge`` joins the shards into the bytes that one ``midus preprocess`` had written of the same documents in this order.
Needs datatrove: ``pip install 'megatron-midus[data]'``.
"""

from __future__ import annotations

import dataclasses
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

from datatrove.data import DocumentsPipeline
from datatrove.pipeline.base import PipelineStep
from datatrove.utils.typeshelper import StatHints

from megatron_midus.config.preprocess import PreprocessConfig
from megatron_midus.config.text import TEXT_KEY
from megatron_midus.data.corpus import DEFAULT_SEPARATOR, Record, RowDocument
from megatron_midus.data.preprocess import preprocess_inputs


class MegatronDatasetWriter(PipelineStep):
    """Encodes the texts of documents as ``midus preprocess --shard RANK/TASKS`` does.

    A task writes everything or nothing. One that failed begins again, and replaces what an earlier run of it has written.

    Args:
        output_prefix: of all shards; give it to ``midus merge``.
        tokenizer_model: directory of the tokenizer; ``tokenizer_type`` among the settings for other kinds.
        append_eod: end every document with the end-of-sequence token. Training needs this.
        settings: further fields of ``PreprocessConfig``: ``dedup``, ``split_by_hash``, ``min_document_tokens``, ``workers`` …

    Raises:
        ValueError: settings that do not go together.
    """

    name = "MIDUS"
    type = "💽 - WRITER"

    def __init__(self, output_prefix: str, tokenizer_model: str, *, append_eod: bool = True, **settings: Any) -> None:
        super().__init__()
        self.settings = {
            **settings,
            "output_prefix": str(output_prefix),
            "tokenizer_model": str(tokenizer_model),
            "append_eod": append_eod,
        }
        self._config(0, 1)  # A mistake is told before the jobs start.

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        """Writes the shard ``rank`` of ``world_size``; passes no document on."""
        with self.track_time(unit="task"):
            result = preprocess_inputs(self._config(rank, world_size), [_Pipeline(self, data)])
        for statistics in result.datasets.values():
            self.stat_update("written_documents", value=statistics.documents, unit="task")
            self.stat_update("tokens", value=statistics.tokens, unit="task")
        for reason, count in result.skipped.counts().items():
            self.stat_update(f"{StatHints.dropped}_{reason}", value=count, unit="task")
        yield from ()

    def _config(self, rank: int, world_size: int) -> PreprocessConfig:
        # datatrove knows which tasks are done; nothing else says that what an earlier one wrote is still right.
        return PreprocessConfig(
            input=["datatrove"],
            shard=f"{rank}/{world_size}",
            overwrite=True,
            commit_seconds=float("inf"),
            **self.settings,
        )


@dataclasses.dataclass
class _Pipeline:
    """The documents of a task as an input of preprocessing."""

    step: MegatronDatasetWriter
    documents: DocumentsPipeline
    name: str = "datatrove"
    num_bytes: int = 0
    num_text_bytes: int | None = None
    # Of no other run, so that none is gone on from: the documents before the same place may be others.
    fingerprint: str = dataclasses.field(default_factory=lambda: uuid.uuid4().hex)

    def records(self, keys: Sequence[str], *, separator: str = DEFAULT_SEPARATOR, start: int = 0) -> Iterator[Record]:
        assert list(keys) == [TEXT_KEY] and start == 0
        for number, document in enumerate(self.documents or (), start=1):
            self.step.stat_update(StatHints.total)
            # Half of a surrogate pair passes here, and is a malformed record where it is decoded.
            content = document.text.encode("utf-8", "surrogatepass")
            where = str(document.metadata.get("file_path", "document"))
            yield RowDocument(where, number, (content,), (TEXT_KEY,))
