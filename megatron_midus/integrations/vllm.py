"""Plugin of vLLM: in every process of the engine, MIDUS models load without ``--trust-remote-code``."""

from __future__ import annotations

import importlib.metadata

ARCHITECTURE = "MidusForCausalLM"
# A name, so that it is imported when a model needs it and not before a process has chosen its GPU.
BACKEND = "megatron_midus.integrations.vllm_model:MidusForCausalLM"


def is_installed() -> bool:
    """Whether vLLM finds this plugin; from a checkout that is not installed it does not."""
    return any(entry.name == "midus" for entry in importlib.metadata.entry_points(group="vllm.general_plugins"))


def register() -> None:
    """Entry point ``vllm.general_plugins``; vLLM may call it several times in one process.

    Raises:
        ImportError: outside of vLLM, where nobody calls it.
    """
    from vllm import ModelRegistry

    from megatron_midus.hf import register as register_with_transformers

    register_with_transformers()
    _read_old_names()
    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(ARCHITECTURE, BACKEND)


def _read_old_names() -> None:
    """Lets vLLM, which asks transformers for them, read parameters under the names that they had in earlier exports.

    In an engine's process alone: a model that is made, not loaded, would be *saved* under the old names as well.
    """
    try:
        from transformers.conversion_mapping import register_checkpoint_conversion_mapping
        from transformers.core_model_loading import WeightRenaming
    except ImportError:  # transformers 4, whose vLLM has no such way
        return
    from megatron_midus.hf.modeling_midus import OLD_NAMES

    renamings = [WeightRenaming(rf"\.memory\.{old}$", f".memory.{new}") for old, new in OLD_NAMES.items()]
    register_checkpoint_conversion_mapping("midus", renamings, overwrite=True)
