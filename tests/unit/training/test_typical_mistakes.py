"""What people who come from Megatron mistype or forget: one line each, said before a model is thought of."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy
import pytest

ROOT = Path(__file__).parents[3]
# What a run from scratch needs; later flags win.
RUN = (
    "--distributed-backend gloo --train-data-path good --tokenizer-type NullTokenizer --seq-length 32 --lr 1e-3 "
    "--train-iters 4 --num-layers 2 --hidden-size 48 --num-attention-heads 6 --num-query-groups 2 --vocab-size 101 "
    "--ffn-hidden-size 96 --num-workers 0 --eval-iters 0"
)
WITHOUT_DATA = RUN.replace("--train-data-path good ", "")
WITHOUT_TOKENIZER = RUN.replace("--tokenizer-type NullTokenizer ", "")

# {name: (flags, processes, message)}
MISTAKES = {
    "mistyped flag": (f"{RUN} --trian-iters 5", 1, "--trian-iters is no flag; did you mean --train-iters?"),
    "underscores": (f"{RUN} --micro_batch_size 5", 1, "--micro_batch_size is no flag; did you mean --micro-batch-size?"),
    "no number": (f"{RUN} --train-iters 5x", 1, "--train-iters: '5x' is not a whole number"),
    "no value": (f"{RUN} --save", 1, "--save: needs a value, and none follows"),
    "no such choice": (f"{RUN} --lr-decay-style cosin", 1, "did you mean cosine?"),
    "no length": (RUN.replace("--train-iters 4 ", ""), 1, "give exactly one of --train-iters, --train-samples and --train-epochs"),
    "no learning rate": (RUN.replace("--lr 1e-3 ", ""), 1, "give --lr"),
    "no data": (WITHOUT_DATA, 1, "give --data-path, --train-data-path or --mock-data"),
    "no such data": (f"{WITHOUT_DATA} --data-path nowhere", 1, "nowhere.idx does not exist; give the prefix"),
    "no such weighted data": (f"{WITHOUT_DATA} --data-path 0.3 good 0.7 nowhere", 1, "nowhere.idx does not exist"),
    "no such training data": (f"{WITHOUT_DATA} --train-data-path 1 nowhere", 1, "nowhere.idx does not exist"),
    "no such validation data": (f"{RUN} --eval-iters 1 --valid-data-path 1 no", 1, "no.idx does not exist"),
    "no such test data": (f"{RUN} --eval-iters 1 --test-data-path no", 1, "no.idx does not exist"),
    "file for a prefix": (f"{RUN} --train-data-path good.bin", 1, "good.bin.idx does not exist; did you mean good?"),
    "weight left out": (f"{RUN} --train-data-path 0.3 good good", 1, "give a weight before every prefix or before none"),
    "data cut off": (f"{RUN} --train-data-path short", 1, "short.bin has 20 bytes, its index says 24"),
    "other tokenizer's data": (f"{RUN} --vocab-size 7", 1, "good holds the token id 11, but the tokenizer has only 7 ids"),
    "no such tokenizer": (f"{WITHOUT_TOKENIZER} --tokenizer-model nowhere", 1, "tokenizer directory nowhere does not exist"),
    "no tokenizer in it": (f"{WITHOUT_TOKENIZER} --tokenizer-model empty", 1, "empty holds no tokenizer"),
    "processes": (f"{RUN} --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2", 6, "start a multiple of 4"),
    "batch": (f"{RUN} --micro-batch-size 3 --global-batch-size 8", 2, "not divisible by micro_batch_size=3"),
    "heads": (f"{RUN} --tensor-model-parallel-size 4", 4, "num_attention_heads=6, ffn_hidden_size=96, num_query_groups=2"),
    "query groups": (
        f"{RUN} --num-query-groups 2 --tensor-model-parallel-size 3", 3, "tensor_model_parallel_size=3; choose one of [1, 2, 6]"
    ),
    "layers": (f"{RUN} --num-layers 3 --pipeline-model-parallel-size 2", 2, "give --pipeline-model-parallel-layout auto"),
    "sequence parallelism alone": (f"{RUN} --sequence-parallel", 1, "raise --tensor-model-parallel-size"),
    "sequence length": (
        f"{RUN} --tensor-model-parallel-size 2 --sequence-parallel --seq-length 33", 2, "seq_length=33 is not divisible by"
    ),
    "context parallelism on a CPU": (f"{RUN} --context-parallel-size 2", 2, "needs Transformer Engine's attention on a GPU"),
    "save below a file": (f"{RUN} --save good.bin/checkpoints", 1, "good.bin is not a directory; choose another one"),
    "save where nothing can be": (f"{RUN} --save /proc/checkpoints", 1, "cannot be written"),
    "log where nothing can be": (f"{RUN} --tensorboard-dir /proc/logs", 1, "--tensorboard-dir /proc/logs cannot be written"),
    "no such checkpoint": (f"{RUN} --load nowhere", 1, "checkpoint directory nowhere does not exist"),
    "a base for a checkpoint": (f"{RUN} --load {ROOT / 'examples' / 'tiny_base'}", 1, "examples/tiny_base"),
    "two precisions": (f"{RUN} --bf16 --fp16", 1, "give one of --bf16 and --fp16"),
    "warm-up": (f"{RUN} --lr-warmup-iters 4", 1, "lr_warmup_iters=4 is not shorter than the decay of 4"),
    "no GPU": (RUN.replace("--distributed-backend gloo ", ""), 1, "choose --distributed-backend gloo"),
}  # fmt: skip

PROGRAM = """
import json, os, sys
from megatron_midus import cli
from megatron_midus.errors import UserError
from megatron_midus.training.main import main
found = {}
for name, (flags, processes, _) in json.load(sys.stdin).items():
    os.environ["WORLD_SIZE"] = str(processes)
    try:
        found[name] = "no mistake: " + str(main(flags.split()))
    except Exception as error:
        found[name] = cli.describe(error) if isinstance(error, (UserError, OSError)) else repr(error)
    found[name] = [found[name], "megatron.core" in sys.modules, "torch" in sys.modules]
json.dump(found, sys.stdout)
"""


def write_dataset(prefix: Path, *, documents: int, tokens: int) -> None:
    """An indexed dataset as Megatron-Core lays it out."""
    lengths = numpy.full(documents, tokens, numpy.int32)
    places = 2 * numpy.cumsum(lengths, dtype=numpy.int64) - 2 * tokens
    head = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 8, documents, documents + 1)
    ends = numpy.arange(documents + 1, dtype=numpy.int64)
    prefix.with_suffix(".idx").write_bytes(head + lengths.tobytes() + places.tobytes() + ends.tobytes())
    prefix.with_suffix(".bin").write_bytes(numpy.arange(documents * tokens, dtype=numpy.uint16).tobytes())


@pytest.fixture(scope="module")
def said(tmp_path_factory) -> dict[str, list]:
    """What every mistake was answered with, by one fresh interpreter, and what it had imported by then."""
    directory = tmp_path_factory.mktemp("mistakes")
    for name in ("good", "short"):
        write_dataset(directory / name, documents=3, tokens=4)
    (directory / "short.bin").write_bytes((directory / "short.bin").read_bytes()[:20])
    (directory / "empty").mkdir()
    # What needs torch comes last, because a module stays imported.
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], input=json.dumps(MISTAKES), cwd=directory, env=environment, capture_output=True, text=True
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_before_anything_is_built(said, name):
    message, has_megatron, has_torch = said[name]
    assert message.startswith("error: ") and "\n" not in message
    assert MISTAKES[name][2] in message
    assert not has_megatron
    assert has_torch == (name == "no GPU")
