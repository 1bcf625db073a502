"""NVlabs' samplers: against the algorithms of Karras et al. 2022, written plainly in float64."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from counter.emulated import Gpu

import fastdiff as fd
from fastdiff.integrations import edm
from fastdiff.integrations.edm import ablation_sampler, edm_sampler

SHAPE = (3, 2, 4, 5)
CHURN = {"S_churn": 40, "S_min": 0.05, "S_max": 50, "S_noise": 1.003}
LABELS = torch.eye(4)[[1, 3, 0]]


class Net:
    """A denoiser with labels, not linear in x. grid: the levels that sigma is rounded to. seen: what it was called with."""

    def __init__(self, grid=None, sigma_min=0.0, sigma_max=float("inf")):
        self.grid, self.sigma_min, self.sigma_max, self.seen = grid, sigma_min, sigma_max, []

    def round_sigma(self, sigma):
        sigma = torch.as_tensor(sigma)
        if self.grid is None:
            return sigma
        return self.grid[(sigma.reshape(-1, 1) - self.grid).abs().argmin(1)].reshape(sigma.shape).to(sigma.dtype)

    def __call__(self, x, sigma, class_labels=None):
        self.seen.append(sigma.flatten()[0].item())
        x, sigma = x.float(), sigma.float().reshape(-1, 1, 1, 1)  # as NVlabs' networks do
        mean = 0 if class_labels is None else 0.3 * class_labels.argmax(1).view(-1, 1, 1, 1)
        return (0.25 * x + sigma**2 * (mean + 0.2 * torch.sin(x / (1 + sigma)))) / (0.25 + sigma**2)


def latents(seed=0):
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def edm_levels(num_steps, sigma_min=0.002, sigma_max=80, rho=7):
    return [
        (sigma_max ** (1 / rho) + i / (num_steps - 1) * (sigma_min ** (1 / rho) - sigma_max ** (1 / rho))) ** rho
        for i in range(num_steps)
    ]


def algorithm(net, x, class_labels, levels, sigma, rate, inverse, s, s_rate, solver="heun", alpha=1.0, S_churn=0, S_min=0,
              S_max=math.inf, S_noise=1):
    """Karras et al. 2022: algorithm 1 in t, with the churn of algorithm 2 and the alpha of algorithm 3. All in float64."""

    def slope(x, t):
        denoised = net(x / s(t), torch.tensor(sigma(t), dtype=torch.float64), class_labels).double()
        return (rate(t) / sigma(t) + s_rate(t) / s(t)) * x - rate(t) * s(t) / sigma(t) * denoised

    times = [inverse(level) for level in levels] + [0.0]
    x = x.double() * sigma(times[0]) * s(times[0])
    for i, (t, t_next) in enumerate(pairwise(times)):
        gamma = min(S_churn / len(levels), math.sqrt(2) - 1) if S_min <= levels[i] <= S_max else 0
        t_hat = inverse(float(net.round_sigma(torch.tensor(sigma(t) * (1 + gamma), dtype=torch.float64))))
        noise = torch.randn(SHAPE, dtype=torch.float64)
        x = s(t_hat) / s(t) * x + math.sqrt(max(sigma(t_hat) ** 2 - sigma(t) ** 2, 0)) * s(t_hat) * S_noise * noise
        h, first = t_next - t_hat, slope(x, t_hat)
        if solver == "euler" or t_next == 0:
            x = x + h * first
        else:
            second = slope(x + alpha * h * first, t_hat + alpha * h)
            x = x + h * ((1 - 1 / (2 * alpha)) * first + 1 / (2 * alpha) * second)
    return x


LINEAR = {"sigma": lambda t: t, "rate": lambda t: 1.0, "inverse": lambda u: u, "s": lambda t: 1.0, "s_rate": lambda t: 0.0}


def curve(schedule, scaling, low, high, epsilon_s=1e-3):
    """Table 1 of the paper."""
    if schedule == "vp":
        d = 2 * (math.log(low**2 + 1) / epsilon_s - math.log(high**2 + 1)) / (epsilon_s - 1)
        m = math.log(high**2 + 1) - d / 2
        sigma = lambda t: math.sqrt(math.exp(d * t**2 / 2 + m * t) - 1)
        rate = lambda t: (m + d * t) * math.exp(d * t**2 / 2 + m * t) / (2 * sigma(t))
        inverse = lambda u: (math.sqrt(m**2 + 2 * d * math.log(u**2 + 1)) - m) / d
    elif schedule == "ve":
        sigma, rate, inverse = math.sqrt, lambda t: 1 / (2 * math.sqrt(t)), lambda u: u * u
    else:
        sigma, rate, inverse = (LINEAR[name] for name in ("sigma", "rate", "inverse"))
    if scaling == "none":
        return {"sigma": sigma, "rate": rate, "inverse": inverse, "s": LINEAR["s"], "s_rate": LINEAR["s_rate"]}
    return {"sigma": sigma, "rate": rate, "inverse": inverse, "s": lambda t: (sigma(t) ** 2 + 1) ** -0.5,
            "s_rate": lambda t: -sigma(t) * rate(t) * (sigma(t) ** 2 + 1) ** -1.5}


def off(ours, expected):
    return float((ours.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("steps", [2, 18, 50])
@pytest.mark.parametrize("options", [{}, CHURN, {"S_churn": 1000}], ids=["plain", "churn", "most churn"])
def test_algorithm_2(options, steps):
    """The same pictures, and the generator left where the original leaves it: a draw in float64 at every step."""
    torch.manual_seed(5)
    expected = algorithm(Net(), latents(), LABELS, edm_levels(steps), **LINEAR, **options)
    after = torch.get_rng_state()
    torch.manual_seed(5)
    ours = edm_sampler(Net(), latents(), LABELS, num_steps=steps, **options)
    assert ours.dtype == torch.float32 and off(ours, expected) < (1e-4 if steps == 2 else 2e-6)  # 2: a slope at 0.002, over 80
    assert torch.equal(torch.get_rng_state(), after)


def test_levels_are_bounded_by_the_network():
    net = Net(sigma_min=0.1, sigma_max=30.0)
    expected = algorithm(Net(), latents(), None, edm_levels(12, 0.1, 30, 5), **LINEAR)
    ours = edm_sampler(net, latents(), num_steps=12, rho=5)
    assert off(ours, expected) < 2e-6
    assert net.seen[0] == pytest.approx(30) and min(net.seen) == pytest.approx(0.1)


def test_levels_and_churned_levels_are_rounded_by_the_network():
    """With levels that fall together, as in NVlabs' networks of iDDPM at many steps."""
    grid = torch.cat([torch.linspace(0.002, 2, 40, dtype=torch.float64), torch.linspace(2.2, 90, 300, dtype=torch.float64)])
    levels = Net(grid).round_sigma(torch.tensor(edm_levels(24), dtype=torch.float64)).tolist()
    assert len(set(levels)) < len(levels)
    torch.manual_seed(5)
    expected = algorithm(Net(grid), latents(), LABELS, levels, **LINEAR, **CHURN)
    net = Net(grid)
    torch.manual_seed(5)
    assert off(edm_sampler(net, latents(), LABELS, num_steps=24, **CHURN), expected) < 2e-6
    assert all((grid - sigma).abs().min() < 1e-5 for sigma in net.seen)


