"""``midus evaluate``: Hugging Face models side by side on held-out text, tasks, latency."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import importlib.metadata
import importlib.util
import json
import os
from collections.abc import Iterator
from typing import Any

import torch

from megatron_midus.config.evaluate import EvaluateConfig
from megatron_midus.data.corpus import find_inputs, read_documents, read_raw, unescape
from megatron_midus.data.tokenizer import HuggingFaceTokenizer, check_tokenizer_fits, load_hf_tokenizer
from megatron_midus.errors import UserError
from megatron_midus.evaluation import vllm_engine
from megatron_midus.evaluation.generation import generate_text
from megatron_midus.evaluation.latency import measure_latency
from megatron_midus.evaluation.loading import check_context, choose_device, load_model, num_embeddings, read_config
from megatron_midus.evaluation.output import print_result, result_to_dict, result_to_markdown
from megatron_midus.evaluation.parameters import check_safetensors, count_parameters
from megatron_midus.evaluation.perplexity import limit_documents, measure_perplexity
from megatron_midus.evaluation.processes import Processes, joined
from megatron_midus.evaluation.recall import Question, encode_questions, measure_recall
from megatron_midus.evaluation.result import EvaluationResult, ModelFigures, model_names, short_names
from megatron_midus.evaluation.zero_shot import with_scores
from megatron_midus.files import write_text_atomically
from megatron_midus.hub import fetched_model
from megatron_midus.progress import SILENT, Progress
from megatron_midus.training.main import as_rank
from megatron_midus.verbs.first_lines import check_evaluate
from megatron_midus.verbs.verb import verb


@verb(EvaluateConfig)
def evaluate(config: EvaluateConfig, progress: Progress) -> EvaluationResult:
    """Measures models side by side. See ``EvaluateConfig`` for the settings.

    Raises:
        UserError: nothing to measure, a model or text that cannot be read, a tokenizer that does not fit its model.
    """
    with joined() as processes:
        return _evaluate(config, progress if processes.rank == 0 else SILENT, processes)


def _evaluate(config: EvaluateConfig, progress: Progress, processes: Processes) -> EvaluationResult:
    config = _checked(config, processes)
    data, facts = _read_data(config), _read_facts(config)
    tokenizers = [HuggingFaceTokenizer(directory) for directory in config.model]
    if config.windows.max_tokens is not None:
        limit = config.windows.max_tokens
        data = {name: limit_documents(texts, tokenizers[0], limit) for name, texts in data.items()}
    result = EvaluationResult(models=[], settings=_settings(config))
    with _requested_tasks(config) as manager:
        for directory, name, tokenizer in zip(config.model, model_names(config.model), tokenizers):
            work = _OneModel(config, directory, name, tokenizer, progress, processes)
            result.models.append(work.measure(data, manager, facts))
            result.notes += work.notes
            is_midus = work.model.config.model_type == "midus"
            del work
            gc.collect()
            if manager is not None and config.zero_shot.task_engine == "vllm":
                _measure_tasks_by_vllm(config, result.models[-1], manager, is_midus=is_midus)
    if config.timing.latency:
        _measure_latencies(config, result, progress)
    if processes.rank:
        return result
    if config.json:
        write_text_atomically(config.json, json.dumps(result_to_dict(result), indent=2) + "\n")
    if config.markdown:
        write_text_atomically(config.markdown, result_to_markdown(result))
    return result


def _checked(config: EvaluateConfig, processes: Processes) -> EvaluateConfig:
    """Says whatever is wrong with the inputs before the first model is loaded, and settles defaults."""
    from megatron_midus.evaluation.zero_shot import default_max_length

    check_evaluate(config)
    tasks = config.zero_shot
    if config.timing.latency and processes.size > 1:
        raise UserError(f"--latency times one process and there are {processes.size}; measure it in a run of its own")
    runtime = dataclasses.replace(config.runtime, device=str(choose_device(processes.device(config.runtime.device))))
    config = dataclasses.replace(config, model=[fetched_model(name) for name in config.model])
    configs = [read_config(directory) for directory in config.model]
    for directory in config.model:
        check_safetensors(directory)
    contexts = [found["max_position_embeddings"] for found in configs if found.get("max_position_embeddings")]
    if tasks.max_length is None:
        tasks = dataclasses.replace(tasks, max_length=default_max_length(configs))
        if tasks.task_engine == "vllm":
            tasks = dataclasses.replace(tasks, max_length=vllm_engine.default_max_length(tasks.max_length, contexts))
    if tasks.tasks and tasks.task_engine == "vllm":
        vllm_engine.check_engine(
            num_processes=processes.size, device=runtime.device, max_length=tasks.max_length, contexts=contexts
        )
    return dataclasses.replace(config, runtime=runtime, zero_shot=tasks)


def _read_data(config: EvaluateConfig) -> dict[str, list[str]]:
    """The documents of every ``--data``, by short name."""
    text = config.text
    separator = unescape(text.text_document_separator)
    return {
        name: [document for _, document in read_documents([source], key=text.json_key, separator=separator)]
        for name, source in zip(short_names(text.data), text.data)
    }


def _read_facts(config: EvaluateConfig) -> dict[str, list[Question]]:
    """The questions of every ``--facts``, by short name."""
    keys = ("prompt", "answer")
    found = {}
    for name, source in zip(short_names(config.facts), config.facts):
        records = (record for path in find_inputs([source]) for record in read_raw(path, keys=keys))
        found[name] = [Question(*record.parse(keys)) for record in records]
        if not all(question.answer.strip() for question in found[name]):
            raise UserError(f"{source} has a question with an empty answer")
    return found


class _OneModel:
    """Loads one model and measures it; the model goes with this object."""

    def __init__(
        self,
        config: EvaluateConfig,
        directory: str,
        name: str,
        tokenizer: HuggingFaceTokenizer,
        progress: Progress,
        processes: Processes,
    ) -> None:
        self.config, self.tokenizer, self.progress, self.processes = config, tokenizer, progress, processes
        runtime = config.runtime
        self.model = load_model(
            directory, dtype=runtime.dtype, device=runtime.device, trust_remote_code=runtime.trust_remote_code
        )
        check_tokenizer_fits(tokenizer, num_embeddings(self.model), where=directory)
        self.figures = ModelFigures(
            name=name,
            directory=directory,
            parameters=count_parameters(directory, self.model),
            tokenizer=tokenizer.unique_identifiers,
            dtype=str(self.model.dtype).removeprefix("torch."),
        )
        self.notes: list[str] = []

    def measure(self, data: dict[str, list[str]], tasks: Any, facts: dict[str, list[Question]]) -> ModelFigures:
        lengths = {self.config.text.seq_length} if data else set()
        if tasks is not None:
            lengths.add(self.config.zero_shot.max_length)
        notes = (check_context(self.model, length, name=self.figures.name) for length in sorted(lengths))
        self.notes += [note for note in notes if note]
        for name, documents in data.items():
            self._measure_text(name, documents)
        if tasks is not None and self.config.zero_shot.task_engine == "transformers":
            self._measure_tasks(tasks)
        for name, questions in facts.items():
            self._measure_facts(name, questions)
        for prompt in self.config.generate if self.processes.rank == 0 else []:
            self.figures.generations[prompt] = self._continue(prompt)
        return self.figures

    def _measure_text(self, name: str, documents: list[str]) -> None:
        text, windows = self.config.text, self.config.windows
        self.figures.results[name] = measure_perplexity(
            self.model,
            self.tokenizer,
            documents,
            seq_length=text.seq_length,
            stride=windows.stride,
            mode=windows.mode,
            add_bos=self.config.add_bos,
            batch_size=self.config.runtime.batch_size,
            progress=self.progress,
            title=f"{self.figures.name} on {name}",
            processes=self.processes,
        )

    def _measure_tasks(self, manager: Any) -> None:
        from megatron_midus.evaluation.zero_shot import run_tasks, transformers_engine

        tasks = self.config.zero_shot
        if self.processes.rank == 0:
            print(f"{self.figures.name}: zero-shot tasks", flush=True)
        engine = transformers_engine(
            self.model,
            load_hf_tokenizer(self.figures.directory),
            max_length=tasks.max_length,
            batch_size=self.config.runtime.batch_size,
            add_bos=self.config.add_bos,
            processes=self.processes,
        )
        self.figures.tasks = run_tasks(engine, tasks.tasks, manager, limit=tasks.task_limit, processes=self.processes)

    def _measure_facts(self, name: str, questions: list[Question]) -> None:
        figures = self.figures
        encoded = encode_questions(self.tokenizer, questions, add_bos=self.config.add_bos)
        note = check_context(self.model, max(len(question.ids) for question in encoded), name=figures.name)
        self.notes += [note] if note else []
        scores = measure_recall(
            self.model,
            encoded,
            task=name,
            batch_size=self.config.runtime.batch_size,
            progress=self.progress,
            title=f"{figures.name} on {name}",
            processes=self.processes,
        )
        figures.tasks = with_scores(figures.tasks, scores)

    def _continue(self, prompt: str) -> str:
        sampling = self.config.sampling
        return generate_text(
            self.model,
            self.tokenizer,
            prompt,
            max_new_tokens=sampling.generate_tokens,
            temperature=sampling.temperature,
            seed=sampling.seed,
            add_bos=self.config.add_bos,
        )


def _measure_tasks_by_vllm(config: EvaluateConfig, figures: ModelFigures, manager: Any, *, is_midus: bool) -> None:
    """Once the model of transformers is gone: vLLM takes the memory that it finds."""
    from megatron_midus.evaluation.zero_shot import run_tasks

    tasks, runtime = config.zero_shot, config.runtime
    if config.add_bos and load_hf_tokenizer(figures.directory).bos_token_id is None:
        raise UserError("the tokenizer has no beginning-of-sequence token to start requests with")
    print(f"{figures.name}: zero-shot tasks in vLLM", flush=True)
    torch.cuda.empty_cache()
    with vllm_engine.vllm_engine(
        figures.directory,
        dtype=figures.dtype,
        device=runtime.device or "cpu",
        max_length=tasks.max_length,
        add_bos=config.add_bos,
        is_midus=is_midus,
        trust_remote_code=runtime.trust_remote_code,
        options=tasks.task_engine_args,
    ) as engine:
        found = run_tasks(engine, tasks.tasks, manager, limit=tasks.task_limit)
    recall = figures.tasks
    figures.tasks = found if recall is None else with_scores(found, list(recall.scores.values()))


def _measure_latencies(config: EvaluateConfig, result: EvaluationResult, progress: Progress) -> None:
    """Fills in latency and memory of all models; they are in memory together, to be timed in turns."""
    runtime, timing = config.runtime, config.timing
    models = [
        load_model(path, dtype=runtime.dtype, device=runtime.device, trust_remote_code=runtime.trust_remote_code)
        for path in config.model
    ]
    with progress("latency", total=len(models) * (timing.latency_rounds + 1), unit="round") as advance:
        latencies = measure_latency(
            models,
            prompt_tokens=timing.latency_prompt_tokens,
            decode_tokens=timing.latency_decode_tokens,
            batch_size=timing.latency_batch_size,
            rounds=timing.latency_rounds,
            seed=config.sampling.seed,
            progress=advance,
        )
    for figures, latency in zip(result.models, latencies):
        figures.latency = latency


@contextlib.contextmanager
def _requested_tasks(config: EvaluateConfig) -> Iterator[Any]:
    """lm-eval's task manager with the data of ``--tasks`` at hand, or ``None`` without tasks."""
    tasks = config.zero_shot
    if not tasks.tasks:
        yield None
        return
    from megatron_midus.evaluation.zero_shot import load_tasks, open_tasks

    with open_tasks(tasks.tasks, tasks.task_data) as manager:
        load_tasks(manager, tasks.tasks)
        yield manager


