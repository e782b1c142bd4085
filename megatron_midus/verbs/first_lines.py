"""What a verb is about to do, said before the libraries load that it does it with: they take seconds. Imports no torch.

A function here raises what is wrong with the arguments alone. Where a path is not what the verb needs it returns ``None``: the verb says so.
"""

from __future__ import annotations

from pathlib import Path

from megatron_midus.checkpoint.layout import find_checkpoint
from megatron_midus.config.convert import ConvertConfig
from megatron_midus.config.evaluate import EvaluateConfig
from megatron_midus.errors import UserError
from megatron_midus.files import check_output_directory, check_output_file
from megatron_midus.json_files import read_json_object


def of_convert(config: ConvertConfig) -> str | None:
    """The checkpoint or model, and where it goes."""
    check_convert(config)
    if config.to == "hf":
        directory, _ = find_checkpoint(config.load, config.ckpt_step)
        what = f"{'averaged weights of ' if config.weights == 'ema' else ''}{directory}"
        return f"converting {what} to a Hugging Face model in {config.save}"
    model = _model(config.load)
    return None if model is None else f"converting {model} to a Megatron checkpoint in {config.save}"


def check_convert(config: ConvertConfig) -> None:
    """Raises ``UserError`` for an output that would replace the input, or that is in the way."""
    save, load = Path(config.save).resolve(), Path(config.load).resolve()
    if save == load or save in load.parents:
        raise UserError(f"--save {config.save} would replace what is loaded; choose another directory")
    check_output_directory(config.save, overwrite=config.overwrite)


def of_evaluate(config: EvaluateConfig) -> str | None:
    """The models, and what is measured of them."""
    tasks = config.zero_shot
    if tasks.save_task_data:
        return None
    check_evaluate(config)
    models = [_model(name) for name in config.model]
    measured = [
        *(f"text {source}" for source in config.text.data),
        *(f"facts {source}" for source in config.facts),
        *([f"tasks {', '.join(tasks.tasks)} by {tasks.task_engine}"] if tasks.tasks else []),
        *(["latency"] if config.timing.latency else []),
        *([f"continuations of prompts: {len(config.generate)}"] if config.generate else []),
    ]
    if None in models or not all(Path(source).exists() for source in (*config.text.data, *config.facts)):
        return None
    return f"evaluating {', '.join(map(str, models))}: {'; '.join(measured)}"


def check_evaluate(config: EvaluateConfig) -> None:
    """Raises ``UserError`` where nothing would be measured, or its report could not be written."""
    tasks = config.zero_shot
    if not config.model:
        raise UserError("there is no model to evaluate; give --model DIR")
    if not (config.text.data or config.facts or tasks.tasks or config.timing.latency or config.generate):
        raise UserError(
            "there is nothing to measure; give --data FILE, --facts FILE, --tasks NAMES, --latency or --generate PROMPT"
        )
    if not tasks.tasks and (tasks.task_data or tasks.task_limit is not None):
        raise UserError("--task-data and --task-limit belong to --tasks; name the tasks")
    for output in filter(None, (config.json, config.markdown)):
        check_output_file(output)


def _model(name: str) -> str | None:
    """A Hugging Face directory with its type and depth; ``None`` where there is none, as of a name on the hub."""
    try:
        config = read_json_object(Path(name) / "config.json")
        return f"{name} ({config['model_type']}, {config['num_hidden_layers']} layers)"
    except (OSError, UserError, KeyError):
        return None
