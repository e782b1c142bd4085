"""Zero-shot tasks of lm-eval on local data: which tasks, how their files are laid out, and lm-eval's stock prompts on them.

::

    DIR/
      wikitext.jsonl  arc_easy.jsonl  arc_challenge.jsonl  logiqa.jsonl  piqa.jsonl
      winogrande.jsonl  commonsense_qa.jsonl  boolq.jsonl
      mmlu/<subject>.jsonl                    any of the 57 subjects; mmlu is the mean over those that are there

A line is one item as the data set on the Hub has it, ``TASKS[task].fields`` at least. ``save_task_data`` writes such files
where there is a network.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from megatron_midus.config.values import did_you_mean
from megatron_midus.errors import UserError
from megatron_midus.json_files import parse_json

INSTALL_HINT = "pip install 'megatron-midus[eval]'"


@dataclasses.dataclass(frozen=True)
class TaskFormat:
    """A task that can read local files."""

    stock: str
    """lm-eval's own YAML file, relative to its directory of tasks."""
    fields: tuple[str, ...]
    """What an item must have for the stock prompt."""
    split: str
    """The split of the Hub's data set that the task is measured on."""


TASKS = {
    "wikitext": TaskFormat("wikitext/wikitext.yaml", ("page",), "test"),
    "arc_easy": TaskFormat("arc/arc_easy.yaml", ("question", "choices", "answerKey"), "test"),
    "arc_challenge": TaskFormat("arc/arc_challenge.yaml", ("question", "choices", "answerKey"), "test"),
    "logiqa": TaskFormat("logiqa/logiqa.yaml", ("context", "question", "options", "label"), "test"),
    "piqa": TaskFormat("piqa/piqa.yaml", ("goal", "sol1", "sol2", "label"), "validation"),
    "winogrande": TaskFormat("winogrande/default.yaml", ("sentence", "option1", "option2", "answer"), "validation"),
    "commonsense_qa": TaskFormat("commonsense_qa/default.yaml", ("question", "choices", "answerKey"), "validation"),
    "boolq": TaskFormat("super_glue/boolq/default.yaml", ("passage", "question", "label"), "validation"),
}
"""The tasks of the paper but for MMLU, which is a group."""

MMLU = TaskFormat("mmlu/default/_mmlu.yaml", ("question", "choices", "answer"), "test")
_MMLU_GROUPS = ("stem", "other", "social_sciences", "humanities")
_MMLU_PREFIX = "mmlu_"

LOCAL_TASKS = (*TASKS, "mmlu")


def lm_eval_tasks_directory() -> Path:
    """Where lm-eval keeps its task files; raises ``ValueError`` with what to install when it is missing."""
    try:
        import lm_eval.tasks
    except ImportError as error:
        raise UserError(f"--tasks needs lm-eval, which cannot be imported ({error}); {INSTALL_HINT}") from None
    return Path(lm_eval.tasks.__file__).parent


def check_names(names: Iterable[str], known: Sequence[str], *, remedy: str = "") -> None:
    """Raises ``ValueError`` with the nearest known name for the first one that is not known."""
    for name in names:
        if name in known:
            continue
        hint = did_you_mean(name, known, otherwise=f"choose from {', '.join(known[:12])}")
        raise UserError(f"task {name!r} is not known{hint}{remedy}")


def mmlu_subjects() -> list[str]:
    """The 57 subjects of the installed lm-eval."""
    directory = (lm_eval_tasks_directory() / MMLU.stock).parent
    return sorted(path.stem.removeprefix(_MMLU_PREFIX) for path in directory.glob(f"{_MMLU_PREFIX}*.yaml"))


def check_local_names(tasks: Sequence[str]) -> None:
    """Raises ``ValueError`` for a task that cannot run on local files."""
    names = [*LOCAL_TASKS, *(_MMLU_PREFIX + subject for subject in mmlu_subjects())]
    check_names(tasks, names, remedy=" (with local data; other tasks of lm-eval run without it)")


