"""The search for a method's best setting: the same number of settings, samples and steps for every method, one criterion.

1. Half of the budget goes to a design that fills the method's space evenly.
2. The rest goes to neighbours of the best so far, one level away on one axis, until all of them were tried; then half
   a level away; then to the neighbours of the next best.
3. If the best setting then lies at the end of what was tried on some axis that goes on, the grid is extended there, until
   it lies inside or `extra` more settings were tried, which is recorded.

The criterion was fixed before any result was looked at. Of the settings whose accuracy is within two points of the best
that the method reached, the one with the smallest distance (`score.pooled`) wins. Accuracy above that of real test images
counts as theirs: nothing real is that accurate, and a criterion that rewarded it would drive every method towards distortion.
"""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.steering.space import Space

__all__ = ["MARGIN", "best_of", "propose", "search"]

MARGIN = 0.02


def best_of(trials: list[dict], real_accuracy: float) -> dict | None:
    """The best trial by the criterion above. trials: dicts with accuracy and pooled; those that failed hold neither."""
    done = [t for t in trials if t.get("pooled") is not None]
    if not done:
        return None
    bar = min(max(t["accuracy"] for t in done), real_accuracy) - MARGIN
    return min((t for t in done if t["accuracy"] >= bar - 1e-12), key=lambda t: t["pooled"])


def ranked(trials: list[dict], real_accuracy: float) -> list[dict]:
    """Trials from the best on, each the best of those that are left."""
    left, order = list(trials), []
    while (best := best_of(left, real_accuracy)) is not None:
        order.append(best)
        left.remove(best)
    return order


def propose(space: Space, trials: list[dict], real_accuracy: float, budget: int, extra: int) -> tuple[dict, str] | None:
    """The next setting to try and why ("design", "neighbour", "extension"), or None at the end. Depends on `trials` alone."""
    tried = [t["setting"] for t in trials]
    if not space.axes:
        return ({}, "design") if not tried else None
    if len(trials) < budget:
        for setting in space.design((budget + 1) // 2):
            if setting not in tried:
                return setting, "design"
        order = ranked(trials, real_accuracy)
        for trial in order:
            halves = trial is order[0] and _all_tried(space, trial["setting"], tried)
            for setting in space.beside(trial["setting"], 0.5 if halves else 1):
                if setting not in tried:
                    return setting, "neighbour"
        for setting in space.design(2 * budget):
            if setting not in tried:
                return setting, "design"
        return None  # the space has no more settings than these
    best = best_of(trials, real_accuracy)
    if best is not None and len(trials) < budget + extra:
        for setting in space.edges(best["setting"], tried):
            if setting not in tried:
                return setting, "extension"
    return None


def _all_tried(space, setting, tried) -> bool:
    return all(s in tried for s in space.beside(setting))


def search(space: Space, try_setting: Callable[[dict], dict], *, real_accuracy: float, budget: int, extra: int) -> dict:
    """Runs the search. try_setting: {axis: value} to a dict with accuracy and pooled, or with "failed".

    Returns {"best": setting, "trials": [...], "inside": whether the best lies inside of what was tried on each axis}.
    """
    trials = []
    while (found := propose(space, trials, real_accuracy, budget, extra)) is not None:
        setting, why = found
        trials.append({"setting": setting, "why": why, **try_setting(setting)})
    best = best_of(trials, real_accuracy)
    edges = [] if best is None or not space.axes else space.edges(best["setting"], [t["setting"] for t in trials])
    return {"best": None if best is None else best["setting"], "inside": not edges, "trials": trials}
