"""RFM in sample space against RFM in feature space, and that against finite differences."""

import math

import pytest
import torch

from fastdiff.steering.rfm import KernelPredictor, LaplaceKernel, fit_rfm, fit_rfm_features, top_eigenvector
from fastdiff.steering.samples import Samples, auc, split

from .planted import cosine, planted


def halves(count, shape, seed=0, **options):
    x, y, u = planted(count, shape, seed, **options)
    train, held = split(y.long(), 0.25, seed)
    return x, y, u, train, held


def in_samples(x, y, train, held, *, bandwidth, ridge=1e-3, adaptive=False, **options):
    samples = Samples(x, train, held)
    kernel = LaplaceKernel(samples.gram, samples.cross, samples.held_norms, bandwidth, ridge, adaptive)
    fit = fit_rfm(samples, y[train], y[held], kernel, bandwidth=bandwidth, ridge=ridge, adaptive=adaptive, **options)
    return samples.direction(fit.weights).flatten(), fit


def in_features(x, y, train, held, **options):
    flat = x.flatten(1)
    return fit_rfm_features(flat[train], y[train], flat[held], y[held], **options)


SETTINGS = [(10.0, False), (2.0, False), (1.0, True), (0.3, True), (10.0, True)]


@pytest.mark.parametrize("center_grads", [False, True])
@pytest.mark.parametrize("bandwidth, adaptive", SETTINGS)
@pytest.mark.parametrize("count, shape", [(60, (3, 4, 7)), (120, (2, 3, 3))])  # fewer samples than dimensions, and more
def test_sample_space_is_feature_space(count, shape, bandwidth, adaptive, center_grads):
    """After 1 to 8 iterations: the direction, and the predictors' AUCs on held-out samples."""
    x, y, _, train, held = halves(count, shape)
    for iterations in (1, 2, 5, 8):
        options = {"bandwidth": bandwidth, "adaptive": adaptive, "center_grads": center_grads, "iterations": iterations,
                   "choose": False}
        v, fit = in_samples(x, y, train, held, **options)
        expected, aucs = in_features(x, y, train, held, **options)
        assert abs(cosine(v, expected)) > 0.9999, (iterations, fit.aucs, aucs)
        assert fit.aucs == pytest.approx(aucs, abs=1e-9) and fit.best == iterations - 1


@pytest.mark.parametrize("seed", range(4))
def test_the_same_iteration_is_chosen(seed):
    x, y, _, train, held = halves(80, (5, 5, 5), seed, noise=1.0)
    v, fit = in_samples(x, y, train, held, bandwidth=1.0, adaptive=True, iterations=8)
    expected, aucs = in_features(x, y, train, held, bandwidth=1.0, adaptive=True, iterations=8)
    assert fit.aucs == pytest.approx(aucs, abs=1e-9)
    assert fit.best == max(range(len(aucs)), key=lambda t: aucs[t])
    assert abs(cosine(v, expected)) > 0.9999


def test_activations_in_float32_far_from_zero():
    """What a network gives: float32, with a mean much larger than what differs. Centring keeps the sums exact enough."""
    x, y, _, train, held = halves(80, (4, 5, 6))
    v, _ = in_samples((x + 100).float(), y, train, held, bandwidth=1.0, adaptive=True)
    expected, _ = in_features(x, y, train, held, bandwidth=1.0, adaptive=True)
    assert abs(cosine(v, expected)) > 0.9999


def test_samples_that_are_the_same():
    """Copies of a sample are one point: their term, 0/0, is left out in both."""
    x, y, _, train, held = halves(60, (3, 4, 5))
    first = train[y[train]][:3]
    x[first[1]], x[first[2]] = x[first[0]], x[first[0]]
    v, _ = in_samples(x, y, train, held, bandwidth=1.0, adaptive=True)
    expected, _ = in_features(x, y, train, held, bandwidth=1.0, adaptive=True)
    assert abs(cosine(v, expected)) > 0.9999


@pytest.mark.parametrize("spread", [0.0, 1.0])
def test_gradients_are_finite_differences(spread):
    g = torch.Generator().manual_seed(1)
    x = torch.randn(20, 6, generator=g, dtype=torch.float64)
    root = torch.eye(6, dtype=torch.float64) + spread * torch.randn(6, 6, generator=g, dtype=torch.float64)
    f = KernelPredictor(x, torch.randn(20, generator=g, dtype=torch.float64), root @ root.T, 3.0)
    z = torch.randn(5, 6, generator=g, dtype=torch.float64)
    step = 1e-5
    numeric = torch.stack([(f(z + step * e) - f(z - step * e)) / (2 * step) for e in torch.eye(6, dtype=torch.float64)], 1)
    torch.testing.assert_close(f.gradients(z), numeric, rtol=1e-7, atol=1e-8)


