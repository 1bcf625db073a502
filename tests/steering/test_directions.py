"""Directions of all methods: closed forms, sign, choice by held-out AUC, and what is refused."""

import numpy as np
import pytest
import torch

from fastdiff.steering.directions import METHODS, checked_targets, fit_directions
from fastdiff.steering.rfm import fit_rfm_features
from fastdiff.steering.samples import auc, split

from .planted import cosine, planted

QUICK = {"rfm": {"bandwidth": (1.0, 10.0), "iterations": 3}, "mean_difference": {}, "covariance_aware": {}}


def classes(count=150, shape=(3, 4, 5), seed=0, distance=2.0, spread=1.0):
    """Three classes: normals of unequal variances whose means differ."""
    x, _, _ = planted(count, shape, seed, spread=spread)
    labels = torch.arange(count) % 3
    means = torch.randn(3, *shape, generator=torch.Generator().manual_seed(seed + 100), dtype=torch.float64)
    return (x + distance / 10 * means[labels]).float(), labels


@pytest.mark.parametrize("method", METHODS)
def test_one_direction_for_each_label(method):
    x, labels = classes()
    found = fit_directions(x, labels, method, **QUICK[method])
    assert list(found) == [0, 1, 2]
    held = split(labels, 0.2, 0)[1]
    for label, d in found.items():
        assert d.vector.shape == x.shape[1:] and d.vector.dtype == torch.float32
        assert float(d.vector.double().norm()) == pytest.approx(1, abs=1e-6)
        scores = (x * d.vector).flatten(1).sum(1)
        assert d.auc == pytest.approx(auc(scores[held], labels[held] == label), abs=1e-9) and d.auc > 0.7
        assert float(torch.corrcoef(torch.stack([scores, (labels == label).float()]))[0, 1]) > 0  # the sign
        assert d.settings in d.trials and d.auc == max(t["auc"] for t in d.trials)


@pytest.mark.parametrize("method", METHODS)
def test_all_at_once_is_each_alone(method):
    """What labels share changes nothing; a label and its absence have opposite directions."""
    x, labels = classes()
    together = fit_directions(x, labels, method, **QUICK[method])
    alone = fit_directions(x, labels, method, classes=[2], **QUICK[method])
    assert list(alone) == [2] and alone[2].auc == pytest.approx(together[2].auc)
    assert cosine(alone[2].vector, together[2].vector) > 1 - 1e-9
    named = fit_directions(x, {"with": labels == 2, "without": labels != 2}, method, **QUICK[method])
    assert cosine(named["with"].vector, named["without"].vector) == pytest.approx(-1, abs=1e-5 if method != "rfm" else 1e-2)


def test_the_mean_difference():
    x, labels = classes()
    train = split(labels, 0.2, 0)[0]
    d = fit_directions(x, labels, "mean_difference")[1]
    here, which = x[train].double(), labels[train] == 1
    assert cosine(d.vector, here[which].mean(0) - here[~which].mean(0)) > 1 - 1e-9


@pytest.mark.parametrize("shape", [(3, 4, 5), (2, 3, 2)])  # more dimensions than samples of a half, and fewer
@pytest.mark.parametrize("ridge", [0.01, 1.0, 50.0])
def test_the_covariance_aware_direction_is_fishers(shape, ridge):
    """(Sigma + lambda I)^-1 (difference of means), with (d, d) matrices; the covariance within classes gives the same."""
    x, labels = classes(60, shape)
    train = split(labels, 0.2, 0)[0]
    d = fit_directions(x, labels, "covariance_aware", ridge=ridge)[1]
    here, which = x[train].double().flatten(1), labels[train] == 1
    means = here[which].mean(0) - here[~which].mean(0)
    total = torch.cov(here.T)
    eye = torch.eye(len(total), dtype=torch.float64) * ridge * total.trace() / len(total)
    assert cosine(d.vector, torch.linalg.solve(total + eye, means)) > 1 - 1e-9
    p, q = int(which.sum()), int((~which).sum())
    within = (torch.cov(here[which].T) * (p - 1) + torch.cov(here[~which].T) * (q - 1)) / (p + q - 1)
    assert cosine(d.vector, torch.linalg.solve(within + eye, means)) > 1 - 1e-9


@pytest.mark.parametrize("center_grads", [False, True])
def test_rfm_is_that_of_feature_space(center_grads):
    x, labels = classes()
    d = fit_directions(x, labels, "rfm", bandwidth=10.0, adaptive=False, center_grads=center_grads, choose=False)[0]
    train, held = split(labels, 0.2, 0)
    flat = x.flatten(1)
    expected, aucs = fit_rfm_features(flat[train], labels[train] == 0, flat[held], labels[held] == 0, bandwidth=10.0,
                                      center_grads=center_grads, choose=False)
    assert abs(cosine(d.vector, expected)) > 0.9999 and d.settings["predictor_auc"] == pytest.approx(aucs)


def test_every_trial_is_reported():
    x, labels = classes()
    d = fit_directions(x, labels, "rfm", classes=[1], bandwidth=(1e-9, 1.0), ridge=(1e-3, 1e-1), iterations=2)[1]
    tried = [(t["bandwidth"], t["ridge"], t["center_grads"]) for t in d.trials]
    assert tried == [(b, r, c) for b in (1e-9, 1.0) for r in (1e-3, 1e-1) for c in (False, True)]
    assert all("failed" in t for t in d.trials[:4]) and not any("failed" in t for t in d.trials[4:])
    assert d.settings["bandwidth"] == 1.0


