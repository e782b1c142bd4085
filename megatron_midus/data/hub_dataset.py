"""Datasets of the Hugging Face hub as inputs of preprocessing, streamed by its own library, ``datasets``.

``hf://datasets/ORG/NAME[@REVISION][/CONFIG]``, or ``/PATH`` of a file, a folder or a pattern in the repository. A revision is
resolved to its commit once, at the beginning, so every shard and every repetition of a run reads the same records; offline the
commit comes from the local cache. Every file of a split is an input of its own, as files here are.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from megatron_midus.data import conversations
from megatron_midus.data.corpus import DEFAULT_SEPARATOR, Record, rows_of
from megatron_midus.errors import UserError
from megatron_midus.hub import hub_errors

_ADDRESS = re.compile(
    r"hf://datasets/(?P<repository>[\w.-]+/[\w.-]+)(@(?P<revision>refs/(?:convert|pr)/[^/]+|[^/]+))?(/(?P<rest>.*))?"
)
_ROWS = 1024
_PATHS = 500


@dataclasses.dataclass(frozen=True)
class HubFile:
    """One file of a split of a dataset, at one commit.

    Attributes:
        source: the dataset, the commit, the config and the split.
        stream: the ``datasets.IterableDataset`` of it.
    """

    name: str
    source: str
    stream: Any
    num_bytes: int = 0
    num_text_bytes: int | None = None

    @property
    def fingerprint(self) -> str:
        return f"{self.name} of {self.source}"

    def records(self, keys: Sequence[str], *, separator: str = DEFAULT_SEPARATOR, start: int = 0) -> Iterator[Record]:
        row = 0
        for table in self.tables(_ROWS):
            behind = row + table.num_rows
            if behind > start:
                there = _columns_to_read(table.column_names, keys, self.name)
                row = max(row, start)
                # A list, so that the file is blamed for what is in it and not for what is done with it.
                with _read_errors(self.name):
                    rows = list(rows_of(table.slice(table.num_rows - (behind - row)), there, self.name, row))
                yield from rows
            row = behind

    def tables(self, num_rows: int) -> Iterator[Any]:
        """Arrow tables of at most so many rows, in order."""
        tables = iter(self.stream.with_format("arrow").iter(num_rows))
        while True:
            with _read_errors(self.name):
                table = next(tables, None)
            if table is None:
                return
            yield table


def hub_files(address: str, keys: Sequence[str], *, split: str, with_sizes: bool) -> list[HubFile]:
    """The files of a split, in order.

    Args:
        address: ``hf://datasets/…``
        keys: columns that will be read, as far as they are there.
        with_sizes: whether ``num_bytes`` is needed; 0 otherwise.

    Raises:
        UserError: no such dataset, revision, config or split, no access, no network and not in the cache.
    """
    match = _ADDRESS.fullmatch(address)
    if match is None:
        raise UserError(f"{address} is no dataset of the hub; write hf://datasets/ORG/NAME[@REVISION][/CONFIG or PATH]")
    try:
        import datasets
    except ImportError:
        raise UserError(f"{address} needs the package datasets: pip install 'megatron-midus[data]'") from None
    rest = (match["rest"] or "").strip("/")
    revision = unquote(match["revision"]) if match["revision"] else None
    if datasets.config.HF_HUB_OFFLINE:
        repository = _Cached.find(match["repository"], revision, rest)
    else:
        repository = _Remote.find(match["repository"], revision)
    with _read_errors(address):
        builder = _builder(datasets, repository, rest)
        streams = _streams(builder, keys)
    if split not in streams:
        raise UserError(f"{address} has no split {split!r}; give --split one of {', '.join(streams)}")
    stream = streams[split]
    source = f"hf://datasets/{repository.name}@{repository.commit}, config {builder.config.name}, split {split}"
    names = [repository.address(str(file)) for file in (builder.config.data_files or {}).get(split, [])]
    # Some kinds make several parts of a file, or of several files one: their parts have numbers.
    if len(names) != stream.num_shards or len(set(names)) != len(names):
        names = [f"{source}, part {index + 1}" for index in range(stream.num_shards)]
    with hub_errors(repository.name, repository.commit, kind="dataset"):
        sizes = repository.sizes(names) if with_sizes else {}
    files = [
        HubFile(name, source, stream.shard(len(names), index), sizes.get(name, 0)) for index, name in enumerate(names)
    ]
    _check_columns(stream, files, keys)
    print(f"{source}: {len(files)} file{'s' if len(files) != 1 else ''}", file=sys.stderr)
    return files


def _check_columns(stream: Any, files: Sequence[HubFile], keys: Sequence[str]) -> None:
    """Before hours of work: where the columns are not known, by the first rows."""
    if stream.features:
        _columns_to_read(list(stream.features), keys, files[0].source)
    elif (table := next(files[0].tables(1), None)) is not None:
        _columns_to_read(table.column_names, keys, files[0].name)


# -- repositories ------------------------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class _Remote:
    """A dataset on the hub."""

    name: str
    commit: str
    paths: list[str]

    @classmethod
    def find(cls, name: str, revision: str | None) -> _Remote:
        from huggingface_hub import HfApi, hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError

        with hub_errors(name, revision, kind="dataset", fetch=_download_command(name, revision, "")):
            info = HfApi().dataset_info(name, revision=revision)
            paths = [file.rfilename for file in info.siblings or []]
            # What datasets asks for as well: the terms of a gated dataset guard files, not the list of them.
            with suppress(EntryNotFoundError):
                hf_hub_download(name, "README.md", repo_type="dataset", revision=info.sha)
        assert info.sha is not None
        return cls(name, info.sha, paths)

    @property
    def source(self) -> dict[str, str]:
        """Arguments of ``datasets.load_dataset_builder``."""
        return {"path": self.name, "revision": self.commit}

    def address(self, file: str) -> str:
        return file

    def sizes(self, addresses: Sequence[str]) -> dict[str, int]:
        from huggingface_hub import HfApi

        start = f"hf://datasets/{self.name}@{self.commit}/"
        paths = [address.removeprefix(start) for address in addresses if address.startswith(start)]
        found = [
            info
            for first in range(0, len(paths), _PATHS)
            for info in HfApi().get_paths_info(
                self.name, paths[first : first + _PATHS], revision=self.commit, repo_type="dataset"
            )
        ]
        return {start + info.path: getattr(info, "size", 0) for info in found}


@dataclasses.dataclass(frozen=True)
class _Cached:
    """A dataset that was fetched into the local cache."""

    name: str
    commit: str
    paths: list[str]
    directory: Path

    @classmethod
    def find(cls, name: str, revision: str | None, rest: str) -> _Cached:
        """Raises ``UserError`` unless all of the repository, or of the path ``rest`` in it, is here."""
        try:
            from huggingface_hub import get_cached_repo_tree, snapshot_download
            from huggingface_hub.errors import CachedRepoTreeNotFoundError, HFValidationError, LocalEntryNotFoundError
        except ImportError:
            raise UserError(
                f"offline, {name} needs a newer huggingface_hub, which knows whether all of it was fetched: "
                "pip install -U huggingface_hub; or give the files themselves with --input"
            ) from None

        where: Any = {"repo_type": "dataset", "revision": revision}
        absent = f"hf://datasets/{name}{f'@{revision}' if revision else ''} is not in the local Hugging Face cache, and offline mode is on"
        try:
            # Without the list of what there is, a part of a dataset looks like all of it.
            paths = [file.path for file in get_cached_repo_tree(name, **where)]
            inside = _inside(rest, paths)
            patterns = [*inside, "README.md", ".huggingface.yaml"] if inside else None
            directory = Path(snapshot_download(name, local_files_only=True, allow_patterns=patterns, **where))
        except (CachedRepoTreeNotFoundError, LocalEntryNotFoundError):
            raise UserError(f"{absent}; where there is a network: {_download_command(name, revision, rest)}") from None
        except HFValidationError as error:
            raise UserError(f"{name} is no name of a repository: {error}") from None
        return cls(name, directory.name, paths, directory)

    @property
    def source(self) -> dict[str, str]:
        return {"path": str(self.directory)}

    def address(self, file: str) -> str:
        """The same as online, so that a run may be continued without a network."""
        start = f"{self.directory.resolve()}/"
        return f"hf://datasets/{self.name}@{self.commit}/{file.removeprefix(start)}"

    def sizes(self, addresses: Sequence[str]) -> dict[str, int]:
        start = f"hf://datasets/{self.name}@{self.commit}/"
        return {address: (self.directory / address.removeprefix(start)).stat().st_size for address in addresses}


def _inside(rest: str, paths: Sequence[str]) -> list[str]:
    """The files that ``rest`` means as a path in the repository."""
    return [path for path in paths if rest and (fnmatch.fnmatch(path, rest) or path.startswith(f"{rest}/"))]


def _download_command(name: str, revision: str | None, rest: str) -> str:
    return (
        f"hf download {name} --repo-type dataset"
        + (f" --revision {revision}" if revision else "")
        + (f" --include README.md '{rest}*'" if rest else "")
    )


# -- datasets ----------------------------------------------------------------------------------------------------------
def _builder(datasets: Any, repository: _Remote | _Cached, rest: str) -> Any:
    """What reads the config ``rest`` of a dataset, or the path of that name where there is no such config."""
    where = repository.source
    configs = datasets.get_dataset_config_names(**where)
    if rest in configs:
        builder = datasets.load_dataset_builder(**where, name=rest)
    elif inside := _inside(rest, repository.paths):
        given = {"data_files": rest} if rest in inside or fnmatch.fnmatch(inside[0], rest) else {"data_dir": rest}
        builder = datasets.load_dataset_builder(**where, **given)
    elif rest:
        raise UserError(
            f"{repository.name} has neither a config nor a path {rest!r}; its configs: {', '.join(configs)}"
        )
    elif len(configs) > 1 and datasets.get_dataset_default_config_name(**where) is None:
        raise UserError(
            f"{repository.name} has several configs; give one of them, such as hf://datasets/{repository.name}/{configs[0]}: "
            f"{', '.join(configs)}"
        )
    else:
        builder = datasets.load_dataset_builder(**where)
    if type(builder).__module__.startswith("datasets.packaged_modules.cache"):
        # What datasets falls back to: whatever it prepared last, of any revision.
        raise UserError(f"{repository.name} was there and is no longer; the network may be down, so try again")
    return builder


def _streams(builder: Any, keys: Sequence[str]) -> dict[str, Any]:
    """The splits; of formats that store columns apart only ``keys`` are fetched."""
    streams = dict(builder.as_streaming_dataset())
    first = next(iter(streams.values()))
    there = [key for key in first.features or () if key in keys]
    if there and len(there) < len(first.features) and hasattr(builder.config, "columns"):
        builder.config.columns = there
        streams = {split: stream for split, stream in builder.as_streaming_dataset().items()}
    return streams


def _columns_to_read(columns: Sequence[str], keys: Sequence[str], name: str) -> list[str]:
    if tuple(keys) == conversations.KEYS:
        conversations.check_columns(columns, name)
        return [key for key in columns if key in keys]
    for key in keys:
        if key not in columns:
            raise UserError(f"{name}: no column {key!r}; columns there: {', '.join(map(repr, columns[:8])) or 'none'}")
    return list(keys)


@contextmanager
def _read_errors(name: str) -> Iterator[None]:
    """What ``datasets`` and the libraries under it say of a dataset, in one line."""
    from datasets.exceptions import DatasetsError
    from pyarrow import ArrowException

    try:
        with hub_errors(name, None, kind="dataset"):
            yield
    except UserError:
        raise
    except (DatasetsError, ArrowException, OSError, ValueError, OverflowError) as error:
        raise UserError(f"{name} cannot be read: {_reason(error)}") from None


def _reason(error: BaseException) -> str:
    """The first cause: datasets wraps it in what only says that something went wrong."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split())[:300] or type(error).__name__