def test_the_gradient_at_a_sample_leaves_its_own_kink_out():
    """exp(-|z|) has none at 0: the mean of the one-sided derivatives is taken, which is 0."""
    x = torch.tensor([[0.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    f = KernelPredictor(x, torch.tensor([5.0, 1.0], dtype=torch.float64), torch.eye(2, dtype=torch.float64), 2.0)
    torch.testing.assert_close(f.gradients(x[:1]), torch.tensor([[math.exp(-0.5) / 2, 0.0]], dtype=torch.float64))


@pytest.mark.parametrize("center_grads", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_a_planted_direction_is_found(seed, center_grads):
    x, y, u, train, held = halves(400, (2, 4, 4), seed, noise=0.1, spread=0.0)
    v, fit = in_samples(x, y, train, held, bandwidth=10.0, center_grads=center_grads)
    assert max(fit.aucs) > 0.9
    # the mean gradient points along u: without it less of u is left
    assert abs(cosine(v, u)) > (0.85 if center_grads else 0.95) and fit.share > (0.1 if center_grads else 0.5)


def test_a_direction_that_means_cannot_see():
    """The label is whether |x . u| is large: both classes have the same mean. The AGOP finds u all the same."""
    x, _, u = planted(500, (2, 3, 4), noise=0.0, spread=0.0)
    score = (x * u).flatten(1).sum(1).abs()
    y = score > score.median()
    train, held = split(y.long(), 0.25, 0)
    v, _ = in_samples(x, y, train, held, bandwidth=10.0, center_grads=True)
    means = x[train][y[train]].mean(0) - x[train][~y[train]].mean(0)
    assert abs(cosine(v, u)) > 0.9 and abs(cosine(means, u)) < 0.5


def test_largest_column_is_the_largest_entry_of_the_agop():
    x, _, _, train, held = halves(50, (4, 30))
    samples = Samples(x, train, held)
    p = torch.randn(len(train), len(train), generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    centred = x[train] - x[train].mean(0)
    g = p @ centred.flatten(1)
    assert samples.largest_column(p) ** 2 == pytest.approx(float((g.T @ g).max()), rel=1e-10)
    assert samples.largest_column(p * 1e-200) == pytest.approx(1e-200 * samples.largest_column(p), rel=1e-10)


def test_top_eigenvector():
    a = torch.randn(30, 30, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    a = a @ a.T
    value, v = top_eigenvector(a)
    assert value == pytest.approx(float(torch.linalg.eigvalsh(a)[-1]))
    torch.testing.assert_close(a @ v, value * v)


def test_settings_that_cannot_work():
    x, y, _, train, held = halves(40, (2, 3, 4))
    with pytest.raises(ValueError, match="found no direction"):
        in_samples(x * 1e6, y, train, held, bandwidth=1.0)  # every sample is alone: e^-1000000
    x[train[1]] = x[train[0]]
    with pytest.raises(ValueError, match="not positive definite"):
        in_samples(x, y, train, held, bandwidth=1.0, ridge=0.0)


def test_auc():
    scores = torch.tensor([0.1, 0.4, 0.35, 0.8])
    positive = torch.tensor([False, False, True, True])
    assert auc(scores, positive) == 0.75 and auc(-scores, positive) == 0.25
    assert auc(torch.zeros(4), positive) == 0.5  # ties count half
    g = torch.Generator().manual_seed(0)
    s, p = torch.randn(40, generator=g).round(decimals=1), torch.rand(40, generator=g) < 0.3
    pairs = [(1.0 if a > b else 0.5 if a == b else 0.0) for a in s[p] for b in s[~p]]
    assert auc(s, p) == pytest.approx(sum(pairs) / len(pairs))


def test_split():
    groups = torch.tensor([0] * 10 + [1] * 5 + [2] * 2)
    train, held = split(groups, 0.2, 7)
    assert sorted(train.tolist() + held.tolist()) == list(range(17))
    assert [int((groups[held] == k).sum()) for k in range(3)] == [2, 1, 1]
    assert all(torch.equal(a, b) for a, b in zip((train, held), split(groups, 0.2, 7)))
    assert not torch.equal(held, split(groups, 0.2, 8)[1])
    assert [int((groups[split(groups, 0.99, 7)[0]] == k).sum()) for k in range(3)] == [1, 1, 1]
