"""Perplexity, bits per byte, parameters and speed of Hugging Face models on held-out text, side by side."""

from __future__ import annotations

import argparse
import gc
import json
from collections.abc import Sequence
from typing import Any

from megatron_midus import cli
from megatron_midus.data.corpus import DEFAULT_SEPARATOR, TEXT_KEY, read_documents, unescape
from megatron_midus.files import write_text_atomically


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--model", nargs="+", required=True, metavar="DIR", help="Hugging Face directories; the first is the base line")
    add(
        "--data",
        nargs="+",
        action="extend",
        required=True,
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
    add("--add-bos", action="store_true", help="start every document with the beginning-of-sequence token")
    add("--batch-size", type=int, default=8, help="windows in one call of the model (default: %(default)s)")
    add("--max-tokens", type=int, help="use only the first documents, up to so many tokens of the first model")
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
    return parser.parse_args(arguments)


def read_data(arguments: argparse.Namespace) -> dict[str, list[str]]:
    """The documents of every ``--data``, by short name."""
    from megatron_midus.evaluation.report import short_names

    separator = unescape(arguments.text_document_separator)
    return {
        name: [text for _, text in read_documents([source], key=arguments.json_key, separator=separator)]
        for name, source in zip(short_names(arguments.data), arguments.data)
    }


def evaluate_model(
    directory: str, name: str, tokenizer: Any, data: dict[str, list[str]], arguments: argparse.Namespace, device: Any
) -> tuple[Any, list[str]]:
    """Loads one model, measures it, lets go of it. Returns its report and notes."""
    from tqdm import tqdm

    from megatron_midus.data.tokenizer import check_tokenizer_fits
    from megatron_midus.evaluation.generation import generate_text
    from megatron_midus.evaluation.loading import check_context, load_model, num_embeddings
    from megatron_midus.evaluation.parameters import count_parameters
    from megatron_midus.evaluation.perplexity import measure_perplexity
    from megatron_midus.evaluation.report import ModelReport

    model = load_model(directory, dtype=arguments.dtype, device=device, trust_remote_code=arguments.trust_remote_code)
    check_tokenizer_fits(tokenizer, num_embeddings(model), where=directory)
    note = check_context(model, arguments.seq_length, name=name)
    report = ModelReport(
        name=name,
        directory=directory,
        parameters=count_parameters(directory, model),
        tokenizer=tokenizer.unique_identifiers,
        dtype=str(model.dtype).removeprefix("torch."),
    )
    for data_name, documents in data.items():
        with tqdm(unit="tok", unit_scale=True, desc=f"{name} on {data_name}") as bar:
            report.results[data_name] = measure_perplexity(
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
    for prompt in arguments.generate:
        report.generations[prompt] = generate_text(
            model,
            tokenizer,
            prompt,
            max_new_tokens=arguments.generate_tokens,
            temperature=arguments.temperature,
            seed=arguments.seed,
            add_bos=arguments.add_bos,
        )
    return report, [note] if note else []


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    # Whatever is wrong with the inputs is said before the first model is loaded.
    from megatron_midus.data.tokenizer import HuggingFaceTokenizer
    from megatron_midus.evaluation.loading import choose_device, read_config
    from megatron_midus.evaluation.parameters import check_safetensors
    from megatron_midus.evaluation.perplexity import limit_documents
    from megatron_midus.evaluation.report import Report, short_names

    device = choose_device(arguments.device)
    for directory in arguments.model:
        read_config(directory)
        check_safetensors(directory)
    data = read_data(arguments)
    tokenizers = [HuggingFaceTokenizer(directory) for directory in arguments.model]
    if arguments.max_tokens is not None:
        data = {name: limit_documents(texts, tokenizers[0], arguments.max_tokens) for name, texts in data.items()}

    names = short_names(arguments.model)
    settings = {n: getattr(arguments, n) for n in ("seq_length", "stride", "mode", "add_bos", "max_tokens", "dtype")}
    report = Report(models=[], settings={**settings, "device": str(device), "data": arguments.data})
    for directory, name, tokenizer in zip(arguments.model, names, tokenizers):
        model_report, notes = evaluate_model(directory, name, tokenizer, data, arguments, device)
        report.models.append(model_report)
        report.notes += notes
        gc.collect()
    report.print()
    if arguments.json:
        write_text_atomically(arguments.json, json.dumps(report.to_dict(), indent=2) + "\n")
    if arguments.markdown:
        write_text_atomically(arguments.markdown, report.to_markdown())


if __name__ == "__main__":
    cli.run(main)
