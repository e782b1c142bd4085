"""``midus analyze``: what the memory of a trained model learnt, as a page and figures."""

from __future__ import annotations

import dataclasses
import gc
import json
from typing import Any

from megatron_midus.analysis.passes import plain_losses
from megatron_midus.analysis.slots import SlotSettings
from megatron_midus.analysis.study import analyse, check_is_midus, check_parts, num_windows
from megatron_midus.analysis.study_page import to_html
from megatron_midus.analysis.summary import to_markdown
from megatron_midus.analysis.windows import make_windows
from megatron_midus.config.analyze import AnalyzeConfig
from megatron_midus.data.corpus import read_documents, unescape
from megatron_midus.data.tokenizer import HuggingFaceTokenizer, check_tokenizer_fits
from megatron_midus.errors import UserError
from megatron_midus.evaluation.loading import check_context, choose_device, load_model, num_embeddings, read_config
from megatron_midus.evaluation.parameters import check_safetensors
from megatron_midus.evaluation.perplexity import limit_documents
from megatron_midus.evaluation.result import model_name
from megatron_midus.files import check_output_directory, staged_directory, write_text_atomically
from megatron_midus.hub import fetched_model
from megatron_midus.progress import Progress
from megatron_midus.verbs.verb import verb

# Settings that the figures depend on, told in the report.
_TOLD = ("base", "data", "parts", "seq_length", "tokens", "batch_size", "slots", "contexts", "min_reads", "device")


@verb(AnalyzeConfig)
def analyze(config: AnalyzeConfig, progress: Progress) -> Any:
    """Analyses a model and writes its report. See ``AnalyzeConfig`` for the settings; returns the study with all figures.

    Raises:
        UserError: no MIDUS model, a text that cannot be read, an output that is in the way.
    """
    config = _checked(config)
    tokenizer = HuggingFaceTokenizer(config.model)
    windows, num_documents = _read_windows(config, tokenizer)
    base = _base_losses(config, tokenizer, windows, progress)
    gc.collect()
    study = _analyse_model(config, tokenizer, windows, base, progress)
    study.text = {"data": config.data, "documents": num_documents, **study.text}
    study.settings.update({name: getattr(config, name) for name in _TOLD})
    with staged_directory(config.output, overwrite=config.overwrite) as directory:
        write_text_atomically(
            directory / "analysis.json", json.dumps(study.to_dict(), indent=1, allow_nan=False) + "\n"
        )
        write_text_atomically(directory / "summary.md", to_markdown(study))
        write_text_atomically(directory / "report.html", to_html(study))
    return study


def _checked(config: AnalyzeConfig) -> AnalyzeConfig:
    """Says whatever is wrong with the inputs before a model is loaded, and settles models and device."""
    base = fetched_model(config.base) if config.base else config.base
    config = dataclasses.replace(config, model=fetched_model(config.model), base=base)
    check_is_midus(config.model)
    check_safetensors(config.model)
    if config.base:
        read_config(config.base)
        check_safetensors(config.base)
    check_output_directory(config.output, overwrite=config.overwrite)
    return dataclasses.replace(config, device=str(choose_device(config.device)))


def _read_windows(config: AnalyzeConfig, tokenizer: HuggingFaceTokenizer) -> tuple[Any, int]:
    """The text as windows, and the number of documents in it."""
    separator = unescape(config.text_document_separator)
    documents = (text for _, text in read_documents(config.data, key=config.json_key, separator=separator))
    kept = limit_documents(documents, tokenizer, config.tokens)
    windows = make_windows(tokenizer, kept, seq_length=config.seq_length)
    check_parts(config.parts, windows)
    return windows, len(kept)


def _base_losses(
    config: AnalyzeConfig, tokenizer: HuggingFaceTokenizer, windows: Any, progress: Progress
) -> tuple[str, Any] | None:
    """Name of the base and its loss on each window."""
    if not config.base:
        return None
    if HuggingFaceTokenizer(config.base).unique_identifiers != tokenizer.unique_identifiers:
        raise UserError(f"{config.base} and {config.model} have different tokenizers; their losses do not compare")
    model = load_model(config.base, dtype=config.dtype, device=config.device)
    name = model_name(config.base)
    with progress(name, total=len(windows), unit="window") as advance:
        return name, plain_losses(model, windows, batch_size=config.batch_size, progress=advance)


def _analyse_model(
    config: AnalyzeConfig, tokenizer: HuggingFaceTokenizer, windows: Any, base: Any, progress: Progress
) -> Any:
    """Loads the MIDUS model and runs all parts."""
    model = load_model(config.model, dtype=config.dtype, device=config.device)
    check_tokenizer_fits(tokenizer, num_embeddings(model), where=config.model)
    note = check_context(model, config.seq_length, name=config.model)
    slots = SlotSettings(
        most_used=config.slots, most_selective=config.slots, contexts=config.contexts, min_reads=config.min_reads
    )
    with progress("analysis", total=num_windows(model, windows, config.parts), unit="window") as advance:
        study = analyse(
            model,
            windows,
            tokenizer,
            directory=config.model,
            parts=config.parts,
            batch_size=config.batch_size,
            slot_settings=slots,
            base=base,
            progress=advance,
        )
    study.notes += [note] if note else []
    study.settings["dtype"] = str(model.dtype).removeprefix("torch.")
    return study


def command(config: AnalyzeConfig) -> int:
    """``midus analyze``."""
    print(to_markdown(analyze(config)), end="")
    print(f"report: {config.output}/report.html")
    return 0
