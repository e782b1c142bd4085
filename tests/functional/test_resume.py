"""Stopping and going on: a resumed run prints the losses of the run that was never stopped, digit for digit."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch
from driver import TINY_MODEL, TINY_RUN, Run, train
from upscaled import read_tensors, write_averages, write_upscaled

from megatron_midus.checkpoint.checksums import write_checksums

# The schedule is made for eight steps; --exit-interval ends a run in the middle of it.
AVERAGED = "--ema-decay 0.9 --eval-interval 3 --eval-iters 2"
STEPS = "--train-iters 8 --lr-warmup-iters 2 --lr-decay-style cosine"


@pytest.fixture(scope="module")
def upscaled(tmp_path_factory):
    return write_upscaled(tmp_path_factory.mktemp("upscaled") / "checkpoint")


@pytest.fixture(scope="module")
def whole(upscaled) -> Run:
    """Eight steps without a stop."""
    return train(*TINY_RUN, STEPS, "--load", upscaled).check()


def after(run: Run, iteration: int) -> dict[int, str]:
    return {i: loss for i, loss in run.losses.items() if i > iteration}


def test_resume_is_exact(upscaled, whole, tmp_path):
    first = train(*TINY_RUN, STEPS, AVERAGED, "--exit-interval 3 --load", upscaled, "--save", tmp_path / "run").check()
    assert list(first.losses) == [1, 2, 3]
    second = train(*TINY_RUN, STEPS, "--load", tmp_path / "run", "--save", tmp_path / "run").check()
    assert second.losses == after(whole, 3)
    # An average changes nothing in training, and a run goes on without it.
    assert "holds an average of weights, with which this run does not go on" in second.err
    assert [line["learning rate"] for line in second.lines] == [line["learning rate"] for line in whole.lines[3:]]
    assert [line["grad norm"] for line in second.lines] == [line["grad norm"] for line in whole.lines[3:]]
    stored = read_tensors(tmp_path / "run", 3)
    averages = {key.removeprefix("ema.") for key in stored if key.startswith("ema.")}
    assert averages == {key for key, start in read_tensors(upscaled, 0).items() if not torch.equal(start, stored[key])}
    alone = write_averages(tmp_path / "run", 3, tmp_path / "averages")
    plain = train(*TINY_RUN, "--skip-train --eval-iters 2 --load", alone).check()
    overlapped = "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather --ema-decay 0.9"
    both = train(*TINY_RUN, overlapped, "--skip-train --eval-iters 2 --load", tmp_path / "run --ckpt-step 3").check()
    assert both.evaluations["validation EMA", 3] == first.evaluations["validation EMA", 3]
    # The log and the checkpoint have one average; it is no other run's evaluation of the last weights.
    assert (
        plain.evaluations["validation", 0]
        == first.evaluations["validation EMA", 3]
        != first.evaluations["validation", 3]
    )


LAYOUTS = {
    "tp2": ("--tensor-model-parallel-size 2", 2),
    "dp2-distributed-optimizer": ("--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather", 2),
    "pp3": ("--pipeline-model-parallel-size 3", 3),
    "bf16": ("--bf16", 1),
    "train-all": ("--train all", 1),
    "async": ("--async-save", 1),
}


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_resume_is_exact_at_every_layout(layout, upscaled, tmp_path):
    flags, processes = LAYOUTS[layout]
    whole = train(*TINY_RUN, STEPS, flags, "--load", upscaled, processes=processes).check()
    stop = "--exit-interval 3"
    train(*TINY_RUN, STEPS, flags, stop, "--load", upscaled, "--save", tmp_path, processes=processes).check()
    second = train(*TINY_RUN, STEPS, flags, "--load", tmp_path, processes=processes).check()
    assert second.losses == after(whole, 3)


def bytes_by_rank(checkpoint: Path) -> list[int]:
    """Bytes of tensors that each of two ranks wrote."""
    return [sum(path.stat().st_size for path in checkpoint.glob(f"__{rank}_*.distcp")) for rank in (0, 1)]


@pytest.mark.parametrize("optimizer", ["", "--use-distributed-optimizer --async-save"])
def test_replicas_share_the_writing(optimizer, upscaled, whole, tmp_path):
    """What both ranks hold alike is written by both, half by half; what is read back does not hang on who wrote it."""
    for name, flags in {"shared": "", "alone": "--no-ckpt-fully-parallel-save"}.items():
        root = tmp_path / name
        train(
            *TINY_RUN, STEPS, optimizer, flags, "--exit-interval 3 --load", upscaled, "--save", root, processes=2
        ).check()
        first, second = bytes_by_rank(root / "iter_0000003")
        if flags:
            assert second < 0.2 * first  # the states of its random number generators
        else:
            assert 0.7 < second / first < 1.4
    shared, alone = (read_tensors(tmp_path / name, 3) for name in ("shared", "alone"))
    assert shared.keys() == alone.keys() and all(torch.equal(shared[key], alone[key]) for key in shared)
    second = train(*TINY_RUN, STEPS, optimizer, "--load", tmp_path / "shared", processes=2).check()
    for iteration, loss in after(whole, 3).items():
        # Two ranks sum in another order than one.
        assert float(second.losses[iteration]) == pytest.approx(float(loss), rel=1e-5)


RANDOM = "--hidden-dropout 0.2 --attention-dropout 0.2 --load"


@pytest.mark.parametrize(
    ("layout", "processes"),
    [
        ("", 1),
        # Dropout of heads and of parts of the sequence differs between ranks.
        ("--tensor-model-parallel-size 2 --sequence-parallel", 2),
        pytest.param("--pipeline-model-parallel-size 3", 3, marks=pytest.mark.slow),
        pytest.param("--use-distributed-optimizer", 2, marks=pytest.mark.slow),
        pytest.param("--recompute-granularity full --recompute-method uniform --recompute-num-layers 1", 1, marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_random_numbers_go_on_where_they_were(layout, processes, upscaled, whole, tmp_path):
    whole_with_dropout = train(*TINY_RUN, STEPS, layout, RANDOM, upscaled, processes=processes).check()
    assert all(whole_with_dropout.losses[i] != loss for i, loss in whole.losses.items())
    first = "--exit-interval 3 --save"
    train(*TINY_RUN, STEPS, layout, first, tmp_path, RANDOM, upscaled, processes=processes).check()
    second = train(*TINY_RUN, STEPS, layout, RANDOM, tmp_path, processes=processes).check()
    assert second.losses == after(whole_with_dropout, 3)
    other = train(*TINY_RUN, STEPS, layout, "--no-load-rng", RANDOM, tmp_path, processes=processes).check()
    assert all(other.losses[i] != loss for i, loss in second.losses.items())


@pytest.mark.parametrize(("layout", "processes"), [("", 1), ("--tensor-model-parallel-size 2", 2)])
def test_two_runs_are_bit_equal(layout, processes, upscaled, tmp_path):
    """Weights and optimizer state, not only what is printed of the losses; another seed is another run."""
    flags = f"--train-iters 4 --train all --deterministic-mode {layout} {RANDOM} {upscaled} --save"
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train(*TINY_RUN, flags, tmp_path / name, f"--seed {seed}", processes=processes).check()
    a, b, c = (read_tensors(tmp_path / name, 4) for name in "abc")
    assert any(name.startswith("optimizer.state.exp_avg_sq") for name in a) and a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []
    assert [name for name in a if name.startswith("decoder.") and torch.equal(a[name], c[name])] == []


@pytest.mark.slow
@pytest.mark.parametrize("there", ["--tensor-model-parallel-size 2", "--pipeline-model-parallel-size 3"])
def test_resume_at_another_layout_continues_the_curve(there, upscaled, whole, tmp_path):
    """Saved by two ranks of a distributed optimizer, continued by others."""
    distributed = "--use-distributed-optimizer"
    train(*TINY_RUN, STEPS, distributed, "--exit-interval 3 --load", upscaled, "--save", tmp_path, processes=2).check()
    second = train(*TINY_RUN, STEPS, distributed, there, "--load", tmp_path, processes=int(there[-1])).check()
    assert "another layout of processes" in second.err
    # fp32 sums over other numbers of ranks, and Adam's amplification of it, over five steps.
    for iteration, loss in after(whole, 3).items():
        assert float(second.losses[iteration]) == pytest.approx(float(loss), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "second"), [("--use-distributed-optimizer", ""), ("", "--use-distributed-optimizer")]
)
def test_the_other_kind_of_optimizer_goes_on(first, second, upscaled, whole, tmp_path):
    train(*TINY_RUN, STEPS, first, "--exit-interval 3 --load", upscaled, "--save", tmp_path).check()
    run = train(*TINY_RUN, STEPS, second, "--load", tmp_path).check()
    for iteration, loss in after(whole, 3).items():
        # One process: the same arithmetic but for the order in which a gradient norm is summed.
        assert float(run.losses[iteration]) == pytest.approx(float(loss), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_killed_runs_resume_exactly(processes, upscaled, tmp_path):
    layout = f"--tensor-model-parallel-size {processes}"
    whole = train(*TINY_RUN, STEPS, layout, "--load", upscaled, processes=processes).check()

    def kill_after_a_checkpoint(ranks, output):
        if (tmp_path / "latest_checkpointed_iteration.txt").exists():
            for process in ranks:
                process.kill()

    save = f"--save-interval 2 --save {tmp_path}"
    killed = train(
        *TINY_RUN, STEPS, layout, save, "--load", upscaled, processes=processes, while_running=kill_after_a_checkpoint
    )
    assert set(killed.codes) == {-signal.SIGKILL}
    iteration = int((tmp_path / "latest_checkpointed_iteration.txt").read_text())
    second = train(*TINY_RUN, STEPS, layout, save, "--load", tmp_path, processes=processes).check()
    assert second.losses == after(whole, iteration) != {}
    assert not list(tmp_path.glob(".*"))


def test_checkpoints_carry_plan_architecture_and_assets(upscaled, tmp_path):
    assets = upscaled / "iter_0000000" / "hf_assets"
    assets.mkdir(exist_ok=True)
    (assets / "tokenizer.json").write_bytes(b"\x00 not touched \xff")
    train(*TINY_RUN, "--train-iters 2 --save-interval 1 --load", upscaled, "--save", tmp_path).check()
    for iteration in ("iter_0000001", "iter_0000002"):
        for name in ("midus_plan.json", "model_config.json", "hf_assets/tokenizer.json"):
            assert (tmp_path / iteration / name).read_bytes() == (upscaled / "iter_0000000" / name).read_bytes()


def test_keep_last_deletes_older_checkpoints(upscaled, tmp_path):
    """Also the one that the run began with, whose assets must have travelled on by then."""
    flags = "--train-iters 6 --save-interval 1 --keep-last 2 --save"
    train(*TINY_RUN, flags, tmp_path, "--exit-interval 1 --load", upscaled).check()
    (tmp_path / "iter_0000001" / "hf_assets").mkdir(exist_ok=True)
    (tmp_path / "iter_0000001" / "hf_assets" / "config.json").write_text("{}")
    write_checksums(tmp_path / "iter_0000001")
    train(*TINY_RUN, flags, tmp_path, "--exit-interval 5 --load", tmp_path).check()
    assert (tmp_path / "iter_0000005" / "hf_assets" / "config.json").read_text() == "{}"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "iter_0000004",
        "iter_0000005",
        "latest_checkpointed_iteration.sha256",
        "latest_checkpointed_iteration.txt",
        "run.yaml",
    ]


def test_load_equal_to_an_empty_save_begins_from_scratch_and_then_resumes(tmp_path):
    root = tmp_path / "run"
    flags = [*TINY_RUN, *TINY_MODEL, STEPS, "--load", root, "--save", root]
    first = train(*flags, "--exit-interval 2").check()
    second = train(*flags, "--exit-interval 4").check()
    assert list(first.losses) == [1, 2] and list(second.losses) == [3, 4]
    assert "weights: fresh" in first.out and "weights: fresh" not in second.out
    third = train(*flags, f"--ckpt-step 2 --exit-interval 4 --save {tmp_path / 'branch'}").check()
    assert third.losses == second.losses


def test_stage_switch_drops_the_optimizer_and_says_so(upscaled, tmp_path):
    average = "--ema-decay 0.9"
    train(*TINY_RUN, STEPS, average, "--train inserted --exit-interval 2 --load", upscaled, "--save", tmp_path).check()
    second = train(*TINY_RUN, STEPS, average, "--train all --exit-interval 4 --load", tmp_path).check()
    assert f"begins with the current weights; {tmp_path / 'iter_0000002'} has one of other parameters" in second.out
    assert "optimizer state is of other parameters and is DROPPED" in second.err
    assert list(second.losses) == [3, 4]
    # The schedule went on: cosine from step 2 of 8.
    assert second.lines[0]["learning rate"] == "9.330127E-04"


def test_finetune_takes_only_the_weights(upscaled, tmp_path):
    train(*TINY_RUN, STEPS, "--exit-interval 2 --load", upscaled, "--save", tmp_path).check()
    run = train(*TINY_RUN, STEPS, "--exit-interval 1 --finetune --load", tmp_path).check()
    assert list(run.losses) == [1] and run.lines[0]["consumed samples"] == "4"


def test_pretrained_checkpoint_begins_a_run_and_is_left_alone_afterwards(upscaled, tmp_path):
    root = tmp_path / "run"
    flags = [*TINY_RUN, STEPS, "--pretrained-checkpoint", upscaled, "--load", root, "--save", root]
    first = train(*flags, "--exit-interval 2").check()
    second = train(*flags, "--exit-interval 4").check()
    assert list(first.losses) == [1, 2] and list(second.losses) == [3, 4]


def test_a_schedule_that_differs_is_refused_or_overridden(upscaled, tmp_path):
    train(*TINY_RUN, STEPS, "--exit-interval 2 --load", upscaled, "--save", tmp_path).check()
    other = STEPS.replace("cosine", "constant")
    run = train(*TINY_RUN, other, "--lr 2e-3 --load", tmp_path)
    assert "has the schedule of --lr 0.001 and --lr-decay-style cosine, and this command says" in run.error
    assert (
        "this command says --lr 0.002 and --lr-decay-style constant; give --override-opt_param-scheduler" in run.error
    )
    run = train(*TINY_RUN, other, "--lr 2e-3 --override-opt_param-scheduler --exit-interval 3 --load", tmp_path)
    assert run.check().lines[0]["learning rate"] == "2.000000E-03"
    run = train(*TINY_RUN, other, "--lr 2e-3 --use-checkpoint-opt_param-scheduler --exit-interval 3 --load", tmp_path)
    assert run.check().lines[0]["learning rate"] == "9.330127E-04"
    run = train(*TINY_RUN, STEPS, "--value-lr-mult 3 --load", tmp_path)
    assert "--value-lr-mult" in run.error and "[1.0, 10.0]" in run.error and "[1.0, 3.0]" in run.error


@pytest.mark.parametrize(
    ("flags", "before", "now"),
    [
        ("--train-iters 12", "--train-iters 8", "--train-iters 12"),
        ("--global-batch-size 8", "--global-batch-size 4", "--global-batch-size 8"),
        ("--lr-decay-iters 7", "no --lr-decay-iters", "--lr-decay-iters 7"),
        ("--lr-warmup-fraction 0.5 --lr-warmup-iters 0", "--lr-warmup-iters 2 and no --lr-warmup-fraction",
         "--lr-warmup-iters 0 and --lr-warmup-fraction 0.5"),
        ("--weight-decay 0.3 --value-weight-decay 0", "--weight-decay 0.01", "--weight-decay 0.3"),
        ("--lr-decay-style WSD --lr-wsd-decay-iters 3", "--lr-decay-style cosine and no --lr-wsd-decay-iters",
         "--lr-decay-style WSD and --lr-wsd-decay-iters 3"),
    ],
)  # fmt: skip
def test_a_changed_schedule_is_named_by_the_flags_that_were_typed(flags, before, now, stopped):
    error = train(*TINY_RUN, STEPS, flags, "--load", stopped).error
    assert f"has the schedule of {before}, and this command says {now}; give --override-opt_param-scheduler" in error
    assert "--use-checkpoint-opt_param-scheduler" in error and "steps" not in error


@pytest.fixture(scope="module")
def stopped(upscaled, tmp_path_factory) -> Path:
    """Two of eight steps."""
    root = tmp_path_factory.mktemp("stopped")
    train(*TINY_RUN, STEPS, "--exit-interval 2 --load", upscaled, "--save", root).check()
    return root


def test_longer_training_ends_its_decay_where_it_is_told(stopped):
    longer = [*TINY_RUN, STEPS, "--train-iters 10 --load", stopped]
    new_end = train(*longer, "--override-opt_param-scheduler").check()
    old_end = train(*longer, "--use-checkpoint-opt_param-scheduler").check()
    rates = [[float(line["learning rate"]) for line in run.lines] for run in (new_end, old_end)]
    assert [len(each) for each in rates] == [8, 8]
    assert rates[0][5] > 0 == rates[0][7] and rates[1][5] == rates[1][7] == 0


def test_a_constant_rate_has_nothing_to_contradict(upscaled, tmp_path):
    constant = "--lr-warmup-fraction 0.2 --lr-decay-style constant"
    train(*TINY_RUN, constant, "--train-iters 5 --load", upscaled, "--save", tmp_path).check()
    longer = train(*TINY_RUN, constant, "--train-iters 7 --min-lr 1e-4 --load", tmp_path, "--save", tmp_path).check()
    assert [line["learning rate"] for line in longer.lines] == ["1.000000E-03"] * 2
    other_batch = "--train-iters 8 --global-batch-size 2 --load"
    assert list(train(*TINY_RUN, constant, other_batch, tmp_path).check().losses) == [8]


def test_another_length_of_the_last_phase_is_no_silent_change(upscaled, tmp_path):
    wsd = "--train-iters 8 --lr-decay-style WSD --lr-wsd-decay-iters"
    train(*TINY_RUN, wsd, "4 --exit-interval 2 --load", upscaled, "--save", tmp_path).check()
    error = train(*TINY_RUN, wsd, "2 --load", tmp_path).error
    assert "has the schedule of --lr-wsd-decay-iters 4, and this command says --lr-wsd-decay-iters 2" in error
    kept = train(*TINY_RUN, wsd, "2 --use-checkpoint-opt_param-scheduler --load", tmp_path).check()
    assert kept.losses == train(*TINY_RUN, wsd, "4 --load", tmp_path).check().losses


# -- samples ---------------------------------------------------------------------------------------------------------
SAMPLES = "--train-samples 24 --lr-decay-style constant"


@pytest.mark.parametrize(
    ("flags", "batches", "left"),
    [
        ("--global-batch-size 2", [2] * 6, 0),
        ("--global-batch-size 4", [4] * 3, 0),
        ("--global-batch-size 8", [8], 4),
        ("--global-batch-size 10 --decrease-batch-size-if-needed --micro-batch-size 3", [9], 3),
        ("--global-batch-size 6 --rampup-batch-size 2 2 20", [4, 4], 4),
        ("--global-batch-size 6 --rampup-batch-size 2 2 4", [6, 6], 0),
    ],
)
def test_samples_are_counted_from_what_was_consumed(flags, batches, left, twelve_of_24, tmp_path):
    run = train(*TINY_RUN, SAMPLES, flags, "--load", twelve_of_24, "--save", tmp_path).check()
    assert [int(line["global batch size"]) for line in run.lines] == batches
    assert list(run.losses) == [4 + i for i in range(len(batches))]
    assert int(run.lines[-1]["consumed samples"]) == 24 - left
    assert (f"{left} of 24 samples are less than a global batch" in run.out) == bool(left)
    again = train(*TINY_RUN, SAMPLES, flags, "--load", tmp_path).check()
    assert not again.lines and "nothing to train" in again.out
    assert (f"{left} of 24 samples are less than a global batch" in again.out) == bool(left)


@pytest.fixture(scope="module")
def twelve_of_24(upscaled, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("twelve")
    run = train(*TINY_RUN, SAMPLES, "--exit-interval 3 --load", upscaled, "--save", root).check()
    assert run.lines[-1]["consumed samples"] == "12"
    return root


def test_a_ramp_up_ends_with_the_samples_that_were_asked_for(upscaled, tmp_path):
    """Also where a start ends within it."""
    ramp = "--train-samples 50 --global-batch-size 8 --rampup-batch-size 2 2 24"
    whole = train(*TINY_RUN, ramp, "--load", upscaled).check()
    resumed = f"--pretrained-checkpoint {upscaled} --load {tmp_path / 'run'} --save {tmp_path / 'run'}"
    stops = ("--exit-interval 5", "--exit-interval 9", "")
    parts = [train(*TINY_RUN, ramp, resumed, stop).check() for stop in stops]
    joined = {iteration: loss for run in parts for iteration, loss in run.losses.items()}
    assert joined == whole.losses and len(parts[1].losses) == 4
    assert 50 - 8 < int(whole.lines[-1]["consumed samples"]) <= 50


def test_a_checkpoint_without_optimizer_is_refused_until_told(upscaled, tmp_path):
    train(*TINY_RUN, STEPS, "--exit-interval 2 --no-save-optim --load", upscaled, "--save", tmp_path).check()
    assert "holds no optimizer state" in train(*TINY_RUN, STEPS, "--load", tmp_path).error
    run = train(*TINY_RUN, STEPS, "--no-load-optim --no-load-rng --exit-interval 4 --load", tmp_path).check()
    assert list(run.losses) == [3, 4]


def test_nothing_is_trained_or_saved_beyond_the_end(upscaled, tmp_path):
    train(*TINY_RUN, "--train-iters 2 --load", upscaled, "--save", tmp_path).check()
    before = (tmp_path / "iter_0000002" / "common.pt").stat().st_mtime_ns
    run = train(*TINY_RUN, "--train-iters 2 --load", tmp_path, "--save", tmp_path).check()
    assert "nothing to train: iteration 2 of 2 is done" in run.out and run.lines == []
    assert (tmp_path / "iter_0000002" / "common.pt").stat().st_mtime_ns == before
