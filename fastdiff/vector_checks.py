"""What ``project_``, ``lift_`` and ``edit_`` refuse, before any work; ``csrc/bind_vectors.h`` refuses the same. Where tensors are on
the CPU, indices that some weight uses are read and refused too; on a device the kernels clamp them."""

import torch

from .checks import FLOATS, INTEGERS, _Extent, _need_dense_last, _need_device, _need_dtype, _need_samples, _need_shape, _shape
from .reference.project import MAX_TERMS

__all__ = ["check_edit", "check_lift", "check_project"]


def _check_samples(op, name, t, *dtypes):
    _need_dtype(op, name, t, *dtypes)
    if t.dim() < 1:
        raise ValueError(f"{op}: {name} has shape (): (batch, *shape) is taken")
    _need_samples(op, name, t)


def _check_vectors(op, name, vectors, like_name, like, terms):
    """Vectors (V, *shape) float32 of the samples' shape, at least one where there is a term."""
    _need_dtype(op, name, vectors, torch.float32)
    if vectors.dim() != like.dim() or vectors.shape[1:] != like.shape[1:] or vectors.shape[0] < min(terms, 1):
        raise ValueError(f"{op}: {name} has shape {_shape(vectors)}, {like_name} has {_shape(like)}: (vectors, *shape) with the same shape "
                         "is taken")
    _need_samples(op, name, vectors)


def _check_index(op, index, name, vectors, batch, terms):
    """index (B, M), or None with a vector for each term."""
    if index is not None:
        _need_dtype(op, "index", index, *INTEGERS)
        _need_shape(op, "index", index, (batch, terms), "(batch, terms)")
        _need_dense_last(op, "index", index)
    elif terms > len(vectors):
        raise ValueError(f"{op}: index is None and {name} holds {len(vectors)} vectors: {terms} terms take as many")


def _check_weight(op, weight, batch, terms=None):
    _need_dtype(op, "weight", weight, torch.float32)
    if terms is None and (weight.dim() != 2 or weight.shape[0] != batch or weight.shape[1] > MAX_TERMS):
        raise ValueError(f"{op}: weight has shape {_shape(weight)}: (batch, terms) = ({batch}, 0 to {MAX_TERMS}) is taken")
    _need_shape(op, "weight", weight, (batch, weight.shape[1] if terms is None else terms), "(batch, terms)")
    _need_dense_last(op, "weight", weight)


def _check_used(op, index, weight, name, vectors):
    """CPU only: every index that a weight uses is that of a vector."""
    if index is None or not index.is_cpu:
        return
    wrong = (index < 0) | (index >= len(vectors))
    for b, m in (wrong if weight is None else wrong & (weight != 0)).nonzero().tolist()[:1]:
        raise ValueError(f"{op}: index[{b}, {m}] is {int(index[b, m])}: {name} holds vectors 0 to {len(vectors) - 1}")


def _check_written(op, out, whole, small):
    """``out`` meets neither itself nor anything that is read. whole: tensors of samples or vectors; small: others, those of two
    dimensions with dense rows; by name."""
    if out.numel() == 0:
        return
    rows = out.dim() == 2 and out.stride(1) != 1 and out.shape[1] > 1  # only the projections may be
    spans = sorted(((step, size) for size, step in zip(out.shape, out.stride()) if size > 1)) if rows else \
        [(1, out[0].numel()), *([(out.stride(0), len(out))] if len(out) > 1 else [])]
    if any(step < 1 for step, _ in spans) or any(outer <= inner * (size - 1) for (inner, size), (outer, _) in zip(spans, spans[1:])):
        raise ValueError(f"{op}: out of shape {_shape(out)} overlaps itself: it has strides {out.stride()}")
    here = _Extent(out, 0 if rows else 1)
    for name, t in {**whole, **small}.items():
        if t is not None and t.numel() and here.meets(_Extent(t, int(name in whole or t.dim() == 2))):
            raise ValueError(f"{op}: out overlaps {name}: out must stand elsewhere")


