"""``midus serve``, which is vLLM's server here, and a client of OpenAI's interface, over loopback."""

import shutil
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
from serving_models import ROOT, load
from transformers import AutoTokenizer

# One worker starts the server, for all of them.
pytestmark = pytest.mark.xdist_group("server")


@pytest.fixture(scope="module")
def model(exports, tmp_path_factory):
    """The export hive, with the chat template of examples/sft."""
    directory = shutil.copytree(exports("hive"), tmp_path_factory.mktemp("model") / "hive")
    shutil.copy(ROOT / "examples/sft/chat_template.jinja", directory)
    return directory


@pytest.fixture(scope="module")
def served(model, environment, tmp_path_factory):
    """Address of a server of the model, by the plugin."""
    place = tmp_path_factory.mktemp("server")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = [
        sys.executable, "-m", "megatron_midus", "serve", str(model), "--name", "midus",
        "--port", str(port), "--dtype", "float32", "--max-length", "256", "--server-flags=--enforce-eager",
    ]  # fmt: skip
    with (place / "log").open("w") as log:
        server = subprocess.Popen(program, env=environment(True), cwd=place, stdout=log, stderr=log)
    try:
        address = f"http://127.0.0.1:{port}"
        wait_for(f"{address}/health", server, place / "log")
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


def test_completions(served, model):
    from openai import OpenAI

    tokenizer = AutoTokenizer.from_pretrained(model)
    prompt = "Deep models remember what they have read"
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    whole = load(model).generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
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


def test_a_conversation(served, model):
    """Through the chat template of the export, as midus chat asks."""
    from openai import OpenAI

    tokenizer = AutoTokenizer.from_pretrained(model)
    messages = [
        {"role": "user", "content": "What is a list?"},
        {"role": "assistant", "content": "A sequence."},
        {"role": "user", "content": "And a tuple?"},
    ]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert text == "<s>User: What is a list?\nAssistant: A sequence.</s>\nUser: And a tuple?\nAssistant:"
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    whole = load(model).generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    done = OpenAI(base_url=f"{served}/v1", api_key="none").chat.completions.create(
        model="midus", messages=messages, max_tokens=12, temperature=0, extra_body={"ignore_eos": True}
    )
    assert done.choices[0].message.content == tokenizer.decode(whole[0, ids.shape[1] :], skip_special_tokens=True)
    assert done.usage.prompt_tokens == ids.shape[1]
