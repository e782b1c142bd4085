"""The hub's own client library against a hub on loopback: models are fetched once, exports are pushed, mistakes are one line."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from loopback_hub import COMMIT, TOKEN, loopback_hub

import megatron_midus as midus
from megatron_midus.errors import UserError

BASE = Path(__file__).parents[2] / "examples" / "tiny_base"
FETCH = """
import json, sys
from megatron_midus.errors import UserError
from megatron_midus.hub import fetched_model
results = {}
for name in sys.argv[1:]:
    try:
        results[name] = fetched_model(name)
    except UserError as error:
        results[name] = f"error: {error}"
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """``(address, requests, directory of the repositories)``; one of them is a model of the name someone/tiny."""
    root = tmp_path_factory.mktemp("hub")
    shutil.copytree(BASE, root / "someone/tiny", ignore=shutil.ignore_patterns("recipe"))
    (root / "someone/tiny/pytorch_model.bin").write_bytes(b"the same weights once more")
    (root / "someone/gated").mkdir()
    (root / "someone/gated/config.json").write_text("{}")
    with loopback_hub(root) as (address, requests):
        yield address, requests, root


def run(program: list[str], address: str, home: Path, **more: str) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    environment |= {"HF_ENDPOINT": address, "HF_HOME": str(home), **more}
    return subprocess.run([sys.executable, *program], env=environment, capture_output=True, text=True, timeout=120)


def fetch(address: str, home: Path, *names: str, **more: str) -> dict[str, str]:
    done = run(["-c", FETCH, *names], address, home, **more)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_model_is_fetched_once_and_found_offline(hub, tmp_path):
    address, requests, root = hub
    first = fetch(address, tmp_path, "someone/tiny", f"someone/tiny@{COMMIT}")
    assert first["someone/tiny"] == first[f"someone/tiny@{COMMIT}"]
    fetched = {path.name: path.read_bytes() for path in Path(first["someone/tiny"]).iterdir()}
    expected = {path.name: path.read_bytes() for path in (root / "someone/tiny").iterdir() if path.suffix != ".bin"}
    assert fetched == expected
    requests.clear()
    assert fetch(address, tmp_path, "someone/tiny") == {"someone/tiny": first["someone/tiny"]}
    assert fetch(address, tmp_path, "someone/tiny", HF_HUB_OFFLINE="1") == {"someone/tiny": first["someone/tiny"]}
    assert not requests


def test_an_interrupted_fetch_goes_on(hub, tmp_path):
    address, _, root = hub
    snapshot = Path(fetch(address, tmp_path, "someone/tiny")["someone/tiny"])
    (snapshot / "model.safetensors").unlink()
    again = fetch(address, tmp_path, "someone/tiny", "some-one/else@v2", HF_HUB_OFFLINE="1")
    assert again["someone/tiny"].endswith("get it with: hf download someone/tiny")
    assert again["some-one/else@v2"].endswith("get it with: hf download some-one/else --revision v2")
    assert fetch(address, tmp_path, "someone/tiny") == {"someone/tiny": str(snapshot)}
    assert (snapshot / "model.safetensors").read_bytes() == (root / "someone/tiny/model.safetensors").read_bytes()


def test_what_cannot_be_fetched_is_one_line(hub, tmp_path):
    address, _, _ = hub
    found = fetch(address, tmp_path, "someone/none", "someone/tiny@v9", "someone/gated")
    assert "someone/none is neither a directory here nor a model of the hub that you may read" in found["someone/none"]
    assert "someone/tiny has no revision v9 on the hub" in found["someone/tiny@v9"]
    assert f"accepted: do so at {address}/someone/gated, then hf auth login" in found["someone/gated"]
    nobody = fetch("http://127.0.0.1:9", tmp_path, "someone/tiny")["someone/tiny"]
    assert "the hub at http://127.0.0.1:9 cannot be reached" in nobody and nobody.endswith("hf download someone/tiny")
    assert all(len(text.splitlines()) == 1 for text in (*found.values(), nobody))


def test_push(hub, tmp_path):
    address, requests, root = hub
    push = ["-m", "megatron_midus", "push", str(BASE)]
    requests.clear()
    refused = {
        "org/new": run([*push, "org/new"], address, tmp_path),
        "no name": run([*push, "no name"], address, tmp_path, HF_TOKEN=TOKEN),
        "wrong token": run([*push, "org/new"], address, tmp_path, HF_TOKEN="hf_wrong"),
    }
    remedies = {
        "org/new": "hf auth login, or set HF_TOKEN",
        "no name": "write org/name",
        "wrong token": "hf auth login",
    }
    for name, done in refused.items():
        (line,) = done.stderr.splitlines()
        assert done.returncode == 1 and line.startswith("error: ") and remedies[name] in line
    assert not (root / "org").exists()
    done = run([*push, "org/new", "--private"], address, tmp_path, HF_TOKEN=TOKEN)
    assert done.returncode == 0, done.stderr
    assert f"uploaded: {address}/org/new/commit/{COMMIT}" in done.stdout
    for path in BASE.glob("*.*"):
        assert (root / "org/new" / path.name).read_bytes() == path.read_bytes()
    # And back: what was pushed is a model.
    assert Path(fetch(address, tmp_path, "org/new")["org/new"], "config.json").is_file()


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_half_a_model_is_not_pushed(missing, tmp_path):
    shutil.copytree(BASE, tmp_path / "model", ignore=shutil.ignore_patterns("recipe"))
    (tmp_path / "model" / missing).unlink()
    with pytest.raises(UserError, match="does not exist|holds no safetensors weights"):
        midus.push(directory=str(tmp_path / "model"), repository="org/new")