@pytest.mark.parametrize("scaling", ["vp", "none"])
@pytest.mark.parametrize("schedule", ["vp", "ve", "linear"])
@pytest.mark.parametrize("discretization", ["vp", "ve", "iddpm", "edm"])
@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_ablation(solver, discretization, schedule, scaling):
    low, high = {"vp": (None, None), "ve": (0.02, 100), "iddpm": (1.0, 60), "edm": (0.002, 80)}[discretization]
    given, N = {} if discretization != "iddpm" else {"sigma_min": low, "sigma_max": high}, 18
    i = np.arange(N) / (N - 1)
    if discretization == "vp":
        beta = lambda t: math.sqrt(math.exp(19.9 * t**2 / 2 + 0.1 * t) - 1)
        low, high = beta(1e-3), beta(1.0)
        levels = [beta(t) for t in 1 + i * (1e-3 - 1)]
    elif discretization == "ve":
        levels = np.sqrt(high**2 * (low**2 / high**2) ** i)
    elif discretization == "iddpm":
        bar = np.sin(np.pi / 2 * np.arange(1001) / 1000 / 1.008) ** 2
        u = np.sqrt(bar[-1] / bar[1:] - 1)  # where no ratio is below C_1
        u = u[(u >= low) & (u <= high)]
        levels = u[np.round((len(u) - 1) * i).astype(int)]
    else:
        levels = edm_levels(N)
    torch.manual_seed(5)
    options = {"solver": solver, "S_churn": 10}
    expected = algorithm(Net(), latents(), LABELS, [float(v) for v in levels], **curve(schedule, scaling, low, high), **options)
    torch.manual_seed(5)
    ours = ablation_sampler(
        Net(), latents(), LABELS, discretization=discretization, schedule=schedule, scaling=scaling, **given, **options
    )
    assert off(ours, expected) < 2e-5


