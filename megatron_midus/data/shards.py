"""Preprocessing by several machines: which files a shard encodes, and its datasets joined into those of a single run.

A shard takes a run of neighbouring files, so shards one after the other are the corpus. What a single run knows of all
documents, a shard does not: whether a text came before. So with deduplication a shard also writes, for every document, the
digest and the bytes of its text, and the merge leaves out what an earlier shard has.
"""

from __future__ import annotations

import dataclasses
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy

from megatron_midus.config.preprocess import MergeConfig, Shard
from megatron_midus.data.inputs import Input
from megatron_midus.data.journal import Journal
from megatron_midus.data.sources import read_lengths
from megatron_midus.data.statistics import DatasetStatistics, PreprocessResult, Skipped, statistics_path
from megatron_midus.data.writer import DIGESTS_SUFFIX, DOCUMENT, write_index
from megatron_midus.errors import UserError
from megatron_midus.json_files import read_json_object
from megatron_midus.progress import SILENT, Progress

_COUNTS = tuple(Skipped().counts())


def inputs_of_shard(inputs: Sequence[Input], shard: Shard) -> list[Input]:
    """Neighbouring inputs of about ``1 / shard.count`` of the bytes; all shards together have every file once, in order.

    Raises:
        UserError: more shards than files, because a file is never divided.
    """
    if shard.count > len(inputs):
        raise UserError(
            f"--shard {shard}: {shard.count} shards of {len(inputs)} input files; a file is never divided, so choose at most "
            f"{len(inputs)} shards, or divide the files"
        )
    sizes = numpy.array([each.num_bytes for each in inputs], dtype=numpy.float64) + 1
    middles = (numpy.cumsum(sizes) - sizes / 2) / sizes.sum() * shard.count
    owners = numpy.clip(middles.astype(int), 0, shard.count - 1)
    # Every shard has a file: the first of each lies where enough are left for the others.
    starts = [int(numpy.searchsorted(owners, index)) for index in range(shard.count)]
    for index in range(1, shard.count):
        starts[index] = max(starts[index], starts[index - 1] + 1)
    for index in reversed(range(1, shard.count)):
        starts[index] = min(starts[index], len(inputs) - (shard.count - index))
    stop = starts[shard.index + 1] if shard.index + 1 < shard.count else len(inputs)
    return list(inputs[starts[shard.index] : stop])


@dataclasses.dataclass(frozen=True)
class _Part:
    """One dataset of one shard."""

    prefix: str
    statistics: dict[str, Any]

    @property
    def lengths(self) -> numpy.ndarray:
        return read_lengths(self.prefix)[0]

    @property
    def dtype(self) -> str:
        return self.statistics["dtype"]


def merge(config: MergeConfig, progress: Progress = SILENT) -> PreprocessResult:
    """Joins the shards of ``config.output_prefix`` into the datasets that one run over all files had written, byte for byte.

    Raises:
        UserError: shards that are missing, of different settings or damaged, outputs that exist.
    """
    shards = _find_shards(config)
    names = _dataset_names(shards)
    parts = [{name: _read_part(shard, name) for name in names} for shard in shards]
    provenance = _common_provenance(parts)
    targets = {name: f"{config.output_prefix}_{name}" for name in names}
    result = PreprocessResult({prefix: DatasetStatistics() for prefix in targets.values()}, _skipped(parts))
    directory = Path(config.output_prefix).parent / f".{Path(config.output_prefix).name}.merge.partial"
    with Journal(directory, {"shards": _fingerprints(parts)}, restart=config.overwrite) as journal:
        if journal.state is None:
            if not config.overwrite:
                _check_absent(targets.values())
            _join(journal, parts, targets, result, progress)
            _check_filled(result)
            _write_statistics(journal, shards, targets, result, provenance)
            # From here on a merge that was killed only has to be finished; before, it begins again.
            journal.commit({"result": dataclasses.asdict(result)})
        else:
            result = _restored(journal.state["result"])
        # An index never stands beside the data of another run.
        for prefix in targets.values():
            if (directory / f"{Path(prefix).name}.bin").exists():
                Path(prefix + ".idx").unlink(missing_ok=True)
        journal.finish(_moves(targets, result, config))
    if config.delete_shards:
        for shard in shards:
            for path in shard.parent.glob(f"{shard.name}_*"):
                path.unlink()
    return result


