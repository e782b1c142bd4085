"""``midus serve``, which is vLLM's server here, and a client of OpenAI's interface, over loopback."""

import socket
import subprocess
import sys
import time
import urllib.request

import pytest
from serving_models import load
from transformers import AutoTokenizer


@pytest.fixture
def served(exports, environment, tmp_path):
    """Address of a server of the model hive, by the plugin."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = [
        sys.executable, "-m", "megatron_midus", "serve", str(exports("hive")), "--name", "midus",
        "--port", str(port), "--dtype", "float32", "--max-length", "256", "--server-flags=--enforce-eager",
    ]  # fmt: skip
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(program, env=environment(True), cwd=tmp_path, stdout=log, stderr=log)
    try:
        address = f"http://127.0.0.1:{port}"
        wait_for(f"{address}/health", server, tmp_path / "log")
        yield address
    finally:
        server.terminate()
        server.wait(timeout=60)


def wait_for(address, server, log):
    while server.poll() is None:
        try:
            with urllib.request.urlopen(address, timeout=5):
                return
        except OSError:
            time.sleep(0.5)
    pytest.fail(log.read_text()[-6000:])


def test_completions(served, exports):
    from openai import OpenAI

    tokenizer = AutoTokenizer.from_pretrained(exports("hive"))
    prompt = "Deep models remember what they have read"
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    whole = load(exports("hive")).generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    expected = tokenizer.decode(whole[0, ids.shape[1] :], skip_special_tokens=True)
    client = OpenAI(base_url=f"{served}/v1", api_key="none")
    assert [model.id for model in client.models.list()] == ["midus"]
    settings = {
        "model": "midus",
        "prompt": prompt,
        "max_tokens": 12,
        "temperature": 0,
        "extra_body": {"ignore_eos": True},
    }
    done = client.completions.create(**settings)
    assert done.choices[0].text == expected and done.usage.completion_tokens == 12
    pieces = [chunk.choices[0].text for chunk in client.completions.create(**settings, stream=True)]
    assert "".join(pieces) == expected
