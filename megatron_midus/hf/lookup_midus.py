"""The look-up of a Memory block in plain torch, also as one operator for compilers. Travels inside every export.

Where the package ``megatron_midus`` is installed its operators do the work: Triton kernels on GPUs, compiled loops on
CPUs. Either way the largest temporary is bounded, whatever the number of tokens.

Shapes: T tokens, M memory heads, D channels of one memory head's query, N sub-keys per half (N * N slots), K top-k, L
latent, O = hidden size / attention heads.
"""

import contextlib

import torch
import torch.nn.functional as F

try:
    from megatron_midus.ops import head_wise_memory
except ImportError:
    head_wise_memory = None

# Elements of the largest temporary of a look-up (scores of all sub-keys, fp32: 64 MiB); longer inputs go in pieces.
MAX_SCORES = 2**24


def look_up(query_TMD, row_keys, col_keys, value_bank, head_proj, topk, variant, activation):
    """Reads the best slots of each token and head.

    Args:
        query_TMD: ``[T, M, D]``.
        row_keys, col_keys: ``[M, N, D / 2]``, matched with the first and the second half of the query.
        value_bank: ``hive`` ``[N * N, L]``; ``full`` ``[M, N * N, O]``; ``block`` ``[N * N, d]``.
        head_proj: ``hive`` ``[M, L, O]``; ``None`` for the others.
        topk: slots per token and head, K.
        variant: ``hive``, ``full`` or ``block``.
        activation: ``softmax``, ``sigmoid`` or ``relu`` turns scores into weights.

    Returns:
        ``[T, M, O]``, for ``block`` ``[T, 1, d]``, in the dtype of the query.
    """
    arguments = (query_TMD, row_keys, col_keys, value_bank, head_proj, topk, variant, activation)
    if not torch.compiler.is_compiling():
        return look_up_now(*arguments)
    if is_exporting() or not HAS_OPERATOR:
        return look_up_piece(*arguments)  # an exported graph has to run where nothing of this file is
    return torch.ops.midus.look_up(*arguments)


def look_up_now(query_TMD, row_keys, col_keys, value_bank, head_proj, topk, variant, activation):
    """As ``look_up``, outside of compilers."""
    if head_wise_memory is not None and query_TMD.device.type in ("cpu", "cuda"):
        return head_wise_memory(
            query_TMD, row_keys, col_keys, value_bank, head_proj,
            topk=topk, variant=variant, score_activation=activation,
        )  # fmt: skip
    rest = (row_keys, col_keys, value_bank, head_proj, topk, variant, activation)
    return torch.cat([look_up_piece(piece, *rest) for piece in pieces(query_TMD, row_keys.shape[1])])


@contextlib.contextmanager
def plain_torch():
    """As long as it lasts, look-ups leave the package's operators alone."""
    global head_wise_memory
    kept, head_wise_memory = head_wise_memory, None
    try:
        yield
    finally:
        head_wise_memory = kept


def look_up_piece(query_TMD, row_keys, col_keys, value_bank, head_proj, topk, variant, activation):
    """As ``look_up``, in one go: holds the scores of all sub-keys."""
    with no_autocast(query_TMD.device.type):
        slots, scores = select_slots(query_TMD, row_keys, col_keys, topk)
        read = read_values(slots, activate(scores, activation), value_bank, variant)
        if head_proj is not None:
            read = torch.einsum("tml,mlo->tmo", read.to(head_proj.dtype), head_proj)
    return read.to(query_TMD.dtype)


