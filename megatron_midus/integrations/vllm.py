"""Plugin of vLLM: in every process of the engine, MIDUS models load without ``--trust-remote-code``."""

from __future__ import annotations

ARCHITECTURE = "MidusForCausalLM"
# vLLM's own wrapper around models of transformers; it builds the decoder with AutoModel. A name, so that it is imported
# when a model needs it and not before a process has chosen its GPU.
BACKEND = "vllm.model_executor.models.transformers:TransformersForCausalLM"


def register() -> None:
    """Entry point ``vllm.general_plugins``; vLLM may call it several times in one process.

    Raises:
        ImportError: outside of vLLM, where nobody calls it.
    """
    from vllm import ModelRegistry

    from megatron_midus.hf import register as register_with_transformers

    register_with_transformers()
    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(ARCHITECTURE, BACKEND)
