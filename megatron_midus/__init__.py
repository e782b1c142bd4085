"""MIDUS, Memory-Infused Depth Up-Scaling, on Megatron-Core: up-scale, continue pre-training, export.

The verbs are functions here, with the names of their flags as keywords:

    import megatron_midus as midus
    midus.upscale(hf_model="base", save="upscaled", num_blocks=4)
    midus.pretrain(pretrained_checkpoint="upscaled", load="run", save="run", data_path=["data"], train_iters=100, lr=1e-3)
    midus.convert(load="run", save="midus_hf", to="hf")
"""

import importlib
from typing import Any

__version__ = "0.1.0"

# Typed in __init__.pyi.
__all__ = [
    "analyze", "average", "background", "chat", "compare", "convert", "doctor", "evaluate", "generate", "merge", "plan", "preprocess",
    "pretrain", "push", "recipe", "serve", "upscale",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """A verb is imported when it is first used: importing the package loads neither torch nor Megatron."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.verbs.{name}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
