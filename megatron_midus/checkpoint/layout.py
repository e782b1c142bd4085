"""Where things lie in a Megatron checkpoint directory of this project: iterations, plan, architecture, HF assets.

::

    DIR/
      latest_checkpointed_iteration.txt      "0" after up-scaling, then the iteration of the newest whole checkpoint
      latest_checkpointed_iteration.sha256   its hash
      run.yaml                               configuration of the newest training run, for --config
      iter_0000000/
        metadata.json, .metadata, common.pt, __0_0.distcp …    Megatron-Core torch_dist files
        model_config.json                                      ModelConfig of the (up-scaled) model
        midus_plan.json                                        UpscalePlan
        memory_background.safetensors                          reads of slots on old-domain text (midus background), if counted
        hf_assets/                                             config, tokenizer, generation config … byte for byte
        checksums.sha256                                       hash of every file above, written last
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable
from pathlib import Path

from megatron_midus.checkpoint.checksums import file_sha256
from megatron_midus.errors import UserError
from megatron_midus.files import write_text_atomically

LATEST_FILE = "latest_checkpointed_iteration.txt"
LATEST_CHECKSUM_FILE = "latest_checkpointed_iteration.sha256"
ASSETS_DIRECTORY = "hf_assets"
BACKGROUND_FILE = "memory_background.safetensors"
# Keys of averaged weights (--ema-decay) begin with it, and go on as those of the weights.
AVERAGE_PREFIX = "ema."
# Keys of the weights that a run began with (--l2-to-start), likewise.
START_PREFIX = "start."
_ITERATION = re.compile(r"iter_(\d{7,})")

# Weights and their indices are converted, never copied; everything else of a Hugging Face directory is an asset.
_NOT_ASSETS = re.compile(
    r".*\.(safetensors|bin|pt|pth|ckpt|msgpack|h5|gguf|onnx)(\.index(\.\w+)?\.json)?|modeling_.*\.py|configuration_.*\.py|midus_plan\.json|README\.md|\..*"
)
# transformers 5 keeps chat templates other than the default in a folder.
_ASSET_DIRECTORIES = ("additional_chat_templates",)


def iteration_directory(root: str | Path, iteration: int) -> Path:
    """``root/iter_0000042``."""
    return Path(root) / f"iter_{iteration:07d}"


def read_latest_iteration(root: str | Path) -> int | None:
    """The iteration that ``latest_checkpointed_iteration.txt`` names; ``None`` when there is no such file."""
    path = Path(root) / LATEST_FILE
    if not path.is_file():
        return None
    text = path.read_bytes().decode(errors="replace").strip()
    if not (text.isascii() and text.isdigit()):
        raise UserError(f"{path} holds {text!r}, not an iteration number; choose one with --ckpt-step")
    return int(text)


def latest_is_as_written(root: str | Path) -> bool:
    """Whether ``latest_checkpointed_iteration.txt`` has its hash; true where no hash was written."""
    path, checksum = Path(root) / LATEST_FILE, Path(root) / LATEST_CHECKSUM_FILE
    if not checksum.is_file():
        return True
    return path.is_file() and checksum.read_bytes() == _latest_checksum(path)


def _latest_checksum(path: Path) -> bytes:
    return f"{file_sha256(path)}  {path.name}\n".encode()


def write_latest_iteration(root: str | Path, iteration: int) -> None:
    """Makes ``iteration`` the latest. A kill between the two files leaves a hash that does not fit, which is reported."""
    path = Path(root) / LATEST_FILE
    write_text_atomically(path, f"{iteration}\n")
    write_text_atomically(Path(root) / LATEST_CHECKSUM_FILE, _latest_checksum(path).decode())


def list_iterations(root: str | Path) -> list[int]:
    """Iterations that lie in ``root``, ascending, whole or not."""
    return sorted(int(m.group(1)) for p in Path(root).iterdir() if p.is_dir() and (m := _ITERATION.fullmatch(p.name)))


def is_iteration_directory(path: str | Path) -> bool:
    """Whether ``path`` is one checkpoint, ``…/iter_0000042``, and not a root of several."""
    return bool(_ITERATION.fullmatch(Path(path).name))


def find_checkpoint(root: str | Path, iteration: int | None = None) -> tuple[Path, int]:
    """Resolves ``--load DIR [--ckpt-step N]``.

    Args:
        root: a checkpoint root, or one ``iter_*`` directory itself.
        iteration: a certain iteration; the latest when absent.

    Returns:
        The ``iter_*`` directory and its iteration.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"checkpoint directory {root} does not exist")
    if match := _ITERATION.fullmatch(root.name):
        return root, int(match.group(1))
    if iteration is None:
        iteration = read_latest_iteration(root)
        if iteration is None:
            hint = (
                "; it looks like a Hugging Face directory: make a checkpoint of it with midus upscale"
                if (root / "config.json").is_file()
                else ""
            )
            raise UserError(f"{root} holds no {LATEST_FILE}, so it is not a Megatron checkpoint{hint}")
    directory = iteration_directory(root, iteration)
    if not directory.is_dir():
        raise UserError(f"{directory} does not exist; {root} holds iterations {list_iterations(root)}")
    return directory, iteration


def find_background(directory: str | Path) -> Path | None:
    """The counts of midus background in an ``iter_*`` directory; ``None`` where nothing was counted."""
    path = Path(directory) / BACKGROUND_FILE
    return path if path.is_file() else None


def is_asset(name: str) -> bool:
    """Whether a file of a Hugging Face directory travels with the checkpoint byte for byte."""
    return not _NOT_ASSETS.fullmatch(name)


def copy_assets(source: str | Path, target: str | Path, *, skip: Iterable[str] = ()) -> list[str]:
    """Copies the asset files of directory ``source`` into ``target`` (made if absent); returns their names."""
    source, target = Path(source), Path(target)
    target.mkdir(parents=True, exist_ok=True)
    copied = []
    for path in sorted(source.iterdir()):
        if path.is_dir() and path.name in _ASSET_DIRECTORIES:
            shutil.copytree(path, target / path.name)
            copied.append(path.name)
        elif path.is_file() and is_asset(path.name) and path.name not in set(skip):
            shutil.copyfile(path, target / path.name)
            copied.append(path.name)
    return copied
