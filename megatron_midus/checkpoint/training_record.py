"""What the training behind a checkpoint was: iterations, tokens, which blocks learnt."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from megatron_midus.checkpoint.common_state import COMMON_FILE, read_common_state
from megatron_midus.checkpoint.damage import corruption_named


@dataclasses.dataclass(frozen=True)
class TrainingRecord:
    """What a model went through since it was up-scaled.

    Attributes:
        iteration: training iterations.
        tokens: training tokens; ``None`` where nobody counted.
        train: what was trained, ``inserted``, ``values`` or ``all``; ``None`` where nobody wrote it down.
        sft: whether the training was on conversations.
    """

    iteration: int = 0
    tokens: int | None = None
    train: str | None = None
    sft: bool = False

    def common_state(self) -> dict[str, Any]:
        """What ``read_training_record`` reads it from, for a checkpoint of weights alone."""
        state = {"consumed_train_tokens": self.tokens, "train": self.train, "sft": self.sft or None}
        known = {name: value for name, value in state.items() if value is not None}
        return {"iteration": self.iteration, **({"training_state": known} if known else {})}


UNTRAINED = TrainingRecord()


def read_training_record(directory: str | Path, iteration: int) -> TrainingRecord:
    """What the checkpoint ``directory`` says about the training that it went through, in our loop or in upstream's."""
    path = Path(directory) / COMMON_FILE
    with corruption_named(path if path.is_file() else Path(directory)):
        common = read_common_state(directory)
        state = common.get("training_state") or _upstream_state(common.get("args"))
        return TrainingRecord(iteration, state.get("consumed_train_tokens"), state.get("train"), bool(state.get("sft")))


def _upstream_state(arguments: Any) -> dict[str, Any]:
    """Tokens and trained blocks from the arguments that upstream's loop stores, where they are ours to read."""
    stored = getattr(arguments, "__dict__", {})
    samples, length = stored.get("consumed_train_samples"), stored.get("seq_length")
    is_counted = isinstance(samples, int) and isinstance(length, int)
    return {"consumed_train_tokens": samples * length if is_counted else None, "train": stored.get("train")}
