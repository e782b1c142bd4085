"""What an upload to the Hugging Face hub can be told."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class PushConfig:
    """Upload

    Uploads an export, its code and its model card to the Hugging Face hub as one commit. Log in first: hf auth login, or set
    HF_TOKEN.

    Examples:
      midus push midus_hf someone/midus-1b
      midus push midus_hf someone/midus-1b --revision step-2000 --private
    """

    directory: str = dataclasses.field(metadata={"metavar": "DIR", "positional": True})
    """What to upload: an export (midus convert --to hf), or another Hugging Face directory with its weights."""

    repository: str = dataclasses.field(metadata={"metavar": "ORG/NAME", "positional": True})
    """Where to; made if it does not exist."""

    revision: str | None = dataclasses.field(default=None, metadata={"metavar": "BRANCH"})
    """Branch to commit to, made if it does not exist; main when absent."""

    private: bool = False
    """A repository that is made is private; one that exists stays as it is."""

    message: str = "Upload a MIDUS model"
    """Of the commit."""
