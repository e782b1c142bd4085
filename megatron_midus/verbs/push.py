"""``midus push``: an export to the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from megatron_midus.config.push import PushConfig
from megatron_midus.conversion.families import check_plan, family_of
from megatron_midus.conversion.hf_io import read_hf_config
from megatron_midus.errors import UserError
from megatron_midus.hub import has_token, is_repository_name, upload
from megatron_midus.progress import Progress
from megatron_midus.upscaling import PLAN_FILE, UpscalePlan
from megatron_midus.verbs.verb import verb
from megatron_midus.weight_files import find_weight_files


@verb(PushConfig)
def push(config: PushConfig, progress: Progress) -> str:
    """Uploads a directory; returns the address of the commit. See ``PushConfig`` for the settings.

    Raises:
        UserError: a directory that is no whole model, a name that is none, no token, what the hub refuses.
    """
    if not is_repository_name(config.repository):
        raise UserError(f"{config.repository!r} is no name of a repository; write org/name")
    _check_whole(Path(config.directory))
    if not has_token():
        raise UserError("the hub wants a token to write with; log in with: hf auth login, or set HF_TOKEN")
    return upload(
        config.directory,
        config.repository,
        revision=config.revision,
        private=config.private,
        message=config.message,
    )


def _check_whole(directory: Path) -> None:
    """Refuses what nobody could load afterwards."""
    hf_config = read_hf_config(directory)
    if not find_weight_files(directory).names:
        raise UserError(f"{directory} holds no safetensors weights; export a checkpoint with midus convert --to hf")
    if (directory / PLAN_FILE).is_file():
        check_plan(hf_config, UpscalePlan.load(directory))
    if family_of(hf_config).name == "midus" and not (directory / "modeling_midus.py").is_file():
        raise UserError(f"{directory} lacks modeling_midus.py, without which nobody can load it; export it again")


def command(config: PushConfig) -> int:
    """``midus push``."""
    print(f"uploaded: {push(config)}")
    return 0
