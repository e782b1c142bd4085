"""tools/analyze.py on an exported model with random values: what it writes, and every way to ask it for nonsense."""

from __future__ import annotations

import html.parser
import importlib.util
import json
import re
from pathlib import Path

import pytest
import torch
from tiny_models import randomize, write_base, write_tokenizer

from megatron_midus.config.analyze import PARTS
from megatron_midus.hf import MidusConfig, MidusForCausalLM

TOOLS = Path(__file__).parents[2] / "tools"
BLOCKS = ["transformer", "memory", "transformer", "memory"]


def load_tool(name):
    spec = importlib.util.spec_from_file_location(f"tool_{name}", TOOLS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


analyze = load_tool("analyze")


def write_midus(directory, *, zero_values=False, **settings):
    config = MidusConfig(
        vocab_size=263, hidden_size=24, intermediate_size=32, num_hidden_layers=4, block_types=BLOCKS,
        num_attention_heads=3, num_key_value_heads=1, head_dim=8, max_position_embeddings=64,
        **{"memory_num_keys": 6, "memory_topk": 3, "memory_latent_size": 5, **settings},
    )  # fmt: skip
    model = randomize(MidusForCausalLM(config))
    if zero_values:
        for layer in model.model.layers[1::2]:
            torch.nn.init.zeros_(layer.memory.value_bank)
    model.save_pretrained(directory)
    write_tokenizer(directory)
    return directory


@pytest.fixture(scope="module")
def midus(tmp_path_factory):
    return write_midus(tmp_path_factory.mktemp("models") / "midus")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "text.jsonl"
    rows = [{"text": f'a tiny text {i} | with <tags> & "quotes"\nabout models, tokens ü {i * i}'} for i in range(12)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(model, text, output, *more):
    fixed = ["--seq-length", "16", "--device", "cpu", "--min-reads", "4", "--slots", "3", "--contexts", "2"]
    analyze.main(["--model", str(model), "--data", str(text), "--output", str(output), *fixed, *map(str, more)])


class Document(html.parser.HTMLParser):
    """Counts tags, keeps attributes and texts, and checks that everything that opens is closed."""

    VOID = {"meta", "rect", "path", "line", "circle", "br"}

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.texts = [], [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append((self.open[-1] if self.open else "", data))


@pytest.fixture(scope="module")
def report(midus, text, tmp_path_factory):
    base = write_base(tmp_path_factory.mktemp("bases") / "tiny")
    output = tmp_path_factory.mktemp("out") / "analysis"
    run(midus, text, output, "--base", base)
    assert sorted(path.name for path in output.parent.iterdir()) == ["analysis"]
    return output


def test_page_needs_no_network_and_has_every_figure(report):
    page = (report / "report.html").read_text()
    found = Document(page)
    assert not re.search(r"https?:|//[a-z]|@import|url\(", page) and not {"link", "img", "iframe"} & set(found.tags)
    assert not [name for name, _ in found.attributes if name in ("src", "href")]
    assert "prefers-color-scheme: dark" in page
    headings = [data for tag, data in found.texts if tag == "h2"]
    assert headings == [
        "Loss", "Slot usage", "Head importance", "Fixed retrieval: what heads have of their own", "What slots fire on",
        "Sensitivity to k, n and d_l, without retraining", "Settings",
    ]  # fmt: skip
    # Usage 2 and 2 maps a block, heads 3, exchanges 1, ranks 4, sensitivity 4.
    assert found.tags.count("svg") == found.tags.count("figure") == 2 + 4 + 3 + 1 + 4 + 4
    assert "No data" not in page and not re.search(r"\b(nan|inf|None)\b", page)
    slots = [data for tag, data in found.texts if "reads, weight" in data]
    assert len(slots) == 2 * 2 * 3 and page.count("<mark>") > len(slots)
    assert "&lt;" in page and "<tags>" not in page


def test_json_holds_the_figures(report):
    found = json.loads((report / "analysis.json").read_text())
    assert set(found) == {
        "name", "directory", "memory", "block_types", "num_heads", "text", "loss", "notes", "base", "usage", "heads",
        "retrieval", "slots", "sensitivity", "settings",
    }  # fmt: skip
    assert found["text"]["documents"] == 12 and found["text"]["tokens"] == found["text"]["windows"] * 16
    for part in ("usage", "slots"):
        assert list(found[part]) == ["1", "3"]
    assert [len(row) for row in found["heads"]["memory"].values()] == [3, 3]
    assert [len(row) for row in found["heads"]["attention"].values()] == [3, 3]
    assert list(found["retrieval"]["exchanges"]["1"]) == ["shared", "mean", "swapped", "off"]
    assert list(found["sensitivity"]["topk"]) == ["6", "3", "1"] and found["sensitivity"]["topk"]["3"]["value"] == 0
    assert found["base"]["difference"]["value"] == pytest.approx(
        found["loss"]["value"] - found["base"]["loss"]["value"]
    )
    assert found["settings"]["dtype"] == "float32" and found["settings"]["tokens"] == 50_000


def test_summary_says_the_same(report):
    summary, found = (report / "summary.md").read_text(), json.loads((report / "analysis.json").read_text())
    assert (
        f"{found['loss']['value']:.4f}" in summary
        and f"{found['heads']['blocks']['1']['value'] * 1000:+.2f}" in summary
    )
    tables = [block.splitlines() for block in re.split(r"\n\n", summary) if block.startswith("| ")]
    tables += [b.splitlines()[1:] for b in re.split(r"\n\n", summary) if b.startswith("## ")]
    for lines in filter(None, tables):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines if line.startswith("|")}) <= 1


def test_its_page():
    page = (TOOLS.parent / "docs" / "analysis.md").read_text()
    assert tuple(re.findall(r"^\| `(\w+)` \| .*\?", page, re.MULTILINE)) == PARTS
    (command,) = re.findall(r"^midus analyze (.*)$", page, re.MULTILINE)
    asked = analyze.make_parser().parse_args(command.split())
    options = {name.removeprefix("--").replace("-", "_") for name in re.findall(r"`(--[a-z-]+)", page)}
    assert options and options <= set(vars(asked))


@pytest.mark.parametrize("variant", ["block", "full"])
def test_other_variants(variant, text, tmp_path):
    model = write_midus(tmp_path / "model", memory_variant=variant, memory_score_activation="relu")
    run(model, text, tmp_path / "out", "--tokens", 150)
    page = (tmp_path / "out" / "report.html").read_text()
    Document(page)
    assert ("Nothing to exchange" in page) == (variant == "block") and "no latent bank" in page
    assert ("bank of its own" in page) == (variant == "full")


def test_before_training(text, tmp_path):
    """Zero values: everything is said, nothing fails, no loss moves."""
    run(write_midus(tmp_path / "model", zero_values=True), text, tmp_path / "out", "--tokens", 150)
    found = json.loads((tmp_path / "out" / "analysis.json").read_text())
    assert any("all values are zero" in note for note in found["notes"])
    assert found["heads"]["all_memories"]["value"] == 0.0
    assert found["retrieval"]["exchanges"]["1"]["shared"] == {"rise": {"value": 0.0, "stderr": 0.0}, "error": None}
    assert "all zero" in (tmp_path / "out" / "summary.md").read_text()


def test_one_part_alone(midus, text, tmp_path, capsys):
    run(midus, text, tmp_path / "out", "--parts", "heads")
    found = json.loads((tmp_path / "out" / "analysis.json").read_text())
    assert found["heads"] and not found["usage"] and not found["slots"]
    printed = capsys.readouterr().out
    assert printed.startswith("# What the memory of midus learnt") and "report.html" in printed


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--tokens", "0"], "--tokens 0 must be at least 1"),
        (["--seq-length", "5000"], "less than one window of seq_length=5000"),
        (["--tokens", "40"], "needs 4"),
        (["--device", "tpu7"], "'tpu7' is not available"),
        (["--base", "nowhere"], "nowhere does not exist"),
        (["--data", "nothing.jsonl"], "nothing.jsonl"),
    ],
)
def test_wrong_requests(more, said, midus, text, tmp_path):
    with pytest.raises((ValueError, OSError), match=said) as error:
        run(midus, text, tmp_path / "out", *more)
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


def test_wrong_models_and_outputs(midus, text, tmp_path):
    base = write_base(tmp_path / "base")
    with pytest.raises(ValueError, match="type 'llama', not midus"):
        run(base, text, tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("keep")
    with pytest.raises(ValueError, match="not empty"):
        run(midus, text, tmp_path / "full")
    assert (tmp_path / "full" / "mine.txt").read_text() == "keep"
    run(midus, text, tmp_path / "full", "--overwrite", "--parts", "usage")
    assert sorted(p.name for p in (tmp_path / "full").iterdir()) == ["analysis.json", "report.html", "summary.md"]
