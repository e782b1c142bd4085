"""A tiny random MIDUS model and its memory written out in loops, head by head: what the analysis is held against."""

import functools
import math

import torch
from tiny_models import randomize

from megatron_midus.analysis.windows import Windows
from megatron_midus.hf import MidusConfig, MidusForCausalLM

VOCAB, HEADS, KEYS, TOPK, LATENT = 61, 3, 6, 3, 5
BLOCKS = ["transformer", "memory", "transformer", "memory"]
VARIANTS = {
    "hive": {"memory_query_norm": "rms"},
    "hive-dressed": {
        "memory_output_projection": "linear",
        "memory_score_activation": "sigmoid",
        "memory_query_temperature": True,
    },
    "full": {"memory_variant": "full", "memory_score_activation": "relu"},
    "block": {"memory_variant": "block"},
}


def make_midus(kind="hive", **changes):
    """Every parameter random, values too; the memories are loud, so that a wrong head moves the loss."""
    config = MidusConfig(
        vocab_size=VOCAB, hidden_size=24, intermediate_size=32, num_hidden_layers=len(BLOCKS), block_types=BLOCKS,
        num_attention_heads=HEADS, num_key_value_heads=1, head_dim=8, max_position_embeddings=64,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
        **{"memory_num_keys": KEYS, "memory_topk": TOPK, "memory_latent_size": LATENT, **VARIANTS[kind], **changes},
    )  # fmt: skip
    model = randomize(MidusForCausalLM(config), seed=4).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            if hasattr(layer, "memory"):
                layer.memory.value_bank.mul_(3)
    return model


@functools.cache
def midus(kind="hive"):
    """One for all tests that leave it as it is."""
    return make_midus(kind)


def make_windows(count=6, length=7, seed=0):
    ids = torch.randint(VOCAB, (count * length + 1,), generator=torch.Generator().manual_seed(seed))
    return Windows(ids[:-1].view(count, length), ids[1:].view(count, length))


def losses(model, windows):
    """Sums of the loss of each window ``[W]``, from the logits of the model as a whole."""
    with torch.no_grad():
        logits = model(input_ids=windows.inputs, use_cache=False).logits.double()
    return -logits.log_softmax(-1).gather(-1, windows.labels[..., None])[..., 0].sum(-1)


def look_up(memory, queries, topk=TOPK, allowed=None):
    """``[T][M]`` lists of (slot, weight) for transformed queries ``[T, M, D]``: every slot is scored, none is skipped.

    Args:
        allowed: slots that can be chosen, by head; all when absent.
    """
    keys = memory.row_keys.shape[1]
    row_keys, col_keys = memory.row_keys.detach().double(), memory.col_keys.detach().double()
    found = []
    for query in queries.double():
        found.append([])
        for head, vector in enumerate(query):
            first, second = vector.chunk(2)
            rows = (row_keys[head] @ first).tolist()
            cols = (col_keys[head] @ second).tolist()
            scores = {s: rows[s // keys] + cols[s % keys] for s in range(keys * keys)}
            wanted = scores if allowed is None else {s: scores[s] for s in allowed[head]}
            best = sorted(wanted, key=lambda s: -scores[s])[:topk]
            found[-1].append(list(zip(best, weigh([scores[s] for s in best], memory.config.memory_score_activation))))
    return found


def weigh(scores, activation):
    if activation == "softmax":
        total = sum(math.exp(s) for s in scores)
        return [math.exp(s) / total for s in scores]
    return [1 / (1 + math.exp(-s)) if activation == "sigmoid" else max(s, 0.0) for s in scores]


def table(memory):
    """What each slot holds for each head, ``[M, N, O]`` float64, for ``block`` ``[1, N, d]``."""
    values = memory.value_bank.detach().double()
    if memory.config.memory_variant == "hive":
        return torch.stack([values @ projection for projection in memory.head_proj.detach().double()])
    return values if memory.config.memory_variant == "full" else values[None]


def outputs(found, tables):
    """``[T, M, O]`` float64 of look-ups, head by head: ``tables[head]`` is what that head reads."""
    rows = []
    for heads in found:
        for head, pairs in enumerate(heads):
            slots, weights = zip(*pairs)
            rows.append(torch.tensor(weights, dtype=torch.float64) @ tables[head][list(slots)])
    return torch.stack(rows).view(len(found), len(found[0]), -1)


class NaivePass:
    """The model with every memory's look-up replaced by the loops above; ``found`` keeps what was looked up by block."""

    def __init__(self, model, *, topk=TOPK, allowed=None, tables=None, fixed=None, silent=()):
        self.model, self.topk, self.allowed, self.silent = model, topk, allowed or {}, silent
        self.tables, self.fixed, self.found, self.read = tables or {}, fixed or {}, {}, {}

    def losses(self, windows):
        for block, layer in enumerate(self.model.model.layers):
            if hasattr(layer, "memory"):
                layer.memory.look_up = functools.partial(self._look_up, block, layer.memory)
        try:
            return losses(self.model, windows)
        finally:
            for layer in self.model.model.layers:
                if hasattr(layer, "memory"):
                    del layer.memory.look_up

    def _look_up(self, block, memory, queries):
        found = self.fixed.get(block) or look_up(memory, queries, self.topk, self.allowed.get(block))
        found = [[[(s, 0.0 if (block, h) in self.silent else w) for s, w in pairs] for h, pairs in enumerate(heads)] for heads in found]  # fmt: skip
        tables = self.tables.get(block, table(memory))
        if memory.config.memory_variant == "block":
            read = outputs(found, [tables[0]] * HEADS).sum(1, keepdim=True)
        else:
            read = outputs(found, tables)
        self.found[block], self.read[block] = found, read
        return read.to(queries.dtype)
