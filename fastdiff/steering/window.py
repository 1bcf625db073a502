"""Where in a run an action acts, and on which samples: windows of noise levels, weights and choices per sample."""

import math
from collections.abc import Iterable, Mapping, Set

import numpy as np
import torch

from ..noise import unknown
from ..plan import Plan
from ..samplers.table import CLIP

__all__ = ["check_clip", "check_window", "chosen", "fresh_name", "levels", "name_of", "per_sample", "rows_in"]


def check_window(window) -> tuple[float, float]:
    """(low, high) of noise levels, 0 <= low <= high; high may be infinite. Raises ``TypeError`` or ``ValueError``."""
    pair = tuple(window) if isinstance(window, Iterable) and not isinstance(window, (str, bytes)) else ()
    if len(pair) != 2 or not all(hasattr(v, "__float__") and not isinstance(v, bool) for v in pair):
        raise TypeError(f"window is {window!r}: (low, high), two noise levels sigma, is taken")
    low, high = map(float, pair)
    if not 0 <= low <= high:
        raise ValueError(f"window is ({low:g}, {high:g}): 0 <= low <= high is taken")
    return low, high


def levels(plan: Plan) -> str:
    """The noise levels at which a plan calls its model, for messages: at most eight of them."""
    found = sorted(set(plan.sigmas[plan.calls_model].tolist()), reverse=True)
    shown = [f"{s:.4g}" for s in found]
    return ", ".join(shown if len(shown) <= 8 else [*shown[:4], "...", *shown[-3:]])


def rows_in(plan: Plan, window=None, steps=None) -> np.ndarray:
    """(N,) bool: the rows of a plan whose model call lies in a window. Every stage of a sampler with several counts for
    itself, at its own level.

    window: (low, high), noise levels sigma of x0 + sigma n, both ends in it; steps: (first, last) of the sampler's steps,
    both in it, with all their stages, as papers that count steps mean it; both: what is in both; neither: every call.
    Raises ``ValueError`` where no row is in it, with what the plan has.

    >>> import fastdiff as fd
    >>> plan = fd.plan("heun", schedule="edm", prediction="denoised", steps=18)
    >>> int(rows_in(plan, (5.3, 80)).sum()), int(rows_in(plan, steps=(0, 7)).sum())
    (15, 16)
    """
    rows = plan.calls_model.copy()
    said = []
    if window is not None:
        low, high = check_window(window)
        rows &= plan.window(low, high)
        said.append(f"window ({low:g}, {high:g})")
    if steps is not None:
        pair = tuple(steps) if isinstance(steps, Iterable) else ()
        if len(pair) != 2 or not all(hasattr(v, "__index__") and not isinstance(v, bool) for v in pair):
            raise TypeError(f"steps is {steps!r}: (first, last), two ints, is taken")
        if not 0 <= pair[0] <= pair[1]:
            raise ValueError(f"steps is {pair}: 0 <= first <= last is taken")
        rows &= (plan.steps >= pair[0]) & (plan.steps <= pair[1])
        said.append(f"steps {pair[0]} to {pair[1]}")
    if not rows.any():
        raise ValueError(f"no call of the model falls into {' and '.join(said) or 'the plan'}: the plan ({plan.name!r}) calls it "
                         f"at sigma {levels(plan)}, in steps 0 to {int(plan.steps.max())}")
    return rows


def check_clip(what: str, values, plan: Plan) -> None:
    """Raises ``ValueError`` where something was made from values that the plan's clipped estimates cannot have, by more than
    5 % of the width. values: (low, high)."""
    for r in np.flatnonzero((plan.meta[:, 1] & CLIP) != 0)[:1]:
        low, high = plan.coef[r, plan.layout.clip : plan.layout.clip + 2].tolist()
        margin = 0.05 * (high - low)
        if values[0] < low - margin or values[1] > high + margin:
            raise ValueError(f"{what} was made from values from {values[0]:g} to {values[1]:g}: the plan ({plan.name!r}) clips "
                             f"its estimates to {low:g} to {high:g}")


def fresh_name(stem: str, plan: Plan) -> str:
    """A name for one more input of a plan: the stem, or the stem and the first number that is free."""
    taken = {*plan.inputs, *plan.outputs}
    return next(name for name in (stem, *(f"{stem}{i}" for i in range(2, len(taken) + 3))) if name not in taken)


def per_sample(value, batch: int, what: str = "weight") -> torch.Tensor:
    """(B,) float32 on the CPU from one number for all samples or B of them. Raises ``TypeError`` or ``ValueError``."""
    if isinstance(value, (bool, str, bytes)) or value is None:
        raise TypeError(f"{what} is {value!r}: a number, or one a sample, is taken")
    try:
        given = np.array(value) if isinstance(value, np.ndarray) else value  # torch takes no negative strides
        numbers = given if isinstance(given, torch.Tensor) else torch.as_tensor(given, device="cpu")
        if numbers.dtype == torch.bool or numbers.is_complex():
            raise TypeError
        numbers = numbers.detach().to("cpu", torch.float32)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{what} is {value!r}: a number, or one a sample, is taken") from None
    if tuple(numbers.shape) not in ((), (batch,)):
        raise ValueError(f"{what} has shape {tuple(numbers.shape)}, the batch has {batch} samples: a number or ({batch},) is "
                         "taken")
    least, most = (float(numbers.min()), float(numbers.max())) if numbers.numel() else (0.0, 0.0)
    if not (math.isfinite(least) and math.isfinite(most)):
        raise ValueError(f"{what} holds {least if not math.isfinite(least) else most}: finite numbers of float32 "
                         "are taken")
    return numbers.expand(batch).clone()


def chosen(target, names: Mapping | Iterable, batch: int, what: str = "target") -> torch.Tensor:
    """(B,) int64 on the CPU: which of the names each sample takes.

    target: a name (text or an int), for all samples, or B of them; None where there is one name only.
    Raises ``ValueError`` with the nearest name.
    """
    names = [str(name) for name in names]
    if target is None:
        if len(names) != 1:
            raise ValueError(f"no {what} was chosen of {len(names)}: one of {', '.join(names)} is taken, or one a sample")
        return torch.zeros(batch, dtype=torch.int64, device="cpu")
    one = isinstance(target, str) or hasattr(target, "__index__") and getattr(target, "ndim", 0) == 0
    if not one and (not isinstance(target, Iterable) or isinstance(target, (Set, Mapping))):  # a set has no order
        raise TypeError(f"{what} is {target!r}: a name, or one a sample, is taken")
    given = [target] * batch if one else list(target)
    if len(given) != batch:
        raise ValueError(f"{what} has {len(given)} entries, the batch has {batch} samples: one a sample is taken")
    return torch.tensor([_position(name, names, what) for name in given], dtype=torch.int64, device="cpu")


def _position(name, names, what) -> int:
    text = name_of(name, what)
    if text not in names:
        raise ValueError(unknown(what, text, names))
    return names.index(text)


def name_of(name, what: str = "target") -> str:
    """A name, text or an int, as text. Raises ``TypeError``."""
    if isinstance(name, bool) or not (isinstance(name, str) or hasattr(name, "__index__")):
        raise TypeError(f"the name of a {what} is {name!r}: text or an int is taken")
    return name if isinstance(name, str) else str(name.__index__())
