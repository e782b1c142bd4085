"""Evaluation of Hugging Face directories: perplexity on held-out text, parameter counts, generation. No Megatron."""

from megatron_midus.evaluation.loading import load_model
from megatron_midus.evaluation.parameters import ParameterCounts, count_parameters
from megatron_midus.evaluation.perplexity import Perplexity, measure_perplexity

__all__ = ["ParameterCounts", "Perplexity", "count_parameters", "load_model", "measure_perplexity"]
