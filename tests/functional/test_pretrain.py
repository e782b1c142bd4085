"""The training driver in real processes: layouts agree, only what should learns, the log reads as tools expect."""

from __future__ import annotations

import dataclasses
import re

import numpy
import pytest
import torch
from driver import TINY_MODEL, TINY_RUN, Run, train
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from upscaled import BASE, MEMORY, read_weights, write_upscaled

STEPS = "--train-iters 4"


@pytest.fixture(scope="module")
def upscaled(tmp_path_factory):
    """An up-scaled checkpoint: base, memory, base; all weights random."""
    return write_upscaled(tmp_path_factory.mktemp("upscaled") / "checkpoint")


@pytest.fixture(scope="module")
def reference(upscaled) -> Run:
    return train(*TINY_RUN, STEPS, "--load", upscaled).check()


def test_the_loss_goes_down_from_scratch():
    run = train(*TINY_RUN, *TINY_MODEL, "--train-iters 40 --lr 1e-2").check()
    losses = [float(loss) for loss in run.losses.values()]
    # Counting sequences are easy: from ln(101) = 4.6 nats down by more than one.
    assert abs(losses[0] - 4.615) < 0.1
    assert losses[-1] < losses[0] - 1


# The printed loss has seven digits; fp32 sums over another number of ranks differ by about 1e-7 relative.
SAME_CURVE = {"rel": 1e-5}


def assert_same_curve(run: Run, reference: Run, **tolerance: float) -> None:
    assert run.losses.keys() == reference.losses.keys()
    for iteration, loss in run.losses.items():
        assert float(loss) == pytest.approx(float(reference.losses[iteration]), **(tolerance or SAME_CURVE))
    for mine, theirs in zip(run.lines, reference.lines):
        # Three decimals are printed: 1e-3 is one unit in the last.
        assert float(mine["grad norm"]) == pytest.approx(float(theirs["grad norm"]), abs=1.1e-3)


