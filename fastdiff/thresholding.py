"""Quantiles and dynamic thresholding of samples, without a sort.

The two functions here take a tensor. Where the estimate is a row's d, no tensor of it need exist: ``quantile_`` takes the inputs
and the table of the row, and fills the ``clip`` that ``step_`` takes for rows with the flag CLIP.
"""

import torch

from . import ops  # noqa: F401  registers the ops
from .checks import dense
from .reference.step import CLIP, NO_SLOT, Layout

__all__ = ["bounded_row", "dynamic_threshold", "quantile"]

_LAYOUT = Layout(1, 1)


def bounded_row(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The table (coef, meta) of one row, y = d = clip(x), by the bounds that ``quantile_`` gives a sample."""
    coef = torch.zeros(1, _LAYOUT.width, dtype=torch.float32)
    coef[0, 0] = coef[0, _LAYOUT.y(0) + 1] = 1
    return coef.to(device), torch.tensor([[NO_SLOT, CLIP, 0, NO_SLOT]], dtype=torch.int32).to(device)


def _refuse_gradients(name: str, x: torch.Tensor) -> None:
    if torch.is_grad_enabled() and x.requires_grad:
        raise ValueError(f"x requires gradients, which {name} does not have: x.detach() is taken, or torch.no_grad()")


def quantile(x: torch.Tensor, q: float) -> torch.Tensor:
    """The q-quantile of |x| for each sample: ``torch.quantile(x.float().abs().flatten(1), q, dim=1)`` in every bit.

    x: (B, *shape) float32, float16 or bfloat16, of any number of elements a sample, at least one; q: 0 to 1, interpolated linearly.
    Returns (B,) float32; NaN for a sample with NaN. Beyond 2^24 elements, where torch ends, the rank q (n - 1) is taken in float64.
    Raises ``ValueError`` for what cannot be taken.
    """
    _refuse_gradients("quantile", x)
    out = torch.empty(x.shape[:1], dtype=torch.float32, device=x.device)
    one = torch.ones(1, 1, dtype=torch.float32, device=x.device)
    torch.ops.fastdiff.quantile_(out, None, [dense(x)], one, None, 0, None, q, 1.0, 1.0)
    return out


def dynamic_threshold(x: torch.Tensor, ratio: float = 0.995, high: float = 1.0, *, low: float = 1.0) -> torch.Tensor:
    """clip(x, -t, t) / t, t being the ``ratio``-quantile of |x| of the sample, at least ``low`` and at most ``high``.

    Saharia et al., arXiv:2205.11487, section 2.3; in diffusers ``ratio`` is called dynamic_thresholding_ratio, ``high``
    sample_max_value. x: (B, *shape) float32, float16 or bfloat16; low and high above 0. Returns a tensor like x; 1 / t is rounded once
    and multiplied, so that a value may differ from that of a division in its last bit. A sample with NaN becomes NaN. Raises
    ``ValueError`` for what cannot be taken.
    """
    _refuse_gradients("dynamic_threshold", x)
    x = dense(x)
    out, clip = torch.empty_like(x), torch.empty(*x.shape[:1], 3, dtype=torch.float32, device=x.device)
    coef, meta = bounded_row(x.device)
    op = torch.ops.fastdiff
    op.quantile_(None, clip, [x], coef, None, 0, None, ratio, low, high)
    op.step_([x], [out], None, coef, meta, None, 0, None, None, None, None, None, clip, None, None, None)
    return out
