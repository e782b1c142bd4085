"""What the memory of a trained MIDUS model learnt: slot usage, head importance, fixed retrieval, what slots fire on, and
how small k, n and d_l could be.

Examples:
  python tools/analyze.py --model MIDUS --data heldout.jsonl --output analysis
  python tools/analyze.py --model MIDUS --base BASE --data heldout.txt --output analysis --parts usage heads --tokens 20000

Writes report.html (opens without a network), analysis.json (every figure) and summary.md into the output directory.
"""

from __future__ import annotations

import argparse
import gc
import json
from collections.abc import Callable, Sequence
from typing import Any

from megatron_midus import cli
from megatron_midus.config.parser import ArgumentParser
from megatron_midus.data.corpus import DEFAULT_SEPARATOR, TEXT_KEY, read_documents, unescape
from megatron_midus.errors import UserError
from megatron_midus.files import check_output_directory, staged_directory, write_text_atomically

PARTS = ("usage", "heads", "retrieval", "slots", "sensitivity")


def make_parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", required=True, metavar="DIR", help="Hugging Face directory of a MIDUS model")
    add("--base", metavar="DIR", help="Hugging Face directory of its base, whose loss is then told as well")
    add("--output", required=True, metavar="DIR", help="directory of the report")
    add("--overwrite", action="store_true", help="replace what the output directory holds")
    add(
        "--parts",
        nargs="+",
        choices=PARTS,
        default=list(PARTS),
        help="what to look at: usage of slots; loss without single heads; exchange of projections with retrieval fixed; "
        "what slots fire on; smaller k, n, d_l (default: all)",
    )
    _add_text_arguments(add)
    _add_slot_arguments(add)
    add("--batch-size", type=int, default=8, help="windows in one call of the model (default: %(default)s)")
    add(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="of the weights; auto = float32 on a CPU, the checkpoint's own on a GPU (default: %(default)s)",
    )
    add("--device", help="cpu, cuda, cuda:1, … (default: a GPU if there is one)")
    return parser


def _add_text_arguments(add: Callable[..., Any]) -> None:
    add(
        "--data",
        nargs="+",
        required=True,
        metavar="FILE",
        help="text to read, .jsonl or .txt (also .gz, .zst) or a directory of such; best one that the model has not seen",
    )
    add("--json-key", default=TEXT_KEY, help="key of the text in a JSON line (default: %(default)s)")
    add(
        "--text-document-separator",
        default=DEFAULT_SEPARATOR.replace("\f", "\\f"),
        help="what divides a .txt file into documents (default: %(default)s, a form feed)",
    )
    add("--seq-length", type=int, default=512, help="tokens of a window (default: %(default)s)")
    add(
        "--tokens",
        type=int,
        default=50_000,
        help="use only the first documents, up to so many tokens; every memory and attention head costs a pass over "
        "them (default: %(default)s)",
    )


def _add_slot_arguments(add: Callable[..., Any]) -> None:
    add("--slots", type=int, default=8, help="slots per block and kind that --parts slots shows (default: %(default)s)")
    add("--contexts", type=int, default=3, help="places in the text per slot (default: %(default)s)")
    add(
        "--min-reads",
        type=int,
        default=32,
        help="reads below which a slot is not called selective: few reads look selective by chance (default: %(default)s)",
    )


def check_arguments(arguments: argparse.Namespace) -> None:
    """Says whatever is wrong with the inputs before a model is loaded, and settles the device."""
    from megatron_midus.analysis.study import check_is_midus
    from megatron_midus.evaluation.loading import choose_device, read_config
    from megatron_midus.evaluation.parameters import check_safetensors

    for name in ("seq_length", "tokens", "slots", "contexts", "min_reads", "batch_size"):
        if getattr(arguments, name) < 1:
            raise UserError(f"{name}={getattr(arguments, name)} must be at least 1")
    check_is_midus(arguments.model)
    check_safetensors(arguments.model)
    if arguments.base:
        read_config(arguments.base)
        check_safetensors(arguments.base)
    check_output_directory(arguments.output, overwrite=arguments.overwrite)
    arguments.device = choose_device(arguments.device)