LAYOUTS = {
    "tp2": ("--tensor-model-parallel-size 2", 2),
    "tp2-sp": ("--tensor-model-parallel-size 2 --sequence-parallel", 2),
    "dp2": ("", 2),
    "dp2-distributed-optimizer": ("--use-distributed-optimizer", 2),
    "dp2-overlap": ("--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather", 2),
    # Stages 0 and 2 have no trainable parameter at all.
    "pp3": ("--pipeline-model-parallel-size 3", 3),
    "pp3-distributed-optimizer": ("--pipeline-model-parallel-size 3 --use-distributed-optimizer", 3),
    "tp2-latent": ("--tensor-model-parallel-size 2 --memory-value-placement latent", 2),
    "pp2-by-cost": ("--pipeline-model-parallel-size 2 --pipeline-model-parallel-layout auto", 2),
    "recompute": ("--recompute-granularity full --recompute-method uniform --recompute-num-layers 1", 1),
    "per-token": ("--calculate-per-token-loss", 1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_train_alike(layout, upscaled, reference):
    flags, processes = LAYOUTS[layout]
    run = train(*TINY_RUN, STEPS, "--load", upscaled, flags, processes=processes).check()
    assert_same_curve(run, reference)


@pytest.mark.slow
def test_tied_embeddings_on_two_stages_train_alike(tmp_path):
    """The first stage and the last each hold a copy of the embedding and must keep them equal."""
    base = dataclasses.replace(BASE, tie_word_embeddings=True)
    checkpoint = write_upscaled(tmp_path / "checkpoint", base=base)
    reference = train(*TINY_RUN, STEPS, "--train all --load", checkpoint).check()
    flags = "--train all --pipeline-model-parallel-size 3 --use-distributed-optimizer"
    assert_same_curve(train(*TINY_RUN, STEPS, flags, "--load", checkpoint, processes=3).check(), reference)


@pytest.mark.slow
def test_interleaved_pipeline_trains_alike(tmp_path):
    checkpoint = write_upscaled(tmp_path / "checkpoint", insert_after=(0, 1))
    flags = "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1"
    reference = train(*TINY_RUN, STEPS, "--load", checkpoint).check()
    run = train(*TINY_RUN, STEPS, "--load", checkpoint, flags, processes=2, timeout=300).check()
    assert_same_curve(run, reference)


@pytest.fixture(scope="module")
def packed_documents(tmp_path_factory):
    """Documents of 3 to 20 random ids, so that every sample of 32 tokens holds several."""
    generator = numpy.random.default_rng(5)
    prefix = str(tmp_path_factory.mktemp("packed") / "documents")
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=numpy.uint16)
    for _ in range(60):
        document = [*generator.integers(0, 100, size=generator.integers(3, 20)), 100]
        builder.add_document(numpy.array(document), [len(document)])
    builder.finalize(f"{prefix}.idx")
    return prefix


def test_packed_documents_train_alike_at_every_layout(packed_documents, upscaled):
    """The middle stage of three has no data of its own and still needs the mask."""
    data = f"--no-mock-data --data-path {packed_documents} --split 1 --tokenizer-type NullTokenizer"
    packing = "--reset-position-ids --reset-attention-mask --eod-mask-loss"
    run = train(*TINY_RUN, STEPS, data, packing, "--load", upscaled).check()
    for layout, processes in (
        ("--tensor-model-parallel-size 2 --sequence-parallel", 2),
        ("--pipeline-model-parallel-size 3", 3),
    ):
        flags = f"{data} {packing} {layout}"
        assert_same_curve(train(*TINY_RUN, STEPS, flags, "--load", upscaled, processes=processes).check(), run)
    plain = train(*TINY_RUN, STEPS, data, "--load", upscaled).check()
    for flag in ("--reset-attention-mask", "--eod-mask-loss"):
        alone = train(*TINY_RUN, STEPS, data, flag, "--load", upscaled).check()
        assert alone.losses[1] not in (plain.losses[1], run.losses[1])
    positions = train(*TINY_RUN, STEPS, data, "--reset-position-ids", "--load", upscaled).check()
    assert positions.losses == plain.losses


def test_gradient_accumulation_equals_one_batch(upscaled, reference):
    run = train(*TINY_RUN, STEPS, "--load", upscaled, "--micro-batch-size 4").check()
    assert_same_curve(run, reference)


def test_bf16_follows_fp32(upscaled, reference):
    run = train(*TINY_RUN, STEPS, "--load", upscaled, "--bf16").check()
    # bf16 has eight bits: rounding of 2**-9 = 0.2 % in every activation.
    for iteration, loss in run.losses.items():
        assert float(loss) == pytest.approx(float(reference.losses[iteration]), rel=2e-3)
    assert run.losses != reference.losses


def test_training_inserted_blocks_leaves_the_base_bit_for_bit(upscaled, tmp_path):
    train(*TINY_RUN, STEPS, "--load", upscaled, "--train inserted --save", tmp_path).check()
    before, after = read_weights(upscaled, 0), read_weights(tmp_path, 4)
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    # Block 1 is the Memory block, and every tensor of it learns.
    assert changed == {name for name in before if name.startswith("decoder.layers.1.")}


def test_training_all_changes_every_tensor(upscaled, tmp_path):
    run = train(*TINY_RUN, STEPS, "--load", upscaled, "--log-params-norm --train all --save", tmp_path).check()
    before, after = read_weights(upscaled, 0), read_weights(tmp_path, 4)
    assert [name for name in before if torch.equal(before[name], after[name])] == []
    assert "--train all" in run.out
    norm = torch.cat([weight.flatten() for weight in after.values()]).norm().item()
    assert float(run.lines[-1]["params norm"]) == pytest.approx(norm, abs=1e-3)  # three decimals are printed
    assert run.lines[0]["params norm"] != run.lines[-1]["params norm"]


def test_memory_values_have_their_own_learning_rate_and_no_decay(upscaled, tmp_path):
    """One step of Adam moves a weight by lr * sign(gradient) at most, and a slot that nothing read stays as it was."""
    flags = "--train-iters 1 --lr 1e-3 --lr-decay-style constant --value-lr-mult 7 --weight-decay 0.5 --clip-grad 0"
    train(*TINY_RUN, flags, "--train inserted --load", upscaled, "--save", tmp_path).check()
    before, after = read_weights(upscaled, 0), read_weights(tmp_path, 1)
    name = "decoder.layers.1.self_attention.linear_proj.values"
    moved = (after[name] - before[name]).abs()
    assert moved.max().item() == pytest.approx(7e-3, rel=1e-3)  # eps = 1e-8 against gradients of 1e-6 and more
    slots = moved.sum(dim=1)
    assert slots.shape == (MEMORY.num_slots,)
    keys = "decoder.layers.1.self_attention.linear_proj.row_keys"
    # Matrices decay: lr * weight_decay of their size comes on top of Adam's step of lr.
    moved_keys = (after[keys] - before[keys]).abs().max().item()
    assert 1e-3 * 0.99 < moved_keys < 1e-3 * (1 + 0.5 * before[keys].abs().max().item()) * 1.01


def test_value_gradients_can_be_clipped_apart(upscaled, tmp_path):
    """Clipping is invisible to Adam's first step but not to SGD's, which moves by lr * gradient."""
    flags = "--train-iters 1 --optimizer sgd --lr 1.0 --lr-decay-style constant --value-lr-mult 1 --weight-decay 0"
    limit = 1e-4
    train(*TINY_RUN, flags, f"--value-clip-grad {limit} --load", upscaled, "--save", tmp_path / "a").check()
    train(*TINY_RUN, flags, "--load", upscaled, "--save", tmp_path / "b").check()
    before, clipped, plain = read_weights(upscaled, 0), read_weights(tmp_path / "a", 1), read_weights(tmp_path / "b", 1)
    values = "decoder.layers.1.self_attention.linear_proj.values"
    assert (plain[values] - before[values]).norm().item() > 2 * limit
    # The weights are of size 0.1, so their difference carries fp32 rounding of 1e-8 each.
    assert (clipped[values] - before[values]).norm().item() == pytest.approx(limit, rel=1e-2)
    keys = "decoder.layers.1.self_attention.linear_proj.row_keys"
    assert torch.equal(clipped[keys], plain[keys])


@pytest.mark.slow
@pytest.mark.parametrize("flags", ["--tensor-model-parallel-size 2", "--use-distributed-optimizer"])
def test_clipping_values_apart_is_the_same_on_two_ranks(flags, upscaled):
    clip = "--value-clip-grad 0.01 --clip-grad 0.02"
    reference = train(*TINY_RUN, STEPS, clip, "--load", upscaled).check()
    run = train(*TINY_RUN, STEPS, clip, flags, "--load", upscaled, processes=2).check()
    assert_same_curve(run, reference)


def test_log_line_has_megatrons_format(upscaled):
    run = train(
        *TINY_RUN, "--train-iters 2 --log-throughput --log-params-norm --log-num-zeros-in-grad --load", upscaled
    )
    number = r"-?\d+\.\d+E[+-]\d\d"
    pattern = (
        r" \[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{6}\] iteration {8}1/ {7}2 \| consumed samples: {12}4 \| "
        r"elapsed time per iteration \(ms\): \d+\.\d \| throughput per GPU \(TFLOP/s/GPU\): \d+\.\d \| "
        rf"learning rate: {number} \| global batch size: {{5}}4 \| lm loss: {number} \| grad norm: \d+\.\d{{3}} \| "
        r"num zeros: \d+ \| params norm: \d+\.\d{3} \| number of skipped iterations: {3}0 \| "
        r"number of nan iterations: {3}0 \| tokens per second: \d+ \| time left: 0:00:\d\d \|"
    )
    assert re.fullmatch(pattern, run.check().out.splitlines()[-2]), run.out.splitlines()[-2]


def test_startup_says_what_is_trained_and_how(upscaled, reference):
    assert "3 blocks (2 base, 1 memory at 1)" in reference.out
    assert "28,040 in total, 2,984 trainable (10.6 %, --train inserted)" in reference.out
    assert "group memory values: 1 tensors, 392 elements on this rank, max lr 0.01, min lr 0, weight decay 0" in (
        reference.out
    )


def test_evaluation_and_tensorboard(upscaled, tmp_path):
    flags = "--train-iters 4 --eval-interval 2 --eval-iters 3 --eval-at-start --kl-to-base 0.5 --tensorboard-dir"
    run = train(*TINY_RUN, flags, tmp_path, "--load", upscaled).check()
    assert set(run.evaluations) == {("validation", 0), ("validation", 2), ("validation", 4), ("test", 4)}
    scalars = read_scalars(tmp_path)
    for key in ("learning-rate", "batch-size", "lm loss", "grad-norm", "iteration-time", "throughput"):
        assert [step for step, _ in scalars[key]] == [1, 2, 3, 4], key
    # TensorBoard keeps fp32, the log seven digits.
    for key in ("lm loss", "kl to base"):
        logged = [float(line[key]) for line in run.lines]
        assert [value for _, value in scalars[key]] == pytest.approx(logged, rel=1e-6) and len(logged) == 4
    assert dict(scalars["lm loss validation"])[4] == pytest.approx(run.evaluations["validation", 4], rel=1e-6)
    loss = run.evaluations["test", 4]
    assert dict(scalars["lm loss test ppl"])[4] == pytest.approx(torch.tensor(loss).exp().item(), rel=1e-5)


def read_scalars(directory) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(directory), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_evaluation_reads_the_same_samples_every_time(upscaled):
    # A learning rate that changes nothing.
    flags = "--train-iters 2 --lr 1e-30 --eval-interval 1 --eval-iters 2 --load"
    run = train(*TINY_RUN, flags, upscaled).check()
    assert run.evaluations["validation", 1] == run.evaluations["validation", 2]


@pytest.mark.slow
def test_evaluation_is_the_same_at_every_layout(upscaled):
    flags = "--train-iters 2 --lr 1e-30 --eval-interval 2 --eval-iters 2 --load"
    one = train(*TINY_RUN, flags, upscaled).check().evaluations
    for layout in ("--tensor-model-parallel-size 2", "--use-distributed-optimizer --overlap-grad-reduce"):
        two = train(*TINY_RUN, flags, upscaled, layout, processes=2).check().evaluations
        assert two == pytest.approx(one, rel=1e-6)


def test_an_epoch_is_one_pass_over_the_training_part_of_all_datasets(upscaled, tmp_path):
    random = numpy.random.default_rng(3)
    samples = 0
    for name, documents in (("a", 13), ("b", 30)):
        builder = IndexedDatasetBuilder(str(tmp_path / f"{name}.bin"), dtype=numpy.uint16)
        lengths = random.integers(20, 60, documents).tolist()
        for length in lengths:
            builder.add_document(random.integers(0, 101, length), [length])
        builder.finalize(str(tmp_path / f"{name}.idx"))
        samples += (sum(lengths[: round(documents * 0.8)]) - 1) // 32
    flags = [*(flag.replace("--mock-data", "") for flag in TINY_RUN), "--tokenizer-type NullTokenizer --split 8,2,0"]
    flags += ["--train-epochs 2 --global-batch-size 2 --load", upscaled, "--data-path"]
    run = train(*flags, f"{tmp_path}/a {tmp_path}/b", log_samples=True).check()
    assert f"2 epochs of {samples} samples: {2 * samples} samples" in run.out
    read = [int(index) for index in re.findall(r"^sample (\d+)$", run.out, re.MULTILINE)]
    assert read == list(range(2 * samples)) and int(run.lines[-1]["consumed samples"]) == 2 * samples
    error = train(*flags, f"0.5 {tmp_path}/a 0.5 {tmp_path}/b").error
    assert "one pass over a blend with weights is not defined; leave the weights of train out" in error


def test_skip_train_only_evaluates(upscaled):
    run = train(*TINY_RUN, "--skip-train --eval-iters 2 --load", upscaled).check()
    assert set(run.evaluations) == {("validation", 0), ("test", 0)}
    assert run.lines == []


def test_batch_size_rampup_counts_samples(upscaled):
    flags = "--rampup-batch-size 2 2 12 --global-batch-size 6 --train-samples 30 --load"
    run = train(*TINY_RUN, flags, upscaled).check()
    assert [int(line["global batch size"]) for line in run.lines] == [2, 2, 2, 4, 4, 6, 6]
    assert run.lines[-1]["consumed samples"] == "26"


def test_schedules_end_where_they_should(upscaled):
    for style in ("constant", "linear", "cosine", "WSD --lr-wsd-decay-iters 2"):
        flags = f"--train-iters 6 --lr-warmup-iters 2 --min-lr 1e-4 --lr-decay-style {style} --load"
        rates = [float(line["learning rate"]) for line in train(*TINY_RUN, flags, upscaled).check().lines]
        assert rates[:2] == [5e-4, 1e-3], style
        assert rates[-1] == pytest.approx(1e-3 if style == "constant" else 1e-4), style


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--train-iters 3 --load /nowhere/x", "/nowhere/x does not exist"),
        (
            "--train-iters 3 --no-mock-data --data-path /nowhere/p --tokenizer-type NullTokenizer",
            "/nowhere/p.idx does not",
        ),
        ("--train-iters 3 --rotary-base x", "--rotary-base: 'x' is not a number"),
    ],
)
def test_wrong_input_is_one_line(flags, words, upscaled):
    assert words in train(*TINY_RUN, "--load", upscaled, flags).error


def test_flags_that_contradict_the_checkpoint_name_both_values(upscaled):
    run = train(*TINY_RUN, STEPS, "--hidden-size 64 --load", upscaled)
    assert "hidden_size=64 contradicts" in run.error and "hidden_size=32" in run.error
    run = train(*TINY_RUN, STEPS, "--memory-topk 4 --load", upscaled)
    assert "memory_topk=4 contradicts" in run.error and "memory_topk=3" in run.error


def test_all_ranks_end_quickly_after_a_mistake(tmp_path):
    """A mistake that only the model's builder sees, when all ranks are connected already."""
    flags = f"{TINY_MODEL[0]} --train-iters 3 --transformer-impl transformer_engine"
    run = train(*TINY_RUN, flags, "--tensor-model-parallel-size 2", processes=2, timeout=60)
    assert "Transformer Engine needs a CUDA device" in run.error


def test_a_plan_of_another_model_is_named(upscaled, tmp_path):
    other = write_upscaled(tmp_path / "other", insert_after=(1,))
    run = train(*TINY_RUN, STEPS, "--load", upscaled, "--save", other)
    assert "block 1: memory(0) against keep(1)" in run.error