@pytest.mark.parametrize("alpha", [0.5, 2 / 3])
def test_alpha(alpha):
    torch.manual_seed(5)
    expected = algorithm(Net(), latents(), None, edm_levels(18), **curve("vp", "vp", 0.002, 80), alpha=alpha, S_churn=10)
    torch.manual_seed(5)
    ours = ablation_sampler(Net(), latents(), alpha=alpha, schedule="vp", scaling="vp", S_churn=10)
    assert off(ours, expected) < 2e-5


def test_draws_come_in_the_originals_order():
    """A draw before each step's first call, of float64 and the latents' shape, whatever its weight."""
    events, net = [], Net()

    def randn_like(x):
        events.append((x.dtype, tuple(x.shape)))
        return torch.zeros_like(x)

    def called(x, sigma, class_labels):
        events.append("call")
        return net(x, sigma, class_labels)

    called.sigma_min, called.sigma_max, called.round_sigma = 0, 1e9, torch.as_tensor
    drawn = (torch.float64, SHAPE)
    for options in ({}, {"S_churn": 5}):
        events.clear()
        edm_sampler(called, latents(), None, randn_like, num_steps=3, **options)
        assert events == [drawn, "call", "call", drawn, "call", "call", drawn, "call"]


def shift(weight=0.5):
    return fd.steering.LatentVector(fd.randn((1, *SHAPE[1:]), seeds=9)).at(weight=weight, window=(0.5, 20.0))


@pytest.mark.parametrize("steering", [False, True])
def test_philox_is_fd_sample_with_heun(steering):
    """In every bit."""
    acting = [shift()] if steering else []
    levels, net = [*edm_levels(18), 0.0], Net()
    plan = fd.plan("heun", schedule="edm", prediction="denoised", sigmas=levels, start="latent", s_churn=40, s_tmin=0.05,
                   s_tmax=50, s_noise=1.003)
    expected = fd.sample(
        lambda x, sigma: net(x, sigma, LABELS), plan, SHAPE, seeds=[4, 5, 6], init=latents().double() * levels[0], steering=acting
    )
    ours = edm_sampler(net, latents(), LABELS, **CHURN, noise="philox", seeds=[4, 5, 6], steering=acting)
    assert torch.equal(ours, expected)


def test_steering_with_noise_of_torch():
    vector = fd.randn((1, *SHAPE[1:]), seeds=9).double()

    class Steered(Net):
        def __call__(self, x, sigma, class_labels=None):
            return super().__call__(x, sigma, class_labels) + 0.5 * vector * (0.5 <= float(sigma) <= 20)

    torch.manual_seed(5)
    expected = algorithm(Steered(), latents(), LABELS, edm_levels(18), **LINEAR, **CHURN)
    torch.manual_seed(5)
    assert off(edm_sampler(Net(), latents(), LABELS, **CHURN, steering=shift()), expected) < 2e-6


def test_an_action_that_calls_the_model_twice_costs_no_draw():
    class Twice(fd.action.Acting):
        def begin(self, setting):
            self.plan = setting.plan
            return self

        def outputs(self, run, evaluate):
            evaluate()
            return evaluate()

    def run(*steering):
        torch.manual_seed(5)
        return edm_sampler(Net(), latents(), LABELS, **CHURN, num_steps=6, steering=steering), torch.get_rng_state()

    (once, state), (twice, after) = run(), run(Twice())
    assert torch.equal(once, twice) and torch.equal(state, after)


