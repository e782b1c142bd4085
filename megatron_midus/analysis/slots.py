"""What slots fire on: the tokens and the places in the text at which a slot is read with the most weight."""

from __future__ import annotations

import dataclasses
import heapq
from typing import Any

import torch

from megatron_midus.analysis.passes import Progress, own_passes
from megatron_midus.analysis.usage import SlotCounts, empty_counts
from megatron_midus.analysis.windows import Windows
from megatron_midus.evaluation.perplexity import Tokenizer

CONTEXT_BEFORE = 10
_MAX_PENDING = 2**22  # (slot, token) pairs that wait to be merged, 64 MiB
NUM_SLOT_PASSES = 2

Pairs = list[tuple[int, int]]
"""(head, slot)."""


@dataclasses.dataclass(frozen=True)
class Context:
    """One place at which a slot was read.

    Attributes:
        weight: of the slot in that look-up.
        before, token, after: text before the token, the token that was read last, and the token that follows.
        window, position: where it is.
    """

    weight: float
    before: str
    token: str
    after: str
    window: int
    position: int


@dataclasses.dataclass(frozen=True)
class SlotReadings:
    """What one head reads one slot for.

    Attributes:
        head: memory head.
        slot, row, col: ``slot = row * n + col``.
        reads: how often.
        mass: sum of the weights.
        num_tokens: different tokens.
        information: bits that a read tells about the token: the Kullback-Leibler divergence of the slot's tokens, by
            weight, from the text's.
        tokens: ``(token, share of the mass)``, largest first.
        contexts: places, heaviest first.
    """

    head: int
    slot: int
    row: int
    col: int
    reads: int
    mass: float
    num_tokens: int
    information: float
    tokens: list[tuple[str, float]]
    contexts: list[Context]


@dataclasses.dataclass(frozen=True)
class BlockSlots:
    """Slots of one memory.

    Attributes:
        most_used: with the largest mass.
        most_selective: with the most information about the token, among those read at least ``min_reads`` times.
        mean_information: bits, mean over all slots with that many reads, weighted by mass; ``None`` without any.
    """

    most_used: list[SlotReadings]
    most_selective: list[SlotReadings]
    mean_information: float | None


@dataclasses.dataclass(frozen=True)
class SlotSettings:
    """How much is shown.

    Attributes:
        most_used, most_selective: slots per block.
        tokens, contexts: per slot.
        min_reads: fewer reads look selective by chance.
    """

    most_used: int = 8
    most_selective: int = 8
    tokens: int = 6
    contexts: int = 3
    min_reads: int = 32


class TokenMass:
    """Sums of weights by (head, slot, token), sparse.

    Attributes:
        keys: int64, sorted, ``(head * N + slot) * vocabulary + token``.
        mass: float64, of each key.
    """

    def __init__(self, num_slots: int, vocabulary: int) -> None:
        self.num_slots, self.vocabulary = num_slots, vocabulary
        self._parts: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._pending = 0

    def add(self, slots_TMK: torch.Tensor, weights_TMK: torch.Tensor, tokens_T: torch.Tensor) -> None:
        heads = torch.arange(slots_TMK.shape[1], device=slots_TMK.device)[:, None]
        keys = (heads * self.num_slots + slots_TMK) * self.vocabulary + tokens_T[:, None, None]
        self._parts.append(_merge(keys.flatten().cpu(), weights_TMK.flatten().double().cpu()))
        self._pending += len(self._parts[-1][0])
        if self._pending > _MAX_PENDING:
            self._merge_parts()

    def _merge_parts(self) -> None:
        if len(self._parts) > 1:
            self._parts = [_merge(torch.cat([k for k, _ in self._parts]), torch.cat([m for _, m in self._parts]))]
        self._pending = 0

    @property
    def keys_and_mass(self) -> tuple[torch.Tensor, torch.Tensor]:
        self._merge_parts()
        return self._parts[0] if self._parts else (torch.empty(0, dtype=torch.int64), torch.empty(0).double())

    def of(self, head: int, slot: int) -> tuple[torch.Tensor, torch.Tensor]:
        """``(tokens, mass)`` of one slot as one head reads it."""
        keys, mass = self.keys_and_mass
        first = (head * self.num_slots + slot) * self.vocabulary
        start, stop = torch.searchsorted(keys, torch.tensor([first, first + self.vocabulary])).tolist()
        return keys[start:stop] - first, mass[start:stop]

    def information(self, text_shares: torch.Tensor) -> torch.Tensor:
        """Bits that a read of each slot tells about the token, ``[M * N]`` as far as the largest slot read.

        Args:
            text_shares: float64 ``[vocabulary]``, how often each token stands in the text.
        """
        keys, mass = self.keys_and_mass
        slots, tokens = keys // self.vocabulary, keys % self.vocabulary
        totals = torch.zeros(int(slots.max()) + 1 if len(slots) else 0, dtype=torch.float64).index_add_(0, slots, mass)
        shares = mass / totals[slots].clamp(min=1e-300)
        bits = torch.where(shares > 0, shares * (shares / text_shares[tokens]).log2(), 0.0)
        return torch.zeros_like(totals).index_add_(0, slots, bits)


