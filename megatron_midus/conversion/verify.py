"""Is the result what was promised? Logits of base and up-scaled model, and tensors of both ends of a conversion."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from megatron_midus.conversion.families import family_of
from megatron_midus.conversion.hf_io import CONFIG_FILE, SafetensorsReader, read_hf_config
from megatron_midus.conversion.stored import canonical_shapes
from megatron_midus.errors import UserError
from megatron_midus.hub import dtype_argument
from megatron_midus.upscaling.tensors import OUTPUT_LAYER, Shape, TensorSource


@dataclasses.dataclass(frozen=True)
class LogitComparison:
    """Two models on the same tokens.

    Attributes:
        max_difference: largest absolute difference of two logits.
        sigma: standard deviation of the first model's logits, the scale of that difference.
        argmax_agreement: share of positions with the same most likely token.
        kl: Kullback-Leibler divergence of the second from the first, nats per token, mean over the positions.
        bit_equal: whether every logit is the same to the last bit.
    """

    max_difference: float
    sigma: float
    argmax_agreement: float
    kl: float
    bit_equal: bool

    def describe(self) -> str:
        return (
            f"max difference {self.max_difference:.3e} (logits' sigma {self.sigma:.3e}), argmax agreement "
            f"{100 * self.argmax_agreement:.2f} %, KL {self.kl:.3e} nats/token, "
            f"bit-equal {'yes' if self.bit_equal else 'no'}"
        )


def load_fp32(directory: str | Path) -> Any:
    """A causal model of transformers from a local directory, in fp32 and evaluation mode."""
    try:
        config = transformers.AutoConfig.from_pretrained(str(directory), local_files_only=True)
    except ValueError as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"transformers cannot load {directory}/{CONFIG_FILE} ({reason}); fix it") from error
    # Beside weights in full precision it would have them quantised; the readers here refuse any others.
    for entry in ("quantization_config", "compression_config"):
        if hasattr(config, entry):
            delattr(config, entry)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        str(directory), config=config, local_files_only=True, **{dtype_argument(): torch.float32}
    )
    # Mapped files leave tensors where they lie in them, and products of matrices round by how those are aligned.
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model.eval()


def check_loadable(config: dict[str, Any], expected: dict[str, Shape]) -> None:
    """Builds the model of a ``config.json`` without memory for it, as loading does first.

    Args:
        config: its content; for a MIDUS model ``megatron_midus.hf.register()`` must have been called.
        expected: canonical names and shapes of the tensors that are, or will be, in the files.

    Raises:
        ValueError: transformers cannot read the configuration, or makes other tensors of it.
    """
    with tempfile.TemporaryDirectory(prefix="midus-config-") as temporary:
        (Path(temporary) / CONFIG_FILE).write_text(json.dumps(config), encoding="utf-8")
        found = canonical_shapes(_shapes_on_meta(temporary), expected, family_of(config).stored)
    wanted = {name: tuple(shape) for name, shape in expected.items()}
    if found != wanted:
        odd = sorted(name for name in {*found, *wanted} if found.get(name) != wanted.get(name))
        raise UserError(
            f"transformers makes another model of the config.json of the result: {odd[0]} is {found.get(odd[0])} there "
            f"and {wanted.get(odd[0])} here; fix the base's"
        )


def _shapes_on_meta(directory: str) -> dict[str, Shape]:
    """Names and shapes of the parameters that transformers makes of a directory's configuration; a tied one once."""
    try:
        config = transformers.AutoConfig.from_pretrained(directory, local_files_only=True)
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config)
    # Whatever transformers raises about a configuration: KeyError, TypeError, ValueError, StrictDataclassFieldError.
    except Exception as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"transformers cannot load the config.json of the result ({reason}); fix the base's") from error
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    if config.tie_word_embeddings:
        shapes.pop(OUTPUT_LAYER, None)
    return shapes


def check_loads(directory: str | Path, expected: dict[str, Shape]) -> None:
    """Raises ``ValueError`` when ``from_pretrained(directory)`` would fail; reads ``config.json`` and headers alone."""
    config, reader = read_hf_config(directory), SafetensorsReader(directory)
    reader.rename(expected, family_of(config).stored)
    check_loadable(config, {name: reader.shape(name) for name in reader.names()})


def round_parameters(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Rounds every parameter to ``dtype`` and back, so that a model is compared with what was written of it."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(dtype).to(parameter.dtype))


def compare_logits(first: Any, second: Any, *, vocab_size: int, num_sequences: int = 3, seq_length: int = 33, seed: int = 0) -> LogitComparison:  # fmt: skip
    """Runs both models on ``num_sequences`` random sequences of ``seq_length`` token ids."""
    ids = random_tokens(vocab_size=vocab_size, num_sequences=num_sequences, seq_length=seq_length, seed=seed)
    return compare(logits_of(first, ids), logits_of(second, ids))


def random_tokens(*, vocab_size: int, num_sequences: int = 3, seq_length: int = 33, seed: int = 0) -> torch.Tensor:
    """``[num_sequences, seq_length]`` token ids, drawn evenly."""
    return torch.randint(vocab_size, (num_sequences, seq_length), generator=torch.Generator().manual_seed(seed))


def logits_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """``[b, s] -> [b, s, vocabulary]`` of a causal model of transformers."""
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def compare(one: torch.Tensor, two: torch.Tensor) -> LogitComparison:
    """Compares logits ``[b, s, vocabulary]`` of two models on the same tokens."""
    first, second = (logits.double().log_softmax(-1) for logits in (one, two))
    return LogitComparison(
        max_difference=(one - two).abs().max().item(),
        sigma=one.std().item(),
        argmax_agreement=(one.argmax(-1) == two.argmax(-1)).float().mean().item(),
        # Rounding may leave a sum of tiny terms below zero.
        kl=max(0.0, (first.exp() * (first - second)).sum(-1).mean().item()),
        bit_equal=torch.equal(one, two),
    )


def first_difference(
    wanted: TensorSource, found: TensorSource, progress: Callable[[str], None] = lambda name: None
) -> str | None:
    """The first tensor in which two sources differ, in words; ``None`` when all names, dtypes and values agree."""
    if set(wanted.names()) != set(found.names()):
        odd = sorted(set(wanted.names()) ^ set(found.names()))
        return f"{odd[0]} is on one side only"
    for name in wanted.names():
        one, two = wanted.read(name), found.read(name)
        if one.dtype != two.dtype or one.shape != two.shape:
            return f"{name} is {one.dtype} {list(one.shape)} against {two.dtype} {list(two.shape)}"
        if not torch.equal(one, two) and not _same_bytes(one, two):
            return f"{name} differs by up to {(one.double() - two.double()).abs().max().item():.3e}"
        progress(name)
    return None


def _same_bytes(one: torch.Tensor, two: torch.Tensor) -> bool:
    """NaN differs from itself, but the same bytes are the same tensor."""
    return torch.equal(one.contiguous().view(torch.uint8), two.contiguous().view(torch.uint8))