def _settings(config: EvaluateConfig) -> dict[str, Any]:
    """What the figures depend on, for the report."""
    text, windows, tasks, runtime = config.text, config.windows, config.zero_shot, config.runtime
    found: dict[str, Any] = {
        "seq_length": text.seq_length,
        "stride": windows.stride,
        "mode": windows.mode,
        "add_bos": config.add_bos,
        "max_tokens": windows.max_tokens,
        "dtype": runtime.dtype,
        "data": text.data,
        **({"facts": config.facts} if config.facts else {}),
    }
    if tasks.tasks:
        found |= {
            "tasks": tasks.tasks,
            "task_data": tasks.task_data,
            "task_limit": tasks.task_limit,
            "max_length": tasks.max_length,
            "batch_size": runtime.batch_size,
        }
    found["device"] = runtime.device
    if tasks.tasks:
        has_lm_eval = importlib.util.find_spec("lm_eval") is not None
        if tasks.task_engine == "vllm":
            found |= {"task_engine": "vllm", "vllm": vllm_engine.version()}
        found |= {"num_fewshot": 0, "lm_eval": importlib.metadata.version("lm_eval") if has_lm_eval else None}
    return found


def save_data(config: EvaluateConfig) -> list[str]:
    """``--save-task-data``: the files that were written."""
    from megatron_midus.evaluation.task_data import check_local_names, save_task_data
    from megatron_midus.evaluation.zero_shot import load_tasks, open_tasks

    tasks = config.zero_shot
    check_local_names(tasks.tasks)
    with open_tasks(tasks.tasks, tasks.task_data) as manager:
        return [str(path) for path in save_task_data(load_tasks(manager, tasks.tasks), tasks.save_task_data)]


def command(config: EvaluateConfig) -> int:
    """``midus evaluate``."""
    if config.zero_shot.save_task_data:
        print("\n".join(save_data(config)))
    else:
        as_rank(lambda: _told(config))
    return 0


def _told(config: EvaluateConfig) -> int:
    result = evaluate(config)
    if int(os.environ.get("RANK", "0")) == 0:
        print_result(result)
    return 0
