"""Zero-shot tasks through lm-eval (https://github.com/EleutherAI/lm-evaluation-harness): prompts and metrics are its own."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import os
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_midus.errors import UserError
from megatron_midus.evaluation.processes import ALONE, Processes
from megatron_midus.evaluation.scores import Score, influences_of, root_sum_of_squares
from megatron_midus.evaluation.task_data import (
    LOCAL_TASKS,
    check_names,
    find_task_files,
    lm_eval_tasks_directory,
    write_task_yamls,
)

_LONGEST_DEFAULT = 2048


def default_max_length(configs: Sequence[dict[str, Any]]) -> int:
    """One limit for all models: the shortest context that their ``config.json`` name, at most 2048 tokens."""
    contexts = [config["max_position_embeddings"] for config in configs if config.get("max_position_embeddings")]
    return min([_LONGEST_DEFAULT, *contexts])


@dataclasses.dataclass(frozen=True)
class TaskResults:
    """What lm-eval found of one model, and its recall of facts."""

    scores: dict[tuple[str, str], Score]
    """By (task, metric), groups before their tasks."""
    group_members: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    """Members of every group; what is no member of any was asked for."""
    versions: dict[str, Any] = dataclasses.field(default_factory=dict)
    """lm-eval's version of each task's prompt."""
    num_truncated: int = 0
    """Requests whose prompt lost its beginning, because it was longer than ``max_length``."""

    @property
    def top_level(self) -> list[tuple[str, str]]:
        """Keys of ``scores`` that are not parts of a group."""
        parts = {name for members in self.group_members.values() for name in members}
        return [key for key in self.scores if key[0] not in parts]


def with_scores(results: TaskResults | None, scores: Sequence[Score]) -> TaskResults:
    """The same with more scores, each a task of its own."""
    more = {(score.task, score.metric): score for score in scores}
    return TaskResults(more) if results is None else dataclasses.replace(results, scores={**results.scores, **more})


@contextlib.contextmanager
def open_tasks(tasks: Sequence[str], data: str | Path | None = None) -> Iterator[Any]:
    """lm-eval's ``TaskManager`` that knows ``tasks``.

    Args:
        tasks: names. With ``data`` those of ``LOCAL_TASKS`` and ``mmlu_<subject>``, otherwise any of lm-eval.
        data: directory of local files (see ``task_data``); nothing is asked of the network then.

    Raises:
        ValueError: lm-eval is missing, a task is not known, or local files are missing or wrong.
    """
    if not tasks:
        raise UserError("there is no task to run; name some, for example " + ",".join(LOCAL_TASKS))
    if len(set(tasks)) < len(tasks):
        raise UserError(f"task {next(t for t in tasks if list(tasks).count(t) > 1)!r} is named twice")
    lm_eval_tasks_directory()
    from lm_eval.tasks import TaskManager

    _quiet_lm_eval()
    if data is None:
        manager = TaskManager()
        check_names(tasks, manager.all_tasks)
        yield manager
        return
    files = find_task_files(data, tasks)
    with tempfile.TemporaryDirectory(prefix="midus_tasks_") as directory:
        # The index of lm-eval's own tasks takes seconds to read; what is needed of it is included by path.
        write_task_yamls(directory, files, cache=Path(directory) / "cache")
        yield TaskManager(include_path=directory, include_defaults=False)


def load_tasks(manager: Any, tasks: Sequence[str]) -> dict[str, Any]:
    """The tasks with their data, groups resolved; raises ``ValueError`` when the data cannot be had."""
    loaded: dict[str, Any] = {}
    for name in tasks:
        try:
            loaded.update(manager.load([name])["tasks"])
        # datasets and the Hub's client raise dozens of classes when there is no network, cache or such file.
        except Exception as error:
            reason = (" ".join(str(error).split()) or type(error).__name__)[:200]
            raise UserError(
                f"the data of task {name} cannot be loaded ({reason}); give local files with --task-data DIR"
            ) from error
    return loaded


def transformers_engine(
    model: Any,
    tokenizer: Any,
    *,
    max_length: int,
    batch_size: int = 8,
    add_bos: bool = False,
    processes: Processes = ALONE,
) -> Any:
    """``model`` as lm-eval sees it.

    Args:
        model: a transformers model, in evaluation mode.
        tokenizer: its transformers tokenizer.
        max_length: tokens that the model reads at most; longer prompts lose their beginning.
        batch_size: requests in one call of the model.
        add_bos: start every request with the beginning-of-sequence token; otherwise as the tokenizer does by default.
        processes: share the items of every task; batches then hold other items than those of one process, so likelihoods
            differ by rounding.

    Raises:
        ValueError: a setting out of range.
    """
    for name, number in (("batch_size", batch_size), ("max_length", max_length)):
        if number < 1:
            raise UserError(f"{name}={number} must be at least 1")
    if add_bos and tokenizer.bos_token_id is None:
        raise UserError("the tokenizer has no beginning-of-sequence token to start requests with")
    from lm_eval.models.huggingface import HFLM

    class SharedLM(HFLM):
        """What lm-eval asks of a model whose processes it did not start itself."""

        def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
            return torch.tensor(processes.all_of([tensor.item()]))

        def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
            shares = processes.all_of([obj])
            return shares if processes.rank == dst else None

        def barrier(self) -> None:
            torch.distributed.barrier()

    wrapped = SharedLM(
        pretrained=model,
        backend="causal",
        tokenizer=tokenizer,
        max_length=max_length,
        batch_size=batch_size,
        add_bos_token=True if add_bos else None,
    )
    wrapped._rank, wrapped._world_size = processes.rank, processes.size
    return wrapped


def run_tasks(
    engine: Any, tasks: Sequence[str], manager: Any, *, limit: int | None = None, processes: Processes = ALONE
) -> TaskResults:
    """Measures a model on ``tasks`` without examples in the prompt.

    Args:
        engine: of ``transformers_engine`` or ``vllm_engine``.
        tasks: names that ``manager`` knows.
        manager: of ``open_tasks``.
        limit: only the first items of each task, for a trial.
        processes: those of ``engine``.

    Raises:
        ValueError: a setting out of range, an answer longer than what the model reads, or a likelihood that is NaN.
    """
    if limit is not None and limit < 1:
        raise UserError(f"limit={limit} must be at least 1")
    import lm_eval

    with _count_truncations() as counter:
        try:
            output = lm_eval.simple_evaluate(
                model=engine, tasks=list(tasks), num_fewshot=0, limit=limit, task_manager=manager, log_samples=True
            )
        except AssertionError as error:
            # lm-eval cuts prompts, never answers, and asserts that they fit.
            if "max_length" not in (traceback.extract_tb(error.__traceback__)[-1].line or ""):
                raise
            raise UserError(
                f"an answer is longer than max_length={engine.max_length} tokens and cannot be scored; give a larger one"
            ) from error
    truncated = sum(processes.all_of([counter.count]))

    def checked() -> TaskResults:
        _check_likelihoods(output)
        return collect(output, num_truncated=truncated)

    return processes.from_first(checked)


def _check_likelihoods(output: dict[str, Any]) -> None:
    """The best of several NaN is the first, so that accuracies would look like results."""
    for task, items in (output.get("samples") or {}).items():
        for item in items:
            for answer in item["filtered_resps"]:
                number = answer[0] if isinstance(answer, (tuple, list)) else answer
                if isinstance(number, float) and math.isnan(number):
                    raise UserError(
                        f"item {item['doc_id']} of task {task} has the likelihood NaN; the model overflows in this dtype, "
                        "give --dtype float32"
                    )


def collect(output: dict[str, Any], *, num_truncated: int = 0) -> TaskResults:
    """The scores in what ``lm_eval.simple_evaluate`` returns."""
    samples = {
        name: sorted(items, key=lambda item: item["doc_id"]) for name, items in (output.get("samples") or {}).items()
    }
    members = {name: tuple(parts) for name, parts in (output.get("group_subtasks") or {}).items() if parts}
    scores: dict[tuple[str, str], Score] = {}
    for task, results in output["results"].items():
        leaves = [leaf for leaf in _leaves(task, members) if leaf in samples]
        directions = output.get("higher_is_better", {}).get(task, {})
        for entry, value in results.items():
            metric, _, filter_name = entry.partition(",")
            if not filter_name or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            kept = [[s for s in samples[leaf] if s.get("filter", "none") == filter_name] for leaf in leaves]
            strata = [[sample[metric] for sample in part] for part in kept if all(metric in s for s in part)]
            influences = influences_of(metric, strata) if strata else None
            reported = results.get(f"{metric}_stderr,{filter_name}")
            if not isinstance(reported, float) and influences is not None:
                reported = root_sum_of_squares(influences)
            scores[task, metric] = Score(
                task=task,
                metric=metric,
                value=float(value),
                stderr=reported if isinstance(reported, float) else None,
                higher_is_better=bool(directions.get(metric, "perplexity" not in metric and "bits" not in metric)),
                items=sum(len(part) for part in kept),
                influences=None if influences is None else tuple(influences),
            )
    return TaskResults(scores, members, dict(output.get("versions", {})), num_truncated)


def _leaves(task: str, members: dict[str, tuple[str, ...]]) -> list[str]:
    """The tasks below a group, or the task itself."""
    if task not in members:
        return [task]
    return [leaf for part in members[task] for leaf in _leaves(part, members)]


class _TruncationCounter(logging.Handler):
    """Counts lm-eval's warnings about cut prompts and shows none of them."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.count = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.count += record.getMessage().startswith(("Combined length of context", "Context length"))


@contextlib.contextmanager
def _count_truncations() -> Iterator[_TruncationCounter]:
    logger, counter = logging.getLogger("lm_eval.models"), _TruncationCounter()
    before = logger.level, logger.propagate
    logger.addHandler(counter)
    logger.setLevel(logging.WARNING)
    logger.propagate = False
    try:
        yield counter
    finally:
        logger.removeHandler(counter)
        logger.setLevel(before[0])
        logger.propagate = before[1]


def _quiet_lm_eval() -> None:
    """Its notes on every overridden default are not for the users of this tool."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import datasets

    datasets.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
