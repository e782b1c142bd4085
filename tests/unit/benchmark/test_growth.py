"""Sub-command growth: what is varied, who is left out, exponents, tables and picture."""

import dataclasses
import io
import math

import pytest
from rich.console import Console

from megatron_midus.benchmark import ceilings, growth
from megatron_midus.benchmark.growth import fit_growth, run_growth, shape_at
from megatron_midus.benchmark.growth_output import plot_result, print_result, result_to_markdown
from megatron_midus.benchmark.result import Row, Section
from megatron_midus.benchmark.settings import GrowthSettings
from megatron_midus.benchmark.shapes import SHAPES
from megatron_midus.benchmark.timing import Summary
from megatron_midus.benchmark.work import bytes_held, work_of


@pytest.fixture(scope="module")
def report():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ceilings, "COPY_BYTES", {"cpu": 1 << 16})
        patch.setattr(ceilings, "GEMM_SIZE", {"cpu": 32})
        settings = GrowthSettings(
            shape=["tiny"],
            device="cpu",
            rounds=2,
            points=3,
            axes=["tokens", "num_keys"],
            backends=["torch"],
            baselines=["ffn", "naive"],
            measure_memory=False,
        )
        return run_growth(settings)


def section(value: int, milliseconds: float, peak: int | None, *, axis: str = "tokens", share: float = 0.5) -> Section:
    time = Summary.of([milliseconds])
    row = Row("torch", {"forward": time}, time, {}, peak_bytes=peak, roofline_share=share)
    extra = {"axis": axis, "value": value, "base_shape": "tiny", "bytes_held": {"torch": value**2}}
    return Section("growth", "", dataclasses.asdict(SHAPES["tiny"]), [row], [], extra=extra)


def test_exponents_of_powers_are_found():
    found = fit_growth([section(n, 3 * n**1.5, 7 * n, share=0.1 * n**-0.5) for n in (2, 4, 8, 16)])
    (each,) = found
    assert each.values == [2, 4, 8, 16]
    measured = (each.time_exponent, each.ideal_time_exponent, each.peak_exponent, each.ideal_peak_exponent)
    assert measured == pytest.approx((1.5, 1.0, 1.0, 2.0))


def test_two_points_and_unknown_memory_have_no_exponent():
    (each,) = fit_growth([section(n, n, None) for n in (2, 4)])
    assert (each.time_exponent, each.peak_exponent) == (None, None)
    (each,) = fit_growth([section(n, n, None) for n in (2, 4, 8)])
    assert each.time_exponent == pytest.approx(1) and each.peak_exponent is None


def test_one_size_is_varied_at_a_time(report):
    shapes = [s.shape for s in report.sections]
    assert [(s["tokens"], s["num_keys"]) for s in shapes] == [
        (512, 11), (1024, 11), (2048, 11), (33, 64), (33, 128), (33, 256),
    ]  # fmt: skip
    assert all(s.checks and [row.name for row in s.rows] == ["torch", "naive", "ffn"] for s in report.sections)


def test_fewer_heads_have_groups_that_divide_them():
    shape = shape_at(SHAPES["cpu-h32"], "num_heads", 2)
    assert (shape.num_heads, shape.num_groups, shape.kv_channels, shape.hidden_size) == (2, 2, 64, 2048)


def test_who_would_take_too_long_or_too_much_is_left_out_and_named(monkeypatch):
    monkeypatch.setattr(growth, "measure_ceilings", lambda device, dtype: ceilings.Ceilings(10.0, 0.1))
    settings = GrowthSettings(
        shape=["tiny"], device="cpu", rounds=1, warmup=0, points=3, axes=["tokens"], backends=["torch"],
        baselines=["ffn"], measure_memory=False, limit_gigabytes=2e-4,
    )  # fmt: skip
    sections = run_growth(settings).sections
    assert [row.name for row in sections[0].rows] == ["torch", "ffn"]
    assert [s.extra["value"] for s in sections] == [512]  # both would take more from 1024 on
    sections = run_growth(dataclasses.replace(settings, limit_gigabytes=4e-4)).sections
    assert [row.name for row in sections[1].rows] == ["torch"]
    assert sections[1].notes[-1] == "ffn: from tokens=1024 on about 0.00054 GB (--limit-gigabytes)"


def test_ideal_work_of_a_whole_block_is_its_ffn_and_its_attention():
    shape = SHAPES["cpu-h8"]
    block, ffn = (work_of(function, shape, shape.tokens) for function in ("transformer", "ffn"))
    projections = 2 * shape.tokens * shape.hidden_size * (4 * 512)
    scores_and_sums = 2 * 2 * shape.tokens * 512 * shape.seq_length / 2
    assert block[0].flops - ffn[0].flops == projections + scores_and_sums
    assert math.isclose(block[1].flops, 2 * block[0].flops)
    assert bytes_held("transformer", shape, shape.tokens) > bytes_held("ffn", shape, shape.tokens)


def test_tables_and_picture(report, tmp_path):
    text = io.StringIO()
    print_result(report, Console(file=text, width=200))
    markdown = result_to_markdown(report)
    for words in ("T, tokens, from tiny tokens=512", "n, sub-keys per half", "exponent", "ideal"):
        assert words in text.getvalue() and words in markdown
    assert markdown.count("| naive |") == 2
    plot_result(report, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_points_are_checked():
    with pytest.raises(ValueError, match="points=0"):
        GrowthSettings(points=0)
