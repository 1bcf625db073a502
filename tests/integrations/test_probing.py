"""Rows found by probing: their numbers, and what is refused."""

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers", reason="diffusers is not installed")

import fastdiff as fd
import fastdiff.integrations.diffusers
from diffusers import DDIMScheduler, DDPMScheduler, SchedulerMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.utils.torch_utils import randn_tensor
from fastdiff.integrations.calls import Call, NotLinear
from fastdiff.integrations.probing import root
from fastdiff.integrations.rows import prepare
from integrations.schedulers import SD

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
LATENT = (("model_output", torch.float32), ("sample", torch.float32))


def call(t, generator=False, ndim=4, **plain):
    return Call(ndim, LATENT, (("timestep", (torch.int64, 0), t),), tuple(plain.items()), generator)


def row_of(scheduler, c):
    return root(type(scheduler), "step", vars(scheduler)).advance(c)[0]


def test_ddim_has_the_coefficients_of_its_formula():
    """Song et al. 2021, equation 12: x' = sqrt(a') x0 + sqrt(1 - a' - s^2) e + s n, x0 = (x - sqrt(1 - a) e) / sqrt(a)."""
    scheduler = DDIMScheduler(**SD, clip_sample=False, set_alpha_to_one=False)
    scheduler.set_timesteps(10)
    alphas = scheduler.alphas_cumprod.double().numpy()
    t, before = int(scheduler.timesteps[3]), int(scheduler.timesteps[4])
    row = row_of(scheduler, call(t, eta=0.7, return_dict=False))
    a, b = alphas[t], alphas[before]
    s = 0.7 * np.sqrt((1 - b) / (1 - a) * (1 - a / b))
    expected = [np.sqrt(1 - b - s * s) - np.sqrt(b) * np.sqrt(1 - a) / np.sqrt(a), np.sqrt(b / a), s]
    np.testing.assert_allclose(row.targets[0, :3], expected, rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(row.targets[1, :3], [-np.sqrt((1 - a) / a), 1 / np.sqrt(a), 0], rtol=2e-6)
    assert not row.targets[:, 3:].any() and row.origin == () and row.draws[0].how == "randn_tensor"


def test_a_clip_is_part_of_the_row():
    scheduler = DDPMScheduler(**SD, clip_sample=True, clip_sample_range=1.5)
    scheduler.set_timesteps(10)
    row = row_of(scheduler, call(int(scheduler.timesteps[2]), return_dict=False))
    slot, inside, lo, hi, quantile = row.clip
    assert quantile is None and not row.thresholds
    assert (
        (lo, hi) == (-1.5, 1.5) and slot in (2, 3) and not row.targets[:, 0].any()
    )  # the output counts through the clip alone
    assert inside[0] < 0 < inside[1] and not inside[2:].any() and row.targets[1, slot] == 1


def test_rows_are_found_once():
    schedulers = [DDIMScheduler(**SD) for _ in range(2)]
    for s in schedulers:
        s.set_timesteps(10)
    nodes = [root(DDIMScheduler, "step", vars(s)) for s in schedulers]
    assert nodes[0] is nodes[1]
    schedulers[1].set_timesteps(11)
    assert root(DDIMScheduler, "step", vars(schedulers[1])) is not nodes[0]
    row, after, _ = nodes[0].advance(call(500, return_dict=False))
    assert after is nodes[0] and nodes[0].advance(call(500, return_dict=False))[0] is row


class Odd(SchedulerMixin, ConfigMixin):
    """A scheduler whose step is whatever ``rule`` says."""

    order = 1
    init_noise_sigma = 1.0

    @register_to_config
    def __init__(self):
        self.timesteps = torch.arange(4).flip(0)
        self.history = []

    def set_timesteps(self, steps, device=None):
        self.timesteps = torch.arange(steps, device=device).flip(0)
        self.history = []

    def step(self, model_output, timestep, sample, generator=None, return_dict=True):
        return (self.rule(model_output, sample, generator),)


def odd(rule):
    return type("Odd", (Odd,), {"rule": rule})()


def many(self, m, x, g):
    self.history = (self.history + [m])[-13:]
    return x + sum(self.history)


NOT_LINEAR = {
    "a square": lambda self, m, x, g: x + m * m,
    "a product": lambda self, m, x, g: x * m,
    "a constant": lambda self, m, x, g: x + 0.01,
    "a norm": lambda self, m, x, g: x / x.norm(),
    "a mean": lambda self, m, x, g: x - m.mean(),
    "two clips": lambda self, m, x, g: x.clamp(-1, 1) + m.clamp(-2, 2),
    "a clip of one side": lambda self, m, x, g: x.clamp(min=-1.0),
    "a rare kink": lambda self, m, x, g: torch.where(x.abs() > 20, x * 0.9, x),
    "where torch.randn draws": lambda self, m, x, g: x + torch.randn(x.shape, generator=g),
    "uniform noise": lambda self, m, x, g: x + torch.rand_like(x),
    "noise of another shape": lambda self, m, x, g: x + randn_tensor((1, 1, 1, 1), generator=g),
    "a shift along the last dimension": lambda self, m, x, g: torch.roll(x, 1, -1),
    "another shape": lambda self, m, x, g: x[..., :4],
}


@pytest.mark.parametrize("name", NOT_LINEAR)
def test_what_no_row_can_express_is_found(name):
    with pytest.raises(NotLinear):
        row_of(odd(NOT_LINEAR[name]), call(1, return_dict=False))
    fused, parent = fd.integrations.diffusers.fuse(odd(NOT_LINEAR[name])), odd(NOT_LINEAR[name])
    m, x = torch.linspace(-1, 1, 75).view(1, 3, 5, 5), torch.linspace(-30, 2, 75).view(1, 3, 5, 5)
    with pytest.warns(UserWarning, match="the scheduler's own step is used"):
        torch.manual_seed(0)
        got = fused.step(m, 2, x, generator=torch.Generator().manual_seed(0))[0]
    torch.manual_seed(0)
    assert torch.equal(got, parent.step(m, 2, x, generator=torch.Generator().manual_seed(0))[0])


def test_more_tensors_than_a_row_takes():
    """Thirteen old outputs: the run goes on with the scheduler's own step, from its own history."""
    fused, parent = fd.integrations.diffusers.fuse(odd(many)), odd(many)
    x = y = torch.linspace(-1, 1, 75).view(1, 3, 5, 5)
    for s in (fused, parent):
        s.set_timesteps(20)
    with pytest.warns(UserWarning, match="it combines 13 tensors: at most 12 are taken"):
        for i, t in enumerate(parent.timesteps):
            x, y = (s.step(v * 0.1 + i, t, v)[0] for s, v in ((fused, x), (parent, y)))
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-4)
    assert len(fused.history) == 13


