"""README.md of an exported model: what it was made from, how, and how to load it."""

from __future__ import annotations

from megatron_midus.config import ModelConfig
from megatron_midus.upscaling import UpscalePlan
from megatron_midus.upscaling.cost import total_parameters, trainable_parameters
from megatron_midus.upscaling.policies import none

_CITATION = """```bibtex
@article{kim2025midus,
  title   = {MIDUS: Memory-Infused Depth Up-Scaling},
  author  = {Kim et al.},
  journal = {arXiv preprint arXiv:2512.13751},
  year    = {2025}
}
```"""


def model_card(model: ModelConfig, plan: UpscalePlan, *, dtype: str, iteration: int = 0) -> str:
    """Markdown text.

    Args:
        model: architecture of the base or of the up-scaled model (layer counts are read from the plan).
        plan: the blocks.
        dtype: of the weights in the directory.
        iteration: training iterations after up-scaling.
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
            _origin(plan, base, iteration),
            "",
            "## Layers",
            "",
            *_layer_rows(plan),
            "",
            "## Size",
            "",
            *_size_rows(model, plan, dtype),
            "",
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


def _origin(plan: UpscalePlan, base: str, iteration: int) -> str:
    trained = f"trained for {iteration} iterations since" if iteration else "not trained since"
    identity = " Before training it computes the same function as its base." if plan.is_identity else ""
    source = f" SHA-256 of the base's weights: `{plan.source_hash}`." if plan.source_hash else ""
    return f"Made of {base} with the policy `{plan.policy}` of megatron-midus and {trained}.{identity}{source}"


def _layer_rows(plan: UpscalePlan) -> list[str]:
    rows = [f"- policy: `{plan.policy}`", f"- inserted blocks: {_list(plan.inserted_indices)}"]
    if plan.memory is not None:
        rows.append(f"- Memory blocks: {_list(plan.memory_indices)}")
        rows += [f"- {name}: `{value}`" for name, value in plan.memory.to_dict().items() if value is not None]
    rows += [f"- {note}" for note in plan.notes]
    return [*rows, "", "The whole plan is in `midus_plan.json`; layers count from 0."]


def _list(indices: tuple[int, ...]) -> str:
    return ", ".join(map(str, indices)) or "none"


def _size_rows(model: ModelConfig, plan: UpscalePlan, dtype: str) -> list[str]:
    total = total_parameters(model, plan)
    base = total_parameters(model, none(num_layers=plan.num_base_layers))
    return [
        f"- parameters: {total:,}",
        f"- of the base: {base:,}",
        f"- added: {total - base:,} ({100 * (total - base) / base:.1f} %)",
        f"- in inserted blocks: {trainable_parameters(model, plan, 'inserted'):,}",
        f"- dtype of the weights: {dtype}",
    ]


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
        'tokenizer = AutoTokenizer.from_pretrained("DIR")',
        "```",
    ]
