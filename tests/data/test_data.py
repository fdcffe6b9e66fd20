"""Batches: every window once per epoch, the same ones for the same seed and index."""

from itertools import pairwise

import numpy as np
import pytest

from jaxpipe.data.batches import Batches
from jaxpipe.data.corpus import Segment
from jaxpipe.errors import DataError


def batches(*lengths, batch_size=3, seq_len=4, seed=0):
    ends = np.cumsum([0, *lengths])
    ids = [np.arange(a, b, dtype=np.uint16) for a, b in pairwise(ends)]
    segments = [Segment(f"segment {i}", part) for i, part in enumerate(ids)]
    return Batches(segments, batch_size=batch_size, seq_len=seq_len, vocab_size=int(ends[-1]), seed=seed)


def test_targets_follow_tokens():
    batch = batches(101)[0]
    assert {name: (leaf.shape, leaf.dtype.name) for name, leaf in batch.items()} == {
        "tokens": ((3, 4), "int32"),
        "targets": ((3, 4), "int32"),
    }
    np.testing.assert_array_equal(batch["tokens"] + 1, batch["targets"])


def test_an_epoch_predicts_every_token_once():
    data = batches(25, 3, 17, 5, batch_size=11, seq_len=4)  # 6 + 0 + 4 + 1 windows
    assert data.num_windows == 11
    seen = sorted(data[0]["targets"].ravel().tolist())
    assert seen == [*range(1, 25), *range(29, 45), *range(46, 50)]


def test_windows_stay_inside_their_segment():
    data = batches(9, 9, 9, batch_size=1, seq_len=4)
    for index in range(data.num_windows):
        tokens = data[index]["tokens"]
        assert (tokens // 9 == tokens[0, 0] // 9).all()


def test_epochs_differ_in_order_only():
    data = batches(401, batch_size=10)  # 100 windows
    epochs = [np.concatenate([data[e * 10 + i]["tokens"] for i in range(10)]) for e in range(2)]
    assert not np.array_equal(epochs[0], epochs[1])
    assert sorted(map(tuple, epochs[0])) == sorted(map(tuple, epochs[1]))


def test_a_batch_may_span_epochs():
    data = batches(9, batch_size=7)  # 2 windows
    rows = data[0]["tokens"][:, 0].tolist() + data[1]["tokens"][:, 0].tolist()
    assert sorted(rows) == [0] * 7 + [4] * 7
    assert all(sorted(rows[i : i + 2]) == [0, 4] for i in range(0, 14, 2))


def test_the_state_is_one_integer():
    straight = batches(401, batch_size=7)
    seen = [straight[i]["tokens"] for i in range(40)]
    for index in (39, 0, 13, 14, 15, 2):
        np.testing.assert_array_equal(batches(401, batch_size=7)[index]["tokens"], seen[index])
        np.testing.assert_array_equal(straight[index]["tokens"], seen[index])


def test_seeds_give_different_orders():
    assert not np.array_equal(batches(401, seed=1)[0]["tokens"], batches(401, seed=2)[0]["tokens"])


def test_too_little_text_is_refused():
    with pytest.raises(DataError, match=r"segment 1: 4 tokens must be at least .*=5; try train\.seq_len=3"):
        batches(2, 4)
    assert batches(2, 5).num_windows == 1


def test_an_id_that_the_scan_at_the_door_missed_is_caught_in_its_batch():
    ids = np.array([0, 1, 2, 3, 2**32 - 1, 5], np.uint32)
    data = Batches([Segment("train.bin", ids)], batch_size=1, seq_len=4, vocab_size=9)
    with pytest.raises(DataError, match=r"train\.bin: token id 4294967295 must be below model\.vocab_size=9"):
        data[0]
