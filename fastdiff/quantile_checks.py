"""What ``quantile_`` refuses, before any work; ``csrc/bind_quantile.h`` refuses the same. Where tensors are on the CPU, rows are
read and refused too; on a device the kernels clamp them."""

import torch

from .checks import (FLOATS, INTEGERS, MAX_SLOTS, _Extent, _need_dense_last, _need_device, _need_dtype, _need_samples, _need_shape,
                     _shape)

__all__ = ["check_quantile"]

_OP = "quantile_"


def _check_numbers(q, low, high):
    if not 0 <= q <= 1:
        raise ValueError(f"{_OP}: q is {q}: 0 to 1 is taken")
    if not (low > 0 and high > 0):
        raise ValueError(f"{_OP}: low is {low}, high is {high}: limits above 0 are taken")


def _check_row(row, row_index, rows, batch):
    if row is None:
        if not 0 <= row_index < rows:
            raise ValueError(f"{_OP}: row_index is {row_index}: coef has rows 0 to {rows - 1}")
        return
    _need_dtype(_OP, "row", row, *INTEGERS)
    if _shape(row) not in ((), (batch,)):
        raise ValueError(f"{_OP}: row has shape {_shape(row)}: () or (batch,) = ({batch},) is taken")
    if row.is_cpu and batch and row.numel() and not 0 <= int(row.min()) <= int(row.max()) < rows:
        raise ValueError(f"{_OP}: row holds {int(row.min())} to {int(row.max())}: coef has rows 0 to {rows - 1}")


def check_quantile(out, clip, inputs, coef, row, row_index, scale, q, low, high):
    """The arguments of ``quantile_``, as its schema lists them. Raises ``ValueError``."""
    if out is None and clip is None:
        raise ValueError(f"{_OP}: out and clip are None: nothing to write")
    if not 1 <= len(inputs) <= MAX_SLOTS:
        raise ValueError(f"{_OP}: inputs holds {len(inputs)} tensors: 1 to {MAX_SLOTS} are taken")
    like = inputs[0]
    written = {"out": out, "clip": clip}
    others = {"coef": coef, "row": row, "scale": scale}
    whole = {f"inputs[{k}]": t for k, t in enumerate(inputs)}
    for name, t in {**whole, **written, **others}.items():
        if t is not None:
            _need_device(_OP, name, t, "inputs[0]", like)
    if like.dim() < 1 or 0 in like.shape[1:]:
        raise ValueError(f"{_OP}: inputs[0] has shape {_shape(like)}: (batch, *shape) with at least one element a sample is taken")
    for name, t in whole.items():
        _need_dtype(_OP, name, t, *FLOATS)
        if t.shape != like.shape:
            raise ValueError(f"{_OP}: {name} has shape {_shape(t)}, inputs[0] has {_shape(like)}: one shape is taken")
        _need_samples(_OP, name, t)
    batch = len(like)
    for name, t in written.items():
        if t is not None:
            _need_dtype(_OP, name, t, torch.float32)
            _need_shape(_OP, name, t, *(((batch,), "(batch,)") if name == "out" else ((batch, 3), "(batch, 3)")))
            if name == "clip":
                _need_dense_last(_OP, name, t)
            if batch > 1 and t.stride(0) < (1 if name == "out" else 3):
                raise ValueError(f"{_OP}: {name} of shape {_shape(t)} overlaps itself: it has strides {t.stride()}")
    _need_dtype(_OP, "coef", coef, torch.float32)
    if coef.dim() != 2 or len(coef) < 1 or coef.shape[1] < len(inputs):
        raise ValueError(f"{_OP}: coef has shape {_shape(coef)}: (rows, {len(inputs)} or more) with at least one row is taken")
    _need_dense_last(_OP, "coef", coef)
    if scale is not None:
        _need_dtype(_OP, "scale", scale, torch.float32)
        _need_shape(_OP, "scale", scale, (batch, len(inputs)), "(batch, inputs)")
    _check_numbers(q, low, high)
    if batch:
        rest = [(name, _Extent(t)) for name, t in whole.items()]
        rest += [(name, _Extent(t, 0)) for name, t in others.items() if t is not None]
        here = {name: _Extent(t, 0 if name == "out" else 1) for name, t in written.items() if t is not None}
        for name, extent in here.items():
            for other, there in [*rest, *(item for item in here.items() if item[0] > name)]:
                if extent.meets(there):
                    raise ValueError(f"{_OP}: {name} overlaps {other}: it must stand elsewhere")
    _check_row(row, row_index, len(coef), batch)
