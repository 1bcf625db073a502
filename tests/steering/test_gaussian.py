"""Mean and covariance eigenbasis of streamed data, and the denoiser that they make."""

import math

import numpy as np
import pytest
import torch

import fastdiff as fd
from fastdiff.steering import Gaussian, gaussian


def correlated(count, shape=(2, 3, 2), seed=0, scale=1.0, mean=0.0):
    """Samples of a Gaussian with falling eigenvalues in a random basis."""
    n = math.prod(shape)
    z = fd.randn((count, n), seeds=range(seed, seed + count)).double()
    turn = torch.linalg.qr(fd.randn((1, n, n), seeds=99)[0].double())[0]
    return (mean + scale * (z * 0.7 ** torch.arange(n)) @ turn).reshape(count, *shape)


def covariance(g):
    flat = g.basis.reshape(g.rank, -1).double()
    return flat.T @ (g.eigenvalues[:, None] * flat)


@pytest.mark.parametrize("mean, scale", [(0.0, 1.0), (1e4, 1.0), (-3.0, 1e-3)])
def test_moments_are_those_of_numpy(mean, scale):
    data = correlated(300, mean=mean, scale=scale)
    g = Gaussian.fit(data)
    flat = data.reshape(300, -1).numpy()
    expected = np.cov(flat.T)
    assert np.allclose(g.mean.reshape(-1), flat.mean(0), rtol=1e-12, atol=1e-12 * scale)
    assert np.abs(covariance(g).numpy() - expected).max() < 1e-6 * expected.max()  # the basis is float32
    assert np.allclose(g.eigenvalues, np.linalg.eigvalsh(expected)[::-1], rtol=1e-7)
    assert g.variance == pytest.approx(np.trace(expected), rel=1e-8)
    basis = g.basis.reshape(g.rank, -1)
    assert torch.allclose(basis @ basis.T, torch.eye(g.rank), atol=1e-6)


