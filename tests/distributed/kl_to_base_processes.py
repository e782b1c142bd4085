"""What the processes of the tests of --kl-to-base do: one micro-batch, by the driver's forward step and by plain torch."""

from __future__ import annotations

import dataclasses
from typing import Any

import scenarios
import torch
import torch.nn.functional as F
from megatron.core.rerun_state_machine import RerunMode, initialize_rerun_state_machine
from scenarios import MICRO_BATCH, SEQUENCE, VOCABULARY, Layout, Setting, generator

from megatron_midus.data.batch import document_mask
from megatron_midus.model.builder import freeze
from megatron_midus.model.lora import adapters, add_adapters
from megatron_midus.training.kl_to_base import KlToBase
from megatron_midus.training.step import BatchShape, make_forward_step

COEFFICIENT = 20.0  # so that gradients of either term are of one size
EOD = 5
SHAPE = BatchShape(MICRO_BATCH, SEQUENCE, True, EOD)  # no document sees another


def micro_batch() -> dict[str, torch.Tensor]:
    text = torch.randint(VOCABULARY, (MICRO_BATCH, SEQUENCE + 1), generator=generator("kl"))
    text[:, 4] = EOD
    return {
        "tokens": text[:, :-1],
        "labels": text[:, 1:],
        "loss_mask": (torch.rand(MICRO_BATCH, SEQUENCE, generator=generator("mask")) < 0.7).long(),
        "position_ids": torch.arange(SEQUENCE)[None].repeat(MICRO_BATCH, 1),
    }


def outcomes(settings: dict[str, Setting]) -> dict[str, dict[str, Any]]:
    """Of each setting what ``outcome`` returns."""
    initialize_rerun_state_machine(mode=RerunMode.DISABLED)
    return {name: outcome(setting) for name, setting in settings.items()}


def outcome(setting: Setting) -> dict[str, Any]:
    """Sums of cross-entropy and divergence, and gradients by name: ``ours``, ``plain``, and ``without`` the term. ``base``: the
    logits of the base's pass, and those of a model that is the base. ``passes``: of an added block in a step with the term."""
    ((base,), _), (chunks, plan) = (
        scenarios.build(one, Layout()) for one in (dataclasses.replace(setting, policy="none"), setting)
    )
    (model,) = chunks
    if setting.train == "lora":
        add_adapters(chunks, model.config, rank=3, alpha=6.0, seed=5)
        for name, linear in adapters(model):
            shape = linear.adapter.up.shape
            linear.adapter.up.data.copy_(torch.randn(shape, generator=generator(name)) * 0.2)
    else:
        freeze(chunks, plan, setting.train)
    batch = micro_batch()
    inputs = batch["tokens"], batch["position_ids"], document_mask(batch["tokens"], EOD)
    with torch.no_grad():
        of_base = base.eval()(*inputs)

    without = _step(model, None, batch)
    plain = _plain(model, inputs, of_base, batch)
    calls: list[int] = []
    for index in plan.added_indices[:1]:
        model.decoder.layers[index].register_forward_hook(lambda *_: calls.append(1))
    term = KlToBase(model, plan, COEFFICIENT)
    ours = _step(model, term, batch)
    passes = len(calls)
    term.run_base(*inputs)
    assert term._base is not None and model.training
    pair = term._base.transpose(0, 1), of_base
    term._base = None
    with torch.no_grad():
        _, loss = make_forward_step(SHAPE, check_loss=False, kl_to_base=term)(iter([batch]), model)
    assert term._divergence is None and loss.args[-1] is None, "evaluations are of the cross-entropy alone"
    return {"ours": ours, "plain": plain, "without": without, "base": pair, "passes": passes}


def _step(model: torch.nn.Module, term: KlToBase | None, batch: dict[str, torch.Tensor]) -> dict[str, Any]:
    model.train()
    output, loss = make_forward_step(SHAPE, check_loss=False, kl_to_base=term)(iter([batch]), model)
    total, _, report = loss(output)
    total.backward()
    return {**{name: float(sums[0]) for name, sums in report.items()}, "gradients": _gradients(model)}


def _plain(
    model: torch.nn.Module, inputs: tuple, of_base: torch.Tensor, batch: dict[str, torch.Tensor]
) -> dict[str, Any]:
    logits = model.train()(*inputs)
    log_p, log_q = (x[..., :VOCABULARY].double().log_softmax(-1) for x in (logits, of_base))
    divergence = (F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1) * batch["loss_mask"]).sum()
    losses = F.nll_loss(log_p.transpose(1, 2), batch["labels"], reduction="none")
    cross_entropy = (losses * batch["loss_mask"]).sum()
    (cross_entropy + COEFFICIENT * divergence).backward()
    return {"lm loss": float(cross_entropy), "kl to base": float(divergence), "gradients": _gradients(model)}


def _gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found
