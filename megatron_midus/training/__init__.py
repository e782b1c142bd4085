"""Continued pre-training: the driver's flags, the loop on Megatron-Core's services, checkpoints, telemetry."""
