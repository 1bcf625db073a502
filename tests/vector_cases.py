"""Cases of ``project_``, ``lift_`` and ``edit_``: drawn at random or by hypothesis, with what the reference says they must give.

    case = random_vector_case(random.Random(0))      or      @given(case=vector_cases())
    expected = case.expected()                       a clone of the case after the op, by the exact reference
    case.run()                                       calls torch.ops.fastdiff
    assert_same(case, expected)                      every byte of every storage, what lies between the samples included
"""

import dataclasses
from dataclasses import dataclass, field

import numpy as np
import torch
from hypothesis import strategies as st

from cases import NAMES, Options, _array, _coefficients, _Hypothesis, _lay_out, _Random, _shape, _stored, _values, _wide, _write, assert_same, mover
from fastdiff import reference

__all__ = ["OPS", "VectorCase", "assert_same", "random_vector_case", "vector_cases"]

OPS = ("project_", "lift_", "edit_")
# Around the tree's registers, rows and chunks.
SIZES = (1, 2, 7, 15, 16, 17, 31, 64, 100, 255, 256, 257, 511, 513, 784, 1000, 2047, 2048, 2049, 2304, 4096, 4100, 5000)


@dataclass
class VectorCase:
    """Arguments of one of the ops, by name and in the order of its schema."""

    op: str
    arguments: dict
    note: str = field(default="", compare=False)

    def items(self):
        return list(self.arguments.items())

    def args(self):
        return tuple(self.arguments.values())

    def to(self, device):
        """A copy with the same strides, offsets and aliases, on ``device``."""
        move = mover(device)
        return VectorCase(self.op, {name: move(value) for name, value in self.items()}, self.note)

    def clone(self):
        return self.to(self.arguments["out"].device)

    def run(self, ops=None):
        getattr(ops or torch.ops.fastdiff, self.op)(*self.args())

    def stored(self, arithmetic=reference.EXACT):
        """What ``out`` must hold, as the reference stores it."""
        a = self.arguments
        index, weight = _array(a["index"]), _array(a["weight"])
        if self.op == "project_":
            row = a["row_index"] if a["row"] is None else _array(a["row"])
            return reference.project(_wide(a["x"], len(a["x"])), _wide(a["basis"], len(a["basis"])), index, _array(a["gain"]),
                                     _array(a["offset"]), weight, row, count=a["out"].shape[1], arithmetic=arithmetic)
        if self.op == "lift_":
            return reference.lift(_wide(a["basis"], len(a["basis"])), index, weight, arithmetic=arithmetic)
        h, dtype = _stored(a["h"])
        return reference.edit(h.reshape(len(h), -1) if h.size else np.zeros((len(h), 0), h.dtype), _wide(a["bank"], len(a["bank"])), index,
                              weight, dtype=dtype, output=NAMES[a["out"].dtype], arithmetic=arithmetic)

    def expected(self):
        after = self.clone()
        if after.arguments["out"].numel():
            _write(after.arguments["out"], self.stored())
        return after

    def __repr__(self):
        def show(v):
            return v if not isinstance(v, torch.Tensor) else f"{NAMES.get(v.dtype, v.dtype)}{tuple(v.shape)} strides {v.stride()} + {v.storage_offset()}"

        lines = [f"  {name} = {show(value)}" for name, value in self.items()]
        for name in ("index", "gain", "offset", "weight", "row"):
            value = self.arguments.get(name)
            if value is not None and value.numel() <= 100:
                lines.append(f"  {name}: {value.tolist()}")
        return f"{self.op}(" + self.note + "\n" + "\n".join(lines) + ")"


def _table(c, values):
    """A table of two dimensions as a part of a larger one; rows may be one and the same."""
    kind = c.pick(["contiguous", "contiguous", "part", "expanded"])
    if kind == "part":
        wide = torch.full((len(values), values.shape[1] + 3), 7, dtype=values.dtype)
        wide[:, 2 : 2 + values.shape[1]] = values
        return wide[:, 2 : 2 + values.shape[1]]
    if kind == "expanded" and len(values):
        return values[:1].clone().expand(values.shape)
    return values


