"""Checkpoints of a run: what is saved, how it is written, where a run begins, whether it is whole."""
