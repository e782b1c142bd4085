"""What evaluations and continuations of Hugging Face models can be told."""

from __future__ import annotations

import dataclasses
from typing import Literal

from megatron_midus.config.fields import part
from megatron_midus.config.text import TextConfig, check_at_least_one
from megatron_midus.errors import UserError

Dtype = Literal["auto", "float32", "bfloat16", "float16"]


@dataclasses.dataclass(frozen=True)
class WindowConfig:
    """Windows over the text"""

    stride: int | None = None
    """Tokens by which the next window starts later. When absent: --seq-length, no overlap."""

    mode: Literal["packed", "document"] = "packed"
    """packed = all documents in one stream; document = each on its own."""

    max_tokens: int | None = None
    """Use only the first documents, up to so many tokens of the first model."""

    def __post_init__(self) -> None:
        check_at_least_one(self, "stride", "max_tokens")


@dataclasses.dataclass(frozen=True)
class TaskConfig:
    """Zero-shot tasks"""

    tasks: list[str] = dataclasses.field(default_factory=list, metadata={"metavar": "NAME", "separator": ","})
    """Tasks of lm-eval, separated by spaces or commas; those of the paper are
    wikitext,arc_easy,arc_challenge,logiqa,piqa,winogrande,commonsense_qa,boolq,mmlu."""

    task_data: str | None = dataclasses.field(default=None, metadata={"metavar": "DIR"})
    """Local files of the tasks, for machines without a network (layout: docs/evaluation.md); the prompts stay lm-eval's own."""

    save_task_data: str | None = dataclasses.field(default=None, metadata={"metavar": "DIR"})
    """Write the data of --tasks to this directory, for --task-data, and exit."""

    task_engine: Literal["transformers", "vllm"] = "transformers"
    """What computes the tasks: transformers, or vLLM, which batches by itself and is one process."""

    task_engine_args: list[str] = dataclasses.field(default_factory=list, metadata={"metavar": "NAME=VALUE"})
    """Arguments of vLLM's LLM, for instance gpu_memory_utilization=0.8 enforce_eager=True."""

    max_length: int | None = None
    """Most tokens that a model reads in a task. When absent: the shortest context of the models, at most 2048."""

    task_limit: int | None = dataclasses.field(default=None, metadata={"metavar": "N"})
    """Only the first N items of each task, for a trial."""

    def __post_init__(self) -> None:
        check_at_least_one(self, "max_length", "task_limit")
        if self.task_engine_args and self.task_engine != "vllm":
            raise UserError(f"--task-engine-args {' '.join(self.task_engine_args)} are vLLM's; give --task-engine vllm")
        for argument in self.task_engine_args:
            if not argument.partition("=")[2]:
                raise UserError(f"--task-engine-args {argument}: give NAME=VALUE")


@dataclasses.dataclass(frozen=True)
class LatencyConfig:
    """Latency"""

    latency: bool = False
    """Also time prefill and decoding and count memory, all models loaded."""

    latency_prompt_tokens: int = 256
    """Length of the prompts."""

    latency_decode_tokens: int = 32
    """Decoding steps of a round."""

    latency_batch_size: int = 1
    """Sequences at once."""

    latency_rounds: int = 7
    """Timed rounds of all models in turn."""

    def __post_init__(self) -> None:
        check_at_least_one(self, *(field.name for field in dataclasses.fields(self) if field.name != "latency"))


@dataclasses.dataclass(frozen=True)
class RuntimeConfig:
    """How models are run"""

    batch_size: int = 8
    """Windows or requests in one call of the model."""

    dtype: Dtype = "auto"
    """Of the weights; auto = float32 on a CPU, the checkpoint's own on a GPU."""

    device: str | None = None
    """cpu, cuda, cuda:1, … When absent: a GPU if there is one."""

    trust_remote_code: bool = False
    """Run modeling code that lies in a model's directory."""

    def __post_init__(self) -> None:
        check_at_least_one(self, "batch_size")


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """Continuations"""

    generate_tokens: int = 64
    """Tokens of a continuation, at most."""

    temperature: float = 0.0
    """Of the continuations; 0 = greedy."""

    seed: int = 0
    """Of the sampling."""

    def __post_init__(self) -> None:
        check_at_least_one(self, "generate_tokens")
        if self.temperature < 0:
            raise UserError(f"--temperature {self.temperature} must be 0 or more; 0 takes the most likely token")


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """Evaluation

    Compares Hugging Face models: perplexity on held-out text, zero-shot tasks, recall of facts, parameters, latency and memory.

    Examples:
      midus evaluate --model BASE MIDUS --data heldout.jsonl
      midus evaluate --model BASE MIDUS --tasks wikitext,arc_easy,piqa --task-data DIR --markdown results.md
      midus evaluate --tasks wikitext,arc_easy,piqa --save-task-data DIR       (where there is a network)
    """

    model: list[str] = dataclasses.field(default_factory=list, metadata={"metavar": "DIR"})
    """Hugging Face directories, or org/name[@revision] on the Hugging Face hub; the first is the baseline."""

    facts: list[str] = dataclasses.field(default_factory=list, metadata={"metavar": "FILE", "append": True})
    """Questions, .jsonl with "prompt" and "answer": how often the greedy continuation of the prompt is the answer."""

    add_bos: bool = False
    """Start every document and prompt with the beginning-of-sequence token."""

    generate: list[str] = dataclasses.field(default_factory=list, metadata={"metavar": "PROMPT"})
    """Also continue these prompts with each model."""

    json: str | None = dataclasses.field(default=None, metadata={"metavar": "OUT"})
    """Write everything here as JSON."""

    markdown: str | None = dataclasses.field(default=None, metadata={"metavar": "OUT"})
    """Write the table here as Markdown."""

    text: TextConfig = part(TextConfig)
    windows: WindowConfig = part(WindowConfig)
    zero_shot: TaskConfig = part(TaskConfig)
    timing: LatencyConfig = part(LatencyConfig)
    runtime: RuntimeConfig = part(RuntimeConfig)
    sampling: SamplingConfig = part(SamplingConfig)


@dataclasses.dataclass(frozen=True)
class GenerateConfig:
    """Generation

    Continues prompts with a Hugging Face model.

    Examples:
      midus generate --model DIR --prompt "The memory block"
      midus generate --model DIR --prompt "One" "Two" --temperature 0.8 --generate-tokens 128
    """

    model: str = dataclasses.field(metadata={"metavar": "DIR"})
    """Hugging Face directory of the model, or org/name[@revision] on the Hugging Face hub."""

    prompt: list[str] = dataclasses.field(metadata={"metavar": "TEXT"})
    """Texts to continue."""

    add_bos: bool = False
    """Start every prompt with the beginning-of-sequence token."""

    runtime: RuntimeConfig = part(RuntimeConfig)
    sampling: SamplingConfig = part(SamplingConfig)