# -- what is there ---------------------------------------------------------------------------------------------------
def _find_shards(config: MergeConfig) -> list[Path]:
    """The prefixes of all shards, in order."""
    where = Path(config.output_prefix)
    pattern = re.compile(re.escape(where.name) + r"_shard(\d{5})-of-(\d{5})_.*\.idx")
    found = {(int(m[2]), int(m[1])) for path in where.parent.glob("*.idx") if (m := pattern.fullmatch(path.name))}
    counts = sorted({count for count, _ in found})
    if not counts:
        raise UserError(
            f"there are no shards of {config.output_prefix}; make them with midus preprocess --output-prefix "
            f"{config.output_prefix} --shard I/N"
        )
    if len(counts) > 1:
        raise UserError(
            f"{config.output_prefix} has shards of {' and of '.join(map(str, counts))} parts; remove those that are not meant"
        )
    (count,) = counts
    missing = [index for index in range(count) if (count, index) not in found]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise UserError(
            f"of {count} shards of {config.output_prefix}, {', '.join(map(str, missing[:3]))}{more} "
            f"{'is' if len(missing) == 1 else 'are'} missing; run midus preprocess --shard {missing[0]}/{count} again"
        )
    return [where.with_name(f"{where.name}{Shard(index, count).suffix}") for index in range(count)]


def _dataset_names(shards: list[Path]) -> list[str]:
    """``text_document``, or ``train_text_document`` and so on: the same of every shard."""
    of_shards = [
        sorted(
            path.name.removeprefix(f"{shard.name}_").removesuffix(".idx")
            for path in shard.parent.glob(f"{shard.name}_*.idx")
        )
        for shard in shards
    ]
    for shard, names in zip(shards, of_shards):
        if names != of_shards[0]:
            raise UserError(
                f"{shards[0]} holds {', '.join(of_shards[0])} and {shard} {', '.join(names)}; make both alike"
            )
    return of_shards[0]


def _read_part(shard: Path, name: str) -> _Part:
    prefix = f"{shard}_{name}"
    path = statistics_path(prefix)
    if not path.is_file():
        raise UserError(f"{path} is missing; run this shard of midus preprocess again")
    return _Part(prefix, read_json_object(path))


def _common_provenance(parts: list[dict[str, _Part]]) -> dict[str, Any]:
    """How the datasets were made, which has to be the same everywhere."""
    counted = {*vars(DatasetStatistics()), "bytes_per_token", *(f"skipped_{name}" for name in _COUNTS)}
    first: dict[str, Any] | None = None
    for part in (part for of_shard in parts for part in of_shard.values()):
        settings = {key: value for key, value in part.statistics.items() if key not in counted}
        first = settings if first is None else first
        if settings != first:
            key = next(key for key in {**first, **settings} if first.get(key) != settings.get(key))
            raise UserError(
                f"{part.prefix} was made with {key}={settings.get(key)}, the first shard with {first.get(key)}; make all alike"
            )
    assert first is not None
    return first


def _skipped(parts: list[dict[str, _Part]]) -> Skipped:
    """The sums; every dataset of a shard has the counts of the whole shard."""
    of_shards = [next(iter(of_shard.values())).statistics for of_shard in parts]
    return Skipped(**{name: sum(statistics[f"skipped_{name}"] for statistics in of_shards) for name in _COUNTS})


def _check_absent(prefixes: Any) -> None:
    for prefix in prefixes:
        for path in (f"{prefix}.bin", f"{prefix}.idx", str(statistics_path(prefix))):
            if Path(path).exists():
                raise UserError(f"{path} exists; move it away, or replace it with --overwrite")


# -- joining ---------------------------------------------------------------------------------------------------------
def _join(
    journal: Journal,
    parts: list[dict[str, _Part]],
    targets: dict[str, str],
    result: PreprocessResult,
    progress: Progress,
) -> None:
    lengths: dict[str, list[numpy.ndarray]] = {name: [] for name in targets}
    seen: set[bytes] = set()
    total = sum(Path(f"{part.prefix}.bin").stat().st_size for of_shard in parts for part in of_shard.values())
    with progress("merge", total=total, unit="B") as advance:
        for of_shard in parts:
            repeated: set[bytes] = set()
            of_this: set[bytes] = set()
            for name, part in of_shard.items():
                found = part.lengths
                kept = _not_seen(part, len(found), seen, of_this, repeated)
                stream = journal.stream(f"{Path(targets[name]).name}.bin")
                _append(stream, part, found, kept, result.datasets[targets[name]])
                lengths[name].append(found if kept is None else found[kept])
                advance(Path(f"{part.prefix}.bin").stat().st_size)
            seen |= of_this
            result.skipped.duplicates += len(repeated)
    for name, part in parts[0].items():
        write_index(journal.directory / f"{Path(targets[name]).name}.idx", numpy.concatenate(lengths[name]), part.dtype)


