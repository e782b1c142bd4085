"""``midus upscale``: plans the inserted blocks of a Hugging Face model, says what they cost, writes the result."""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console

from megatron_midus.config import ModelConfig
from megatron_midus.config.upscale import UpscaleConfig
from megatron_midus.errors import UserError
from megatron_midus.files import check_output_directory, staged_directory
from megatron_midus.hub import fetched_model, short_name
from megatron_midus.progress import Bars, Progress
from megatron_midus.report.table import Cell, terminal_table, text_cells
from megatron_midus.upscaling import UpscalePlan
from megatron_midus.upscaling.cost import Cost, block_flops, block_parameters, cost_of
from megatron_midus.verbs.exports import base_plan_of, check_export_loads, code_files, print_notes
from megatron_midus.verbs.verb import verb


@dataclasses.dataclass(frozen=True)
class Upscaled:
    """What was made.

    Attributes:
        model: the base's architecture.
        plan: the blocks of the up-scaled model.
        cost: parameters, FLOPs, bytes, before and after.
        dtype: of the written weights.
        directory: where it lies; ``None`` after a dry run.
        verified: how base and result compare; empty when nothing was compared.
        gate_accuracies: of the domain gates, block by block, on tokens that they were not fitted on.
    """

    model: ModelConfig
    plan: UpscalePlan
    cost: Cost
    dtype: str
    directory: Path | None = None
    verified: str = ""
    gate_accuracies: list[float] = dataclasses.field(default_factory=list)


@verb(UpscaleConfig)
def upscale(config: UpscaleConfig, progress: Progress) -> Upscaled:
    """Up-scales a model. See ``UpscaleConfig`` for the settings; returns ``Upscaled``.

    Raises:
        UserError: settings that do not fit the model, an output that is in the way, a promised identity that broke.
    """
    return _Work(config).run(progress)


