"""What preprocessing counted: the statistics file beside every indexed dataset, and the sums of one run."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path


@dataclasses.dataclass
class DatasetStatistics:
    """Counts over one indexed dataset."""

    documents: int = 0
    """Documents in the dataset."""
    tokens: int = 0
    """Tokens, end-of-document tokens included."""
    bytes: int = 0
    """UTF-8 bytes of the text of those documents."""
    max_token_id: int = -1
    """Largest id."""

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of text per token; 0 when there is no token."""
        return self.bytes / self.tokens if self.tokens else 0.0

    def add(self, *, documents: int, tokens: int, num_bytes: int, max_token_id: int) -> None:
        """Counts more documents."""
        self.documents += documents
        self.tokens += tokens
        self.bytes += num_bytes
        self.max_token_id = max(self.max_token_id, max_token_id)

    def to_json(self, **more: object) -> str:
        values = {**dataclasses.asdict(self), "bytes_per_token": self.bytes_per_token, **more}
        return json.dumps(values, indent=2) + "\n"


@dataclasses.dataclass
class Skipped:
    """Records (lines, rows, texts) that are in no dataset, by reason; each is counted once."""

    empty: int = 0
    """Without any text."""
    too_short: int = 0
    """Below --min-document-bytes or --min-document-tokens."""
    too_long: int = 0
    """Above --max-document-bytes or --max-document-tokens."""
    duplicates: int = 0
    """The same text came before."""
    malformed: int = 0
    """Lines that are no documents."""
    malformed_examples: list[str] = dataclasses.field(default_factory=list)
    """The first few of them, ``file:line: reason``."""

    def to_json(self) -> dict[str, int]:
        """``skipped_empty`` and so on, for the statistics files."""
        return {f"skipped_{name}": count for name, count in self.counts().items()}

    def counts(self) -> dict[str, int]:
        """Numbers by reason."""
        return {name: value for name, value in vars(self).items() if isinstance(value, int)}


@dataclasses.dataclass
class PreprocessResult:
    """What a run did."""

    datasets: dict[str, DatasetStatistics]
    """Statistics by prefix."""
    skipped: Skipped = dataclasses.field(default_factory=Skipped)
    """What was left out."""
    bytes_read: int = 0
    """Bytes of the records read, uncompressed."""
    seconds: float = 0.0
    """Wall time of this process from the first record to the last, tokenizer not included."""
    bytes_resumed: int = 0
    """Of ``bytes_read``, those that an earlier, killed run had done."""

    @property
    def megabytes_per_second(self) -> float:
        """Throughput of this process, 1e6 bytes of records a second."""
        return (self.bytes_read - self.bytes_resumed) / 1e6 / max(self.seconds, 1e-9)


def statistics_path(prefix: str | Path) -> Path:
    """``P_text_document`` -> ``P_text_document.json``."""
    return Path(f"{prefix}.json")
