"""The ops as torch sees them: schemas, fake kernels, gradients, torch.compile."""

import random

import numpy as np
import pytest
import torch

import fastdiff as fd
from cases import random_case
from fastdiff.reference import Layout

OPS = torch.ops.fastdiff


def small_case(seed):
    return random_case(random.Random(seed), max_numel=60, specials=False, empty=False)


@pytest.mark.parametrize("seed", range(6))
def test_opcheck_step(seed):
    case = small_case(seed)
    inputs = [v.clone() for v in case.inputs]  # aliases are for eager code: functional tracing takes them apart
    args = (inputs, *case.args()[1:])
    torch.library.opcheck(OPS.step_.default, args)


def test_opcheck_the_others():
    keys = OPS.run_keys(torch.arange(3), torch.tensor([[1]]), torch.tensor([[0]]))[0, 0]
    torch.library.opcheck(OPS.normal_.default, (torch.empty(3, 5, 7), keys))
    torch.library.opcheck(OPS.fold_in.default, (keys, torch.tensor([4])))
    torch.library.opcheck(OPS.raw_words.default, (keys, 9))
    torch.library.opcheck(OPS.run_keys.default, (torch.arange(3), torch.zeros(2, 4, dtype=torch.int64), torch.ones(2, 4, dtype=torch.int64)))


@pytest.mark.parametrize("seed", range(4))
def test_opcheck_differentiable_step(seed):
    inputs, dtypes, *rest = differentiable_arguments(seed)
    args = (inputs, [0] * len(dtypes), *rest)  # the op takes places in (float32, float16, bfloat16)
    torch.library.opcheck(OPS.step.default, args)


def differentiable_arguments(seed, requires_grad=True):
    """A row of everything: clip, masks with noise, scales, bank, ring. Float32, well scaled."""
    g = torch.Generator().manual_seed(seed)
    B, shape, K, R, M, J, O, N = 2, (2, 3, 2), 2, 2, 2, 2, 2, 3
    layout = Layout(K + R, O, M, J)

    def leaf(*size):
        return torch.randn(size, generator=g).requires_grad_(requires_grad)

    coef = torch.randn((N, layout.width), generator=g)
    coef[torch.rand(coef.shape, generator=g) < 0.2] = 0
    coef[:, layout.clip : layout.clip + 3] = torch.tensor([-1.5, 1.5, 0.7])
    masked_input = 2 << 0 if seed % 2 else 0
    flags = 1 | masked_input | (2 << 1 if seed == 1 else 0) | (2 << (2 + seed % 2))
    meta = torch.tensor([[seed % 2, flags, 1, 0]] * N, dtype=torch.int32)
    rows = {0: None, 1: torch.tensor(1), 2: torch.tensor([2, 0]), 3: torch.tensor([[0, 1], [2, 1]])}[seed]
    keys = OPS.run_keys(torch.arange(B), torch.zeros(N, J, dtype=torch.int64), torch.arange(N * J).reshape(N, J))
    return ([leaf(B, *shape) for _ in range(K)], [torch.float32] * O, leaf(R, B, *shape), coef, meta, rows, 1, keys,
            leaf(B, K + R), leaf(3, *shape), torch.tensor([[0, 2], [1, 1]]), leaf(B, M), None, leaf(B, *shape),
            torch.rand((1, 1, 3, 2), generator=g))


@pytest.mark.filterwarnings("ignore:Input #")  # that it is not double: see below
@pytest.mark.parametrize("seed", range(4))
def test_gradcheck(seed):
    """A row is piecewise linear, so a large difference quotient has no truncation error in float32."""
    inputs, dtypes, ring, coef, meta, row, index, keys, scale, bank, bank_index, weight, clip, known, mask = (
        differentiable_arguments(seed))

    def f(a, b, ring, scale, bank, weight, known):
        return tuple(fd.step([a, b], dtypes, ring, coef, meta, row, index, keys, scale, bank, bank_index, weight, clip, known, mask))

    leaves = (*inputs, ring, scale, bank, weight, known)
    torch.autograd.gradcheck(f, leaves, eps=2e-3, atol=3e-3, rtol=1e-2)