class _Work:
    """One up-scaling: everything that can be wrong is found while it is made, before anything is written."""

    def __init__(self, config: UpscaleConfig) -> None:
        from megatron_midus.conversion.families import from_hf_config, to_hf_config
        from megatron_midus.conversion.hf_io import dtype_name, open_hf_weights, parse_size, read_hf_config
        from megatron_midus.conversion.streaming import resolve_workers
        from megatron_midus.conversion.tokenizer import check_tokenizer
        from megatron_midus.upscaling.tensors import EMBEDDING, model_shapes

        config = dataclasses.replace(config, hf_model=fetched_model(config.hf_model))
        self.config = config
        self.workers = resolve_workers(config.workers)
        self.max_shard_size = parse_size(config.max_shard_size)
        check_paths(config)
        self.hf_config = read_hf_config(config.hf_model)
        model = from_hf_config(self.hf_config)
        print_notes(self.hf_config)
        self.plan = plan_of(config, model, self.hf_config)
        check_tokenizer(config.hf_model, model.vocab_size)
        self.base_shapes = model_shapes(model, self.plan.base_plan)
        self.base = open_hf_weights(config.hf_model, model, self.base_shapes)
        self.dtype = dtype_name(self.base.dtype(EMBEDDING)) if config.dtype == "keep" else config.dtype
        self.model = dataclasses.replace(model, hf_dtype=self.dtype)
        self.gate_accuracies: list[float] = []
        self.result_config = to_hf_config(self.hf_config, self.model, self.plan, dtype=self.dtype)

    def cost(self) -> Cost:
        return cost_of(self.model, self.plan, seq_length=self.config.seq_length, dtype=self.dtype)

    def run(self, progress: Progress) -> Upscaled:
        """Writes the result, unless it is a dry run."""
        if self.config.dry_run:
            return Upscaled(self.model, self.plan, self.cost(), self.dtype)
        assert self.config.save is not None
        self._check_loadable()
        self._hash(progress)
        source = self._tensors(progress)
        with staged_directory(self.config.save, overwrite=self.config.overwrite) as directory:
            self._write(directory, source, progress)
            if self.config.save_format == "hf":
                check_export_loads(directory, self.model, self.plan)
            verified = self._verify(directory) if self.config.verify else ""
        return Upscaled(
            self.model, self.plan, self.cost(), self.dtype, Path(self.config.save), verified, self.gate_accuracies
        )

    def _check_loadable(self) -> None:
        """Raises ``UserError`` when transformers could not load the result, or a later export of it; before any work."""
        from megatron_midus.conversion.verify import check_loadable
        from megatron_midus.hf import register
        from megatron_midus.upscaling.tensors import model_shapes

        register()
        check_loadable(self.result_config, model_shapes(self.model, self.plan))

    def _hash(self, progress: Progress) -> None:
        from megatron_midus.conversion.hf_io import source_hash

        with progress("hashing", total=len(self.base_shapes), unit="tensor") as advance:
            found = source_hash(self.base, list(self.base_shapes), lambda name: advance(1), workers=self.workers)
        self.plan = dataclasses.replace(self.plan, source_hash=found)

    def _tensors(self, progress: Progress) -> Any:
        """Every tensor of the result, made when it is read."""
        from megatron_midus.upscaling.initialize import UpscaledTensors

        make = functools.partial(UpscaledTensors, self.base, self.model, self.plan, dtype=self.config.dtype)
        memory = self.plan.memory
        measures = memory is not None and (memory.memory_key_init == "calibrated" or memory.memory_domain_gate)
        if not (measures and self.plan.new_memory_indices):
            return make()
        return make(calibrated=self._measure(make()))

    def _measure(self, source: Any) -> dict:
        """Tensors by canonical name that come from what the up-scaled model's memories see on text."""
        import torch

        from megatron_midus.conversion.families import FAMILIES
        from megatron_midus.conversion.stored import StoredTensors
        from megatron_midus.hf import MidusConfig, MidusForCausalLM
        from megatron_midus.upscaling.calibration import collect_queries, keys_from_queries
        from megatron_midus.upscaling.domain_gate import collect_normed_inputs, gate_tensors

        assert self.plan.memory is not None
        # The new values are zero, so this is the base: every memory sees what the base would hand it.
        model = MidusForCausalLM(MidusConfig(**self.result_config)).float().eval()
        parameters, stored = dict(model.named_parameters()), StoredTensors(source, FAMILIES["midus"].stored)
        with torch.no_grad():
            for name in stored.names():
                parameters[name].copy_(stored.read(name))
        new, found = self._read_text(self.config.calibration_data), {}
        if self.plan.memory.memory_key_init == "calibrated":
            found |= keys_from_queries(collect_queries(model, new), self.plan)
        if self.plan.memory.memory_domain_gate:
            old = self._read_text(self.config.background_data)
            gates, self.gate_accuracies = gate_tensors(
                collect_normed_inputs(model, new), collect_normed_inputs(model, old), self.plan
            )
            found |= gates
        return found

    def _read_text(self, path: str | None) -> Any:
        from transformers import AutoTokenizer

        from megatron_midus.upscaling.calibration import calibration_tokens

        assert path is not None
        return calibration_tokens(
            path,
            AutoTokenizer.from_pretrained(self.config.hf_model, local_files_only=True),
            num_tokens=self.config.calibration_tokens,
            seq_length=min(512, self.result_config["max_position_embeddings"]),
        )

    def _write(self, directory: Path, source: Any, progress: Progress) -> None:
        """Writes the result into ``directory``, in the format that was asked for."""
        from megatron_midus.conversion.directories import write_megatron_checkpoint

        with progress("writing", total=len(source.names()), unit="tensor") as advance:
            if self.config.save_format == "hf":
                self._write_hf(directory, source, progress=lambda name: advance(1))
                return
            target = self.config.target
            write_megatron_checkpoint(
                source,
                directory,
                assets=self.config.hf_model,
                model=self.model,
                plan=self.plan,
                tensor_parallel_size=target.target_tensor_parallel_size,
                pipeline_parallel_size=target.target_pipeline_parallel_size,
                make_vocab_size_divisible_by=target.make_vocab_size_divisible_by,
                workers=self.workers,
                progress=lambda name: advance(1),
            )

    def _write_hf(self, directory: Path, source: Any, **options: Any) -> None:
        from megatron_midus.conversion.directories import write_hf_directory

        write_hf_directory(
            source,
            directory,
            assets=self.config.hf_model,
            model=self.model,
            plan=self.plan,
            code_files=code_files(self.plan),
            max_shard_size=self.max_shard_size,
            workers=self.workers,
            **options,
        )

    def _verify(self, directory: Path) -> str:
        """Compares the written model with its base; ``UserError`` when a promised identity does not hold."""
        from megatron_midus.checkpoint.layout import iteration_directory
        from megatron_midus.conversion.megatron_io import MegatronReader
        from megatron_midus.conversion.verify import compare_logits, load_fp32, round_parameters
        from megatron_midus.upscaling.initialize import DTYPES

        base = load_fp32(self.config.hf_model)
        if self.config.dtype != "keep":
            round_parameters(base, DTYPES[self.config.dtype])
        with tempfile.TemporaryDirectory(prefix=".verify.", dir=directory.parent) as temporary:
            hf = directory
            if self.config.save_format == "megatron":
                # Through the checkpoint and back, so that what is compared is what lies on the disk.
                hf = Path(temporary)
                self._write_hf(hf, MegatronReader(iteration_directory(directory, 0), self.model, self.plan))
            if self.plan.memory_indices:
                # The package's own classes: the files in the output are copies of them.
                from megatron_midus.hf import register

                register()
            comparison = compare_logits(base, load_fp32(hf), vocab_size=self.model.vocab_size)
        if self.plan.is_identity and not comparison.bit_equal:
            raise UserError(
                f"policy {self.plan.policy} must compute the base's function and does not: {comparison.describe()}"
            )
        return comparison.describe()


