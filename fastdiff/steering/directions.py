"""Concept directions from labelled activations: RFM, difference of means, and the covariance-aware discriminant.

Each method proposes trials: settings and sample weights w, the direction being X^T w. The sign makes the direction's scores
correlate with the label, and the trial whose scores have the highest AUC on held-out samples is taken; all are reported.
"""

import inspect
import math
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from numbers import Real
from operator import index

import torch

from ..noise import unknown
from .rfm import LaplaceKernel, fit_rfm
from .samples import Samples, auc, split

__all__ = ["METHODS", "Direction", "check_choices", "checked_targets", "covariance_aware", "fit_directions", "mean_difference",
           "rfm"]

Targets = Mapping[object, tuple[torch.Tensor, torch.Tensor]]
"""For each label, which training and which held-out samples have it: bool (n,), (m,), on the CPU."""
Trials = Iterator[tuple[object, dict, torch.Tensor | None]]
"""A label, the settings and what else is worth knowing, and weights (n,); None where the settings failed."""


@dataclass(frozen=True)
class Direction:
    """vector: float32, of the activation's shape, norm 1; auc: of its scores on held-out samples; settings: those chosen;
    trials: all settings with their AUCs, in the order in which they were tried."""

    vector: torch.Tensor
    auc: float
    settings: dict
    trials: list[dict] = field(repr=False)


def mean_difference(samples: Samples, targets: Targets) -> Trials:
    """v = mean of the label's samples - mean of the others."""
    for label, (positive, _) in targets.items():
        yield label, {}, _mean_weights(positive, samples.device)


def _mean_weights(positive, device):
    p = positive.to(device, torch.float64)
    return p / p.sum() - (1 - p) / (1 - p).sum()


def covariance_aware(samples: Samples, targets: Targets, *, ridge=(0.1, 1.0, 10.0, 100.0, 1000.0)) -> Trials:
    """v = (Sigma + lambda I)^-1 (difference of means): Fisher's discriminant, with Sigma the covariance of all samples (that
    within classes gives the same direction: the two differ by a multiple of the difference's outer product).

    ridge: lambda in units of the mean variance of an element, tr(Sigma) / d. In sample space, by the push-through identity,
    w = (X X^T / (n - 1) + lambda I)^-1 w_mean: one n^3 / 3 for all labels.
    """
    return _covariance_aware(samples, targets, _positive("ridge", ridge))


def _covariance_aware(samples, targets, ridge):
    n = len(samples)
    means = torch.stack([_mean_weights(positive, samples.device) for positive, _ in targets.values()], 1)
    covariance = samples.gram / (n - 1)
    unit = float(covariance.trace()) / math.prod(samples.shape)
    for share in ridge:
        shifted = covariance + share * unit * torch.eye(n, dtype=torch.float64, device=samples.device)
        weights = torch.cholesky_solve(means, torch.linalg.cholesky(shifted))
        for label, w in zip(targets, weights.T):
            yield label, {"ridge": share}, w


def rfm(samples: Samples, targets: Targets, *, bandwidth=(1.0, 10.0), ridge=(1e-3, 3e-2, 1.0), center_grads=(False, True),
        adaptive: bool = True, iterations: int = 5, choose: bool = True) -> Trials:
    """v = top eigenvector of the AGOP of a Recursive Feature Machine (``fastdiff.steering.rfm``).

    bandwidth: of the Laplace kernel; with ``adaptive`` in units of the median distance between samples, anew for each metric
    (xrfm's ``bandwidth_mode="adaptive"``), else as it is: the recipes for language models have (1, 10, 100), for activations
    that are about so far apart. ridge: lambda, 1e-3 in the recipes; center_grads: subtract the mean gradient; iterations: AGOPs
    computed, 5 to 8 in the recipes; choose: of these the one whose predictor has the highest held-out AUC, else the last. The
    kernel of the first iteration is the same for all labels and is factored once for each bandwidth and ridge.
    """
    if isinstance(iterations, bool) or not hasattr(iterations, "__index__") or iterations < 1:
        raise ValueError(f"iterations is {iterations!r}: an int of 1 or more is taken")
    center_grads = (center_grads,) if isinstance(center_grads, bool) else tuple(center_grads)
    if not center_grads or not all(isinstance(center, bool) for center in center_grads):
        raise ValueError(f"center_grads is {center_grads}: True, False, or both is taken")
    widths, ridges = _positive("bandwidth", bandwidth), _positive("ridge", ridge)
    return _rfm(samples, targets, widths, ridges, center_grads, adaptive, index(iterations), choose)