def _merge(keys: torch.Tensor, mass: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    unique, place = keys.unique(return_inverse=True)
    return unique, torch.zeros(len(unique), dtype=torch.float64).index_add_(0, place, mass)


class _Places:
    """The heaviest places of chosen (head, slot) pairs of one memory."""

    def __init__(self, chosen: Pairs, num_slots: int, limit: int) -> None:
        self.num_slots, self.limit = num_slots, limit
        self.wanted = torch.tensor(sorted({head * num_slots + slot for head, slot in chosen}), dtype=torch.int64)
        # (weight, -window, -position): of equal weights the earlier place wins.
        self.found: dict[int, list[tuple[float, int, int]]] = {key: [] for key in self.wanted.tolist()}

    def add(self, slots_TMK: torch.Tensor, weights_TMK: torch.Tensor, first_window: int, seq_length: int) -> None:
        heads = torch.arange(slots_TMK.shape[1], device=slots_TMK.device)[:, None]
        keys = heads * self.num_slots + slots_TMK
        hits = torch.isin(keys, self.wanted.to(keys.device))
        places = hits.nonzero()[:, 0].tolist()
        for place, key, weight in zip(places, keys[hits].tolist(), weights_TMK[hits].tolist()):
            entry = (weight, -(first_window + place // seq_length), -(place % seq_length))
            heap = self.found[key]
            if len(heap) < self.limit:
                heapq.heappush(heap, entry)
            elif entry > heap[0]:
                heapq.heapreplace(heap, entry)

    def best(self, head: int, slot: int) -> list[tuple[float, int, int]]:
        """``(weight, window, position)``, heaviest first."""
        ordered = sorted(self.found[head * self.num_slots + slot], reverse=True)
        return [(weight, -window, -position) for weight, window, position in ordered]


def measure_slots(
    model: Any,
    windows: Windows,
    tokenizer: Tokenizer,
    settings: SlotSettings,
    *,
    batch_size: int,
    progress: Progress | None = None,
) -> dict[int, BlockSlots]:
    """Two passes over the text: one finds the slots to show, one the places at which they are read."""
    settings_of_passes: dict[str, Any] = {"batch_size": batch_size, "progress": progress}
    counts, tokens = _tally(model, windows, **settings_of_passes)
    text = windows.inputs.flatten().bincount(minlength=_vocabulary(windows)).double() / windows.num_tokens
    chosen = {block: _choose(counts[block], tokens[block].information(text), settings) for block in counts}
    pairs = {block: [*used, *selective] for block, (used, selective, _) in chosen.items()}
    places = _find_places(model, windows, pairs, settings.contexts, **settings_of_passes)
    describer = _Describer(windows, tokenizer, text, settings, model.config.memory_num_keys)

    def describe(block: int, pairs: Pairs) -> list[SlotReadings]:
        return [describer.readings(h, s, counts[block], tokens[block], places[block]) for h, s in pairs]

    return {
        block: BlockSlots(describe(block, used), describe(block, selective), mean)
        for block, (used, selective, mean) in chosen.items()
    }


def _vocabulary(windows: Windows) -> int:
    return int(max(windows.inputs.max(), windows.labels.max())) + 1


def _tally(
    model: Any, windows: Windows, *, batch_size: int, progress: Progress | None
) -> tuple[dict[int, SlotCounts], dict[int, TokenMass]]:
    counts = empty_counts(model)
    tokens = {block: TokenMass(model.config.memory_num_keys**2, _vocabulary(windows)) for block in counts}
    for done in own_passes(model, windows, batch_size=batch_size, progress=progress):
        for block in counts:
            slots, weights = done.slots_and_weights(block)
            counts[block].add(slots, weights)
            tokens[block].add(slots, weights, done.windows.inputs.flatten())
    return counts, tokens


def _find_places(
    model: Any,
    windows: Windows,
    pairs: dict[int, Pairs],
    limit: int,
    *,
    batch_size: int,
    progress: Progress | None,
) -> dict[int, _Places]:
    places = {block: _Places(chosen, model.config.memory_num_keys**2, limit) for block, chosen in pairs.items()}
    first_window = 0
    for done in own_passes(model, windows, batch_size=batch_size, progress=progress):
        for block, found in places.items():
            found.add(*done.slots_and_weights(block), first_window, windows.inputs.shape[1])
        first_window += len(done.windows)
    return places


def _choose(counts: SlotCounts, bits: torch.Tensor, settings: SlotSettings) -> tuple[Pairs, Pairs, float | None]:
    """(head, slot) pairs of the most used and of the most selective slots, and the mean information in bits."""
    mass, reads = counts.mass.flatten(), counts.reads.flatten()
    num_slots = counts.mass.shape[1]

    def pairs(order: torch.Tensor, limit: int, allowed: torch.Tensor) -> Pairs:
        return [divmod(key, num_slots) for key in order.tolist() if allowed[key]][:limit]

    by_mass = mass.sort(descending=True, stable=True).indices[: settings.most_used]
    used = pairs(by_mass, settings.most_used, mass > 0)
    often = torch.zeros(len(reads), dtype=torch.bool)
    often[: len(bits)] = (reads >= settings.min_reads)[: len(bits)] & (mass > 0)[: len(bits)]
    candidates = often.nonzero()[:, 0]
    by_bits = candidates[bits[candidates].sort(descending=True, stable=True).indices]
    selective = pairs(by_bits[: settings.most_selective], settings.most_selective, often)
    total = mass[candidates].sum()
    mean = (bits[candidates] * mass[candidates]).sum().item() / total.item() if total > 0 else None
    return used, selective, mean


class _Describer:
    """Turns numbers into text."""

    def __init__(
        self, windows: Windows, tokenizer: Tokenizer, text: torch.Tensor, settings: SlotSettings, num_keys: int
    ) -> None:
        self.windows, self.tokenizer, self.text = windows, tokenizer, text
        self.settings, self.num_keys = settings, num_keys

    def readings(self, head: int, slot: int, counts: SlotCounts, tokens: TokenMass, places: _Places) -> SlotReadings:
        ids, mass = tokens.of(head, slot)
        shares = mass / mass.sum()
        order = mass.sort(descending=True, stable=True).indices[: self.settings.tokens]
        bits = torch.where(shares > 0, shares * (shares / self.text[ids]).log2(), 0.0)
        return SlotReadings(
            head=head,
            slot=slot,
            row=slot // self.num_keys,
            col=slot % self.num_keys,
            reads=int(counts.reads[head, slot]),
            mass=counts.mass[head, slot].item(),
            num_tokens=len(ids),
            information=bits.sum().item(),
            tokens=[(self.token_text(ids[i].item()), shares[i].item()) for i in order.tolist()],
            contexts=[self.context(*place) for place in places.best(head, slot)],
        )

    def context(self, weight: float, window: int, position: int) -> Context:
        ids = self.windows.inputs[window].tolist()
        start = max(0, position - CONTEXT_BEFORE)
        before = self.tokenizer.decode(ids[start:position]) if position > start else ""
        token, after = self.token_text(ids[position]), self.token_text(self.windows.labels[window, position].item())
        return Context(weight, before, token, after, window, position)

    def token_text(self, token: int) -> str:
        """With its leading space, which tokenizers of the SentencePiece kind drop at the start of a text."""
        anchor = self.tokenizer.decode([token])
        both = self.tokenizer.decode([token, token])
        return both[len(anchor) :] if both.startswith(anchor) and both != anchor else anchor