# -- what is asked for -----------------------------------------------------------------------------------------------
def check_paths(config: UpscaleConfig) -> None:
    """What the configuration cannot check without looking at the file system."""
    for name in ("calibration_data", "background_data"):
        path = getattr(config, name)
        if path is not None and not Path(path).is_file():
            raise UserError(f"--{name.replace('_', '-')} {path} does not exist")
    if config.save is None or config.dry_run:
        return
    save, base = Path(config.save).resolve(), Path(config.hf_model).resolve()
    if save == base or save in base.parents:
        raise UserError(f"--save {config.save} would replace the base model; choose another directory")
    check_output_directory(config.save, overwrite=config.overwrite)


def plan_of(config: UpscaleConfig, model: ModelConfig, hf_config: dict[str, Any]) -> UpscalePlan:
    """The plan that the settings ask for, with its origin."""
    from megatron_midus.conversion.megatron_io import check_parallel_sizes
    from megatron_midus.upscaling.arguments import plan_from_config

    plan = plan_from_config(config.blocks, config.memory, model, base_plan_of(config.hf_model, model, hf_config))
    if not config.dry_run:
        _check_texts(config, plan)
    check_parallel_sizes(
        model,
        plan,
        tensor_parallel_size=config.target.target_tensor_parallel_size,
        pipeline_parallel_size=config.target.target_pipeline_parallel_size,
    )
    return dataclasses.replace(plan, seed=config.seed, source_name=short_name(config.hf_model))


def _check_texts(config: UpscaleConfig, plan: UpscalePlan) -> None:
    """New blocks of a MIDUS model may need texts because its own were made with some; no flag says so then."""
    memory = plan.memory
    if memory is None or plan.base is None or not plan.new_memory_indices:
        return
    if memory.memory_domain_gate and None in (config.calibration_data, config.background_data):
        raise UserError(
            f"the Memory blocks of {config.hf_model} have domain gates, and new ones need theirs; give --memory-domain-gate, "
            "--calibration-data FILE, a text of the new domain, and --background-data FILE, a text of the old"
        )
    if memory.memory_key_init == "calibrated" and config.calibration_data is None:
        raise UserError(
            f"the sub-keys of {config.hf_model} were calibrated; give --memory-key-init calibrated and --calibration-data FILE "
            "for those of the new blocks, or --memory-key-init uniform"
        )


