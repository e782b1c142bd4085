"""The HTML report of an analysis: every figure with a sentence that says how to read it."""

from __future__ import annotations

import json

from megatron_midus.analysis import page_heads, page_retrieval, page_sensitivity, page_slots, page_usage
from megatron_midus.analysis.study import Study
from megatron_midus.report.page import Page


def to_html(study: Study) -> str:
    """One document that needs nothing else."""
    memory, blocks = study.memory, study.block_types.count("memory")
    shape = f"{blocks} Memory blocks of {len(study.block_types)}, {study.num_heads} memory heads, n = {memory['memory_num_keys']}, k = {memory['memory_topk']}"  # fmt: skip
    if study.variant == "hive":
        shape += f", d_l = {memory['memory_latent_size']}"
    page = Page(f"What the memory of {study.name} learnt", f"{study.directory}: variant {study.variant}, {shape}")
    page.bullets(study.notes)
    page.heading("Loss")
    page.paragraph(loss_sentence(study))
    page.paragraph(
        "± is one standard error over the windows of the text. Changes of the loss are paired: the same windows are read "
        "with and without the change, so a hard window does not count as noise. A change within two of its errors is no "
        "evidence, and among many heads a few exceed two by chance. 1 mnat = 0.001 nats.",
        is_note=True,
    )
    if study.usage is not None:
        page_usage.add(page, study, study.usage)
    if study.heads is not None:
        page_heads.add(page, study, study.heads)
    if study.retrieval is not None:
        page_retrieval.add(page, study, study.retrieval)
    if study.slots is not None:
        page_slots.add(page, study, study.slots)
    if study.sensitivity is not None:
        page_sensitivity.add(page, study, study.sensitivity)
    page.heading("Settings")
    settings = {"model": study.directory, "memory": memory, "block_types": study.block_types, **study.settings}
    page.code("Model, text and settings", json.dumps(settings, indent=1, ensure_ascii=False))
    return page.html()


def loss_sentence(study: Study) -> str:
    text = study.text
    sentence = f"{study.loss.text()} nats/token on {text['tokens']:,} tokens ({text['windows']} windows of {text['seq_length']})."
    if study.base is not None:
        sentence += (
            f" The base {study.base.name}: {study.base.loss.text()}; the MIDUS model minus the base: "
            f"{study.base.difference.text(sign='+')}."
        )
    return sentence