def test_selected_by_the_predictor():
    x, labels = classes()
    options = {"bandwidth": (0.1, 1.0, 10.0), "iterations": 4, "classes": [0]}
    d = fit_directions(x, labels, "rfm", select="predictor", **options)[0]
    assert d.settings["predictor_auc"][d.settings["best"]] == max(max(t["predictor_auc"]) for t in d.trials)
    assert d.auc == d.settings["auc"]


def test_the_same_split_gives_the_same_bits():
    x, labels = classes()
    one, two, other = (fit_directions(x, labels, "rfm", split_seed=s, **QUICK["rfm"])[0] for s in (3, 3, 4))
    assert torch.equal(one.vector, two.vector) and one.trials == two.trials
    assert not torch.equal(one.vector, other.vector)
    assert torch.equal(x, classes()[0])  # the caller's activations are not changed


def test_activations_in_16_bits():
    """Computed from as they are, in float32 and float64."""
    x, labels = classes()
    x = x.to(torch.bfloat16)
    one, two = (fit_directions(given, labels, "covariance_aware")[0] for given in (x, x.float()))
    assert torch.equal(one.vector, two.vector) and one.trials == two.trials


def test_attributes_that_overlap():
    x, labels = classes(600, spread=0.0)
    bright = x.flatten(1).sum(1) > 0
    found = fit_directions(x, {"bright": bright, "first": labels == 0}, "mean_difference")
    assert list(found) == ["bright", "first"] and found["bright"].auc > 0.8


def test_labels():
    assert list(checked_targets(["b", "a", "b", "a", "c", "c"], 6)[0]) == ["a", "b", "c"]
    assert list(checked_targets(torch.tensor([10, 9, 2, 9, 10, 2]), 6)[0]) == [2, 9, 10]
    masks, groups = checked_targets([0, 0, 1, 1, 2], 5, classes=[1])
    assert list(masks) == [1] and masks[1].tolist() == [False, False, True, True, False]
    assert len(groups.unique()) == 3  # the split is the same whichever labels are wanted
    n = np.arange(6) % 3
    for labels in (n, list(n), list(torch.from_numpy(n)), dict(zip(np.arange(3), torch.eye(3).bool().repeat(1, 2)))):
        for wanted in (np.array([2, 1]), torch.tensor([2, 1]), [np.int64(2), 1]):
            masks = checked_targets(labels, 6, classes=wanted)[0]
            assert [(type(name), name) for name in masks] == [(int, 2), (int, 1)]
            assert masks[2].tolist() == [False, False, True] * 2


X, LABELS = classes(30)


@pytest.mark.parametrize("change, error, message", [
    ({"labels": [0] * 29 + [1]}, ValueError, "label 0 is that of 29 of 30 samples: at least 2"),
    ({"labels": [0] * 30}, ValueError, "label 0 is that of 30 of 30"),
    ({"labels": [0, 1]}, ValueError, "labels has 2 entries, there are 30"),
    ({"labels": [0.5] * 30}, TypeError, "labels holds 0.5"),
    ({"labels": {("a", 1): torch.zeros(30, dtype=torch.bool)}}, TypeError, r"labels holds \('a', 1\)"),
    ({"labels": {"a": torch.zeros(30, dtype=torch.bool)}}, ValueError, "label 'a' is that of 0 of 30"),
    ({"labels": {"a": torch.zeros(30)}}, ValueError, r"labels\['a'\] is torch.float32"),
    ({"classes": [7]}, ValueError, "label 7 is not known"),
    ({"classes": []}, ValueError, "no label is wanted"),
    ({"activations": X[:1], "labels": [0]}, ValueError, "label 0 is that of 1 of 1"),
    ({"activations": torch.ones(30, 3, 4)}, ValueError, "the activations of all samples are the same"),
    ({"activations": X.index_fill(0, torch.tensor([4]), float("nan"))}, ValueError, r"activations\[4\] holds NaN"),
    ({"activations": X.long()}, TypeError, "activations is torch.int64"),
    ({"activations": X[:, 0, 0, 0]}, TypeError, "activations is torch.float32"),
    ({"method": "rmf"}, ValueError, "did you mean 'rfm'"),
    ({"method": "rfm", "bandwidths": 1.0}, TypeError, "Options: bandwidth, ridge, center_grads"),
    ({"method": "mean_difference", "ridge": 1.0}, TypeError, "Options: none"),
    ({"method": "rfm", "bandwidth": 0.0}, ValueError, "bandwidth is "),
    ({"method": "rfm", "ridge": ()}, ValueError, "ridge is "),
    ({"method": "rfm", "iterations": 0}, ValueError, "iterations is 0"),
    ({"method": "rfm", "center_grads": "no"}, ValueError, "center_grads is "),
    ({"held_out": 1.0}, ValueError, "held_out is 1.0"),
    ({"select": "directions"}, ValueError, "did you mean 'direction'"),
])
def test_what_cannot_work_is_refused(change, error, message):
    given = {"activations": X, "labels": LABELS, "method": "covariance_aware", **change}
    with pytest.raises(error, match=message):
        fit_directions(**given)


def test_classes_that_are_the_same():
    """Means that agree: there is no difference to follow."""
    x = torch.tensor([[1.0, 2.0], [3.0, 5.0]]).repeat(4, 1)
    labels = torch.tensor([0, 0, 1, 1, 0, 0, 1, 1])
    for seed in range(100):
        train = split(labels, 0.5, seed)[0]
        if torch.equal(x[train][labels[train] == 0].mean(0), x[train][labels[train] == 1].mean(0)):
            break
    with pytest.raises(ValueError, match="no setting of mean_difference found a direction for label 0: the direction is zero"):
        fit_directions(x, labels, "mean_difference", held_out=0.5, split_seed=seed)