def find_task_files(data: str | Path, tasks: Sequence[str]) -> dict[str, Path]:
    """The local file of every task, checked line by line.

    Args:
        data: a directory as drawn at the top of this module.
        tasks: names from ``LOCAL_TASKS``, or ``mmlu_<subject>``.

    Returns:
        ``{task: file}``; ``mmlu`` becomes one entry per subject that has a file.

    Raises:
        ValueError: an unknown task, a missing or empty file, a line without what the prompt needs.
    """
    data = Path(data)
    if not data.is_dir():
        raise UserError(f"task data directory {data} does not exist")
    check_local_names(tasks)
    subjects = mmlu_subjects()
    files: dict[str, Path] = {}
    for task in tasks:
        if task == "mmlu":
            found = {s: data / "mmlu" / f"{s}.jsonl" for s in subjects if (data / "mmlu" / f"{s}.jsonl").is_file()}
            if not found:
                raise UserError(f"{data / 'mmlu'} holds no file of a subject, such as mmlu/{subjects[0]}.jsonl")
            files.update({_MMLU_PREFIX + subject: path for subject, path in found.items()})
        elif task in TASKS:
            files[task] = data / f"{task}.jsonl"
        else:
            files[task] = data / "mmlu" / f"{task.removeprefix(_MMLU_PREFIX)}.jsonl"
    for task, path in files.items():
        _check_file(path, task, TASKS.get(task, MMLU).fields)
    return files


def _check_file(path: Path, task: str, fields: Sequence[str]) -> None:
    if not path.is_file():
        raise UserError(f"there is no data for task {task}: {path} does not exist")
    count = 0
    try:
        lines = path.read_text(encoding="utf-8").split(
            "\n"
        )  # not splitlines: it divides at characters that JSON strings may hold
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error}") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        item = parse_json(line, f"{path}:{number}")
        missing = [name for name in fields if not isinstance(item, dict) or name not in item]
        if missing:
            raise UserError(
                f"{path}:{number}: task {task} needs the entry {missing[0]!r}; it reads {', '.join(fields)}"
            )
        count += 1
    if not count:
        raise UserError(f"{path} holds no item of task {task}")


def write_task_yamls(directory: str | Path, files: dict[str, Path], *, cache: str | Path | None = None) -> None:
    """Writes task files for lm-eval that take everything but the data from its own: ``--include_path`` of its program.

    Args:
        directory: to fill; made if absent.
        files: of ``find_task_files``.
        cache: where ``datasets`` keeps its copies; its own cache when absent.
    """
    stock, directory = lm_eval_tasks_directory(), Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    for task, path in files.items():
        relative = TASKS[task].stock if task in TASKS else str(Path(MMLU.stock).parent / f"{task}.yaml")
        dataset: dict[str, Any] = {"data_files": {"test": str(path.resolve())}}
        if cache is not None:
            dataset["cache_dir"] = str(cache)
        _write_yaml(
            directory / f"{task}.yaml",
            {
                "include": str(stock / relative),
                "task": task,
                "dataset_path": "json",
                "dataset_name": None,
                "dataset_kwargs": dataset,
                "training_split": None,
                "validation_split": None,
                "test_split": "test",
                "fewshot_split": None,
            },
        )
    _write_mmlu_groups(directory, stock, [task for task in files if task.startswith(_MMLU_PREFIX)])


def _write_mmlu_groups(directory: Path, stock: Path, subjects: Sequence[str]) -> None:
    """The group ``mmlu`` over those of its four parts that have a subject here; tags say which subject is whose."""
    from lm_eval.tasks._yaml_loader import load_yaml

    folder = (stock / MMLU.stock).parent
    tags = {load_yaml(folder / f"{subject}.yaml", resolve_func=False)["tag"] for subject in subjects}
    parts = [part for part in _MMLU_GROUPS if f"mmlu_{part}_tasks" in tags]
    for part in parts:
        _write_yaml(directory / f"_mmlu_{part}.yaml", {"include": str(folder / f"_mmlu_{part}.yaml")})
    if parts:
        tasks = [f"mmlu_{part}" for part in parts]
        _write_yaml(directory / "_mmlu.yaml", {"include": str(stock / MMLU.stock), "task": tasks})


def _write_yaml(path: Path, content: dict[str, Any]) -> None:
    # JSON is YAML, and needs no package to be written.
    path.write_text(json.dumps(content, indent=2) + "\n")


def save_task_data(tasks: dict[str, Any], directory: str | Path) -> list[Path]:
    """Writes the items on which tasks are measured as local files of this module's layout.

    Args:
        tasks: loaded tasks of lm-eval by name, those of ``LOCAL_TASKS``.
        directory: the data directory to make or add to.

    Returns:
        The files written.
    """
    written = []
    for name, task in tasks.items():
        is_subject = name.startswith(_MMLU_PREFIX)
        path = Path(directory) / ("mmlu" if is_subject else "") / f"{name.removeprefix(_MMLU_PREFIX)}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(item, ensure_ascii=False) + "\n" for item in task.eval_docs))
        written.append(path)
    return written
