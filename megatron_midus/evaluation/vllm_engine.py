"""A model in vLLM as lm-eval sees it: lm-eval's own ``VLLM``, with the limits and dtypes that this package's tasks have."""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from megatron_midus.errors import UserError
from megatron_midus.integrations.vllm import is_installed

# lm-eval's transformers reads max_length tokens and scores one more; vLLM is fed that one, too, and has to write one.
_MORE_TOKENS = 2


def version() -> str:
    """Of the vLLM that is installed."""
    import vllm

    return str(vllm.__version__)


def check_engine(*, num_processes: int, device: str, max_length: int, contexts: Sequence[int]) -> None:
    """Raises ``ValueError`` where tasks cannot run in vLLM.

    Args:
        num_processes: of this evaluation.
        device: that was asked for, or found.
        max_length: tokens that a model reads at most.
        contexts: ``max_position_embeddings`` of the models.
    """
    if num_processes > 1:
        raise UserError(
            f"--task-engine vllm runs in one process and there are {num_processes}; start it without torchrun, or leave the flag out: "
            "transformers shares the tasks among processes"
        )
    if torch.device(device).index:
        raise UserError(
            f"--device {device}: vLLM takes the first GPU that it sees; give CUDA_VISIBLE_DEVICES={torch.device(device).index} and "
            "--device cuda"
        )
    if any(max_length > context - _MORE_TOKENS for context in contexts):
        raise UserError(
            f"max_length={max_length}: vLLM needs {_MORE_TOKENS} tokens more, and a model was made for {min(contexts)}; give "
            f"--max-length {min(contexts) - _MORE_TOKENS} at most"
        )
    if importlib.util.find_spec("vllm") is None:
        raise UserError(
            "--task-engine vllm needs vLLM, which is not installed; pip install vllm, or leave the flag out"
        )


def default_max_length(max_length: int, contexts: Sequence[int]) -> int:
    """That of transformers, shortened where a model's context has no room for what vLLM needs."""
    return min([max_length, *(context - _MORE_TOKENS for context in contexts)])


@contextlib.contextmanager
def vllm_engine(
    directory: str,
    *,
    dtype: str,
    device: str,
    max_length: int,
    add_bos: bool,
    is_midus: bool,
    trust_remote_code: bool,
    options: Sequence[str] = (),
) -> Iterator[Any]:
    """lm-eval's model of ``directory``, in vLLM, which goes with its memory at the end.

    Args:
        directory: a Hugging Face directory.
        dtype: of the weights, as transformers loads them.
        device: ``cpu`` or ``cuda``.
        max_length: tokens that the model reads at most; longer prompts lose their beginning.
        add_bos: start every request with the beginning-of-sequence token; otherwise as the tokenizer does by default.
        is_midus: whether it has Memory blocks; where vLLM has no plugin, the code in the directory runs.
        trust_remote_code: run the code in the directory of another model.
        options: ``NAME=VALUE``, of vLLM's ``LLM``.

    Raises:
        ValueError: a vLLM for another device, or a model that vLLM does not load.
    """
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    try:
        from lm_eval.models.vllm_causallms import VLLM
        from lm_eval.utils import simple_parse_args_string
        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory
        from vllm.platforms import current_platform
    except ImportError as error:
        raise UserError(f"--task-engine vllm: lm-eval cannot import vLLM ({error}); see docs/serving.md") from None
    runs_on = current_platform.device_type
    if runs_on != torch.device(device).type:
        raise UserError(f"--device {device}: the vLLM that is installed runs on {runs_on}; give --device {runs_on}")

    class CheckedVLLM(VLLM):
        """Refuses an answer that does not fit, of which lm-eval would score a part."""

        def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False) -> Any:
            if any(len(answer) > max_length for _, _, answer in requests):
                raise UserError(
                    f"an answer is longer than max_length={max_length} tokens and cannot be scored; give a larger one"
                )
            return super()._loglikelihood_tokens(requests, disable_tqdm=disable_tqdm)

    try:
        engine = CheckedVLLM(
            pretrained=directory,
            dtype=dtype,
            max_length=max_length + _MORE_TOKENS,
            add_bos_token=True if add_bos else None,
            **simple_parse_args_string(",".join(options)),
            trust_remote_code=not is_installed() if is_midus else trust_remote_code,
        )
    # Its engine, its workers and transformers below it have no common error.
    except Exception as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"{directory} cannot be loaded by vLLM: {reason}") from error
    try:
        yield engine
    finally:
        engine.model = None
        del engine
        gc.collect()
        cleanup_dist_env_and_memory()
