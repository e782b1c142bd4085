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

    def add(self, *, tokens: int, num_bytes: int, max_token_id: int) -> None:
        """Counts one more document."""
        self.documents += 1
        self.tokens += tokens
        self.bytes += num_bytes
        self.max_token_id = max(self.max_token_id, max_token_id)

    def to_json(self, **more: object) -> str:
        values = {**dataclasses.asdict(self), "bytes_per_token": self.bytes_per_token, **more}
        return json.dumps(values, indent=2) + "\n"


@dataclasses.dataclass
class PreprocessResult:
    """What a run did."""

    datasets: dict[str, DatasetStatistics]
    """Statistics by prefix."""
    empty: int = 0
    """Records without any text, left out."""
    duplicates: int = 0
    """Records left out because their text came before."""
    malformed: int = 0
    """Lines left out because they are no documents."""
    malformed_examples: list[str] = dataclasses.field(default_factory=list)
    """The first few of them, ``file:line: reason``."""
    bytes_read: int = 0
    """Bytes of the records read, uncompressed."""
    seconds: float = 0.0
    """Wall time, start-up included."""


def statistics_path(prefix: str | Path) -> Path:
    """``P_text_document`` -> ``P_text_document.json``."""
    return Path(f"{prefix}.json")
