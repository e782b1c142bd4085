"""DataConfig: where the training tokens come from and how they are cut into samples."""

from __future__ import annotations

import dataclasses
from typing import Literal

from megatron_midus.errors import UserError

DEFAULT_SPLIT = "969,30,1"


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Data and tokenizer"""

    data_path: list[str] | None = None
    """Prefixes P of indexed datasets (P.bin and P.idx, made by midus preprocess), each optionally preceded by
    its weight in the blend: 0.7 P1 0.3 P2. Without weights every dataset is read in proportion to its size. Cut into
    train, valid and test by --split."""

    split: str | None = None
    """Shares of train, valid and test documents of --data-path, three numbers separated by commas; 969,30,1 when
    absent."""

    train_data_path: list[str] | None = None
    """Prefixes (and weights) of the training data alone, instead of --data-path."""

    valid_data_path: list[str] | None = None
    """Prefixes (and weights) of the validation data alone."""

    test_data_path: list[str] | None = None
    """Prefixes (and weights) of the test data alone."""

    data_cache_path: str | None = None
    """Directory for the sample indices; a directory named cache beside the first dataset when absent."""

    mock_data: bool = False
    """Train on counting sequences that are made up on the fly, to try a launch without any data."""

    tokenizer_type: Literal["HuggingFaceTokenizer", "SentencePieceTokenizer", "NullTokenizer"] | None = None
    """Kind of tokenizer: HuggingFaceTokenizer reads a directory, SentencePieceTokenizer a .model file, NullTokenizer
    knows numbers only (for --mock-data). When absent it follows from --tokenizer-model, or from the checkpoint."""

    tokenizer_model: str | None = None
    """Directory or file of the tokenizer that the data were made with; the checkpoint's own when absent."""

    vocab_size: int | None = dataclasses.field(default=None, metadata={"flag": False})
    """Ids of a NullTokenizer; the driver fills in the model's."""

    seq_length: int = 1024
    """Tokens in one sample."""

    reset_position_ids: bool = False
    """Start the positions again at 0 after every end-of-document token. Rotary positions only count as distances, so
    on its own this changes nothing; launch scripts give it with --reset-attention-mask."""

    reset_attention_mask: bool = False
    """Keep a document of a packed sample from attending to the documents before it. Needs the local layers."""

    eod_mask_loss: bool = False
    """Leave out the loss of the prediction that follows an end-of-document token."""

    sft: bool = False
    """Supervised fine-tuning: the data are conversations that midus preprocess --sft made. Whole ones are packed into samples and do not
    see each other, and only what the assistant says has a loss. Turns --reset-attention-mask and --reset-position-ids on, and
    --calculate-per-token-loss, because micro-batches have unequal numbers of such tokens."""

    chat_template: str | None = None
    """With --sft, the file that was given to midus preprocess as --chat-template. Checkpoints and exports have it from then on, instead
    of the tokenizer's own."""

    sft_long_conversations: Literal["refuse", "truncate", "drop"] = "refuse"
    """Conversations of more than --seq-length + 1 tokens: refuse = end with their number; truncate = cut off the end, and drop
    those without a loss before it; drop = leave them out."""

    num_workers: int = 2
    """Processes that read samples ahead of training, on every data-parallel rank; 0 = read in the training process."""

    dataloader_type: Literal["single", "cyclic"] = "single"
    """single = one pass over the built samples, in their (already shuffled) order; cyclic = endless passes, shuffled
    again in every pass."""

    def __post_init__(self) -> None:
        per_split = [n for n in ("train_data_path", "valid_data_path", "test_data_path") if getattr(self, n)]
        sources = [n for n in ("data_path", "mock_data") if getattr(self, n)] + per_split[:1]
        if len(sources) > 1:
            flags = " and ".join("--" + name.replace("_", "-") for name in sources)
            raise UserError(f"{flags} were given together; choose one source of data")
        if self.split is not None and per_split:
            flag = "--" + per_split[0].replace("_", "-")
            raise UserError(f"--split {self.split} divides --data-path and does not apply to {flag}; leave it out")
        if self.seq_length < 1:
            raise UserError(f"seq_length={self.seq_length} must be at least 1")
        if self.num_workers < 0:
            raise UserError(f"num_workers={self.num_workers} must be 0 or more")
        self.split_fractions()
        self._check_sft()

    def _check_sft(self) -> None:
        if not self.sft:
            if self.chat_template is not None:
                raise UserError(f"--chat-template {self.chat_template} is of --sft; add it or leave both out")
            if self.sft_long_conversations != "refuse":
                raise UserError(
                    f"--sft-long-conversations {self.sft_long_conversations} is of --sft; add it or leave both out"
                )
            return
        for name in ("mock_data", "eod_mask_loss"):
            if getattr(self, name):
                flag = "--" + name.replace("_", "-")
                raise UserError(f"{flag} does not go with --sft, whose data say which tokens have a loss; leave it out")
        # What it means; all that reads these settings needs no other.
        object.__setattr__(self, "reset_attention_mask", True)
        object.__setattr__(self, "reset_position_ids", True)

    @property
    def has_data(self) -> bool:
        """Whether any source of data was named."""
        return bool(
            self.data_path or self.train_data_path or self.valid_data_path or self.test_data_path or self.mock_data
        )

    def split_fractions(self) -> tuple[float, float, float]:
        """``--split`` as three shares that sum to 1; raises ``ValueError`` when it is none."""
        text = DEFAULT_SPLIT if self.split is None else self.split
        try:
            shares = [float(part) for part in text.split(",")]
        except ValueError:
            shares = []
        if len(shares) not in (1, 2, 3) or min(shares) < 0 or not 0 < sum(shares) < float("inf"):
            raise UserError(f"--split {text!r} is not three shares such as {DEFAULT_SPLIT}")
        shares += [0.0] * (3 - len(shares))
        train, valid, test = (share / sum(shares) for share in shares)
        return train, valid, test
