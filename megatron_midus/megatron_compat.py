"""What the supported releases of Megatron-Core do differently, told by what is there and never by a version number.

Where a release merely hands over one more argument (``name`` of a linear layer, ``capturable`` of an Adam, ``has_residual``
of a norm), whoever is called takes it, and nothing stands here.
"""

from __future__ import annotations

import importlib.util
import inspect
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import serialization
from megatron.core.dist_checkpointing.strategies import common


def _takes(function: Any, argument: str) -> bool:
    return argument in inspect.signature(function).parameters


def save_checkpoint(state: dict[str, Any], directory: str | Path, strategy: Any = None, **options: Any) -> Any:
    """``dist_checkpointing.save`` by Megatron-Core's own writer. Collective over all ranks.

    Later releases write in the background by nvidia-resiliency-ext unless they are told otherwise. Its requests are of
    another kind than those that this package adds its hashing to.

    Returns:
        The ``AsyncRequest`` with ``async_sharded_save=True``, else ``None``.
    """
    if _takes(dist_checkpointing.save, "async_strategy"):
        options["async_strategy"] = "mcore"
    return dist_checkpointing.save(state, str(directory), strategy, **options)


def load_checkpoint(state: dict[str, Any], directory: str | Path) -> dict[str, Any]:
    """``dist_checkpointing.load`` of what ``state`` names, whichever release wrote the checkpoint. Collective.

    What all ranks have alike is not for here, ``checkpoint.common_state`` reads it without running any of it. Releases
    before 0.19 would fail without a ``common.pt``, which later ones do not write.
    """
    strategy = getattr(common, "TorchCommonLoadStrategy", None)
    if strategy is not None:
        nothing = type("NoCommonState", (strategy,), {"load_common": lambda self, directory: {}})()
        return dist_checkpointing.load(state, str(directory), common_strategy=nothing)
    # Later releases have no strategy for it; load() calls the one of these functions that it has.
    replaced = {name: getattr(serialization, name) for name in ("load_common", "load_common_state_dict")}
    try:
        for name in replaced:
            setattr(serialization, name, lambda directory: {})
        return dist_checkpointing.load(state, str(directory))
    finally:
        for name, function in replaced.items():
            setattr(serialization, name, function)


def use_built_dataset_helpers() -> None:
    """Lets ``megatron.training`` start from a wheel: it runs ``make`` for the dataset helpers, and the wheel has the built
    helpers but no makefile, so that the run ends there. Nothing is replaced where there is a makefile."""
    from megatron.core.datasets import utils

    if not (Path(utils.__file__).parent / "Makefile").is_file():
        utils.compile_helpers = lambda: importlib.import_module("megatron.core.datasets.helpers_cpp")


def let_upstream_start_without_nvcc() -> None:
    """Lets ``megatron.training`` of 0.16 start where there is no CUDA toolkit: it asks nvcc for its version before kernels that
    it does not have any more, and the run ends there. Nothing is replaced where there is a toolkit, or where nobody asks."""
    from torch.utils import cpp_extension

    if cpp_extension.CUDA_HOME is None and importlib.util.find_spec("megatron.legacy") is not None:
        from megatron.legacy import fused_kernels

        fused_kernels.load = lambda args: None


def let_routers_run_without_transformer_engine() -> None:
    """Gives Megatron-Core's router the name that it asks for Transformer Engine's matrix product; without Transformer Engine
    the releases up to 0.16 leave it undefined, and a router fails."""
    from megatron.core.transformer.moe import moe_utils

    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None


def mlp_submodules(spec: Any) -> Any:
    """The ``MLPSubmodules`` of a dense MLP's spec, which is a partial of a builder since 0.18."""
    return spec.submodules if hasattr(spec, "submodules") else spec.keywords["submodules"]
