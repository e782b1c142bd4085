"""Which server midus serve becomes; the server itself runs in tests/serving."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import pytest

from megatron_midus.config.chat import ServeConfig
from megatron_midus.errors import UserError
from megatron_midus.verbs.serve import server_command

BASE = Path(__file__).parents[3] / "examples" / "tiny_base"
has_vllm = importlib.util.find_spec("vllm") is not None


@pytest.mark.skipif(has_vllm, reason="vLLM is installed here")
def test_without_a_server_the_way_to_one_is_told():
    with pytest.raises(UserError, match="vLLM is not installed; pip install vllm"):
        server_command(ServeConfig(str(BASE), engine="vllm"))
    if importlib.util.find_spec("fastapi") is None:
        with pytest.raises(UserError, match=r"pip install 'transformers\[serving\]'"):
            server_command(ServeConfig(str(BASE)))


def test_mistakes(tmp_path):
    shutil.copy(BASE / "tokenizer.json", tmp_path)
    with pytest.raises(UserError, match="holds no config.json"):
        server_command(ServeConfig(str(tmp_path)))
    with pytest.raises(UserError, match="--port 70000 is no port"):
        ServeConfig(str(BASE), port=70000)
