"""``midus average``: the mean of the weights of several checkpoints of one run."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from megatron_midus.checkpoint.checksums import check_checkpoint
from megatron_midus.checkpoint.layout import ASSETS_DIRECTORY, find_checkpoint, list_iterations
from megatron_midus.checkpoint.training_record import read_training_record
from megatron_midus.config import ModelConfig
from megatron_midus.config.average import AverageConfig
from megatron_midus.conversion.average import AveragedTensors
from megatron_midus.conversion.directories import write_megatron_checkpoint
from megatron_midus.conversion.megatron_io import MegatronReader
from megatron_midus.conversion.streaming import resolve_workers
from megatron_midus.errors import UserError
from megatron_midus.files import check_output_directory, staged_directory
from megatron_midus.progress import Progress
from megatron_midus.upscaling import UpscalePlan
from megatron_midus.verbs.verb import verb


@dataclasses.dataclass(frozen=True)
class Averaged:
    """What was made.

    Attributes:
        directory: where it lies.
        iterations: of the checkpoints whose mean it is, ascending.
    """

    directory: Path
    iterations: tuple[int, ...]


@verb(AverageConfig)
def average(config: AverageConfig, progress: Progress) -> Averaged:
    """Averages checkpoints. See ``AverageConfig`` for the settings; returns ``Averaged``.

    Raises:
        UserError: a checkpoint that is missing or damaged, checkpoints of different models, an output in the way.
    """
    save, load = Path(config.save).resolve(), Path(config.load).resolve()
    if save == load or save in load.parents or load in save.parents:
        raise UserError(f"--save {config.save} lies in --load or would replace it; choose another directory")
    check_output_directory(config.save, overwrite=config.overwrite)
    iterations = _iterations(config)
    directories = [find_checkpoint(config.load, iteration)[0] for iteration in iterations]
    for directory in directories if config.verify_checkpoint else ():
        check_checkpoint(directory)
    model, plan = _one_model(directories)
    source = AveragedTensors([MegatronReader(directory, model, plan) for directory in directories])
    newest = directories[-1]
    with (
        staged_directory(config.save, overwrite=config.overwrite) as target,
        progress("averaging", total=len(source.names()), unit="tensor") as advance,
    ):
        write_megatron_checkpoint(
            source,
            target,
            assets=newest / ASSETS_DIRECTORY,
            model=model,
            plan=plan,
            training=read_training_record(newest, iterations[-1]),
            workers=resolve_workers(config.workers),
            progress=lambda name: advance(1),
        )
    return Averaged(Path(config.save), tuple(iterations))


def _iterations(config: AverageConfig) -> list[int]:
    find_checkpoint(config.load)  # says what is wrong with a directory that is no run
    found = list_iterations(config.load)
    if config.iterations:
        absent = [iteration for iteration in config.iterations if iteration not in found]
        if absent:
            raise UserError(f"{config.load} holds no iteration {absent[0]}; it holds {', '.join(map(str, found))}")
        return sorted(config.iterations)
    assert config.last is not None
    trained = [iteration for iteration in found if iteration > 0]
    if len(trained) < config.last:
        raise UserError(
            f"--last {config.last}: {config.load} holds {len(trained)} trained checkpoints "
            f"({', '.join(map(str, trained)) or 'none'}); choose a smaller K, or save more often (--save-interval)"
        )
    return trained[-config.last :]


def _one_model(directories: list[Path]) -> tuple[ModelConfig, UpscalePlan]:
    model, plan = ModelConfig.load(directories[-1]), UpscalePlan.load(directories[-1])
    for directory in directories[:-1]:
        if (ModelConfig.load(directory), UpscalePlan.load(directory)) != (model, plan):
            raise UserError(f"{directory} and {directories[-1]} hold different models; average checkpoints of one run")
    return model, plan


def command(config: AverageConfig) -> int:
    """``midus average``."""
    result = average(config)
    print(f"written: {config.save} (mean of iterations {', '.join(map(str, result.iterations))}; weights alone)")
    return 0
