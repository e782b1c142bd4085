"""Which layouts of a cluster a model fits on, what each GPU holds and sends, and how long a step should take.

Nothing is run: figures follow from the plan. Memory and traffic are those that the tests compare with real runs; times are
estimates from peaks and from the shares of them that training reaches (megatron_midus/planning/hardware.py).

Examples:
  python tools/plan.py --hf-model Llama-3.1-8B --num-blocks 16 --memory-num-keys 512 --nodes 4 --gpus-per-node 8 --hardware h100
  python tools/plan.py --load upscaled --nodes 1 --gpus-per-node 8 --gpu-memory-gib 40 --global-batch-size 256
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_midus import cli
from megatron_midus.config import ModelConfig
from megatron_midus.config.parser import ArgumentParser
from megatron_midus.conversion.checkpoint_layout import find_checkpoint
from megatron_midus.conversion.families import from_hf_config
from megatron_midus.conversion.hf_io import read_hf_config
from megatron_midus.errors import UserError
from megatron_midus.files import write_text_atomically
from megatron_midus.planning import Workload
from megatron_midus.planning.hardware import HARDWARE, LINK_SHARE, MATMUL_SHARE, MEMORY_SHARE, Hardware
from megatron_midus.planning.search import RESERVED_SHARE, Candidate, find_layouts
from megatron_midus.upscaling import UpscalePlan
from megatron_midus.upscaling.arguments import add_plan_arguments, plan_from_arguments
from megatron_midus.upscaling.cost import flops_per_token, total_parameters, trainable_parameters
from megatron_midus.upscaling.pipeline_layout import format_layout

GIB = 2**30
OVERRIDES = {
    "gpu_memory_gib": ("memory_gib", "memory of a GPU, GiB"),
    "matmul_tflops": ("matmul_tflops", "dense bf16 peak of a GPU, TFLOP/s"),
    "memory_gb_s": ("memory_gb_s", "memory bandwidth of a GPU, GB/s"),
    "node_gb_s": ("node_gb_s", "one direction between GPUs of a node, GB/s a GPU"),
    "network_gb_s": ("network_gb_s", "one direction between nodes, GB/s a GPU"),
}


def make_parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--hf-model", metavar="DIR", help="base model (its config.json is enough); the flags of the plan say what it becomes")  # fmt: skip
    source.add_argument("--load", metavar="DIR", help="up-scaled checkpoint, which brings its plan")
    add("--nodes", type=int, default=1, help="nodes (default: 1)")
    add("--gpus-per-node", type=int, default=8, help="GPUs of a node (default: 8)")
    add("--hardware", choices=sorted(HARDWARE), default="h100", help="kind of GPU (default: h100)")
    for name, (_, help_text) in OVERRIDES.items():
        add(f"--{name.replace('_', '-')}", type=float, help=f"{help_text} (default: that of --hardware)")
    add("--seq-length", type=int, default=4096, help="tokens of a sequence (default: 4096)")
    add("--global-batch-size", type=int, default=256, help="sequences of a step (default: 256)")
    add("--max-micro-batch-size", type=int, default=8, help="largest micro-batch that is tried (default: 8)")
    add("--train", choices=["inserted", "all"], default="inserted", help="what learns (default: inserted)")
    add("--fp32", action="store_true", help="weights and activations in fp32 instead of bf16")
    add("--make-vocab-size-divisible-by", type=int, default=128, help="as in pretrain_midus.py (default: 128)")
    add("--show", type=int, default=8, help="layouts in the table (default: 8)")
    add("--json", metavar="OUT", help="write all layouts here as JSON")
    add_plan_arguments(parser)
    return parser


def model_and_plan(args: argparse.Namespace) -> tuple[ModelConfig, UpscalePlan]:
    if args.load is not None:
        directory = find_checkpoint(args.load)[0]
        return ModelConfig.load(directory), UpscalePlan.load(directory)
    model = from_hf_config(read_hf_config(args.hf_model))
    return model, plan_from_arguments(args, model)


def hardware_of(args: argparse.Namespace) -> Hardware:
    given = {field: getattr(args, name) for name, (field, _) in OVERRIDES.items() if getattr(args, name) is not None}
    for field, value in given.items():
        if value <= 0:
            raise UserError(f"{field}={value} must be above 0")
    return dataclasses.replace(HARDWARE[args.hardware], **given)


def check_arguments(args: argparse.Namespace, plan: UpscalePlan) -> None:
    for name in ("nodes", "gpus_per_node", "seq_length", "global_batch_size", "max_micro_batch_size", "show"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)} must be at least 1")
    if args.train == "inserted" and not plan.inserted_indices:
        raise UserError(f"policy {plan.policy} inserts no block, so nothing would learn; give --train all")


def print_model(console: Console, model: ModelConfig, plan: UpscalePlan, args: argparse.Namespace) -> None:
    console.print(
        f"{plan.num_base_layers} -> {plan.num_layers} blocks, policy {plan.policy}: {total_parameters(model, plan):,} parameters, "
        f"{trainable_parameters(model, plan, args.train):,} of them trained; "
        f"a step: {args.global_batch_size} x {args.seq_length:,} tokens",
        highlight=False, soft_wrap=True,
    )  # fmt: skip


def print_layouts(console: Console, candidates: list[Candidate], hardware: Hardware) -> None:
    table = Table(
        title="layouts, fastest first; memory in GiB of the fullest GPU, traffic in GB that a GPU sends a step"
    )
    for heading in ("TP", "PP", "DP", "micro", "recompute", "values"):
        table.add_column(heading)
    for heading in (
        "weights",
        "grads",
        "optimizer",
        "activ.",
        "total",
        "TP",
        "PP",
        "DP",
        "s/step",
        "tokens/s/GPU",
        "of peak",
    ):
        table.add_column(heading, justify="right")
    for c in candidates:
        memory, layout = c.memory, c.layout
        sizes = (
            memory.weights,
            memory.gradients,
            memory.optimizer,
            memory.activations + memory.transient,
            memory.total,
        )
        table.add_row(
            f"{layout.tensor}{'+SP' if layout.sequence_parallel else ''}", str(layout.pipeline), str(layout.data),
            str(c.workload.micro_batch_size), "full" if layout.recompute else "-", "latent" if layout.latent_values else "repl.",
            *(f"{size / GIB:.1f}" for size in sizes),
            *(f"{c.sent_bytes[axis] / 1e9:.2f}" for axis in ("tensor", "pipeline", "data")),
            f"{c.seconds:.2f}", f"{c.tokens_per_second:,.0f}", f"{c.flops_share:.0%}",
            style=None if c.fits else "dim",
        )  # fmt: skip
    console.print(table)
    console.print(
        f"Times are estimates: {MATMUL_SHARE:.0%} of {hardware.matmul_tflops:,.0f} TFLOP/s, {MEMORY_SHARE:.0%} of "
        f"{hardware.memory_gb_s:,.0f} GB/s, {LINK_SHARE:.0%} of {hardware.node_gb_s:,.0f} GB/s in a node and of "
        f"{hardware.network_gb_s:,.0f} GB/s between nodes; {RESERVED_SHARE:.0%} of {hardware.memory_gib:.0f} GiB are kept free.",
        highlight=False, soft_wrap=True,
    )  # fmt: skip


def driver_flags(c: Candidate) -> list[str]:
    """What to give to pretrain_midus.py for this layout."""
    layout = c.layout
    flags = [f"--micro-batch-size {c.workload.micro_batch_size}", f"--global-batch-size {c.workload.global_batch_size}"]
    if layout.tensor > 1:
        flags += [f"--tensor-model-parallel-size {layout.tensor}", "--sequence-parallel"]
    if layout.latent_values:
        flags += ["--memory-value-placement latent"]
    if layout.pipeline > 1:
        flags += [
            f"--pipeline-model-parallel-size {layout.pipeline}",
            f"--pipeline-model-parallel-layout '{format_layout([len(blocks) for blocks in layout.stages])}'",
        ]
    if layout.distributed_optimizer:
        flags += ["--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"]
    if layout.recompute:
        flags += ["--recompute-granularity full", "--recompute-method uniform", "--recompute-num-layers 1"]
    return flags


def to_json(c: Candidate) -> dict[str, Any]:
    values = dataclasses.asdict(c)
    values["memory"]["total"] = c.memory.total
    values["flags"] = driver_flags(c)
    return values


def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    model, plan = model_and_plan(args)
    check_arguments(args, plan)
    hardware = hardware_of(args)
    workload = Workload(
        args.seq_length,
        args.max_micro_batch_size,
        args.global_batch_size,
        itemsize=4 if args.fp32 else 2,
        train=args.train,
    )
    candidates = find_layouts(
        model,
        plan,
        hardware,
        workload,
        nodes=args.nodes,
        gpus_per_node=args.gpus_per_node,
        training_flops_per_token=flops_per_token(model, plan, args.seq_length, train=args.train),
        vocab_divisible_by=args.make_vocab_size_divisible_by,
    )
    if not candidates:
        raise UserError(
            f"no layout of {args.nodes * args.gpus_per_node} GPUs divides a global batch of {args.global_batch_size}; "
            "change --global-batch-size"
        )
    console = Console(width=max(150, Console().width))
    print_model(console, model, plan, args)
    fitting = [c for c in candidates if c.fits]
    print_layouts(console, (fitting or candidates)[: args.show], hardware)
    if args.json:
        write_text_atomically(args.json, json.dumps([to_json(c) for c in candidates], indent=1) + "\n")
    if not fitting:
        smallest = candidates[0].memory.total / GIB
        raise UserError(
            f"nothing fits into {hardware.memory_gib:.0f} GiB; the smallest layout (shown first) needs {smallest:.1f} GiB a "
            "GPU: take more GPUs, shorter sequences, or --train inserted"
        )
    best = fitting[0]
    console.print(f"\n{len(fitting)} of {len(candidates)} layouts fit. The fastest:", highlight=False)
    console.print("  " + " \\\n  ".join(driver_flags(best)), highlight=False, soft_wrap=True)
    if plan.memory is not None and best.layout.tensor > 1:
        console.print(f"values: {best.value_reason}", highlight=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    cli.run(main)
