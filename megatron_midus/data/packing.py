"""Whole conversations into sequences of one length: which go together, and in which order, by seed and epoch alone.

Best fit, the longest first. Where a conversation goes then depends on lengths alone, so every epoch has the same number of
sequences; what an epoch changes is which of the conversations of one length go where, and the order of the sequences.
"""

from __future__ import annotations

import bisect
import functools

import numpy


class Packing:
    """Sequences of one epoch after the other.

    Args:
        lengths: ``[n]``, places that each conversation takes, each at least 1 and at most ``capacity``.
        capacity: places of a sequence.
        seed: of the shuffles.
    """

    def __init__(self, lengths: numpy.ndarray, capacity: int, *, seed: int) -> None:
        assert len(lengths) and lengths.min() >= 1 and lengths.max() <= capacity
        self._lengths, self._seed = lengths, seed
        bins = best_fit(numpy.sort(lengths)[::-1], capacity)  # by rank, the longest has rank 0
        self._ranks = numpy.argsort(bins, kind="stable")
        self._starts = numpy.searchsorted(bins[self._ranks], numpy.arange(int(bins.max()) + 2))
        self.per_epoch = int(bins.max()) + 1
        """Sequences in an epoch."""
        self.fill = float(lengths.sum() / (self.per_epoch * capacity))
        """Share of the places that conversations take."""
        self._epoch = functools.lru_cache(maxsize=2)(self._shuffled)

    def __getitem__(self, index: int) -> numpy.ndarray:
        """The conversations of a sequence; sequences ``per_epoch * e`` and following are those of epoch ``e``."""
        epoch, place = divmod(int(index), self.per_epoch)
        conversations, sequences = self._epoch(epoch)
        sequence = sequences[place]
        return conversations[self._ranks[self._starts[sequence] : self._starts[sequence + 1]]]

    def _shuffled(self, epoch: int) -> tuple[numpy.ndarray, numpy.ndarray]:
        """Conversations by rank, and sequences in their order."""
        # A stream that NumPy promises not to change.
        random = numpy.random.RandomState([self._seed % 2**32, epoch])
        shuffled = random.permutation(len(self._lengths))
        by_length = shuffled[numpy.argsort(-self._lengths[shuffled].astype(numpy.int64), kind="stable")]
        return by_length, random.permutation(self.per_epoch)


def best_fit(lengths: numpy.ndarray, capacity: int) -> numpy.ndarray:
    """``[n]``: the bin of each of ``lengths``, which fall; each goes into the fullest bin that has room for it."""
    room: dict[int, list[int]] = {}  # free places -> bins
    sizes: list[int] = []  # the keys of room, rising
    bins = numpy.empty(len(lengths), dtype=numpy.int64)
    count = 0
    for index, length in enumerate(lengths.tolist()):
        at = bisect.bisect_left(sizes, length)
        if at < len(sizes):
            free = sizes[at]
            chosen = room[free].pop()
            if not room[free]:
                del room[free], sizes[at]
        else:
            free, chosen, count = capacity, count, count + 1
        bins[index] = chosen
        left = free - length
        if left:
            if left not in room:
                room[left] = []
                bisect.insort(sizes, left)
            room[left].append(chosen)
    return bins