def pieces(query_TMD, num_keys):
    """The query in parts whose scores have room in ``MAX_SCORES``."""
    return query_TMD.split(max(1, MAX_SCORES // (query_TMD.shape[1] * num_keys)))


def activate(scores, activation):
    return scores.softmax(-1) if activation == "softmax" else getattr(scores, activation)()


def select_slots(query_TMD, row_keys_MND, col_keys_MND, topk):
    """The K best of N * N slots per token and head; slot ``(i, j)`` = ``i * N + j`` scores ``row_i . q1 + col_j . q2``.

    Exact: the best K slots are among (best K rows) x (best K columns), and there only where
    ``(rank of row) * (rank of column) <= K``.

    Returns:
        ``(slots int64 [T, M, K], scores [T, M, K])``, in fp32 at least; the scores are differentiable.
    """
    dtype = torch.promote_types(query_TMD.dtype, torch.float32)
    query_MTD = query_TMD.transpose(0, 1).to(dtype)
    best, index = [], []
    for half, keys in zip(query_MTD.chunk(2, dim=-1), (row_keys_MND, col_keys_MND)):
        scores_MTN = torch.bmm(half, keys.to(dtype).transpose(1, 2))
        values, places = scores_MTN.topk(topk, dim=-1)  # [M, T, K]
        best.append(values)
        index.append(places)
    with torch.no_grad():
        rows, cols = candidate_pairs(topk, query_TMD.device)  # [P]
        chosen = (best[0][..., rows] + best[1][..., cols]).topk(topk, dim=-1).indices  # [M, T, K], into P
        rows, cols = rows[chosen], cols[chosen]
        slots = index[0].gather(-1, rows) * row_keys_MND.shape[1] + index[1].gather(-1, cols)
    scores = best[0].gather(-1, rows) + best[1].gather(-1, cols)
    return slots.transpose(0, 1), scores.transpose(0, 1)


def candidate_pairs(topk, device):
    """Ranks ``(i, j)``, 0-based, with ``(i + 1) * (j + 1) <= topk``; made on the device, so nothing waits for the host."""
    ranks = torch.arange(1, topk + 1, device=device)
    count = sum(topk // rank for rank in range(1, topk + 1))
    order = (ranks[:, None] * ranks).flatten().argsort(stable=True)[:count]
    return order.div(topk, rounding_mode="floor"), order % topk


def read_values(slots_TMK, weights_TMK, value_bank, variant):
    """Weighted sums of rows of the value bank: ``[T, M, width]``, for ``block`` summed over the heads, ``[T, 1, d]``."""
    tokens, heads, topk = slots_TMK.shape
    bags = (tokens, heads * topk) if variant == "block" else (tokens * heads, topk)
    if variant == "full":
        offsets = torch.arange(heads, device=slots_TMK.device) * value_bank.shape[1]
        slots_TMK = slots_TMK + offsets[:, None]
    # embedding_bag never makes the [T, M, K, width] tensor of gathered rows, neither forward nor backward.
    summed = F.embedding_bag(
        slots_TMK.reshape(bags),
        value_bank.flatten(0, -2),
        mode="sum",
        per_sample_weights=weights_TMK.reshape(bags).to(value_bank.dtype),
    )
    return summed.view(tokens, -1, value_bank.shape[-1])


def no_autocast(device_type):
    """Scores and weights stay in fp32; devices without autocast (meta) have nothing to switch off."""
    if torch.amp.is_autocast_available(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


# -- one operator for compilers --------------------------------------------------------------------------------------
# A compiler traces once, with a number of tokens that it does not know: it could neither cut the query into pieces nor
# see into the loops of megatron_midus.ops. To it the look-up is one opaque operator, which cuts when it runs.
def is_exporting():
    return getattr(torch.compiler, "is_exporting", lambda: False)()


TENSORS = "Tensor query, Tensor row_keys, Tensor col_keys, Tensor value_bank, Tensor? head_proj"
SETTINGS = "int topk, str variant, str activation"
HAS_OPERATOR = hasattr(torch.library, "register_autograd")  # torch 2.4


def look_up_contiguous(*arguments):
    return look_up_now(*arguments).contiguous()


def look_up_shape(query_TMD, row_keys, col_keys, value_bank, head_proj, topk, variant, activation):
    width = value_bank.shape[-1] if head_proj is None else head_proj.shape[-1]
    return query_TMD.new_empty(query_TMD.shape[0], 1 if variant == "block" else query_TMD.shape[1], width)


def look_up_gradients(grad, query_TMD, row_keys, col_keys, value_bank, head_proj, topk, variant, activation):
    """Gradients of the tensors among the arguments, in their order; the look-up is computed again."""
    given = (query_TMD, row_keys, col_keys, value_bank, head_proj)
    leaves = [None if t is None else t.detach().requires_grad_() for t in given]
    with torch.enable_grad():
        output = look_up_now(*leaves, topk, variant, activation)
    found = torch.autograd.grad(output, [t for t in leaves if t is not None], grad)
    return [gradient.contiguous() for gradient in found]


def look_up_gradient_shapes(grad, query_TMD, row_keys, col_keys, value_bank, head_proj, topk, variant, activation):
    given = (query_TMD, row_keys, col_keys, value_bank, head_proj)
    return [t.new_empty(t.shape) for t in given if t is not None]


def keep_arguments(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:5])
    ctx.settings = inputs[5:]


def differentiate(ctx, grad):
    found = torch.ops.midus.look_up_backward(grad, *ctx.saved_tensors, *ctx.settings)
    return (*found, *[None] * (8 - len(found)))


# Several copies of this file may be in one process, the package's and those of exports: the first one defines the
# operators. A change of what they mean needs another name.
if HAS_OPERATOR and not hasattr(torch.ops.midus, "look_up"):
    LIBRARY = torch.library.Library("midus", "FRAGMENT")
    LIBRARY.define(f"look_up({TENSORS}, {SETTINGS}) -> Tensor")
    LIBRARY.define(f"look_up_backward(Tensor grad, {TENSORS}, {SETTINGS}) -> Tensor[]")
    LIBRARY.impl("look_up", look_up_contiguous, "CompositeExplicitAutograd")
    LIBRARY.impl("look_up_backward", look_up_gradients, "CompositeExplicitAutograd")
    torch.library.register_fake("midus::look_up", look_up_shape, lib=LIBRARY)
    torch.library.register_fake("midus::look_up_backward", look_up_gradient_shapes, lib=LIBRARY)
    torch.library.register_autograd("midus::look_up", differentiate, setup_context=keep_arguments, lib=LIBRARY)
