"""Indices beyond 2^31: the first and last blocks of large samples, those at the border, and batch strides beyond it, against the
exact reference at these elements."""

import numpy as np
import pytest

from cases import assert_same, expected_case
from proof import large
from proof.bits import backend
from proof.execute import memory_of, written


@pytest.mark.parametrize("kind", large.KINDS)
@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_indices_beyond_2_31(name, kind):
    try:
        case, tokens = large.big_case(kind)
    except OSError as error:
        pytest.skip(f"no address space for samples of this size: {error}")
    numel, data = case.inputs[0][0].numel(), np.random.default_rng(1)
    recording = backend(name).record(90, "step_", *case.args())
    (launch,) = recording.launches
    memory = memory_of(recording.tensors, written(case))
    for b in range(2):
        for first in [f for f in (0, 2**31 - large.SPAN, 2**31, 2**32) if f < numel] + [(numel - 1) // large.SPAN * large.SPAN]:
            count = min(large.SPAN, numel - first)
            large.fill(case, b, first, count, data)
            row = large.row_of(case, b, first, tokens)
            expected = expected_case(large.window(case, b, first, count, row))
            launch.run(memory, blocks=large.blocks(name, launch, b, first, numel, tokens))
            assert_same(large.window(case, b, first, count, row), expected)
