"""Spectral Guidance: its loss against eigenvalues known in closed form, its fit, its rule, and what is refused."""

import math

import pytest
import torch
from guidance.cases import MIXTURE, MODEL, SHAPE, TARGET, edm, same
from guidance.test_gradients import Network, check, guided
from torch import nn

import fastdiff as fd
from fastdiff import guidance
from fastdiff.guidance.spectral import FLOOR, bounded

CLIP = (0.1, 0.3)


def normals(shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- the loss


VARIANCES = torch.tensor([9.0, 4.0, 1.0, 0.25], dtype=torch.float64)


def noisings(count, sigma, seed=0):
    """Two noisings of Gaussian points whose eigenvalues are v / (v + sigma^2)."""
    x0 = normals((count, 4), seed) * VARIANCES.sqrt()
    return x0 + sigma * normals((count, 4), seed + 1), x0 + sigma * normals((count, 4), seed + 2)


@pytest.mark.parametrize("sigma", [0.5, 2.0])
def test_the_loss_is_one_minus_the_mean_eigenvalue(sigma):
    a, b = noisings(40000, sigma)
    expected = 1 - (VARIANCES / (VARIANCES + sigma**2)).mean()
    assert abs(guidance.spectral_loss(a, b, ridge=0.0) - expected) < 0.01
    assert abs(guidance.spectral_loss(a[:, :2], b[:, :2]) - (1 - (VARIANCES / (VARIANCES + sigma**2))[:2].mean())) < 0.01
    assert guidance.spectral_loss(a, a) < 1e-5


def test_the_loss_does_not_depend_on_the_basis_of_the_features():
    a, b = noisings(2000, 1.0)
    mixing = normals((4, 4), 9)
    first, second = guidance.spectral_loss(a, b, 0.0), guidance.spectral_loss(a @ mixing + 3, b @ mixing + 3, 0.0)
    torch.testing.assert_close(first, second, rtol=0, atol=2e-3)  # but for b's own spread


def test_training_finds_the_leading_functions():
    """A linear encoder with two features of four directions: what it learns spans the two of largest variance."""
    torch.manual_seed(0)
    encoder = nn.Linear(4, 2).double()
    optimizer = torch.optim.Adam(encoder.parameters(), lr=0.05)
    for step in range(120):
        a, b = noisings(256, 1.0, seed=10 * step)
        optimizer.zero_grad()
        guidance.spectral_loss(encoder(a), encoder(b)).backward()
        optimizer.step()
    rows = torch.linalg.qr(encoder.weight.detach().T).Q
    assert rows[:2].square().sum() > 1.9  # of 2


def test_gradients_of_the_loss_go_through_the_second_noising_alone():
    a, b = (v.requires_grad_() for v in noisings(64, 1.0))
    guidance.spectral_loss(a, b).backward()
    assert a.grad is None and b.grad.abs().sum() > 0


# ---- the fit


class Posterior(nn.Module):
    """Features of which E[label | x] is linear: p(y | x) of the mixture, mixed, and one feature twice."""

    def __init__(self):
        super().__init__()
        self.mixing = nn.Parameter(normals((3, 4), 3), requires_grad=False)

    def forward(self, x, sigma):
        p = MIXTURE.log_joint(x, sigma).softmax(1)
        return torch.cat([p @ self.mixing, p[:, :1]], 1) + 2


def drawn(count, seed=0):
    """Points of the mixture and their labels, one-hot."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.multinomial(MIXTURE.log_weights.exp(), count, replacement=True, generator=generator)
    x0 = MIXTURE.means[y] + MIXTURE.variances[y].sqrt()[:, None] * normals((count, MIXTURE.dims), seed + 1)
    return x0.view(count, *MIXTURE.shape).float(), nn.functional.one_hot(y, 3).double()


@pytest.fixture(scope="module")
def fitted():
    return guidance.Spectral.fit(Posterior(), *drawn(8000), [2.0, 0.5, 1.0])


@pytest.mark.parametrize("sigma", [0.5, 1.0, 2.0])
def test_the_fit_finds_the_expectation(fitted, sigma):
    """To the error of 8,000 draws."""
    x = drawn(200, 5)[0] + sigma * normals((200, *MIXTURE.shape), 7).float()
    exact = MIXTURE.log_joint(x, sigma).softmax(1)
    assert (fitted.expectation(x, sigma) - exact).abs().max() < 0.05


def test_the_fit_is_least_squares(fitted):
    """phi^T H / M in the whitened basis is regression on the features and 1."""
    x0, h = drawn(8000)
    x = x0 + 1.0 * fd.randn(x0.shape, seeds=0, draw=1)  # the second of three levels
    f = torch.cat([Posterior()(x, 1.0).double(), torch.ones(8000, 1)], 1)
    solution = torch.linalg.lstsq(f, h, driver="gelsd").solution
    torch.testing.assert_close(fitted.expectation(x, 1.0).double(), f @ solution, rtol=1e-4, atol=1e-4)


def test_what_guidance_climbs_is_over_the_length_of_phi(fitted):
    """Whose square is 1 + K in the mean over the images of the fit, here 1 + 2: of five features two are independent."""
    x0, _ = drawn(8000)
    x = x0 + 1.0 * fd.randn(x0.shape, seeds=0, draw=1)
    f = Posterior()(x, 1.0).double()
    phi = torch.cat([torch.ones(8000, 1), (f - f.mean(0)) @ fitted.whitening[1].double()], 1)
    torch.testing.assert_close(phi.square().sum(1).mean(), torch.tensor(3.0).double(), rtol=1e-4, atol=1e-4)
    expected = fitted.expectation(x, 1.0) * 6**0.5 / phi.norm(dim=1, keepdim=True)
    torch.testing.assert_close(fitted(x, 1.0), expected.float(), rtol=1e-4, atol=1e-4)


def test_between_levels_and_beyond(fitted):
    """Linear in ln sigma between two levels, the nearest level's beyond: of the same features."""
    x = drawn(6)[0]

    class Flat(nn.Module):
        def forward(self, x, sigma):
            return x.flatten(1)

    parts = fitted.levels, normals((3, 6), 1), normals((3, 6, 6), 2), normals((3, 6, 2), 3), normals((2,), 4)
    network = guidance.Spectral(Flat(), *parts)
    at = torch.tensor([0.01, 0.5, 0.5 * 2**0.25, 1.0, 2**0.5, 90.0])
    low, middle, high = ((x.flatten(1) - parts[1][k]) @ parts[2][k] @ parts[3][k] + parts[4] for k in range(3))
    expected = [low[0], low[1], 0.75 * low[2] + 0.25 * middle[2], middle[3], 0.5 * (middle[4] + high[4]), high[5]]
    torch.testing.assert_close(network.expectation(x, at), torch.stack(expected).float(), rtol=1e-4, atol=1e-4)


def test_the_state_is_all_that_it_knows(fitted):
    again = guidance.Spectral(Posterior(), *(torch.zeros_like(v) for v in list(fitted.buffers())))
    again.load_state_dict(fitted.state_dict())
    x = drawn(5)[0]
    assert torch.equal(again(x, torch.full((5,), 0.7)), fitted(x, torch.full((5,), 0.7)))


BAD_FITS = {
    "no images": (lambda x, h: (x.tolist(), h, [1.0]), TypeError, "images is list"),
    "images of bytes": (lambda x, h: (x.to(torch.uint8), h, [1.0]), TypeError, "floating"),
    "labels not one-hot": (lambda x, h: (x, h.argmax(1), [1.0]), TypeError, "(M, C) is taken"),
    "properties of others": (lambda x, h: (x, h[:7], [1.0]), ValueError, "7 rows for 50 images"),
    "a level of 0": (lambda x, h: (x, h, [0.0, 1.0]), ValueError, "above 0"),
    "a level twice": (lambda x, h: (x, h, [1.0, 1.0]), ValueError, "each once"),
    "no level": (lambda x, h: (x, h, []), ValueError, "one or more"),
    "too few images": (lambda x, h: (x[:5], h[:5], [1.0]), ValueError, "5 images for 5 features"),
}


@pytest.mark.parametrize("name", BAD_FITS)
def test_fits_that_are_refused(name):
    change, error, words = BAD_FITS[name]
    with pytest.raises(error) as raised:
        guidance.Spectral.fit(Posterior(), *change(*drawn(50)))
    assert words in str(raised.value)


def test_an_encoder_that_is_no_module_is_refused():
    with pytest.raises(TypeError, match="encoder is function"):
        guidance.Spectral.fit(lambda x, sigma: x.flatten(1), *drawn(50), [1.0])


def test_features_that_are_not_finite_are_refused():
    class Broken(Posterior):
        def forward(self, x, sigma):
            return super().forward(x, sigma) / 0

    with pytest.raises(ValueError, match="not finite"):
        guidance.Spectral.fit(Broken(), *drawn(50), [1.0])


# ---- the logarithm


def test_a_regression_may_be_negative_and_its_logarithm_leads_upwards():
    p = torch.tensor([-0.2, 0.0, FLOOR, 0.5, 1.1], requires_grad=True)
    log_p = guidance.expected(lambda x, sigma: torch.stack([p, 1 - p], 1), 2)(torch.zeros(5, 1), None, torch.zeros(5).long())
    torch.testing.assert_close(log_p[2:], p[2:].log())
    slope = torch.autograd.grad(log_p.sum(), p)[0]
    torch.testing.assert_close(slope, torch.tensor([1 / FLOOR, 1 / FLOOR, 1 / FLOOR, 2.0, 1 / 1.1]))
    with pytest.raises(ValueError, match=r"\(5, 3\) is taken"):
        guidance.expected(lambda x, sigma: torch.stack([p, 1 - p], 1), 3)(torch.zeros(5, 1), None, torch.zeros(5).long())


# ---- the rule


def expectation(x, sigma):
    return MIXTURE.log_joint(x, sigma).softmax(1)


LOG_PROB = guidance.expected(expectation, ["shirt", "bag", "boot"])


def slope(x, sigma):
    """grad_{x_t} log E[h | x], its norm within CLIP, in float64."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        p = expectation(x, sigma)[torch.arange(len(x)), TARGET]
        log_p = torch.where(p > FLOOR, p.clamp(min=FLOOR).log(), p / FLOOR)
        g = math.hypot(1, sigma) * torch.autograd.grad(log_p.sum(), x)[0]
    norm = g.flatten(1).norm(dim=1)
    return g * (norm.clamp(*CLIP) / norm).view(-1, 1, 1)


def test_the_gradient():
    y = torch.tensor([2, 0, 1])

    class Probabilities(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Network(4, seed=1)

        def forward(self, x, sigma):
            return self.inner(x, sigma).softmax(1)

    log_prob = guidance.expected(Probabilities(), 4)
    run, (_, g) = guided(guidance.spectral(log_prob, y, clip=(0.0, math.inf)), Network())
    scale = math.hypot(1, run.sigma)
    with torch.no_grad():
        sigma = torch.full((3,), run.sigma)
        check(lambda x_t: log_prob(scale * x_t, sigma, y), run.model_input.double(), g, 1e-5)


def test_the_rule_in_ve_coordinates():
    """x' += kappa sigma g after each step, by hand in float64."""
    plan, kappa = edm(), 3.0
    sigmas = plan.sigmas[plan.calls_model]
    x = fd.randn(SHAPE, seeds=0, stream="init").double() * sigmas[0]
    for sigma, after in zip(sigmas, [*sigmas[1:], 0.0]):
        d = MIXTURE.denoised(x, sigma)
        x = d + after / sigma * (x - d) + kappa * sigma * slope(x, sigma)
    out = fd.sample(MODEL, plan, SHAPE, 0, steering=[guidance.spectral(LOG_PROB, TARGET, kappa)])
    torch.testing.assert_close(out, x.float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("clip_denoised", [None, (-1.0, 1.0)])
def test_the_rule_in_vp_coordinates(clip_denoised):
    """As the authors write it: x_t moves after the network has seen it, then a DDIM step with that eps."""
    sigmas, kappa = [2.0, 1.0, 0.4, 0.0], 2.0
    options = {} if clip_denoised is None else {"clip_denoised": clip_denoised}
    plan = fd.plan("ddim", schedule="linear", prediction="epsilon", sigmas=sigmas, time="sigma", **options)
    x = fd.randn(SHAPE, seeds=0, stream="init").double()
    for sigma, after in zip(sigmas, sigmas[1:]):
        abar, abar_after = 1 / (1 + sigma**2), 1 / (1 + after**2)
        eps = MIXTURE.model("epsilon")(x, torch.full((4,), sigma)).double()
        x0 = (x - (1 - abar) ** 0.5 * eps) / abar**0.5
        if clip_denoised is not None:
            x0 = x0.clamp(*clip_denoised)
            eps = (x - abar**0.5 * x0) / (1 - abar) ** 0.5
        moved = kappa * (1 - abar) ** 0.5 * slope(x / abar**0.5, sigma)
        x = abar_after**0.5 * (x0 + moved / abar**0.5) + (1 - abar_after) ** 0.5 * eps
    guide = guidance.spectral(LOG_PROB, TARGET, kappa)
    out = fd.sample(MIXTURE.model("epsilon"), plan, SHAPE, 0, steering=[guide])
    torch.testing.assert_close(out, x.float(), rtol=1e-3, atol=1e-3)


def sample(strength, plan=None, **options):
    return fd.sample(MODEL, plan or edm(), SHAPE, 0, steering=[guidance.spectral(LOG_PROB, TARGET, strength, **options)])


@pytest.mark.parametrize("sampler", ["euler", "ddim", "dpmpp_2m"])
def test_strength_zero_changes_no_bit(sampler):
    plain = fd.sample(MODEL, edm(sampler), SHAPE, 0)
    assert same(sample(0.0, edm(sampler)), plain)
    assert same(sample(torch.zeros(4), edm(sampler)), plain)
    mixed = sample([0.0, 5.0, 2.5, 0.0], edm(sampler))
    assert same(mixed[[0, 3]], plain[[0, 3]])
    torch.testing.assert_close(mixed[1], sample(5.0, edm(sampler))[1], rtol=1e-4, atol=1e-4)
    assert (mixed[1:3] - plain[1:3]).abs().amax((1, 2)).min() > 1e-2


def test_it_leads_to_the_target():
    plan = edm(steps=20)
    plain, steered = fd.sample(MODEL, plan, SHAPE, 0), sample(5.0, plan)
    assert (MIXTURE.log_prob(steered, TARGET).exp() > 0.9).all() and not (MIXTURE.log_prob(plain, TARGET).exp() > 0.9).all()


def test_a_window_and_the_counts():
    plan = edm(steps=6)
    guide = guidance.spectral(LOG_PROB, TARGET, 5.0, window=(plan.sigmas[3], plan.sigmas[2]))
    seen, plain = [], []
    fd.sample(MODEL, plan, SHAPE, 0, steering=[guide], callback=lambda p: seen.append(p.x.clone()))
    fd.sample(MODEL, plan, SHAPE, 0, callback=lambda p: plain.append(p.x.clone()))
    assert same(seen[0], plain[0]) and not same(seen[1], plain[1])
    assert guide.counts == {"network_forward": 6, "network_backward": 0, "classifier_forward": 2, "classifier_backward": 2}


def test_names_of_properties():
    named = guidance.spectral(LOG_PROB, ["shirt", "bag", "boot", "bag"], 5.0)
    assert same(fd.sample(MODEL, edm(), SHAPE, 0, steering=[named]), sample(5.0))


def test_the_bounds_of_a_norm():
    g = torch.tensor([[3.0, 4.0], [0.03, 0.04], [0.0, 0.2], [0.0, 0.0]])
    torch.testing.assert_close(bounded(g, *CLIP), torch.tensor([[0.18, 0.24], [0.06, 0.08], [0.0, 0.2], [0.0, 0.0]]))
    assert torch.equal(bounded(g, 0.0, math.inf), g)


REFUSED = {
    "a name that is not there": (dict(target="bags"), "did you mean 'bag'"),
    "a strength that is not finite": (dict(strength=math.nan), "nan"),
    "bounds upside down": (dict(clip=(0.3, 0.1)), "clip is (0.3, 0.1)"),
    "one bound": (dict(clip=0.3), "clip is 0.3"),
    "a window above the plan": (dict(window=(30, 40)), "(30, 40)"),
    "a sampler of two stages": (dict(plan=edm("heun")), "does not write its estimate"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_before_the_model_runs(name):
    options, words = REFUSED[name]
    plan = options.pop("plan", None) or edm()

    def never(x, sigma):
        raise AssertionError("called")

    with pytest.raises(ValueError) as raised:
        fd.sample(never, plan, SHAPE, 0, steering=[guidance.spectral(LOG_PROB, **{"target": TARGET, **options})])
    assert words in str(raised.value)