def _rfm(samples, targets, widths, ridges, center_grads, adaptive, iterations, choose):
    for width in widths:
        for share in ridges:
            kernel = LaplaceKernel(samples.gram, samples.cross, samples.held_norms, width, share, adaptive)
            for label, (positive, held) in targets.items():
                for center in center_grads:
                    settings = {"bandwidth": width, "ridge": share, "center_grads": center, "adaptive": adaptive}
                    try:
                        fit = fit_rfm(samples, positive, held, kernel, iterations=iterations, choose=choose, **settings)
                    except ValueError as error:
                        yield label, {**settings, "iterations": iterations, "failed": str(error)}, None
                        continue
                    found = {"iterations": iterations, "best": fit.best, "predictor_auc": fit.aucs, "share": fit.share}
                    yield label, {**settings, **found}, fit.weights


# Each checks its options when it is called, and works when it is iterated.
METHODS = {"rfm": rfm, "mean_difference": mean_difference, "covariance_aware": covariance_aware}


def _positive(name, values) -> list[float]:
    values = list(values) if isinstance(values, Iterable) and not isinstance(values, str) else [values]
    if not values or not all(isinstance(v, Real) and not isinstance(v, bool) and 0 < v < math.inf for v in values):
        raise ValueError(f"{name} is {values!r}: a finite number above 0, or several, is taken")
    return [float(v) for v in values]


def checked_targets(labels, count: int, classes=None) -> tuple[dict[object, torch.Tensor], torch.Tensor]:
    """Which of ``count`` samples have which label: a mapping of those wanted to bool (N,), on the CPU; and (N,) int64, the same
    for samples that agree in all labels.

    labels: N labels, ints or text, as a tensor or a sequence; or a mapping of names to bool (N,), for attributes that may
    overlap. classes: the labels wanted, all by default. Raises ``ValueError``/``TypeError``: for a label with fewer than two
    samples, or fewer than two without it, since one of each is held out.
    """
    masks = _masks(labels, count)
    wanted = list(masks) if classes is None else [_label(name, "classes") for name in classes]
    if not wanted:
        raise ValueError("no label is wanted: classes is empty")
    for name in wanted:
        if name not in masks:
            raise ValueError(unknown("label", name, [str(known) for known in masks]))
        has = int(masks[name].sum())
        if min(has, count - has) < 2:
            raise ValueError(f"label {name!r} is that of {has} of {count} samples: at least 2 with it and 2 without it are "
                             "needed, to learn from one and judge by the other")
    groups = torch.stack(list(masks.values()), 1).unique(dim=0, return_inverse=True)[1]
    return {name: masks[name] for name in wanted}, groups


def _masks(labels, count) -> dict[object, torch.Tensor]:
    if isinstance(labels, Mapping):
        masks = {_label(name, "labels"): torch.as_tensor(mask, device="cpu") for name, mask in labels.items()}
        for name, mask in masks.items():
            if mask.dtype != torch.bool or tuple(mask.shape) != (count,):
                raise ValueError(f"labels[{name!r}] is {mask.dtype} {tuple(mask.shape)}: bool ({count},), one a sample, is taken")
        return masks
    values = [_label(value, "labels") for value in (labels.tolist() if hasattr(labels, "tolist") else labels)]
    if len(values) != count:
        raise ValueError(f"labels has {len(values)} entries, there are {count} samples: one a sample is taken")
    names = sorted(set(values), key=lambda name: (isinstance(name, str), name))
    return {name: torch.tensor([value == name for value in values], device="cpu") for name in names}


def _label(value, what) -> int | str:
    """A label as a ``Concept`` keeps it: NumPy's and torch's ints as Python's. Raises ``TypeError``."""
    if isinstance(value, str):
        return str(value)
    try:
        return value if isinstance(value, bool) else index(value)
    except TypeError:
        raise TypeError(f"{what} holds {value!r}: ints or text are taken") from None