def check_project(out, x, basis, index, gain, offset, weight, row, row_index):
    """The arguments of ``project_``, as its schema lists them. Raises ``ValueError``."""
    op = "project_"
    small = {"index": index, "gain": gain, "offset": offset, "weight": weight, "row": row}
    for name, t in {"x": x, "basis": basis, **small}.items():
        if t is not None:
            _need_device(op, name, t, "out", out)
    _check_samples(op, "x", x, *FLOATS)
    batch = len(x)
    _need_dtype(op, "out", out, torch.float32)
    if out.dim() != 2 or len(out) != batch:
        raise ValueError(f"{op}: out has shape {_shape(out)}, x has {_shape(x)}: (batch, terms) with the same batch is taken")
    terms = out.shape[1]
    _check_vectors(op, "basis", basis, "x", x, terms)
    _check_index(op, index, "basis", basis, batch, terms)
    for name, t in (("gain", gain), ("offset", offset)):
        _need_dtype(op, name, t, torch.float32)
        if t.dim() != 2 or len(t) < 1 or t.shape[1] != len(basis) or t.shape != gain.shape:
            raise ValueError(f"{op}: {name} has shape {_shape(t)}, gain {_shape(gain)}, basis {_shape(basis)}: (rows, vectors) with at least "
                             "one row, the same for both, is taken")
        _need_dense_last(op, name, t)
    if weight is not None:
        _check_weight(op, weight, batch, terms)
    rows = len(gain)
    if row is not None:
        _need_dtype(op, "row", row, *INTEGERS)
        if _shape(row) not in ((), (batch,)):
            raise ValueError(f"{op}: row has shape {_shape(row)}, x has {_shape(x)}: () or (batch,) is taken")
        if row.is_cpu and row.numel() and not 0 <= int(row.min()) <= int(row.max()) < rows:
            raise ValueError(f"{op}: row holds {int(row.min())} to {int(row.max())}: gain has rows 0 to {rows - 1}")
    elif not 0 <= row_index < rows:
        raise ValueError(f"{op}: row_index is {row_index}: gain has rows 0 to {rows - 1}")
    _check_written(op, out, {"x": x, "basis": basis}, small)
    _check_used(op, index, weight, "basis", basis)


def check_lift(out, basis, index, weight):
    """The arguments of ``lift_``, as its schema lists them. Raises ``ValueError``."""
    op = "lift_"
    for name, t in (("basis", basis), ("index", index), ("weight", weight)):
        if t is not None:
            _need_device(op, name, t, "out", out)
    _check_samples(op, "out", out, torch.float32)
    _check_weight(op, weight, len(out))
    _check_vectors(op, "basis", basis, "out", out, weight.shape[1])
    _check_index(op, index, "basis", basis, len(out), weight.shape[1])
    _check_written(op, out, {"basis": basis}, {"index": index, "weight": weight})
    _check_used(op, index, weight, "basis", basis)


def check_edit(out, h, bank, index, weight):
    """The arguments of ``edit_``, as its schema lists them. Raises ``ValueError``."""
    op = "edit_"
    for name, t in (("h", h), ("bank", bank), ("index", index), ("weight", weight)):
        if t is not None:
            _need_device(op, name, t, "out", out)
    _check_samples(op, "out", out, *FLOATS)
    _check_samples(op, "h", h, *FLOATS)
    if h.shape != out.shape:
        raise ValueError(f"{op}: h has shape {_shape(h)}, out has {_shape(out)}: one shape is taken")
    _check_weight(op, weight, len(out))
    _check_vectors(op, "bank", bank, "out", out, weight.shape[1])
    _check_index(op, index, "bank", bank, len(out), weight.shape[1])
    in_place = out.numel() > 0 and _Extent(out).same_place(_Extent(h))
    _check_written(op, out, {"bank": bank} if in_place else {"h": h, "bank": bank}, {"index": index, "weight": weight})
    _check_used(op, index, weight, "bank", bank)
