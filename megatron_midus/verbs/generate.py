"""``midus generate``: continues prompts with a Hugging Face model."""

from __future__ import annotations

import dataclasses

from megatron_midus.config.evaluate import GenerateConfig
from megatron_midus.data.tokenizer import HuggingFaceTokenizer, check_tokenizer_fits
from megatron_midus.evaluation.generation import generate_text
from megatron_midus.evaluation.loading import choose_device, load_model, num_embeddings, read_config
from megatron_midus.hub import fetched_model
from megatron_midus.progress import Progress
from megatron_midus.verbs.verb import verb


@verb(GenerateConfig)
def generate(config: GenerateConfig, progress: Progress) -> list[str]:
    """One continuation a prompt. See ``GenerateConfig`` for the settings.

    Raises:
        UserError: a model that cannot be loaded, a tokenizer that does not fit it.
    """
    config = dataclasses.replace(config, model=fetched_model(config.model))
    runtime, sampling = config.runtime, config.sampling
    device = choose_device(runtime.device)
    read_config(config.model)
    tokenizer = HuggingFaceTokenizer(config.model)
    model = load_model(config.model, dtype=runtime.dtype, device=device, trust_remote_code=runtime.trust_remote_code)
    check_tokenizer_fits(tokenizer, num_embeddings(model), where=config.model)
    texts = []
    with progress("generating", total=len(config.prompt), unit="prompt") as advance:
        for prompt in config.prompt:
            texts.append(
                generate_text(
                    model,
                    tokenizer,
                    prompt,
                    max_new_tokens=sampling.generate_tokens,
                    temperature=sampling.temperature,
                    seed=sampling.seed,
                    add_bos=config.add_bos,
                )
            )
            advance(1)
    return texts


def command(config: GenerateConfig) -> int:
    """``midus generate``."""
    for prompt, text in zip(config.prompt, generate(config)):
        print(f"{prompt}{text}\n")
    return 0