def read_windows(arguments: argparse.Namespace, tokenizer: Any) -> tuple[Any, int]:
    """The text as windows, and the number of documents in it."""
    from megatron_midus.analysis.study import check_parts
    from megatron_midus.analysis.windows import make_windows
    from megatron_midus.evaluation.perplexity import limit_documents

    separator = unescape(arguments.text_document_separator)
    documents = (text for _, text in read_documents(arguments.data, key=arguments.json_key, separator=separator))
    kept = limit_documents(documents, tokenizer, arguments.tokens)
    windows = make_windows(tokenizer, kept, seq_length=arguments.seq_length)
    check_parts(arguments.parts, windows)
    return windows, len(kept)


def base_losses(arguments: argparse.Namespace, tokenizer: Any, windows: Any) -> tuple[str, Any] | None:
    """Name of the base and its loss on each window."""
    if not arguments.base:
        return None
    from tqdm import tqdm

    from megatron_midus.analysis.passes import plain_losses
    from megatron_midus.data.tokenizer import HuggingFaceTokenizer
    from megatron_midus.evaluation.loading import load_model
    from megatron_midus.evaluation.result import model_name

    if HuggingFaceTokenizer(arguments.base).unique_identifiers != tokenizer.unique_identifiers:
        raise UserError(
            f"{arguments.base} and {arguments.model} have different tokenizers; their losses do not compare"
        )
    model = load_model(arguments.base, dtype=arguments.dtype, device=arguments.device)
    name = model_name(arguments.base)
    with tqdm(total=len(windows), unit="window", mininterval=1, desc=name) as bar:
        return name, plain_losses(model, windows, batch_size=arguments.batch_size, progress=bar.update)


def analyse_model(arguments: argparse.Namespace, tokenizer: Any, windows: Any, base: Any) -> Any:
    """Loads the MIDUS model and runs all parts."""
    from tqdm import tqdm

    from megatron_midus.analysis.slots import SlotSettings
    from megatron_midus.analysis.study import analyse, num_windows
    from megatron_midus.data.tokenizer import check_tokenizer_fits
    from megatron_midus.evaluation.loading import check_context, load_model, num_embeddings

    model = load_model(arguments.model, dtype=arguments.dtype, device=arguments.device)
    check_tokenizer_fits(tokenizer, num_embeddings(model), where=arguments.model)
    note = check_context(model, arguments.seq_length, name=arguments.model)
    slots = SlotSettings(
        most_used=arguments.slots,
        most_selective=arguments.slots,
        contexts=arguments.contexts,
        min_reads=arguments.min_reads,
    )
    with tqdm(total=num_windows(model, windows, arguments.parts), unit="window", mininterval=1, desc="analysis") as bar:
        study = analyse(
            model,
            windows,
            tokenizer,
            directory=arguments.model,
            parts=arguments.parts,
            batch_size=arguments.batch_size,
            slot_settings=slots,
            base=base,
            progress=bar.update,
        )
    study.notes += [note] if note else []
    study.settings["dtype"] = str(model.dtype).removeprefix("torch.")
    return study


def write_results(study: Any, arguments: argparse.Namespace) -> None:
    from megatron_midus.analysis.study_page import to_html
    from megatron_midus.analysis.summary import to_markdown

    summary = to_markdown(study)
    with staged_directory(arguments.output, overwrite=arguments.overwrite) as directory:
        write_text_atomically(
            directory / "analysis.json", json.dumps(study.to_dict(), indent=1, allow_nan=False) + "\n"
        )
        write_text_atomically(directory / "summary.md", summary)
        write_text_atomically(directory / "report.html", to_html(study))
    print(summary, end="")
    print(f"report: {arguments.output}/report.html")


def main(argv: Sequence[str] | None = None) -> None:
    arguments = make_parser().parse_args(argv)
    check_arguments(arguments)
    from megatron_midus.data.tokenizer import HuggingFaceTokenizer

    tokenizer = HuggingFaceTokenizer(arguments.model)
    windows, num_documents = read_windows(arguments, tokenizer)
    base = base_losses(arguments, tokenizer, windows)
    gc.collect()
    study = analyse_model(arguments, tokenizer, windows, base)
    study.text = {"data": arguments.data, "documents": num_documents, **study.text}
    names = ("base", "data", "parts", "seq_length", "tokens", "batch_size", "slots", "contexts", "min_reads")
    study.settings.update({name: getattr(arguments, name) for name in names}, device=str(arguments.device))
    write_results(study, arguments)


if __name__ == "__main__":
    cli.run(main)
