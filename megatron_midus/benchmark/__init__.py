"""Benchmarks behind tools/benchmark.py: a look-up, a block, a training iteration, each against what it replaces."""
