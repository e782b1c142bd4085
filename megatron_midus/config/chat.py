"""What a conversation in the terminal, and a server, can be told."""

from __future__ import annotations

import dataclasses
from typing import Literal

from megatron_midus.config.evaluate import RuntimeConfig, SamplingConfig
from megatron_midus.config.fields import part
from megatron_midus.config.text import check_at_least_one
from megatron_midus.errors import UserError


@dataclasses.dataclass(frozen=True)
class ChatConfig:
    """Chat

    A conversation with a fine-tuned model in the terminal, through its own chat template. /reset begins anew, /exit ends;
    Ctrl-C stops an answer.

    Examples:
      midus chat midus_hf
      midus chat midus_hf --system "Answer in one sentence." --temperature 0.7 --generate-tokens 512
    """

    model: str = dataclasses.field(metadata={"metavar": "DIR", "positional": True})
    """Hugging Face directory of the model, or org/name[@revision] on the Hugging Face hub."""

    system: str | None = dataclasses.field(default=None, metadata={"metavar": "TEXT"})
    """System prompt."""

    runtime: RuntimeConfig = part(RuntimeConfig)
    sampling: SamplingConfig = part(SamplingConfig)


@dataclasses.dataclass(frozen=True)
class ServeConfig:
    """Serving

    Serves a model over OpenAI's interface: by vLLM, with this package's plugin, where it is installed; else by the server of
    transformers. Ends when the server does.

    Examples:
      midus serve midus_hf
      midus serve midus_hf --port 8080 --name midus-1b --tensor-parallel-size 2 --server-flags="--enforce-eager"
    """

    model: str = dataclasses.field(metadata={"metavar": "DIR", "positional": True})
    """Hugging Face directory of the model, or org/name[@revision] on the Hugging Face hub."""

    host: str = "127.0.0.1"
    """Address to listen at; 0.0.0.0 for all of this machine's."""

    port: int = 8000
    """Port to listen at."""

    name: str | None = None
    """What clients call the model (vLLM); the name of its directory when absent."""

    engine: Literal["auto", "vllm", "transformers"] = "auto"
    """auto = vllm where it is installed, else transformers."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the weights; auto = the checkpoint's own."""

    max_length: int | None = None
    """Most tokens of a prompt and its answer (vLLM); the model's own limit when absent."""

    tensor_parallel_size: int = 1
    """GPUs that share the model (vLLM)."""

    server_flags: str = dataclasses.field(default="", metadata={"metavar": "'FLAG ...'"})
    """More flags of the server itself, as a shell would read them; written with =, because they begin with dashes."""

    def __post_init__(self) -> None:
        check_at_least_one(self, "port", "max_length", "tensor_parallel_size")
        if self.port > 65535:
            raise UserError(f"--port {self.port} is no port; choose 1 to 65535")