def test_what_the_data_comes_in_does_not_matter():
    data = correlated(130).float()
    labels = torch.arange(130) % 3
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(data, labels), batch_size=40)
    whole = Gaussian.fit(data)
    for given in (data.numpy(), list(data.split(17)), (part for part in data.split(64)), loader, [data[:1], data[1:1], data[1:]]):
        g = Gaussian.fit(given)
        assert g.about == whole.about
        assert torch.allclose(g.mean, whole.mean, rtol=0, atol=1e-13)
        assert torch.allclose(g.eigenvalues, whole.eigenvalues, rtol=1e-10)
    assert whole.about["count"] == 130
    assert whole.about["range"] == [float(data.min()), float(data.max())]
    assert Gaussian.fit(data.flip(0)).about["sha256"] != whole.about["sha256"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_floating_dtype_is_taken_as_it_is(dtype):
    data = correlated(50).to(dtype)
    assert torch.equal(Gaussian.fit(data).eigenvalues, Gaussian.fit(data.double()).eigenvalues)


def test_of_fewer_samples_than_dimensions_there_are_as_many_directions_as_samples_allow():
    g = Gaussian.fit(correlated(5))
    assert g.rank == 4
    assert g.rest < 1e-9 * g.variance


@pytest.fixture
def sketched(monkeypatch):
    """Twelve dimensions are too many for the second moment, and more than 6 directions for the sketch."""
    monkeypatch.setattr(gaussian, "MOMENT_DIMENSIONS", 11)
    monkeypatch.setattr(gaussian, "SKETCH", 6)


def test_a_sketch_of_few_samples_is_exact(sketched):
    data = correlated(5, mean=3.0)
    sketch = Gaussian.fit([data[:2], data[2:]])
    assert sketch.about["lost"] == 0
    expected = np.cov(data.reshape(5, -1).numpy().T)
    assert np.abs(covariance(sketch).numpy() - expected).max() < 1e-6 * expected.max()


@pytest.mark.parametrize("batch", [1, 4, 50])
def test_what_a_sketch_lost_is_bounded(sketched, batch):
    data = correlated(200, mean=3.0)
    sketch = Gaussian.fit(data.split(batch))
    expected = np.cov(data.reshape(200, -1).numpy().T)
    lost, true = sketch.about["lost"], np.linalg.eigvalsh(expected)[::-1][: sketch.rank]
    assert sketch.rank == 6 and 0 < lost < 0.3 * true[0]
    missing = expected - covariance(sketch).numpy()
    assert np.linalg.norm(missing, 2) <= lost * (1 + 1e-5)
    assert ((true - sketch.eigenvalues.numpy() >= -1e-6) & (true - sketch.eigenvalues.numpy() <= lost + 1e-6)).all()
    assert sketch.variance == pytest.approx(np.trace(expected), rel=1e-8)
    assert np.allclose(sketch.mean.reshape(-1), data.reshape(200, -1).mean(0), rtol=1e-12)


def test_a_sketch_finds_data_of_low_rank(sketched):
    data = correlated(200) @ torch.diag(torch.tensor([1.0, 0.0], dtype=torch.float64))  # 6 of 12 dimensions are 0
    sketch = Gaussian.fit(data.split(7))
    expected = np.cov(data.reshape(200, -1).numpy().T)
    assert np.abs(covariance(sketch).numpy() - expected).max() < 1e-6 * expected.max()


def test_the_rank_is_chosen_by_the_gain():
    data = correlated(400)
    everything = Gaussian.fit(data)
    for sigma, gain in ((0.1, 0.01), (1.0, 0.1), (1.0, 0.4)):
        g = Gaussian.fit(data, sigma=sigma, gain=gain)
        assert g.rank == int((everything.gains(sigma) > gain).sum())
        assert g.variance == pytest.approx(everything.variance)
    assert Gaussian.fit(data, rank=3, sigma=50).rank == 3
    assert Gaussian.fit(data, rank=0).basis.shape == (0, 2, 3, 2)
    assert Gaussian.fit(data, rank=0).variance == pytest.approx(everything.variance)


def test_the_denoiser_is_the_posterior_mean():
    data = correlated(400, mean=0.5)
    g = Gaussian.fit(data)
    cov, mean = np.cov(data.reshape(400, -1).numpy().T), data.reshape(400, -1).mean(0).numpy()
    x = 3 * correlated(7, seed=1000)
    for sigma in (0.05, 1.0, 20.0):
        expected = mean + (x.reshape(7, -1).numpy() - mean) @ np.linalg.solve(cov + sigma**2 * np.eye(12), cov)
        assert np.allclose(g.denoise(x, sigma).reshape(7, -1), expected, atol=1e-6)
        assert torch.equal(g.denoise(x, torch.full((7,), sigma)), g.denoise(x, float(torch.tensor(sigma))))


@pytest.mark.parametrize("rank, sigma", [(0, 2.0), (3, 2.0), (3, 0.3), (8, 0.1)])
def test_the_error_of_a_lower_rank_is_what_is_measured(rank, sigma):
    data = correlated(20_000)
    whole, part = Gaussian.fit(data), Gaussian.fit(data, rank=rank)
    x = data + sigma * fd.randn(data.shape, seeds=10**6).double()
    moved = (whole.denoise(x, sigma) - part.denoise(x, sigma)).reshape(len(x), -1).square().sum(1).mean().sqrt()
    assert float(moved) / math.sqrt(whole.variance) == pytest.approx(whole.error(rank, sigma), rel=0.03)
    assert part.error(rank, sigma) >= whole.error(rank, sigma) * (1 - 1e-9)  # it knows a bound only


@pytest.mark.parametrize("data, error, says", [
    (torch.zeros(0, 3, 2), ValueError, "0 samples: 2 or more"),
    ([], ValueError, "0 samples: 2 or more"),
    (torch.zeros(1, 3, 2), ValueError, "1 sample: 2 or more"),
    (torch.zeros(4, 3, dtype=torch.uint8), TypeError, r"x / 127.5 - 1"),
    (torch.zeros(4), ValueError, r"shape \(4,\)"),
    (torch.zeros(4, 0), ValueError, "not empty"),
    ([torch.zeros(4, 3), torch.zeros(4, 2)], ValueError, r"batch 1 holds samples of shape \(2,\), those before it \(3,\)"),
    ([torch.zeros(4, 3), torch.tensor([[0.0, 0, 0], [0, math.nan, 0]])], ValueError, "batch 1 holds a NaN, in sample 5"),
    (torch.full((4, 3), math.inf), ValueError, "infinite value, in sample 0"),
    ("images", TypeError, "str"),
    (7, TypeError, "int"),
    ([3], TypeError, "batch 0 is int"),
    (torch.utils.data.TensorDataset(torch.zeros(4, 3)), TypeError, "DataLoader"),
])
def test_wrong_data(data, error, says):
    with pytest.raises(error, match=says) as raised:
        Gaussian.fit(data, name="the pictures")
    assert "the pictures" in str(raised.value)


@pytest.mark.parametrize("options", [{"sigma": -1}, {"sigma": math.nan}, {"gain": 1.0}, {"gain": -0.1}, {"rank": -1},
                                     {"rank": True}, {"rank": 2.0}])
def test_wrong_options(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))} is"):
        Gaussian.fit(torch.zeros(4, 3), **options)


def test_data_without_variance_is_its_mean():
    g = Gaussian.fit(torch.ones(4, 3, 2))
    assert g.rank == 0 and g.variance == 0
    assert torch.equal(g.denoise(torch.zeros(2, 3, 2), 1.0), torch.ones(2, 3, 2, dtype=torch.float64))
    with pytest.raises(ValueError, match="samples of shape"):
        g.denoise(torch.zeros(2, 3), 1.0)


def test_a_rank_beyond_that_of_the_data_keeps_no_rounding():
    """Four samples span three directions, whatever is asked for."""
    g = Gaussian.fit(fd.randn((4, 3, 5), seeds=0), rank=9)
    assert g.rank == 3 and g.eigenvalues[-1] > 1e-3


@pytest.mark.parametrize("change, says", [
    ({"eigenvalues": torch.tensor([1.0, 2.0], dtype=torch.float64)}, "positive and falling"),
    ({"eigenvalues": torch.tensor([1.0, -2.0], dtype=torch.float64)}, "positive and falling"),
    ({"mean": torch.full((3,), math.nan, dtype=torch.float64)}, "mean holds"),
    ({"basis": torch.zeros(2, 4)}, "a basis of shape"),
    ({"rest": -1.0}, "rest is"),
    ({"about": {"count": 5, "shape": [3]}}, "about lacks range, asked"),
])
def test_tensors_that_are_no_gaussian(change, says):
    parts = {"mean": torch.zeros(3, dtype=torch.float64), "basis": torch.eye(3)[:2],
             "eigenvalues": torch.tensor([2.0, 1.0], dtype=torch.float64), "rest": 0.0,
             "about": {"count": 5, "shape": [3], "range": [-1, 1], "asked": None}}
    Gaussian(**parts)
    with pytest.raises(ValueError, match=says):
        Gaussian(**{**parts, **change})
