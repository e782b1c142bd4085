"""Hugging Face models side by side: perplexity on held-out text, zero-shot tasks, parameters, latency and memory.

Examples:
  python tools/evaluate.py --model BASE MIDUS --data heldout.jsonl
  python tools/evaluate.py --model BASE MIDUS --tasks wikitext,arc_easy,piqa --task-data DIR --markdown results.md
  python tools/evaluate.py --tasks wikitext,arc_easy,piqa --save-task-data DIR       (where there is a network)
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib.metadata
import importlib.util
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from megatron_midus import cli
from megatron_midus.config.parser import ArgumentParser
from megatron_midus.data.corpus import DEFAULT_SEPARATOR, TEXT_KEY, read_documents, unescape
from megatron_midus.errors import UserError
from megatron_midus.files import check_output_file, write_text_atomically


def make_parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", nargs="+", default=[], metavar="DIR", help="Hugging Face directories; the first is the base line")
    _add_text_arguments(add)
    _add_task_arguments(add)
    _add_latency_arguments(add)
    add("--add-bos", action="store_true", help="start every document and prompt with the beginning-of-sequence token")
    add("--batch-size", type=int, default=8, help="windows or requests in one call of the model (default: %(default)s)")
    add(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="of the weights; auto = float32 on a CPU, the checkpoint's own on a GPU (default: %(default)s)",
    )
    add("--device", help="cpu, cuda, cuda:1, … (default: a GPU if there is one)")
    add("--trust-remote-code", action="store_true", help="run modeling code that lies in a model's directory")
    add("--generate", nargs="+", default=[], metavar="PROMPT", help="also continue these prompts with each model")
    add("--generate-tokens", type=int, default=64, help="tokens of a continuation, at most (default: %(default)s)")
    add("--temperature", type=float, default=0.0, help="of the continuations; 0 = greedy (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the sampling (default: %(default)s)")
    add("--json", metavar="OUT", help="write everything here as JSON")
    add("--markdown", metavar="OUT", help="write the table here as Markdown")
    return parser


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    return make_parser().parse_args(arguments)


def _add_text_arguments(add: Callable[..., Any]) -> None:
    add(
        "--data",
        nargs="+",
        action="extend",
        default=[],
        metavar="FILE",
        help="held-out text, .jsonl or .txt (also .gz, .zst) or a directory of such; each gets rows of its own",
    )
    add("--json-key", default=TEXT_KEY, help="key of the text in a JSON line (default: %(default)s)")
    add(
        "--text-document-separator",
        default=DEFAULT_SEPARATOR.replace("\f", "\\f"),
        help="what divides a .txt file into documents (default: %(default)s, a form feed)",
    )
    add("--seq-length", type=int, default=512, help="tokens that the model reads at once (default: %(default)s)")
    add("--stride", type=int, help="tokens by which the next window starts later (default: --seq-length, no overlap)")
    add(
        "--mode",
        choices=("packed", "document"),
        default="packed",
        help="packed = all documents in one stream; document = each on its own (default: %(default)s)",
    )
    add("--max-tokens", type=int, help="use only the first documents, up to so many tokens of the first model")


def _add_task_arguments(add: Callable[..., Any]) -> None:
    add(
        "--tasks",
        type=lambda text: [name for name in text.replace(",", " ").split() if name],
        default=[],
        metavar="NAME,…",
        help="zero-shot tasks of lm-eval; those of the paper are wikitext,arc_easy,arc_challenge,logiqa,piqa,winogrande,"
        "commonsense_qa,boolq,mmlu",
    )
    add(
        "--task-data",
        metavar="DIR",
        help="local files of the tasks, for machines without a network (layout: docs/evaluation.md); the prompts stay "
        "lm-eval's own",
    )
    add("--save-task-data", metavar="DIR", help="write the data of --tasks there for --task-data and end")
    add(
        "--max-length",
        type=int,
        help="tokens that a model reads at most in a task (default: the shortest context of the models, at most 2048)",
    )
    add("--task-limit", type=int, metavar="N", help="only the first N items of each task, for a trial")


def _add_latency_arguments(add: Callable[..., Any]) -> None:
    add("--latency", action="store_true", help="also time prefill and decoding and count memory, all models loaded")
    add("--latency-prompt-tokens", type=int, default=256, help="length of the prompts (default: %(default)s)")
    add("--latency-decode-tokens", type=int, default=32, help="decoding steps of a round (default: %(default)s)")
    add("--latency-batch-size", type=int, default=1, help="sequences at once (default: %(default)s)")
    add("--latency-rounds", type=int, default=7, help="timed rounds of all models in turn (default: %(default)s)")


def read_data(arguments: argparse.Namespace) -> dict[str, list[str]]:
    """The documents of every ``--data``, by short name."""
    from megatron_midus.evaluation.result import short_names

    separator = unescape(arguments.text_document_separator)
    return {
        name: [text for _, text in read_documents([source], key=arguments.json_key, separator=separator)]
        for name, source in zip(short_names(arguments.data), arguments.data)
    }


def evaluate_model(
    directory: str, name: str, tokenizer: Any, data: dict[str, list[str]], manager: Any, arguments: argparse.Namespace
) -> tuple[Any, list[str]]:
    """Loads one model, measures it, lets go of it. Returns its figures and notes."""
    from megatron_midus.data.tokenizer import check_tokenizer_fits
    from megatron_midus.evaluation.generation import generate_text
    from megatron_midus.evaluation.loading import check_context, load_model, num_embeddings
    from megatron_midus.evaluation.parameters import count_parameters
    from megatron_midus.evaluation.result import ModelFigures

    model = load_model(
        directory, dtype=arguments.dtype, device=arguments.device, trust_remote_code=arguments.trust_remote_code
    )
    check_tokenizer_fits(tokenizer, num_embeddings(model), where=directory)
    lengths = {arguments.seq_length} if data else set()
    if manager is not None:
        lengths.add(arguments.max_length)
    notes = [check_context(model, length, name=name) for length in sorted(lengths)]
    figures = ModelFigures(
        name=name,
        directory=directory,
        parameters=count_parameters(directory, model),
        tokenizer=tokenizer.unique_identifiers,
        dtype=str(model.dtype).removeprefix("torch."),
    )
    measure_texts(model, tokenizer, data, figures, arguments)
    if manager is not None:
        measure_tasks(model, manager, figures, arguments)
    for prompt in arguments.generate:
        figures.generations[prompt] = generate_text(
            model,
            tokenizer,
            prompt,
            max_new_tokens=arguments.generate_tokens,
            temperature=arguments.temperature,
            seed=arguments.seed,
            add_bos=arguments.add_bos,
        )
    return figures, [note for note in notes if note]


def measure_texts(
    model: Any, tokenizer: Any, data: dict[str, list[str]], figures: Any, arguments: argparse.Namespace
) -> None:
    """Fills in the perplexity on every text."""
    from tqdm import tqdm

    from megatron_midus.evaluation.perplexity import measure_perplexity

    for data_name, documents in data.items():
        with tqdm(unit="tok", unit_scale=True, desc=f"{figures.name} on {data_name}") as bar:
            figures.results[data_name] = measure_perplexity(
                model,
                tokenizer,
                documents,
                seq_length=arguments.seq_length,
                stride=arguments.stride,
                mode=arguments.mode,
                add_bos=arguments.add_bos,
                batch_size=arguments.batch_size,
                progress=bar.update,
            )


def measure_tasks(model: Any, manager: Any, figures: Any, arguments: argparse.Namespace) -> None:
    """Fills in the scores of the zero-shot tasks."""
    from megatron_midus.data.tokenizer import load_hf_tokenizer
    from megatron_midus.evaluation.zero_shot import run_tasks

    print(f"{figures.name}: zero-shot tasks", flush=True)
    figures.tasks = run_tasks(
        model,
        load_hf_tokenizer(figures.directory),
        arguments.tasks,
        manager,
        max_length=arguments.max_length,
        batch_size=arguments.batch_size,
        limit=arguments.task_limit,
        add_bos=arguments.add_bos,
    )


def measure_latencies(result: Any, arguments: argparse.Namespace) -> None:
    """Fills in latency and memory of all models; they are in memory together, to be timed in turns."""
    from tqdm import tqdm

    from megatron_midus.evaluation.latency import measure_latency
    from megatron_midus.evaluation.loading import load_model

    models = [
        load_model(path, dtype=arguments.dtype, device=arguments.device, trust_remote_code=arguments.trust_remote_code)
        for path in arguments.model
    ]
    with tqdm(total=len(models) * (arguments.latency_rounds + 1), desc="latency") as bar:
        latencies = measure_latency(
            models,
            prompt_tokens=arguments.latency_prompt_tokens,
            decode_tokens=arguments.latency_decode_tokens,
            batch_size=arguments.latency_batch_size,
            rounds=arguments.latency_rounds,
            seed=arguments.seed,
            progress=bar.update,
        )
    for model_figures, latency in zip(result.models, latencies):
        model_figures.latency = latency


def check_arguments(arguments: argparse.Namespace) -> None:
    """Says whatever is wrong with the inputs before the first model is loaded, and settles defaults."""
    from megatron_midus.evaluation.loading import choose_device, read_config
    from megatron_midus.evaluation.parameters import check_safetensors
    from megatron_midus.evaluation.zero_shot import default_max_length

    if not arguments.model:
        raise UserError("there is no model to evaluate; give --model DIR")
    if not (arguments.data or arguments.tasks or arguments.latency or arguments.generate):
        raise UserError("there is nothing to measure; give --data FILE, --tasks NAMES, --latency or --generate PROMPT")
    if not arguments.tasks and (arguments.task_data or arguments.task_limit is not None):
        raise UserError("--task-data and --task-limit belong to --tasks; name the tasks")
    for name in ("max_length", "task_limit", "batch_size"):
        number = getattr(arguments, name)
        if number is not None and number < 1:
            raise UserError(f"{name}={number} must be at least 1")
    for output in (arguments.json, arguments.markdown):
        if output is not None:
            check_output_file(output)
    arguments.device = choose_device(arguments.device)
    configs = [read_config(directory) for directory in arguments.model]
    for directory in arguments.model:
        check_safetensors(directory)
    if arguments.max_length is None:
        arguments.max_length = default_max_length(configs)


@contextlib.contextmanager
def open_requested_tasks(arguments: argparse.Namespace) -> Iterator[Any]:
    """lm-eval's task manager with the data of ``--tasks`` at hand, or ``None`` without tasks."""
    if not arguments.tasks:
        yield None
        return
    from megatron_midus.evaluation.zero_shot import load_tasks, open_tasks

    with open_tasks(arguments.tasks, arguments.task_data) as manager:
        load_tasks(manager, arguments.tasks)
        yield manager