def test_a_scheduler_of_ones_own_is_fused():
    def rule(self, m, x, g):
        self.history = [*self.history[-1:], 0.5 * m + x]
        return 0.2 * x + self.history[0] - self.history[-1] + 0.1 * randn_tensor(x.shape, generator=g, dtype=x.dtype)

    results = []
    for s in (odd(rule), fd.integrations.diffusers.fuse(odd(rule))):
        s.set_timesteps(6)
        g, x = torch.Generator().manual_seed(0), torch.linspace(-1, 1, 75).view(1, 3, 5, 5)
        for t in s.timesteps:
            x = s.step(torch.sin(x), t, x, generator=g)[0]
        results.append(x)
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-6)


def test_nothing_outside_is_disturbed():
    """Neither torch's generators nor its modes; inside of inference mode, of a default device, and of no_grad alike."""
    scheduler = fd.integrations.diffusers.fuse(DDPMScheduler(**SD))
    scheduler.set_timesteps(5)
    x, generator = torch.ones(1, 3, 4, 4), torch.Generator().manual_seed(0)
    before = torch.get_rng_state()
    with torch.inference_mode():
        scheduler.step(x / 2, scheduler.timesteps[4], x, generator=generator)  # the last step draws nothing
        assert torch.equal(generator.get_state(), torch.Generator().manual_seed(0).get_state())
        scheduler.step(x / 2, scheduler.timesteps[0], x, generator=generator)
    assert torch.equal(torch.get_rng_state(), before)
    drawn = torch.Generator().manual_seed(0)
    torch.randn(x.shape, generator=drawn)
    assert torch.equal(generator.get_state(), drawn.get_state())
    scheduler.set_timesteps(7)
    with torch.device("meta"):
        assert torch.isfinite(scheduler.step(x / 2, scheduler.timesteps[0], x, generator=generator)[0]).all()
    start = x.clone().requires_grad_()
    scheduler.step(start / 2, scheduler.timesteps[0], start, generator=generator)[0].sum().backward()
    assert torch.isfinite(start.grad).all() and start.grad.abs().sum() > 0


def test_philox_rows_take_at_most_sixteen_noises():
    def rule(self, m, x, g):
        return x + sum(randn_tensor(x.shape, generator=g, dtype=x.dtype) for _ in range(17))

    row = row_of(odd(rule), call(1, return_dict=False))
    with pytest.raises(NotLinear, match="draws 17 noises: at most 16"):
        prepare([(row, None)], True, torch.device("cpu"))