def test_differentiable_values_are_the_steps():
    args = differentiable_arguments(1, requires_grad=False)
    inputs, dtypes, ring, *rest = args
    outputs, kept = [torch.empty_like(inputs[0]) for _ in dtypes], ring.clone()
    OPS.step_(inputs, outputs, kept, *rest, None)
    for ours, theirs in zip(fd.step(*args), [*outputs, kept], strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_without_break_or_recompile(backend):
    """Twenty steps through one graph: the row is a tensor, so nothing changes from step to step."""
    if backend == "inductor" and fd.ops.chosen("cpu") != "cpp":
        pytest.skip("one compiler is enough where the ops are Python")
    torch._dynamo.reset()
    plan = fd.plan("dpmpp_2m_sde", schedule="edm", prediction="denoised", steps=20)
    shape = (2, 3, 4, 4)

    def run(apply):
        stepper = fd.Stepper(plan, shape, seeds=3)
        x, ring, coef, meta, keys = stepper.x, stepper._ring, stepper._coef, stepper._meta, stepper._keys
        slots, outputs = list(plan.inputs), list(plan.outputs)
        buffers = dict(stepper._buffers)
        for r in range(stepper.row, len(plan)):
            apply(x, buffers, slots, outputs, ring, coef, meta, keys, torch.tensor(r), float_sigma := torch.tensor(plan.sigmas[r]))
        return x

    def one(x, buffers, slots, outputs, ring, coef, meta, keys, row, sigma):
        seen = buffers[plan.model_input]
        out = (torch.tanh(x) / (1 + sigma**2)).float() + 0 * seen
        OPS.step_([buffers.get(n, out) for n in slots], [buffers[n] for n in outputs], ring, coef, meta, row, 0, keys,
                  None, None, None, None, None, None, None, None)

    expected = run(one)
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled = torch.compile(one, fullgraph=True, backend=backend)
        got = run(compiled)
    assert torch.equal(got, expected) if backend == "aot_eager" else torch.allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name, dtype", [("dpmpp_2m_sde", torch.float32), ("heun", torch.float16), ("ddim", torch.bfloat16)])
def test_model_and_step_are_one_graph(name, dtype, grad):
    """A round written with the stepper's public parts, for every row and for runs started again: one graph, no recompile."""
    torch._dynamo.reset()
    plan = fd.plan(name, schedule="edm", prediction="denoised", steps=6)
    shape, graphs = (2, 3, 4, 4), []

    def model(x, time):
        return (torch.tanh(x.float()) / (1 + time.view(-1, 1, 1, 1) ** 2)).to(x.dtype)

    def counted(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    run = fd.Stepper(plan, shape, seeds=3, dtype=dtype)
    row = torch.tensor(run.row)

    def one_round():
        run.step(model(run.model_input, run.time_at(row)), row=row)
        row.add_(1)

    with torch.set_grad_enabled(grad), torch._dynamo.config.patch(error_on_recompile=True):
        compiled = torch.compile(one_round, fullgraph=True, backend=counted)
        for seed in (3, 8):
            run.restart(seed)
            row.fill_(run.row)
            for _ in range(plan.evaluations):
                compiled()
            run.check()
            assert torch.equal(run.x, fd.sample(model, plan, shape, seeds=seed, dtype=dtype))
        run.step(model(run.model_input, run.time))  # the run's own counter has not moved, and may
        row.fill_(run.row)
        compiled()
    assert len(graphs) == 1
    calls = [node.target for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert calls.count(OPS.step_.default) == 1 and torch.tanh in calls


def test_noise_does_not_depend_on_the_batch():
    whole = fd.randn((5, 3, 7), seeds=[9, 2**64 - 1, 0, -1, 9])
    assert torch.equal(whole[1], whole[3])  # seeds are read modulo 2^64
    assert torch.equal(whole[0], whole[4])
    for b, seed in enumerate([9, 2**64 - 1, 0]):
        assert torch.equal(fd.randn((1, 3, 7), seeds=[seed]), whole[b : b + 1])
    half = fd.randn((5, 3, 7), seeds=[9, 2**64 - 1, 0, -1, 9], dtype=torch.bfloat16)
    assert torch.equal(half, whole.bfloat16())


def test_raw_words_are_the_references():
    keys = torch.tensor([[1, 2], [-1, -2]])
    words = OPS.raw_words(keys, 23).numpy().view(np.uint32)
    assert (words == fd.reference.raw_words(keys.numpy(), 0, 23)).all()