# -- what is printed -------------------------------------------------------------------------------------------------
def print_layers(console: Console, model: ModelConfig, plan: UpscalePlan, seq_length: int) -> None:
    rows = []
    for index, (block, parameters) in enumerate(zip(plan.blocks, block_parameters(model, plan))):
        flops = block_flops(model, plan, index, seq_length)
        texts = (
            str(index), block.kind, ", ".join(map(str, block.source)), block.init, f"{parameters:,}",
            f"{(flops.weights + flops.activations) / 1e6:,.2f}",
        )  # fmt: skip
        rows.append([Cell(text, is_best=block.inserted) for text in texts])
    header = ("layer", "block", "source", "filled", "parameters", "MFLOP/token")
    title = f"{plan.num_base_layers} -> {plan.num_layers} layers, policy {plan.policy}"
    console.print(terminal_table(header, rows, text_columns=4, title=title))
    for note in plan.notes:
        console.print(f"note: {note}", highlight=False, soft_wrap=True)


def print_cost(console: Console, cost: Cost, *, seq_length: int, dtype: str) -> None:
    has_experts = cost.base_active_parameters != cost.base_parameters
    compared = [
        ("parameters", cost.base_parameters, cost.parameters, "{:,.0f}"),
        *(
            [("parameters that a token uses", cost.base_active_parameters, cost.active_parameters, "{:,.0f}")]
            * has_experts
        ),
        ("forward GFLOP/token", cost.base_forward_flops / 1e9, cost.forward_flops / 1e9, "{:,.4f}"),
        ("KV cache bytes/token", cost.base_kv_bytes, cost.kv_bytes, "{:,.0f}"),
    ]
    rows = [
        (name, form.format(base), form.format(scaled), f"{100 * (scaled - base) / base:+.1f} %")
        for name, base, scaled, form in compared
    ]
    mebibytes = [b / 2**20 for b in (cost.weight_bytes, cost.training_bytes_inserted, cost.training_bytes_all)]
    rows += [
        ("parameters in inserted blocks", "", f"{cost.trainable_inserted:,}", ""),
        ("training GFLOP/token, --train inserted", "", f"{cost.training_flops / 1e9:,.4f}", ""),
        ("weights, MiB", "", f"{mebibytes[0]:,.1f}", ""),
        ("weights + AdamW, --train inserted, MiB", "", f"{mebibytes[1]:,.1f}", ""),
        ("weights + AdamW, --train all, MiB", "", f"{mebibytes[2]:,.1f}", ""),
    ]
    title = f"cost (sequences of {seq_length} tokens, {dtype})"
    console.print(terminal_table(("", "base", "up-scaled", "change"), list(map(text_cells, rows)), title=title))


def command(config: UpscaleConfig) -> int:
    """``midus upscale``."""
    work = _Work(config)
    console = Console(highlight=False)
    print_layers(console, work.model, work.plan, config.seq_length)
    print_cost(console, work.cost(), seq_length=config.seq_length, dtype=work.dtype)
    result = work.run(Bars())
    if result.gate_accuracies:
        shares = ", ".join(f"{100 * accuracy:.0f} %" for accuracy in result.gate_accuracies)
        console.print(f"domain gates tell new from old on held-out tokens: {shares} (50 % is chance)", soft_wrap=True)
    if result.verified:
        console.print(f"verified: {result.verified}", soft_wrap=True)
    if result.directory is not None:
        console.print(f"written: {config.save} ({config.save_format}, {result.dtype})", soft_wrap=True)
    return 0
