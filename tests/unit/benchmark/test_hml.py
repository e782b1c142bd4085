"""What sub-command hml reports: rows, ratios, table, JSON and plot."""

import dataclasses
import io
import json

import pytest
from rich.console import Console

from megatron_midus.benchmark import ceilings
from megatron_midus.benchmark.hml import run_hml
from megatron_midus.benchmark.output import print_result, result_to_markdown
from megatron_midus.benchmark.plot import plot_result, require_matplotlib
from megatron_midus.benchmark.settings import HmlSettings


@pytest.fixture(scope="module")
def report():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ceilings, "COPY_BYTES", {"cpu": 1 << 16})
        patch.setattr(ceilings, "GEMM_SIZE", {"cpu": 32})
        settings = HmlSettings(
            shape=["tiny"], device="cpu", rounds=3, decode_tokens=[1, 3], decode_rounds=2, measure_memory=False
        )
        return run_hml(settings)


def test_sections_and_rows(report):
    assert [s.title for s in report.sections] == ["hml tiny", "decode tiny T=1", "decode tiny T=3"]
    main, *decode = report.sections
    assert list(main.rows[0].phases) == ["forward", "backward"]
    assert main.checks and all(check.ok for check in main.checks)
    for section in decode:
        # A block decodes with a cache, so a whole one is in no step.
        assert [row.name for row in section.rows] == [row.name for row in main.rows if row.name != "copied"]
        assert list(section.rows[0].phases) == ["forward"]


def test_only_what_computes_the_same_is_compared(report):
    ratios = {row.name: set(row.ratios) for row in report.sections[0].rows}
    assert ratios["torch"] == {"ffn", "copied", "naive"}
    assert ratios["naive"] == {"ffn", "copied"}
    assert (ratios["ffn"], ratios["copied"]) == ({"copied"}, {"ffn"})
    (block,) = (compared for name, compared in ratios.items() if name.endswith(" (block)"))
    assert block == {"ffn", "copied", "product-key-memory", "memory-layer"}
    assert ratios["memory-layer"] == {"ffn", "copied", "product-key-memory"}


def test_json(report):
    found = json.loads(json.dumps(report.to_dict()))
    assert set(found) == {"schema_version", "kind", "date", "command", "settings", "device", "machine", "sections"}
    assert (found["schema_version"], found["kind"]) == (2, "hml")
    row = found["sections"][0]["rows"][0]
    assert set(row) == {
        "name", "phases", "total", "ratios", "peak_bytes", "gigabytes_per_second", "teraflops", "roofline_share",
        "tokens_per_second",
    }  # fmt: skip
    assert set(row["total"]) == {"median", "lower_quartile", "upper_quartile", "minimum", "rounds"}
    assert row["total"]["rounds"] == 3 and found["sections"][1]["rows"][0]["total"]["rounds"] == 2
    assert found["sections"][0]["shape"]["num_keys"] == 11


def test_markdown_has_a_table_for_every_section(report):
    text = result_to_markdown(report)
    assert text.startswith("# Benchmark hml\n") and text.count("\n## ") == len(report.sections)
    assert text.count("|---|") == len(report.sections) and "parity:" in text
    rows = [line for line in text.splitlines() if line.startswith("| naive ")]
    assert len(rows) == len(report.sections)


def test_table_names_everything(report):
    text = io.StringIO()
    print_result(report, Console(file=text, width=250))
    for words in (" (block)", "time / ffn", "time / naive", "roofline", "ceilings", "parity: ", "decode tiny T=3"):
        assert words in text.getvalue()


def test_ratios_stand_below_where_there_is_no_room_beside(report):
    text = io.StringIO()
    print_result(report, Console(file=text, width=130))
    assert "hml tiny: ratios" in text.getvalue() and text.getvalue().count("parity: ") == 1
    header = [line for line in text.getvalue().splitlines() if "contender" in line][:2]
    assert ["time / ffn" in line for line in header] == [False, True] and "roofline" in header[0]
    assert max(map(len, text.getvalue().splitlines())) <= 130


def test_plot(report, tmp_path):
    target = tmp_path / "new" / "plot.png"
    plot_result(report, target)
    assert target.read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in target.parent.iterdir()] == ["plot.png"]


def test_plot_without_matplotlib(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(ValueError, match="pip install"):
        require_matplotlib()


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"rounds": 0}, "rounds=0"), ({"threads": 0}, "threads=0"), ({"device": "cuda"}, "no CUDA device")],
)
def test_settings_are_checked(monkeypatch, changes, words):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(HmlSettings(), **changes)