def fit_directions(activations: torch.Tensor, labels, method: str = "rfm", *, classes=None, held_out: float = 0.2,
                   split_seed: int = 0, select: str = "direction", progress: bool | None = None,
                   **options) -> dict[object, Direction]:
    """The direction of each label in activations, that label against the rest. What labels share is computed once.

    activations: (N, ...) floating, as ``collect`` returns them; labels, classes: see ``checked_targets``; method: "rfm",
    "mean_difference" or "covariance_aware", with its options. held_out: the share of the samples, of each label, that
    judges and is not learnt from, drawn by split_seed. select: what the trials are judged by: "direction", the AUC of the
    direction's scores, or for RFM "predictor", that of the kernel predictor, as xrfm and its recipes do; ``auc`` is the
    former either way. Runs in float64 on the activations' device.

    Returns label -> ``Direction``. Raises ``ValueError``/``TypeError`` for wrong or degenerate input.
    """
    check_choices(method, held_out, select, options)
    _check_activations(activations)
    masks, groups = checked_targets(labels, len(activations), classes)
    train, held = split(groups, held_out, split_seed)
    targets = {name: (mask[train], mask[held]) for name, mask in masks.items()}
    _check_split(targets)
    samples = Samples(activations, train, held)
    if float(samples.gram.trace()) == 0:
        raise ValueError("the activations of all samples are the same: there is no direction in them")

    from tqdm import tqdm

    best, trials = {}, {name: [] for name in targets}
    show = sys.stderr.isatty() if progress is None else progress
    for label, trial, weights in tqdm(METHODS[method](samples, targets, **options), disable=not show, unit="trial", leave=False):
        trials[label].append(trial)
        if weights is None:
            continue
        weights = _signed(samples, weights, targets[label][0])
        if weights is None:
            trial["failed"] = "the direction is zero"
            continue
        trial["auc"] = auc(samples.cross @ weights, targets[label][1])
        score = trial["predictor_auc"][trial["best"]] if select == "predictor" and "best" in trial else trial["auc"]
        if label not in best or score > best[label][0]:
            best[label] = (score, trial, weights)
    for label, tried in trials.items():
        if label not in best:
            raise ValueError(f"no setting of {method} found a direction for label {label!r}: {tried[0].get('failed')}")
    return {label: Direction(samples.direction(weights), trial["auc"], trial, trials[label])
            for label, (_, trial, weights) in ((name, best[name]) for name in targets)}


def check_choices(method: str, held_out: float, select: str, options: Mapping) -> None:
    """Raises ``ValueError``/``TypeError`` where ``fit_directions`` would, for these arguments."""
    if method not in METHODS:
        raise ValueError(unknown("method", method, METHODS))
    try:
        inspect.signature(METHODS[method]).bind(None, None, **options)
    except TypeError as error:
        taken = ", ".join(list(inspect.signature(METHODS[method]).parameters)[2:]) or "none"
        raise TypeError(f"{method}: {error}. Options: {taken}") from None
    if select not in ("direction", "predictor"):
        raise ValueError(unknown("select", select, ("direction", "predictor")))
    if not isinstance(held_out, (int, float)) or not 0 < held_out < 1:
        raise ValueError(f"held_out is {held_out!r}: a share above 0 and below 1 is taken")
    METHODS[method](None, None, **options)


def _signed(samples, weights, positive):
    """Weights whose scores correlate with the label; None for a direction of no length."""
    scores = samples.gram @ weights
    length = float(weights @ scores)  # |X^T w|^2
    if not length > 1e-20 * float(samples.gram.trace()) * float(weights @ weights):
        return None
    y = positive.to(scores.device, torch.float64)
    return -weights if float((scores - scores.mean()) @ (y - y.mean())) < 0 else weights


def _check_activations(activations) -> None:
    given = isinstance(activations, torch.Tensor)
    if not given or not activations.is_floating_point() or activations.ndim < 2:
        kind = f"{activations.dtype} {tuple(activations.shape)}" if given else type(activations).__name__
        raise TypeError(f"activations is {kind}: a floating tensor (N, ...) is taken")
    finite = activations.flatten(1).isfinite().all(1)
    if not finite.all():
        raise ValueError(f"activations[{int((~finite).nonzero()[0])}] holds NaN or infinity: finite activations are taken")


def _check_split(targets) -> None:
    for name, (positive, held) in targets.items():
        if any(half.all() or not half.any() for half in (positive, held)):
            raise ValueError(f"label {name!r}: {int(positive.sum())} of {len(positive)} samples to learn from and "
                             f"{int(held.sum())} of {len(held)} held-out ones have it; each half needs some with and some "
                             "without it")
