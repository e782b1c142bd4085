"""Checkpoints between Hugging Face and Megatron: names are declarative, tensors are streamed."""
