"""README.md of an exported model: what it was made from, how, and how to load it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_midus.checkpoint.training_record import UNTRAINED, TrainingRecord
from megatron_midus.config import ModelConfig
from megatron_midus.errors import UserError
from megatron_midus.json_files import read_json_object
from megatron_midus.report.table import markdown_table, text_cells
from megatron_midus.upscaling import UpscalePlan
from megatron_midus.upscaling.cost import total_parameters, trainable_parameters

_CITATION = """```bibtex
@article{kim2025midus,
  title   = {MIDUS: Memory-Infused Depth Up-Scaling},
  author  = {Kim et al.},
  journal = {arXiv preprint arXiv:2512.13751},
  year    = {2025}
}
```"""


# Entries of an evaluation's results that say how it was done, not what came out.
_NOT_RESULTS = ("documents", "bytes", "tokens", "nats", "seconds", "tokens_read", "tokens_per_second")


def model_card(
    model: ModelConfig,
    plan: UpscalePlan,
    *,
    dtype: str,
    training: TrainingRecord = UNTRAINED,
    evaluation: Mapping[str, Any] | None = None,
) -> str:
    """Markdown text.

    Args:
        model: architecture of the base or of the up-scaled model (layer counts are read from the plan).
        plan: the blocks.
        dtype: of the weights in the directory.
        training: what happened after up-scaling.
        evaluation: report of midus evaluate, as read from its JSON.
    """
    base = plan.source_name or "the base model"
    tags = ["depth-up-scaling", *(["midus"] if plan.memory_indices else [])]
    return "\n".join(
        [
            "---",
            "library_name: transformers",
            "pipeline_tag: text-generation",
            "tags:",
            *[f"- {tag}" for tag in tags],
            "---",
            "",
            f"# {base}, up-scaled from {plan.num_base_layers} to {plan.num_layers} layers",
            "",
            _origin(plan, base, training),
            "",
            "## Layers",
            "",
            *_layer_rows(plan),
            "",
            "## Size",
            "",
            *_size_rows(model, plan, dtype, training),
            "",
            *_evaluation_rows(evaluation),
            "## Loading",
            "",
            *_loading(plan),
            "",
            "## Citation",
            "",
            _CITATION,
            "",
        ]
    )


def _origin(plan: UpscalePlan, base: str, training: TrainingRecord) -> str:
    tokens = f" on {training.tokens:,} tokens" if training.tokens else ""
    how = "fine-tuned on conversations" if training.sft else "trained"
    trained = (
        f"{how} for {training.iteration:,} iterations{tokens} since" if training.iteration else "not trained since"
    )
    identity = " Before training it computes the same function as its base." if plan.is_identity else ""
    source = f" SHA-256 of the base's weights: `{plan.source_hash}`." if plan.source_hash else ""
    made = f"Made of {base} with the policy `{plan.policy}` of megatron-midus and {trained}.{identity}{source}"
    return " ".join([made, *_earlier(plan)])


def _earlier(plan: UpscalePlan) -> Iterator[str]:
    """A sentence for every up-scaling before this one, the last of them first."""
    while plan.base is not None:
        name, plan = plan.source_name or "The base", plan.base
        yield (
            f"{name} has {plan.num_layers} blocks, made of the {plan.num_base_layers} of {plan.source_name or 'its base'} with the "
            f"policy `{plan.policy}`."
        )


def _layer_rows(plan: UpscalePlan) -> list[str]:
    rows = [f"- policy: `{plan.policy}`", f"- inserted blocks: {_list(plan.inserted_indices)}"]
    if plan.memory is not None:
        rows.append(f"- Memory blocks: {_list(plan.memory_indices)}")
        if plan.base is not None:
            rows.append(f"- of these the base has already: {_list(plan.kept_memory_indices)}")
        rows += [f"- {name}: `{value}`" for name, value in plan.memory.to_dict().items() if value is not None]
    rows += [f"- {note}" for note in plan.notes]
    return [*rows, "", "The whole plan is in `midus_plan.json`; layers count from 0."]


def _list(indices: tuple[int, ...]) -> str:
    return ", ".join(map(str, indices)) or "none"


def _size_rows(model: ModelConfig, plan: UpscalePlan, dtype: str, training: TrainingRecord) -> list[str]:
    total = total_parameters(model, plan)
    base = total_parameters(model, plan.base_plan)
    trained = []
    what = {
        "inserted": "the inserted blocks, the base frozen",
        "values": "the values of the Memory blocks, all else frozen",
        "all": "the whole model",
    }.get(training.train or "")
    if training.iteration and what is not None:
        count = trainable_parameters(model, plan, training.train)  # type: ignore[arg-type]
        trained = [f"- trained: {count:,} ({what})"]
    if training.iteration and training.train == "lora":
        trained = ["- trained: low-rank adapters on every linear layer, merged into the weights"]
    return [
        f"- parameters: {total:,}",
        f"- of the base: {base:,}",
        f"- added: {total - base:,} ({100 * (total - base) / base:.1f} %)",
        f"- in inserted blocks: {trainable_parameters(model, plan, 'inserted'):,}",
        *trained,
        f"- dtype of the weights: {dtype}",
    ]


def read_evaluation(path: str | Path) -> dict[str, Any]:
    """The JSON report of midus evaluate; ``ValueError`` when the file holds something else."""
    try:
        report = read_json_object(path)
        _evaluation_rows(report)
    except FileNotFoundError:
        raise UserError(f"--evaluation {path} does not exist; make it with midus evaluate") from None
    except (UserError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"--evaluation {path} is not a JSON report of midus evaluate ({type(error).__name__}: {error})"
        ) from None
    return report


def _evaluation_rows(report: Mapping[str, Any] | None) -> list[str]:
    """A section with one row per model, data and figure; a figure's standard error stands beside it."""
    if report is None:
        return []
    rows = [
        text_cells((str(model["name"]), *figures))
        for model in report["models"]
        for figures in (*_text_figures(model["results"]), *_task_figures(model.get("tasks", {})))
    ]
    table = markdown_table(("model", "data", "figure", "value"), rows, text_columns=3)
    return ["## Evaluation", "", *table, *[f"\n{note}" for note in report.get("notes", ())], ""]


def _text_figures(results: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """(text, figure, value) of perplexity and its kin."""
    for data, figures in results.items():
        for name, value in figures.items():
            if isinstance(value, (int, float)) and name not in _NOT_RESULTS:
                yield data, name, f"{value:.4g}"


def _task_figures(tasks: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """(task, metric, value ± standard error); of a group such as mmlu its mean alone, not its dozens of subjects."""
    for task, scores in tasks.items():
        if any(task.startswith(f"{group}_") for group in tasks):
            continue
        for metric, score in scores.items():
            if score["value"] is not None:
                error = "" if score["stderr"] is None else f" ± {score['stderr']:.2g}"
                yield task, metric, f"{score['value']:.4g}{error}"


def _loading(plan: UpscalePlan) -> list[str]:
    remote = ", trust_remote_code=True" if plan.memory_indices else ""
    code = (
        "The code of the model is in this directory and needs transformers >= 4.53 alone."
        if plan.memory_indices
        else "An ordinary model of its architecture; no custom code."
    )
    return [
        code,
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'model = AutoModelForCausalLM.from_pretrained("DIR"{remote})',
        f'tokenizer = AutoTokenizer.from_pretrained("DIR"{remote})',  # it may ask the configuration which class it is
        "```",
    ]
