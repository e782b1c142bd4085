"""``midus serve``: a model over OpenAI's interface, by vLLM or by transformers. Becomes that server."""

from __future__ import annotations

import importlib.util
import os
import shlex
import subprocess
import sys
from pathlib import Path

from megatron_midus.config.chat import ServeConfig
from megatron_midus.errors import UserError
from megatron_midus.hub import fetched_model, short_name
from megatron_midus.integrations.vllm import is_installed
from megatron_midus.json_files import read_json_object
from megatron_midus.progress import Progress
from megatron_midus.verbs.verb import verb


@verb(ServeConfig)
def serve(config: ServeConfig, progress: Progress) -> subprocess.Popen:
    """Starts the server as a process of its own, which the caller ends. See ``ServeConfig`` for the settings."""
    return subprocess.Popen(server_command(config))


def server_command(config: ServeConfig) -> list[str]:
    """The command line of the server, from its interpreter on.

    Raises:
        UserError: no model, no server that can be started, a flag that this server does not know.
    """
    directory = fetched_model(config.model)
    if not (Path(directory) / "config.json").is_file():
        raise UserError(
            f"{directory} holds no config.json, so it is not a Hugging Face model; export one with midus convert"
        )
    is_midus = read_json_object(Path(directory) / "config.json").get("model_type") == "midus"
    words = (_vllm if _engine(config.engine) == "vllm" else _transformers)(config, directory, is_midus)
    return [*words, *shlex.split(config.server_flags)]


def _engine(asked: str) -> str:
    has_vllm = importlib.util.find_spec("vllm") is not None
    if asked == "vllm" and not has_vllm:
        raise UserError("vLLM is not installed; pip install vllm, or --engine transformers")
    return "vllm" if has_vllm and asked != "transformers" else "transformers"


def _vllm(config: ServeConfig, directory: str, is_midus: bool) -> list[str]:
    words = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", directory]
    words += ["--host", config.host, "--port", str(config.port), "--dtype", config.dtype]
    words += ["--served-model-name", config.name or short_name(directory)]
    words += ["--tensor-parallel-size", str(config.tensor_parallel_size)]
    if config.max_length is not None:
        words += ["--max-model-len", str(config.max_length)]
    if is_midus and not is_installed():
        words.append("--trust-remote-code")
    return words


def _transformers(config: ServeConfig, directory: str, is_midus: bool) -> list[str]:
    missing = [name for name in ("fastapi", "uvicorn", "openai") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"the server of transformers needs {', '.join(missing)}: pip install 'transformers[serving]' (or vllm, which is faster)"
        )
    for flag, value, default in (
        ("--name", config.name, None),
        ("--max-length", config.max_length, None),
        ("--tensor-parallel-size", config.tensor_parallel_size, 1),
    ):
        if value != default:
            raise UserError(f"{flag} is for vLLM, which is not what serves here; leave it out, or install vllm")
    words = [sys.executable, "-m", "transformers.cli.transformers", "serve", directory]
    words += ["--host", config.host, "--port", str(config.port), "--dtype", config.dtype]
    return [*words, "--trust-remote-code"] if is_midus else words


def command(config: ServeConfig) -> int:
    """``midus serve``."""
    words = server_command(config)
    print(f"serving {config.model} at http://{config.host}:{config.port}/v1: {' '.join(words[1:])}", flush=True)
    os.execv(words[0], words)
