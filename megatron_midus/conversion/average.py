"""The mean of several checkpoints of one model, as a source of tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_midus.upscaling.tensors import Shape, TensorSource


class AveragedTensors:
    """Means of equally named tensors; what is equal in all of them stays as it is, bit by bit.

    Args:
        sources: of one model, at least one. Names, shapes and dtypes are those of the last.
    """

    def __init__(self, sources: Sequence[TensorSource]) -> None:
        self._sources = sources

    def names(self) -> Sequence[str]:
        return self._sources[-1].names()

    def shape(self, name: str) -> Shape:
        return self._sources[-1].shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self._sources[-1].dtype(name)

    def read(self, name: str) -> torch.Tensor:
        """One tensor of one source at a time is in memory, beside the mean in fp32 (fp64 for fp64)."""
        mean: torch.Tensor | None = None
        for count, source in enumerate(self._sources, start=1):
            tensor = source.read(name)
            wide = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
            # A running mean and not a sum: equal numbers leave it alone, and it does not overflow.
            mean = wide.clone() if mean is None else mean.add_(wide.sub(mean), alpha=1 / count)
        assert mean is not None
        return mean.to(self.dtype(name))
