"""Keys and raw words in C++ against the reference, which is held to known answers elsewhere."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdiff import reference

int64 = st.integers(-(2**63), 2**63 - 1)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(int64, int64), min_size=1, max_size=4), st.integers(1, 40))
def test_raw_words(ops, keys, count):
    keys = torch.tensor(keys, dtype=torch.int64).reshape(-1, 2)
    words = ops.raw_words(keys, count)
    assert words.dtype == torch.int32
    assert np.array_equal(words.numpy().view(np.uint32), reference.raw_words(keys.numpy(), 0, count))


@pytest.mark.parametrize("samples, count", [(0, 5), (3, 0), (0, 0)])
def test_no_raw_words(ops, samples, count):
    assert ops.raw_words(torch.zeros(samples, 2, dtype=torch.int64), count).shape == (samples, count)


def test_raw_words_of_random123(ops):
    """The one of its known answers whose upper counter words are 0, as they always are here: key and counter zero."""
    words = ops.raw_words(torch.zeros(1, 2, dtype=torch.int64), 4)
    assert [f"{w & 0xFFFFFFFF:08x}" for w in words[0].tolist()] == ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"]


@pytest.mark.parametrize("key_shape, data_shape", [((), ()), ((3,), ()), ((), (4,)), ((3, 1), (4,)), ((2, 3), (2, 3)), ((0,), ()), ((1,), (0,))])
def test_fold_in(ops, key_shape, data_shape):
    generator = np.random.default_rng(3)
    keys = torch.from_numpy(np.asarray(generator.integers(-(2**63), 2**63 - 1, (*key_shape, 2))))
    data = torch.from_numpy(np.asarray(generator.integers(-(2**63), 2**63 - 1, data_shape)))
    child = ops.fold_in(keys, data)
    expected = reference.fold_in(keys.numpy(), data.numpy())
    assert child.shape == expected.shape
    assert np.array_equal(child.numpy(), expected)
    turned = keys.transpose(0, -1).contiguous().transpose(0, -1)
    assert torch.equal(ops.fold_in(turned, data), child)


def test_run_keys(ops):
    generator = np.random.default_rng(4)
    seeds = torch.from_numpy(generator.integers(-(2**63), 2**63 - 1, 3))
    streams, draws = (torch.from_numpy(generator.integers(-5, 50, (4, 2))) for _ in range(2))
    assert np.array_equal(ops.run_keys(seeds, streams, draws).numpy(), reference.run_keys(seeds.numpy(), streams.numpy(), draws.numpy()))
    assert ops.run_keys(seeds[:0], streams, draws).shape == (4, 2, 0, 2)


@pytest.mark.parametrize("call, given_, taken", [
    (lambda o: o.fold_in(torch.zeros(3, dtype=torch.int64), torch.tensor(1)), "(3,)", "last dimension of 2"),
    (lambda o: o.fold_in(torch.zeros(2), torch.tensor(1)), "float32", "int64"),
    (lambda o: o.fold_in(torch.zeros(3, 2, dtype=torch.int64), torch.zeros(4, dtype=torch.int64)), "(4,)", "broadcast"),
    (lambda o: o.raw_words(torch.zeros(1, 2, dtype=torch.int64), -1), "-1", "at least 0"),
    (lambda o: o.raw_words(torch.zeros(2, dtype=torch.int64), 4), "(2,)", "(samples, 2)"),
    (lambda o: o.run_keys(torch.zeros(2), torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, 1, dtype=torch.int64)), "float32", "int64"),
    (lambda o: o.run_keys(torch.zeros(2, dtype=torch.int64), torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, 2, dtype=torch.int64)),
     "(1, 2)", "one shape"),
    (lambda o: o.normal_(torch.zeros(2, 3), torch.zeros(3, 2, dtype=torch.int64)), "(3, 2)", "(samples of out, 2)"),
    (lambda o: o.normal_(torch.zeros(2, 3, dtype=torch.float64), torch.zeros(2, 2, dtype=torch.int64)), "float64", "bfloat16"),
    (lambda o: o.normal_(torch.zeros(3).expand(2, 3), torch.zeros(2, 2, dtype=torch.int64)), "(0, 1)", "overlaps"),
    (lambda o: o.normal_(torch.zeros(4, 6)[:, ::2], torch.zeros(4, 2, dtype=torch.int64)), "(6, 2)", "dense"),
])
def test_refusals(ops, call, given_, taken):
    with pytest.raises(ValueError) as error:
        call(ops)
    assert given_ in str(error.value) and taken in str(error.value)
