"""Models by their name on the Hugging Face hub, ``org/name[@revision]``: from the local cache, from the hub, and to it."""

from __future__ import annotations

import importlib.metadata
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_midus.errors import UserError
from megatron_midus.weight_files import find_weight_files

_NAME = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")
_SNAPSHOT = re.compile(r"models--.+?--(?P<name>[^/]+)/snapshots/[^/]+$")
# Weights in formats that nothing here reads, gigabytes of them beside the ones that count.
_NOT_FETCHED = ["*.bin", "*.pth", "*.pt", "*.gguf", "*.h5", "*.msgpack", "*.onnx", "*.ckpt", "original/*", "onnx/*"]


def local_model(name: str | os.PathLike) -> str:
    """The directory of a model: ``name`` itself, or of ``org/name[@revision]`` the snapshot in the local cache.

    A name that cannot be one of the hub's is handed back, for the reader to say what is wrong with it.

    Raises:
        UserError: neither a directory nor in the cache; ends with the command that fetches it.
    """
    text = os.fspath(name)
    if not _is_of_the_hub(text):
        return text
    found = cached_model(text)
    if found is None:
        raise UserError(
            f"{text} does not exist and is not in the local Hugging Face cache; if it is a model of the hub, get it "
            f"with: {_download_command(text)}"
        )
    return found


def fetched_model(name: str | os.PathLike) -> str:
    """As ``local_model``, and fetches what is not in the cache unless HF_HUB_OFFLINE says not to.

    For one process at a time. A whole snapshot of the cache is taken as it is: a branch that has moved on the hub since
    is fetched by ``hf download``.

    Raises:
        UserError: neither here nor on the hub, no access, no network; ends with the remedy.
    """
    from huggingface_hub import constants, snapshot_download

    text = os.fspath(name)
    if not _is_of_the_hub(text) or constants.is_offline_mode():
        return local_model(text)
    found = cached_model(text)
    if found is not None and _is_whole(found):
        return found
    repository, revision = _parts(text)
    with hub_errors(repository, revision, fetch=_download_command(text)):
        return str(snapshot_download(repository, revision=revision, ignore_patterns=_NOT_FETCHED))


def cached_model(name: str) -> str | None:
    """The snapshot of ``org/name[@revision]`` in the local cache; ``None`` when it is not there."""
    if not _NAME.fullmatch(name):
        return None
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    repository, revision = _parts(name)
    try:
        return str(
            snapshot_download(repository, revision=revision, local_files_only=True, ignore_patterns=_NOT_FETCHED)
        )
    except (LocalEntryNotFoundError, HFValidationError):
        return None


def upload(directory: str | Path, repository: str, *, revision: str | None, private: bool, message: str) -> str:
    """Uploads a directory as one commit, makes the repository where there is none, and returns the commit's address.

    Raises:
        UserError: no token, no permission, a name that is none, no network.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    with hub_errors(repository, None):
        api.create_repo(repository, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repository, branch=revision, exist_ok=True)
        done = api.upload_folder(
            repo_id=repository,
            folder_path=directory,
            revision=revision,
            commit_message=message,
            ignore_patterns=[".*"],
        )
    return str(done.commit_url)


def has_token() -> bool:
    """Whether huggingface_hub has a token to work with, from HF_TOKEN or ``hf auth login``."""
    from huggingface_hub import get_token

    return get_token() is not None


def is_repository_name(name: str) -> bool:
    """Whether ``name`` has the form ``org/name``."""
    match = _NAME.fullmatch(name)
    return match is not None and match["revision"] is None


def short_name(path: str | os.PathLike) -> str:
    """What to call the model at ``path``: the name of a cached one, the last part of any other path."""
    resolved = Path(path).resolve()
    found = _SNAPSHOT.search(resolved.as_posix())
    return found["name"] if found else resolved.name


def _is_of_the_hub(text: str) -> bool:
    return not Path(text).exists() and not text.startswith(".") and _NAME.fullmatch(text) is not None


def _parts(name: str) -> tuple[str, str | None]:
    match = _NAME.fullmatch(name)
    assert match is not None
    return match["name"], match["revision"]


def _download_command(name: str) -> str:
    repository, revision = _parts(name)
    return f"hf download {repository}" + (f" --revision {revision}" if revision else "")


def _is_whole(directory: str) -> bool:
    """Whether a snapshot has its configuration and its weights; one that was interrupted has not."""
    try:
        return (Path(directory) / "config.json").is_file() and bool(find_weight_files(directory).names)
    except UserError:
        return False


@contextmanager
def hub_errors(
    repository: str, revision: str | None, *, kind: str = "model", fetch: str = "try again"
) -> Iterator[None]:
    """What the hub and the way to it refuse, in one line with the remedy.

    Args:
        kind: what the repository holds, "model" or "dataset".
        fetch: what to do where there is a network.
    """
    from huggingface_hub import constants
    from huggingface_hub import errors as hub

    # Of the library that it speaks HTTP with, which is another one in each of its major versions.
    transport = tuple(c for c in hub.HfHubHTTPError.__mro__ if c.__name__ in ("HTTPError", "RequestException"))
    page = f"{constants.ENDPOINT}/{'datasets/' if kind == 'dataset' else ''}{repository}"
    try:
        yield
    except hub.GatedRepoError:
        raise UserError(
            f"{repository} asks for its terms to be accepted: do so at {page}, then hf auth login"
        ) from None
    except hub.RevisionNotFoundError:
        raise UserError(f"{repository} has no revision {revision or 'main'} on the hub") from None
    except hub.RepositoryNotFoundError:
        found = "neither a directory here nor a model" if kind == "model" else f"no {kind}"
        raise UserError(
            f"{repository} is {found} of the hub that you may read; check the name, and for a private {kind}: hf auth login"
        ) from None
    except hub.HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        remedy = "; log in with a token that may do this: hf auth login" if status in (401, 403) else ""
        raise UserError(f"the hub refused {repository}: {' '.join(str(error).split())[:200]}{remedy}") from None
    except hub.HFValidationError as error:
        raise UserError(f"{repository} is no name of a repository: {error}") from None
    except (hub.LocalEntryNotFoundError, *transport) as error:
        name = repository + (f"@{revision}" if revision else "")
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise UserError(
            f"{name} is not here and the hub at {constants.ENDPOINT} cannot be reached ({reason}); where there is a network: {fetch}"
        ) from None


def dtype_argument() -> str:
    """What ``from_pretrained`` of the installed transformers calls the dtype: renamed in 4.56, which warns of the old name."""
    version = tuple(int(part) for part in importlib.metadata.version("transformers").split(".")[:2])
    return "dtype" if version >= (4, 56) else "torch_dtype"
