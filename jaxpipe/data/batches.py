"""Which tokens make up which batch.

The order is a pure function of (seed, index): batch `index` is the same on every machine and in every run, so the
whole state of the data is one integer and a run that continues asks for the next.
"""

from collections.abc import Sequence

import numpy as np

from jaxpipe.data.corpus import Segment, check_ids
from jaxpipe.errors import DataError


class Batches:
    """Batches of windows over segments: each epoch visits every window once, in an order of its own.

    A window is ``seq_len + 1`` neighbouring tokens of one segment; windows start every `seq_len` tokens, so every
    token but a segment's last few is predicted once per epoch.

    Args:
        segments: Where windows are cut from.
        batch_size: Windows per batch.
        seq_len: Tokens per row, T.
        vocab_size: Every id must be below it.
        seed: Seed of the order.

    Raises:
        DataError: No segment is long enough for one window.

    Example:
        >>> batches = Batches([Segment("digits", np.arange(9, dtype=np.uint8))], batch_size=2, seq_len=4, vocab_size=9)
        >>> batches.num_windows
        2
        >>> sorted(batches[0]["tokens"].tolist())
        [[0, 1, 2, 3], [4, 5, 6, 7]]
    """

    def __init__(self, segments: Sequence[Segment], *, batch_size: int, seq_len: int, vocab_size: int, seed: int = 0):
        self.segments = tuple(segments)
        self.batch_size = batch_size
        self.seq_len = seq_len
        self.vocab_size = vocab_size
        self.seed = seed
        counts = [max(0, (len(segment.ids) - 1) // seq_len) for segment in self.segments]
        self._ends = np.cumsum(counts)
        self.num_windows = int(self._ends[-1])
        if not self.num_windows:
            longest = max(self.segments, key=lambda segment: len(segment.ids))
            raise DataError(
                f"{longest.name}: {len(longest.ids)} tokens must be at least train.seq_len+1={seq_len + 1}; "
                f"try train.seq_len={max(1, len(longest.ids) - 1)} or more data"
            )
        self._epoch, self._order = -1, np.empty(0, np.int64)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Batch `index`, counted from 0: ``tokens`` and the ``targets`` that follow them, both int32 ``[B, T]``.

        Raises:
            DataError: A token id that the vocabulary does not hold.
        """
        return self.rows(index * self.batch_size, self.batch_size)

    def rows(self, first: int, count: int) -> dict[str, np.ndarray]:
        """Rows `first` to ``first + count - 1`` of all batches one after the other, like those of a batch.

        Raises:
            DataError: A token id that the vocabulary does not hold.
        """
        rows = [self._window(*divmod(first + row, self.num_windows)) for row in range(count)]
        ids = np.stack(rows).astype(np.int32)  # [B, T + 1]
        return {"tokens": ids[:, :-1].copy(), "targets": ids[:, 1:].copy()}

    def _window(self, epoch: int, place: int) -> np.ndarray:
        if epoch != self._epoch:
            self._order = np.random.default_rng([self.seed, epoch]).permutation(self.num_windows)
            self._epoch = epoch
        window = int(self._order[place])
        which = int(np.searchsorted(self._ends, window, side="right"))
        segment = self.segments[which]
        start = (window - int(self._ends[which - 1] if which else 0)) * self.seq_len
        ids = segment.ids[start : start + self.seq_len + 1]
        check_ids(segment, ids, self.vocab_size)
        return ids
