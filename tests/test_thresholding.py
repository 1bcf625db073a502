"""Quantiles and dynamic thresholding of tensors, against torch and against what diffusers writes."""

import math

import pytest
import torch

import fastdiff as fd
from fastdiff.thresholding import dynamic_threshold, quantile

SHAPE = (4, 3, 20, 20)


def samples(shape=SHAPE, seed=0):
    """Of different sizes, so that limits act on some."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return x * torch.tensor([0.1, 1.0, 3.0, 30.0])[: len(x)].view(-1, *[1] * (len(shape) - 1))


def layouts():
    x = samples()
    return {"contiguous": x, "channels last": x.contiguous(memory_format=torch.channels_last),
            "a crop": samples((4, 3, 20, 40))[..., ::2], "one for all": x[:1].expand(SHAPE), "float16": x.half(), "bfloat16": x.bfloat16(), "no dimension": x[:, 0, 0, 0]}


@pytest.mark.parametrize("what", layouts())
@pytest.mark.parametrize("q", [0.0, 0.5, 0.995, 1.0])
def test_quantile(what, q):
    x = layouts()[what]
    expected = torch.quantile(x.float().abs().reshape(len(x), -1), q, dim=1)
    assert torch.equal(quantile(x, q), expected)


@pytest.mark.parametrize("what", layouts())
@pytest.mark.parametrize("ratio, high", [(0.995, 1.0), (0.9, 2.5), (0.5, math.inf), (0.9, 0.25)])
def test_dynamic_threshold(what, ratio, high):
    """As diffusers does it: clip to the quantile between 1 and sample_max_value, divide by it."""
    x = layouts()[what]
    before = x.clone()
    s = torch.quantile(x.float().abs().reshape(len(x), -1), ratio, dim=1).clamp(1, high).view(-1, *[1] * (x.dim() - 1))
    expected = x.float().clamp(-s, s) / s
    got = dynamic_threshold(x, ratio, high)
    assert got.dtype == x.dtype and got.shape == x.shape and torch.equal(x, before)
    ulp = {torch.float32: 2.0**-23, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}[x.dtype]
    assert ((got.float() - expected).abs() <= ulp * expected.abs()).all()


def test_diffusers():
    """The method of its own schedulers."""
    schedulers = pytest.importorskip("diffusers")
    scheduler = schedulers.DDPMScheduler(thresholding=True, dynamic_thresholding_ratio=0.9, sample_max_value=2.0)
    x = samples()
    assert torch.allclose(dynamic_threshold(x, 0.9, 2.0), scheduler._threshold_sample(x.clone()), rtol=2.0**-23, atol=0)


def test_a_sample_with_nan_becomes_nan():
    x = samples()
    x[1, 0, 3, 3] = math.nan
    assert quantile(x, 0.5).isnan().tolist() == [False, True, False, False]
    got = dynamic_threshold(x, 0.9, 2.0)
    assert got[1].isnan().all() and not got[[0, 2, 3]].isnan().any()


def test_empty_batch():
    assert quantile(samples()[:0], 0.5).shape == (0,) and dynamic_threshold(samples()[:0]).shape == (0, *SHAPE[1:])


@pytest.mark.parametrize("call, message", [
    (lambda x: quantile(x, 1.5), "q is 1.5: 0 to 1"), (lambda x: quantile(x[:, :0], 0.5), "at least one element"),
    (lambda x: quantile(x.double(), 0.5), "float64.*bfloat16"), (lambda x: dynamic_threshold(x, 0.9, 0.0), "low is 1.*high is 0"),
    (lambda x: quantile(torch.tensor(1.0), 0.5), r"\(batch, \*shape\)"),
    (lambda x: dynamic_threshold(torch.tensor(1.0)), r"\(batch, \*shape\)"),
])
def test_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(samples())


def test_in_a_step_no_estimate_is_written():
    """A row of a plan with CLIP takes the clip that quantile_ fills from the row's own inputs: what thresholding d itself gives."""
    plan = fd.plan("ddim", schedule="scaled_linear", steps=4)
    coef, meta = (torch.from_numpy(t).clone() for t in plan.table())
    meta[:, 1] |= 1  # CLIP
    shape, r = (2, 4, 16, 16), 2
    slots = [samples(shape, seed) for seed in range(len(plan.slots))]
    clip, outputs = torch.empty(2, 3), [torch.empty(shape) for _ in plan.outputs]
    ops = torch.ops.fastdiff
    ops.quantile_(None, clip, slots, coef, None, r, None, 0.9, 1.0, 3.0)
    keys = torch.zeros(1, plan.noises, 2, 2, dtype=torch.int64)  # the row's weight of its noise is 0
    ops.step_(slots, outputs, None, coef, meta, None, r, keys, None, None, None, None, clip, None, None, None)
    d = sum(c * v for c, v in zip(coef[r], slots))
    s = torch.quantile(d.abs().flatten(1), 0.9, dim=1).clamp(1, 3)
    assert torch.allclose(clip, torch.stack([-s, s, 1 / s], 1), rtol=1e-5)
    layout = plan.layout
    y = coef[r, layout.y(0) : layout.y(0) + len(slots)]
    s = s[:, None, None, None]
    expected = sum(c * v for c, v in zip(y, slots)) + coef[r, layout.y(0) + layout.inputs] * (d.clamp(-s, s) / s)
    assert torch.allclose(outputs[0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("function", [quantile, dynamic_threshold])
def test_gradients_are_refused_and_default_dtypes_do_not_matter(function):
    x = torch.randn(3, 40)
    expected = function(x, 0.9)
    with pytest.raises(ValueError, match="x requires gradients"):
        function(x.clone().requires_grad_(), 0.9)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.no_grad():
            assert torch.equal(function(x.clone().requires_grad_(), 0.9), expected)
    finally:
        torch.set_default_dtype(torch.float32)