def test_guidance_by_gradients_and_recurrences():
    """What adds inputs, and rows, of its own."""
    guided = fd.guidance.classifier(lambda x, sigma, y: -((x - y.view(-1, 1, 1, 1)) ** 2).flatten(1).sum(1), [1, 0, 2], scale=0.1)
    torch.manual_seed(5)
    out = edm_sampler(Net(), latents(), **CHURN, num_steps=6, steering=[shift(0.1), guided])
    assert torch.isfinite(out).all() and guided.counts["classifier_forward"] == 11
    again = fd.guidance.dps(lambda x0, y: -((x0 - y.view(-1, 1, 1, 1)) ** 2).flatten(1).sum(1), [1, 0, 2], 0.1)
    torch.manual_seed(5)
    assert torch.isfinite(ablation_sampler(Net(), latents(), solver="euler", S_churn=3, num_steps=6, steering=[again])).all()


@pytest.mark.parametrize("sampler", [edm_sampler, ablation_sampler])
def test_a_sample_depends_on_its_own_seed_only(sampler):
    whole = sampler(Net(), latents(), None, **CHURN, noise="philox", seeds=[7, 8, 9])
    for b in range(3):
        alone = sampler(Net(), latents()[b : b + 1], None, **CHURN, noise="philox", seeds=[7 + b])
        assert torch.equal(alone[0], whole[b])
    four = torch.cat([latents(), latents(1)[:1]])
    assert torch.equal(sampler(Net(), four, **CHURN, noise="philox", seeds=7)[:3], whole)


def test_seeds_of_philox_come_from_torchs_generator():
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append(edm_sampler(Net(), latents(), num_steps=4, S_churn=2, noise="philox"))
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])


def test_callback_and_a_network_of_float64():
    seen, net = [], Net()

    def double(x, sigma, class_labels):
        return net(x, sigma, class_labels).double()

    double.sigma_min, double.sigma_max, double.round_sigma = 0, 1e9, torch.as_tensor
    edm_sampler(double, latents().double(), num_steps=5, callback=lambda p: seen.append((p.step, p.sigma)))
    assert [step for step, _ in seen] == [0, 0, 1, 1, 2, 2, 3, 3, 4]
    assert [sigma for _, sigma in seen] == pytest.approx(net.seen)


def test_one_launch_a_call():
    """On emulated CUDA tensors: with philox, nothing but the rows; with noise of torch, a draw and its cast for each step with
    churn."""
    for noise, more in (("philox", 0), ("torch", 1)):
        with Gpu(math.prod(SHAPE)) as gpu:
            net, between = Net(), []

            def called(x, sigma, class_labels):
                between.append(gpu.take())
                out = net(x, sigma, class_labels)
                gpu.take()
                return out

            called.sigma_min, called.sigma_max, called.round_sigma = 0, 1e9, torch.as_tensor
            net.seen = type("Nothing", (), {"append": lambda self, value: None})()
            edm_sampler(called, latents().to("cuda"), num_steps=4, S_churn=1, noise=noise, seeds=3)
        for k, counts in enumerate(between[1:], 1):
            assert counts.ops["fastdiff.step_"] == 1
            assert counts.big == (1 if k % 2 else 1 + 2 * more) and counts.h2d == 0, (noise, k, counts)


def test_a_rounding_that_gives_no_levels_is_refused():
    net = Net()
    net.round_sigma = lambda sigma: sigma * float("nan")
    with pytest.raises(ValueError, match="round_sigma"):
        edm_sampler(net, latents())


def test_nan_is_reported():
    class Broken(Net):
        def __call__(self, x, sigma, class_labels=None):
            return x * float("nan")

    with pytest.raises(FloatingPointError, match="step 0"):
        edm_sampler(Broken(), latents(), num_steps=3)


def test_levels_of_iddpm():
    """The recursion in closed form, where no ratio is clipped: u_j^2 + 1 = alpha_bar_M / alpha_bar_j."""
    bar = np.sin(np.pi / 2 * np.arange(1, 1001) / 1000 / 1.008) ** 2
    u = np.array(edm._iddpm(1000, 0.001, 0.008))[1:]
    expected = np.sqrt(bar[-1] / bar - 1)
    assert np.allclose(u[expected > 0.1], expected[expected > 0.1], rtol=1e-4)
    assert np.allclose(u, expected, rtol=0.05) and u[-1] == 0
