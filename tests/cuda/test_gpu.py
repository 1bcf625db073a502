"""On a GPU: the ops against the exact reference and the golden digests, bit by bit, and what a captured step needs.
Skipped without one."""

import random

import numpy as np
import pytest
import torch

import fastdiff  # noqa: F401  registers the ops
from cases import assert_same, expected_case, random_case
from fastdiff import _reference_ops, reference, testing
from fastdiff.testing.digests import golden
from fastdiff.testing.inputs import moved
from proof import draw_steering
from quantile_cases import random_quantile_case

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
OPS = torch.ops.fastdiff


@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_golden_digests(name):
    """Every op and every sampler, on both backends, whichever of them is in use."""
    backend = next(b for b in testing.available("cuda") if b.name == name)
    if not backend.usable:
        pytest.skip(f"{name}: {backend.reason}")
    report = testing.assert_backends_agree("cuda", backends=[name])
    assert not report.not_run and len(report.results) == len(golden().cases)


@pytest.mark.parametrize("block", range(10))
def test_drawn_cases(block):
    for seed in range(20):
        options = {"dtypes": ("float32",)} if block % 3 == 2 else {}
        if block % 4:
            options |= {"masks": False, "row_kinds": ("int", "scalar", "batch"), "bank": block % 4 == 1}
        case = random_case(random.Random(5000 * block + seed), max_numel=5000, **options)
        expected = expected_case(case)
        there = case.to("cuda")
        OPS.step_(*there.args())
        assert_same(there.to("cpu"), expected)


@pytest.mark.parametrize("clamped", [False, True])
@pytest.mark.parametrize("op", draw_steering.OPS)
def test_ops_on_vectors(op, clamped):
    for i in range(36):
        args = draw_steering.case(op, i, clamped)
        expected = list(moved(dict(enumerate(args)), "cpu").values())
        getattr(_reference_ops, op)(*draw_steering.within(op, expected))
        there = list(moved(dict(enumerate(args)), "cuda").values())
        getattr(OPS, op)(*there)
        assert torch.equal(whole(there[0]).cpu(), whole(expected[0])), i


def whole(t):
    return torch.empty(0, dtype=torch.uint8, device=t.device).set_(t.untyped_storage())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 5), (2, 4, 64, 64), (70000, 3)])
def test_normal(dtype, shape):
    keys = torch.from_numpy(np.random.default_rng(0).integers(-(2**63), 2**63 - 1, (shape[0], 2)))
    out = torch.empty(shape, dtype=dtype, device="cuda")
    OPS.normal_(out, keys.cuda())
    expected = reference.narrow(reference.normal(keys.numpy(), out[0].numel()), str(dtype).split(".")[1])
    kind = torch.int32 if dtype == torch.float32 else torch.int16
    stored = out.cpu().view(kind).numpy().reshape(shape[0], -1)
    assert np.array_equal(stored, expected.view(stored.dtype))


def test_keys():
    rng = np.random.default_rng(1)
    keys, data = rng.integers(-(2**63), 2**63 - 1, (5, 3, 2)), rng.integers(-(2**63), 2**63 - 1, (3,))
    cuda = [torch.from_numpy(v).cuda() for v in (keys, data)]
    assert np.array_equal(OPS.fold_in(*cuda).cpu().numpy(), reference.fold_in(keys, data))
    assert np.array_equal(OPS.raw_words(cuda[0][0], 9).cpu().numpy().view(np.uint32), reference.raw_words(keys[0], 0, 9))
    streams, draws = rng.integers(0, 99, (4, 2)), rng.integers(0, 99, (4, 2))
    got = OPS.run_keys(cuda[1], torch.from_numpy(streams).cuda(), torch.from_numpy(draws).cuda())
    assert np.array_equal(got.cpu().numpy(), reference.run_keys(data, streams, draws))


def test_a_captured_step_replays():
    """Two replays of one captured step are two steps: nothing was baked in, copied or waited for."""
    case = random_case(random.Random(11), dtypes=("float32",), layouts=("contiguous",), row_kinds=("scalar",), empty=False)
    case = case.to("cuda")
    OPS.step_(*case.clone().args())  # loads the kernel
    first = expected_case(case.to("cpu"))
    second = expected_case(first)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        OPS.step_(*case.args())
    graph.replay()
    assert_same(case.to("cpu"), first)
    graph.replay()
    assert_same(case.to("cpu"), second)


def test_a_captured_edit_replays():
    """Two launches and the memory between them: what a graph holds works on what stands there when it is replayed."""
    h, bank, weight = torch.randn(2, 8, 16, 16), torch.randn(3, 8, 16, 16), torch.tensor([[0.1, 0.0], [-0.2, 0.3]])
    there = [t.cuda() for t in (h, bank, weight)]
    OPS.edit_(there[0].clone(), there[0], there[1], None, there[2])  # loads the kernels
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        OPS.edit_(there[0], there[0], there[1], None, there[2])
    for _ in range(2):
        graph.replay()
        _reference_ops.edit_(h, h, bank, None, weight)
        assert torch.equal(there[0].cpu(), h)


@pytest.mark.parametrize("seed", range(24))
def test_quantile(seed):
    case = random_quantile_case(random.Random(seed))
    expected = case.expected()
    there = case.to("cuda")
    there.run()
    assert_same(there.to("cpu"), expected)


def test_a_captured_quantile_replays():
    """Counts begin as zeros at each replay."""
    x, out, coef = torch.randn(2, 3, 65, 33), torch.zeros(2, device="cuda"), torch.ones(1, 1, device="cuda")
    there = x.cuda()
    OPS.quantile_(out, None, [there], coef, None, 0, None, 0.995, 1.0, 1.0)  # loads the kernels
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        OPS.quantile_(out, None, [there], coef, None, 0, None, 0.995, 1.0, 1.0)
    for factor in (2, 0.5):
        there.copy_(x * factor)
        graph.replay()
        assert torch.equal(out.cpu(), torch.quantile((x * factor).abs().flatten(1), 0.995, dim=1))