def _projections(c, B, M):
    """Where project_ may write: dense, a part of something wider, or turned."""
    kind = c.pick(["contiguous", "part", "turned", "every other"])
    if kind == "turned":
        return torch.full((M, B), 7.0).t()
    if kind == "every other":
        return torch.full((B, 2 * M + 1), 7.0)[:, 1::2][:, :M]
    return torch.full((B, M + 3), 7.0)[:, 1 : 1 + M] if kind == "part" else torch.full((B, M), 7.0)


def _build_vectors(c, options, op, max_terms):
    data = np.random.default_rng(c.integer(0, 2**32 - 1))
    B = 0 if options.empty and c.chance(0.03) else c.integer(1, options.max_batch)
    if c.chance(0.5):
        shape = (min(c.pick(SIZES), options.max_numel),)
    else:
        shape = _shape(c, options)
    if options.empty and shape and c.chance(0.03):
        shape = (0, *shape[1:])
    special = c.pick([0, 0, 0.001, 0.2]) if options.specials else 0
    V = c.integer(1, c.pick([2, max_terms]))
    has_index = c.chance(0.6)
    M = 0 if options.empty and c.chance(0.03) else c.integer(1, c.pick([2, max_terms]) if has_index else V)
    plain = dataclasses.replace(options, layouts=tuple(k for k in options.layouts if k != "expanded"))

    def tensor(lead, dtype=None, opts=options, **flags):
        return _lay_out(c, _values(data, (lead, *shape), special), dtype or c.pick(options.dtypes), opts, **flags)

    vectors = tensor(V, "float32", expandable=True)
    index = weight = None
    if op != "project_" or c.chance(0.6):
        weight = _table(c, torch.from_numpy(_coefficients(c, data, (B, M), options, c.pick([0.5, 0.9, 1.0]))))
    if has_index:
        index = torch.from_numpy(data.integers(0, V, (B, M))).to(c.pick([torch.int32, torch.int64]))
        if c.chance(0.5) and B:
            index[:] = index[:1].clone()
        index = _table(c, index)
        if weight is not None and index.stride(0) and c.chance(0.3):  # what no weight uses may be anything
            index[weight == 0] = c.pick([-1, V, 2**31 - 1])
    if op == "lift_":
        return VectorCase(op, dict(out=tensor(B, "float32", plain), basis=vectors, index=index, weight=weight), f"{(B, *shape)}")
    if op == "edit_":
        out = tensor(B, opts=plain)
        h = out if c.chance(0.4) else tensor(B, c.pick([NAMES[out.dtype], *options.dtypes]), expandable=True)
        return VectorCase(op, dict(out=out, h=h, bank=vectors, index=index, weight=weight), f"{(B, *shape)}")
    N = c.integer(1, options.max_rows)
    gain, offset = (torch.from_numpy(_coefficients(c, data, (N, V), options, density)) for density in (c.pick([0.5, 1.0]), 0.8))
    if c.chance(0.2) and V > 1 and vectors.stride(0):  # a vector that must not be read
        gain[:, 0] = 0
        vectors[0] = float("nan")
    kind = c.pick([k for k in options.row_kinds if k != "tokens"])
    row = None if kind == "int" else torch.from_numpy(np.asarray(data.integers(0, N, {"scalar": (), "batch": (B,)}[kind]))).to(
        c.pick([torch.int32, torch.int64]))
    return VectorCase(op, dict(out=_projections(c, B, M), x=tensor(B, expandable=True), basis=vectors, index=index, gain=_table(c, gain),
                               offset=_table(c, offset), weight=weight, row=row, row_index=c.integer(0, N - 1)), f"{(B, *shape)}, rows by {kind}")


DEFAULTS = dict(max_numel=5000)


def random_vector_case(rng, op=None, max_terms=9, **options):
    """A case from a ``random.Random``; the same seed gives the same case. op: one of ``OPS``, else any."""
    c = _Random(rng)
    return _build_vectors(c, Options(**{**DEFAULTS, **options}), op or c.pick(OPS), max_terms)


@st.composite
def vector_cases(draw, op=None, max_terms=9, **options):
    """The hypothesis strategy of cases."""
    c = _Hypothesis(draw)
    return _build_vectors(c, Options(**{**DEFAULTS, **options}), op or c.pick(OPS), max_terms)
