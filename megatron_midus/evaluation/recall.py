"""Recall of facts: whether a model's greedy continuation of a prompt is the answer, and how likely the answer is.

One forward pass over prompt and answer decides it: if every token of the answer is the most likely one behind the true tokens before it, greedy decoding
from the prompt writes exactly these tokens, and otherwise it leaves them at the first that is not.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch

from megatron_midus.errors import UserError
from megatron_midus.evaluation.perplexity import Tokenizer
from megatron_midus.evaluation.processes import ALONE, Processes
from megatron_midus.evaluation.scores import Score, mean_influences, root_sum_of_squares
from megatron_midus.progress import SILENT, Progress


@dataclasses.dataclass(frozen=True)
class Question:
    """The answer follows the prompt as it is written: with the space before it, and the full stop that ends it."""

    prompt: str
    answer: str


@dataclasses.dataclass(frozen=True)
class EncodedQuestion:
    """Tokens of prompt and answer, encoded as one text; the answer is ``ids[first:]``."""

    ids: list[int]
    first: int


def encode_questions(
    tokenizer: Tokenizer, questions: Sequence[Question], *, add_bos: bool = False
) -> list[EncodedQuestion]:
    """Each behind an end-of-document token, or the beginning-of-sequence token, as documents stand in training.

    Where a token holds the end of the prompt and the beginning of the answer, it is a part of the answer.

    Raises:
        UserError: no question, or ``add_bos`` with a tokenizer that has no such token.
    """
    if not questions:
        raise UserError("there is no question to answer")
    if add_bos and tokenizer.bos is None:
        raise UserError("the tokenizer has no beginning-of-sequence token to start questions with")
    head = tokenizer.bos if add_bos and tokenizer.bos is not None else tokenizer.eod
    prompts = tokenizer.encode_batch([question.prompt for question in questions])
    wholes = tokenizer.encode_batch([question.prompt + question.answer for question in questions])
    return [EncodedQuestion([head, *whole], 1 + _num_shared(prompt, whole)) for prompt, whole in zip(prompts, wholes)]


def _num_shared(prompt: list[int], whole: list[int]) -> int:
    """Tokens at the beginning that both have; the last of ``whole`` is always left to be predicted."""
    pairs = zip(prompt, whole[:-1])
    return next((index for index, (a, b) in enumerate(pairs) if a != b), min(len(prompt), len(whole) - 1))


def measure_recall(
    model: Any,
    questions: Sequence[EncodedQuestion],
    *,
    task: str,
    batch_size: int = 8,
    progress: Progress = SILENT,
    title: str = "recall",
    processes: Processes = ALONE,
) -> list[Score]:
    """``recall``, the share of answers that greedy decoding writes, and ``log_likelihood``, the mean of the answers' in nats.

    Args:
        model: called as ``model(input_ids=[b, s], use_cache=False)``; gives ``logits [b, s, vocabulary]``.
        questions: of ``encode_questions`` with this model's tokenizer.
        task: name in the scores.
        batch_size: questions in one call.
        progress: shows how many have been answered, under ``title``.
        processes: share the batches, which are those of one process.

    Raises:
        UserError: a likelihood that is not finite.
    """
    device = next(model.parameters()).device
    order = sorted(range(len(questions)), key=lambda index: -len(questions[index].ids))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    own, found = processes.own(batches), []
    with progress(title, total=sum(map(len, own)), unit="question") as advance:
        for indices in own:
            found.append(_answer(model, [questions[index] for index in indices], device))
            advance(len(indices))
    recalled, log_likelihoods = [0.0] * len(questions), [0.0] * len(questions)
    for indices, answers in zip(batches, processes.all_of(found)):
        for index, (is_recalled, log_likelihood) in zip(indices, answers):
            recalled[index], log_likelihoods[index] = float(is_recalled), log_likelihood
    if not all(map(math.isfinite, log_likelihoods)):
        raise UserError("a likelihood is not finite; the model overflows in this dtype, give --dtype float32")
    return [_mean(task, "recall", recalled), _mean(task, "log_likelihood", log_likelihoods)]


@torch.inference_mode()
def _answer(model: Any, batch: Sequence[EncodedQuestion], device: torch.device) -> list[tuple[bool, float]]:
    """Whether each answer is the greedy continuation, and its log likelihood in nats."""
    inputs = torch.zeros(len(batch), max(len(question.ids) for question in batch) - 1, dtype=torch.int64)  # [b, s]
    for row, question in enumerate(batch):
        # Padding stands on the right, where a causal model cannot see it.
        inputs[row, : len(question.ids) - 1] = torch.tensor(question.ids[:-1])
    logits = model(input_ids=inputs.to(device), use_cache=False).logits  # [b, s, vocabulary]
    found = []
    for row, question in enumerate(batch):
        answer = torch.tensor(question.ids[question.first :], device=device)  # [a]
        predicted = logits[row, question.first - 1 : len(question.ids) - 1].float()  # [a, vocabulary]
        nats = predicted.log_softmax(-1).gather(-1, answer[:, None]).double().sum().item()
        found.append((bool((predicted.argmax(-1) == answer).all()), nats))
    return found


def _mean(task: str, metric: str, values: list[float]) -> Score:
    influences = mean_influences([values])
    stderr = None if influences is None else root_sum_of_squares(influences)
    mean = math.fsum(values) / len(values)
    return Score(task, metric, mean, stderr, True, len(values), None if influences is None else tuple(influences))