def _not_seen(
    part: _Part, documents: int, seen: set[bytes], of_this: set[bytes], repeated: set[bytes]
) -> numpy.ndarray | None:
    """``[documents]`` bool, which documents no earlier shard has; ``None`` = all, where nobody looks for duplicates."""
    if not part.statistics["dedup"]:
        return None
    path = Path(f"{part.prefix}{DIGESTS_SUFFIX}")
    if not path.is_file() or path.stat().st_size != documents * DOCUMENT.itemsize:
        raise UserError(f"{path} does not fit {part.prefix}.idx; run this shard of midus preprocess again")
    digests = [row.tobytes() for row in numpy.fromfile(path, DOCUMENT)["digest"]]
    of_this.update(digests)
    repeated.update(digest for digest in digests if digest in seen)
    return numpy.array([digest not in seen for digest in digests], dtype=bool)


def _append(
    stream: BinaryIO,
    part: _Part,
    lengths: numpy.ndarray,
    kept: numpy.ndarray | None,
    statistics: DatasetStatistics,
) -> None:
    """Adds the ids of a part, without the documents that are left out."""
    if kept is None or kept.all():
        with open(f"{part.prefix}.bin", "rb") as source:
            shutil.copyfileobj(source, stream, 1 << 20)
        counts = {key: part.statistics[key] for key in ("documents", "tokens", "max_token_id")}
        statistics.add(**counts, num_bytes=part.statistics["bytes"])
        return
    if not kept.any():
        return
    ids = numpy.memmap(f"{part.prefix}.bin", dtype=part.dtype, mode="r")
    ends = numpy.cumsum(lengths, dtype=numpy.int64)
    largest = -1
    for end, length in zip(ends[kept].tolist(), lengths[kept].tolist()):
        document = ids[end - length : end]
        largest = max(largest, int(document.max()))
        stream.write(document.tobytes())
    sizes = numpy.fromfile(f"{part.prefix}{DIGESTS_SUFFIX}", DOCUMENT)["bytes"]
    statistics.add(
        documents=int(kept.sum()),
        tokens=int(lengths[kept].sum(dtype=numpy.int64)),
        num_bytes=int(sizes[kept].sum()),
        max_token_id=largest,
    )


def _check_filled(result: PreprocessResult) -> None:
    for prefix, statistics in result.datasets.items():
        if not statistics.documents:
            raise UserError(f"no shard has a document of {prefix}; give it a larger share, or 0")


def _write_statistics(
    journal: Journal, shards: list[Path], targets: dict[str, str], result: PreprocessResult, provenance: dict[str, Any]
) -> None:
    for shard in shards:
        path = Path(f"{shard}_malformed.txt")
        if path.is_file():
            journal.stream("malformed.txt").write(path.read_bytes())
    for prefix in targets.values():
        text = result.datasets[prefix].to_json(**result.skipped.to_json(), **provenance)
        (journal.directory / f"{Path(prefix).name}.json").write_text(text)


def _restored(state: dict[str, Any]) -> PreprocessResult:
    datasets = {prefix: DatasetStatistics(**statistics) for prefix, statistics in state["datasets"].items()}
    return PreprocessResult(**{**state, "datasets": datasets, "skipped": Skipped(**state["skipped"])})


def _fingerprints(parts: list[dict[str, _Part]]) -> list[str]:
    paths = [Path(part.prefix + ".bin") for of_shard in parts for part in of_shard.values()]
    return [f"{path.name} {(status := path.stat()).st_size} {status.st_mtime_ns}" for path in paths]


def _moves(targets: dict[str, str], result: PreprocessResult, config: MergeConfig) -> dict[str, str]:
    """Where the files of the journal go, in this order."""
    moves = {"malformed.txt": f"{config.output_prefix}_malformed.txt"} if result.skipped.malformed else {}
    for prefix in targets.values():
        for suffix in (".bin", ".json", ".idx"):
            moves[Path(prefix).name + suffix] = str(statistics_path(prefix)) if suffix == ".json" else prefix + suffix
    return moves
