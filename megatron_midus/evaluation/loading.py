"""A causal language model from a Hugging Face directory, with every way in which that fails said in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch

from megatron_midus.checkpoint.layout import LATEST_FILE
from megatron_midus.errors import UserError
from megatron_midus.evaluation.parameters import check_safetensors
from megatron_midus.hub import dtype_argument
from megatron_midus.json_files import read_json_object

_COUNTS = ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size")
Dtype = Literal["auto", "float32", "bfloat16", "float16"]


def read_config(directory: str | Path) -> dict[str, Any]:
    """``config.json`` of ``directory``; raises ``ValueError`` when there is none."""
    directory = Path(directory)
    if not directory.is_dir():
        raise UserError(f"model directory {directory} does not exist")
    path = directory / "config.json"
    if not path.is_file():
        hint = ""
        if (directory / LATEST_FILE).is_file() or (directory / "model_config.json").is_file():
            hint = "; it looks like a Megatron checkpoint: export it with midus convert --to hf"
        raise UserError(f"{directory} holds no config.json, so it is not a Hugging Face model{hint}")
    config = read_json_object(path)
    for name in _COUNTS:
        # transformers builds a model of -1 layers and fails when it is used.
        if name in config and not (isinstance(config[name], int) and config[name] >= 1):
            raise UserError(f"{path}: {name}={config[name]!r} must be a whole number from 1")
    return config


def choose_device(name: str | None) -> torch.device:
    """The named device, or a GPU if there is one; raises ``ValueError`` for one that is not here."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    # torch has no common error: RuntimeError, AssertionError (no CUDA in this build), NotImplementedError and others
    except Exception:
        raise UserError(f"device {name!r} is not available here; choose cpu" + _cuda_devices()) from None
    return device


def _cuda_devices() -> str:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return "".join(f", cuda:{index}" for index in range(count))


def load_model(
    directory: str | Path,
    *,
    dtype: Dtype = "auto",
    device: str | torch.device = "cpu",
    trust_remote_code: bool = False,
) -> Any:
    """Loads a model for evaluation.

    Args:
        directory: a local Hugging Face directory. A model of type ``midus`` is loaded by the classes of this package,
            not by the files that lie in the directory.
        dtype: of the weights; ``auto`` = float32 on a CPU, the checkpoint's own elsewhere.
        device: where to.
        trust_remote_code: run the modeling code of a directory of another unknown type.

    Returns:
        A transformers model in evaluation mode.

    Raises:
        ValueError: no such directory, damaged or missing weights, NaN or infinities among them, an architecture that is
            not known.
    """
    config = read_config(directory)
    check_safetensors(directory)
    import transformers

    import megatron_midus.hf

    megatron_midus.hf.register()
    device = torch.device(device)
    if dtype == "auto":
        weights_dtype: torch.dtype | str = torch.float32 if device.type == "cpu" else "auto"
    else:
        weights_dtype = getattr(torch, dtype)
    # Registered classes win only when remote code is not asked for.
    is_ours = config.get("model_type") == "midus"
    if config.get("auto_map") and not is_ours and not trust_remote_code:
        raise UserError(f"{directory} carries its own modeling code; give --trust-remote-code to run it")
    try:
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            str(directory),
            **{dtype_argument(): weights_dtype},
            local_files_only=True,
            trust_remote_code=trust_remote_code and not is_ours,
            output_loading_info=True,
        )
    # Whatever transformers raises on a damaged directory: KeyError, OSError, ValueError, RuntimeError, SafetensorError.
    except Exception as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        if config.get("quantization_config"):
            reason += (
                "; its config.json has a quantization_config: where the weights are in full precision, take it out"
            )
        raise UserError(f"{directory} cannot be loaded as a causal language model: {reason}") from error
    _check_loaded(directory, info)
    _check_finite(directory, model)
    return model.to(device).eval()


def _check_loaded(directory: str | Path, info: dict[str, Any]) -> None:
    """transformers fills what a checkpoint lacks with random numbers and only warns."""
    missing = sorted(info.get("missing_keys") or [])
    mismatched = sorted(str(entry) for entry in info.get("mismatched_keys") or [])
    if missing:
        raise UserError(f"the weights in {directory} lack {len(missing)} tensors, the first is {missing[0]}")
    if mismatched:
        raise UserError(f"{len(mismatched)} tensors in {directory} do not fit its config.json: {mismatched[0]}")


def _check_finite(directory: str | Path, model: torch.nn.Module) -> None:
    """Scores of choices compare NaN with NaN and look like results."""
    for name, parameter in model.named_parameters():
        if parameter.numel() and not all(bound.isfinite() for bound in parameter.detach().aminmax()):
            raise UserError(
                f"tensor {name} in {directory} holds NaN or infinities; take weights from before they broke, or a --dtype "
                "with their range"
            )


def check_context(model: Any, seq_length: int, *, name: str) -> str | None:
    """A note when ``seq_length`` is longer than what the model was made for; ``ValueError`` when it cannot run at all."""
    config = model.config
    longest = getattr(config, "max_position_embeddings", None)
    if longest is None or seq_length <= longest:
        return None
    is_rotary = any(getattr(config, entry, None) for entry in ("rope_theta", "rope_parameters", "rope_scaling"))
    if not is_rotary:
        raise UserError(f"seq_length={seq_length} exceeds the {longest} positions of {name}; choose at most {longest}")
    return f"{name} was made for {longest} tokens; its figures at seq_length={seq_length} are outside of that"


def num_embeddings(model: Any) -> int:
    """Rows of the input embedding."""
    return model.get_input_embeddings().weight.shape[0]
