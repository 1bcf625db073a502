"""Against the xrfm package (github.com/dmbeaglehole/xRFM): the same data, the same settings, the same direction."""

import pytest
import torch

from fastdiff.steering.rfm import LaplaceKernel, fit_rfm
from fastdiff.steering.samples import Samples, auc, split

from .planted import cosine, planted

pytest.importorskip("xrfm", reason="the xrfm package is not installed (requirements-no-deps.txt)")


def both(bandwidth, adaptive, center_grads, iterations, *, dtype=torch.float64, choose=False, seed=0, noise=0.3):
    """Our fit and direction, theirs as (model, AGOP), and ours in their place: x, y, train, held."""
    from xrfm import RFM
    from xrfm.rfm_src.class_conversion import ClassificationConverter

    x, y, _ = planted(120, (3, 4, 5), seed, noise=noise)
    x = x.to(dtype)
    train, held = split(y.long(), 0.25, 0)
    samples = Samples(x, train, held)
    kernel = LaplaceKernel(samples.gram, samples.cross, samples.held_norms, bandwidth, 1e-3, adaptive)
    fit = fit_rfm(samples, y[train], y[held], kernel, bandwidth=bandwidth, iterations=iterations, center_grads=center_grads,
                  adaptive=adaptive, choose=choose)

    mode = "adaptive" if adaptive else "constant"
    model = RFM("l2_high_dim", bandwidth=bandwidth, bandwidth_mode=mode, device="cpu", verbose=False, tuning_metric="auc",
                class_converter=ClassificationConverter(mode="zero_one", n_classes=2))
    flat, labels = x.flatten(1), y.to(dtype)[:, None]
    # xrfm counts the updates of M between predictors: its last predictor's AGOP is one more.
    model.fit((flat[train], labels[train]), (flat[held], labels[held]), iters=iterations - 1, reg=1e-3, center_grads=center_grads,
              get_agop_best_model=True, return_best_params=choose, early_stop_rfm=choose, verbose=False)
    scores = model.predict(flat[held])[:, 0]
    return samples.direction(fit.weights), fit, model, auc(scores, y[held])


@pytest.mark.parametrize("iterations", [1, 2, 5, 8])
@pytest.mark.parametrize("center_grads", [False, True])
@pytest.mark.parametrize("bandwidth, adaptive", [(10.0, False), (3.0, False), (1.0, True), (10.0, True)])
def test_the_direction_is_that_of_xrfm(bandwidth, adaptive, center_grads, iterations):
    v, fit, model, held_auc = both(bandwidth, adaptive, center_grads, iterations)
    theirs = torch.linalg.eigh(model.agop_best_model)[1][:, -1]
    assert abs(cosine(v, theirs)) > 0.9999
    assert fit.aucs[-1] == pytest.approx(held_auc, abs=1e-9)


@pytest.mark.parametrize("center_grads", [False, True])
def test_as_xrfm_is_used_in_float32(center_grads):
    v, _, model, _ = both(10.0, False, center_grads, 5, dtype=torch.float32)
    theirs = torch.linalg.eigh(model.agop_best_model)[1][:, -1]
    assert abs(cosine(v, theirs)) > 0.99


@pytest.mark.parametrize("seed", range(4))
def test_the_iteration_is_chosen_as_by_xrfm(seed):
    """Theirs is chosen by the AUC of predictions clamped to [0.001, 0.999]: the two agree where no tie decides."""
    v, fit, model, _ = both(10.0, False, True, 6, choose=True, seed=seed, noise=1.0)
    assert fit.best == model.best_iter
    theirs = torch.linalg.eigh(model.agop_best_model)[1][:, -1]
    assert abs(cosine(v, theirs)) > 0.99
