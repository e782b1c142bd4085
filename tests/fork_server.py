"""Where tests take processes from that have Megatron and transformers already: importing them takes seconds, a fork none."""

from __future__ import annotations

import multiprocessing

# All that a run of the driver or of a scenario imports, also in its functions. There is one fork server in a process.
_PRELOAD = [
    "megatron_midus.training.main",
    "megatron_midus.training.pretrain",
    "megatron_midus.model.builder",
    "megatron_midus.data.tokenizer",
    "transformers.models.llama.configuration_llama",
    "transformers.utils.type_validators",
    "transformers.tokenization_utils_tokenizers",
    # The last one: garbage collections of the forks leave alone what they inherit.
    "frozen_heap",
]


def fork_server() -> multiprocessing.context.ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    return context
