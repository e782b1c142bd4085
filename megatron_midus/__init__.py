"""MIDUS, Memory-Infused Depth Up-Scaling, on Megatron-Core: up-scale, continue pre-training, export."""

__version__ = "0.1.0"