def save_data(arguments: argparse.Namespace) -> None:
    """``--save-task-data``."""
    from megatron_midus.evaluation.task_data import check_local_names, save_task_data
    from megatron_midus.evaluation.zero_shot import load_tasks, open_tasks

    check_local_names(arguments.tasks)
    with open_tasks(arguments.tasks, arguments.task_data) as manager:
        for path in save_task_data(load_tasks(manager, arguments.tasks), arguments.save_task_data):
            print(path)


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    if arguments.save_task_data:
        save_data(arguments)
        return
    check_arguments(arguments)
    from megatron_midus.data.tokenizer import HuggingFaceTokenizer
    from megatron_midus.evaluation.output import print_result, result_to_dict, result_to_markdown
    from megatron_midus.evaluation.perplexity import limit_documents
    from megatron_midus.evaluation.result import EvaluationResult, model_names

    data = read_data(arguments)
    tokenizers = [HuggingFaceTokenizer(directory) for directory in arguments.model]
    if arguments.max_tokens is not None:
        data = {name: limit_documents(texts, tokenizers[0], arguments.max_tokens) for name, texts in data.items()}

    result = EvaluationResult(models=[], settings=settings_of(arguments))
    with open_requested_tasks(arguments) as manager:
        for directory, name, tokenizer in zip(arguments.model, model_names(arguments.model), tokenizers):
            figures, notes = evaluate_model(directory, name, tokenizer, data, manager, arguments)
            result.models.append(figures)
            result.notes += notes
            gc.collect()
    if arguments.latency:
        measure_latencies(result, arguments)
    print_result(result)
    if arguments.json:
        write_text_atomically(arguments.json, json.dumps(result_to_dict(result), indent=2) + "\n")
    if arguments.markdown:
        write_text_atomically(arguments.markdown, result_to_markdown(result))


def settings_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """What the figures depend on, for the report."""
    names = ["seq_length", "stride", "mode", "add_bos", "max_tokens", "dtype", "data"]
    if arguments.tasks:
        names += ["tasks", "task_data", "task_limit", "max_length", "batch_size"]
    versions = {}
    if arguments.tasks:
        versions["num_fewshot"] = 0
        versions["lm_eval"] = importlib.metadata.version("lm_eval") if importlib.util.find_spec("lm_eval") else None
    return {**{name: getattr(arguments, name) for name in names}, "device": str(arguments.device), **versions}


if __name__ == "__main__":
    cli.run(main)
