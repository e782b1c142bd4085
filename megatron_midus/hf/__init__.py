"""The Hugging Face side: configuration and model files that travel inside every export, and their registration."""

from pathlib import Path

from megatron_midus.hf.configuration_midus import MidusConfig
from megatron_midus.hf.modeling_midus import MidusForCausalLM, MidusModel

NAMES = ("configuration_midus.py", "lookup_midus.py", "modeling_midus.py")
CODE_FILES = tuple(Path(__file__).with_name(name) for name in NAMES)


def register() -> None:
    """Makes ``AutoConfig`` and the auto models know model type ``midus`` in this process; may be called repeatedly.

    An exported directory needs none of this: it loads with ``trust_remote_code=True``.
    """
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    AutoConfig.register(MidusConfig.model_type, MidusConfig, exist_ok=True)
    AutoModel.register(MidusConfig, MidusModel, exist_ok=True)
    AutoModelForCausalLM.register(MidusConfig, MidusForCausalLM, exist_ok=True)


__all__ = ["CODE_FILES", "MidusConfig", "MidusForCausalLM", "MidusModel", "register"]
