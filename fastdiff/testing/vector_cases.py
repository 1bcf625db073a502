"""Golden cases of ``project_``, ``lift_`` and ``edit_``: each row of the lists below names what it has; the rest is drawn from its
name."""

from dataclasses import dataclass

import numpy as np
import torch

from .cases import Case
from .inputs import Draw

__all__ = ["vector_cases"]

F32, F16, BF16 = "float32", "float16", "bfloat16"
IMAGE = (2, 3, 5, 7)
INTERPRETER = ("triton-interpreted",)


@dataclass(frozen=True)
class Edit:
    """h, out: "dtype" or "dtype layout"; out "=" is h itself. index: None where term m takes vector m. weights: one for each
    sample and term, drawn where None."""

    name: str
    shape: tuple = IMAGE
    h: str = F32
    out: str = "="
    terms: int = 1
    vectors: int = 3
    index: str | None = "int64"
    bank: str = F32
    weights: tuple | None = None
    special: float = 0
    zero: bool = False  # h is -0.0
    slow: tuple = ()


# Sizes about one element, a row of 256 and a chunk of 2048; and where the second level takes more than one round of 256 chunks.
EDITS = [
    *(Edit(f"{n} elements, {dtype}", shape=(2, n), h=dtype, slow=INTERPRETER * (i % 3 == 2))
      for i, n in enumerate((1, 7, 255, 256, 257, 2047, 2048, 2049, 4100)) for dtype in ((F32, F16, BF16)[i % 3],)),
    Edit("more chunks than lanes", shape=(1, 2048 * 257 + 3), out=F32, slow=INTERPRETER),
    Edit("samples without a dimension", shape=(5,), h=F16),
    *(Edit(f"{a} to {b}", h=a, out=b, terms=2) for a, b in [(F32, F16), (F16, F32), (BF16, F16), (F16, F16), (BF16, BF16)]),
    *(Edit(f"whole vectors, {dtype}", shape=(2, 8, 16, 16), h=dtype, out=dtype, terms=2) for dtype in (F32, F16, BF16)),
    Edit("channels-last", h=f"{F16} channels_last", out=f"{F16} channels_last", bank=f"{F32} channels_last", terms=2),
    Edit("channels-last in place, contiguous vectors", shape=(2, 16, 9, 9), h=f"{BF16} channels_last"),
    Edit("channels-last in, contiguous out", h=f"{F32} channels_last", out=F16),
    Edit("gaps between samples", shape=(3, 130), h=f"{F16} strided", out=f"{F32} strided"),
    Edit("offsets", shape=(3, 64), h=f"{F16} offset", bank=f"{F32} offset"),
    Edit("seven terms", shape=(3, 100), terms=7, vectors=5, index="int32"),
    Edit("vectors in order", shape=(3, 100), terms=3, index=None),
    Edit("no term", h=BF16, out=BF16, terms=0, special=0.2),
    Edit("weights of 0, NaN kept", shape=(3, 66), h=F16, out=F16, terms=2, weights=((0, 0), (0, 0.5), (-0.0, 0)), special=0.2),
    Edit("weights of 0, another dtype", shape=(2, 66), h=F32, out=BF16, weights=((0,), (1,)), special=0.2),
    Edit("a norm of 0", shape=(2, 70), weights=((1,), (-2,)), zero=True, out=F32),
    Edit("weights that are not finite", shape=(3, 70), weights=((np.inf,), (np.nan,), (3e38,)), out=F32),
    *(Edit(f"NaN, infinities, subnormals, {dtype}", shape=(3, 400), h=dtype, out=dtype, terms=2, special=0.01)
      for dtype in (F32, F16, BF16)),
]  # fmt: skip


def _weights(draw, batch, terms, given=None):
    """(B, M) in wider memory."""
    values = draw.coefficients((batch, terms), 0.8) if given is None else np.array(given, np.float32)
    wide = torch.full((batch, terms + 2), 7.0)
    wide[:, 1:-1] = torch.from_numpy(values)
    return wide[:, 1:-1]


def _index(draw, batch, terms, vectors, dtype):
    return None if dtype is None else torch.from_numpy(draw.integers(0, vectors, (batch, terms))).to(getattr(torch, dtype))


def _tensor(draw, shape, what, special=0.0):
    return draw.tensor(shape, *what.split(), special=special)


def _edit(e: Edit) -> Case:
    def build():
        draw = Draw(f"edit_/{e.name}")
        h = _tensor(draw, e.shape, e.h, e.special)
        if e.zero:
            h.fill_(-0.0)
        return {"out": h if e.out == "=" else _tensor(draw, e.shape, e.out), "h": h,
                "bank": _tensor(draw, (e.vectors, *e.shape[1:]), e.bank), "index": _index(draw, e.shape[0], e.terms, e.vectors, e.index),
                "weight": _weights(draw, e.shape[0], e.terms, e.weights)}

    return _case("edit_", e.name, build, e.slow)


@dataclass(frozen=True)
class Lift:
    name: str
    shape: tuple = IMAGE
    terms: int = 2
    vectors: int = 3
    index: str | None = "int64"
    out: str = F32
    basis: str = F32
    special: float = 0
    slow: tuple = ()


LIFTS = [
    *(Lift(f"{n} elements", shape=(2, n)) for n in (1, 255, 257, 1024, 2049)),
    Lift("samples without a dimension", shape=(5,)),
    Lift("channels-last", out=f"{F32} channels_last", basis=f"{F32} channels_last"),
    Lift("channels-last from contiguous vectors", out=f"{F32} channels_last"),
    Lift("gaps between samples", shape=(3, 130), out=f"{F32} strided", basis=f"{F32} strided"),
    Lift("offsets", shape=(3, 64), out=f"{F32} offset", basis=f"{F32} offset"),
    Lift("vectors in order", shape=(3, 100), terms=3, index=None),
    Lift("65 terms", shape=(2, 3, 8, 8), terms=65, vectors=70, index="int32"),
    Lift("4096 terms", shape=(1, 40), terms=4096, vectors=9, slow=INTERPRETER),
    Lift("no term", terms=0),
    Lift("NaN, infinities, subnormals", shape=(3, 200), terms=3, special=0.05),
]  # fmt: skip


def _lift(e: Lift) -> Case:
    def build():
        draw = Draw(f"lift_/{e.name}")
        return {"out": _tensor(draw, e.shape, e.out), "basis": _tensor(draw, (e.vectors, *e.shape[1:]), e.basis, e.special),
                "index": _index(draw, e.shape[0], e.terms, e.vectors, e.index), "weight": _weights(draw, e.shape[0], e.terms)}

    return _case("lift_", e.name, build, e.slow)


@dataclass(frozen=True)
class Project:
    """out: "rows" or "columns", how the projections lie. row: int, scalar or batch."""

    name: str
    shape: tuple = IMAGE
    x: str = F32
    terms: int = 2
    vectors: int = 3
    index: str | None = "int64"
    basis: str = F32
    rows: int = 2
    row: str = "int"
    weighted: bool = True
    out: str = "rows"
    special: float = 0
    slow: tuple = ()


PROJECTS = [
    *(Project(f"{n} elements, {dtype}", shape=(2, n), x=dtype, slow=INTERPRETER * (i % 3 == 2))
      for i, n in enumerate((1, 255, 256, 257, 2047, 2048, 2049, 4100)) for dtype in ((F32, F16, BF16)[i % 3],)),
    Project("more chunks than lanes", shape=(1, 2048 * 257 + 3), x=F16, terms=1, slow=INTERPRETER),
    Project("samples without a dimension", shape=(5,)),
    Project("channels-last", x=f"{F16} channels_last", basis=f"{F32} channels_last"),
    Project("channels-last on contiguous vectors", x=f"{F32} channels_last"),
    Project("gaps between samples", shape=(3, 130), x=f"{BF16} strided", basis=f"{F32} strided"),
    Project("offsets", shape=(3, 64), x=f"{F16} offset", basis=f"{F32} offset"),
    Project("one sample for all", shape=(3, 64), x=f"{F32} expanded"),
    Project("vectors in order", shape=(3, 100), terms=3, index=None, out="columns"),
    Project("without weights", shape=(3, 100), weighted=False, row="batch", index="int32"),
    Project("a row for all", shape=(3, 100), row="scalar", out="columns"),
    Project("rows by sample", shape=(5, 100), rows=4, row="batch"),
    Project("65 terms", shape=(2, 3, 8, 8), terms=65, vectors=70, row="batch"),
    Project("NaN, infinities, subnormals", shape=(3, 200), terms=3, special=0.01),
]  # fmt: skip


def _project(e: Project) -> Case:
    def build():
        draw = Draw(f"project_/{e.name}")
        batch = e.shape[0]
        x, basis = _tensor(draw, e.shape, e.x, e.special), _tensor(draw, (e.vectors, *e.shape[1:]), e.basis)
        gain, offset = (torch.from_numpy(draw.coefficients((e.rows, e.vectors), 0.8)) for _ in range(2))
        row = None
        if e.row != "int":
            row = torch.from_numpy(np.asarray(draw.integers(0, e.rows, () if e.row == "scalar" else (batch,))))
        whole = torch.full((batch, e.terms + 2), 7.0)
        out = (whole if e.out == "rows" else whole.t().contiguous().t())[:, 1:-1]
        return {"out": out, "x": x, "basis": basis, "index": _index(draw, batch, e.terms, e.vectors, e.index), "gain": gain,
                "offset": offset, "weight": _weights(draw, batch, e.terms) if e.weighted else None, "row": row,
                "row_index": e.rows - 1 if row is None else 0}

    return _case("project_", e.name, build, e.slow)


def _case(op, name, build, slow):
    def run(ops, a, device):
        getattr(ops, op)(*a.values())
        return {"out": a["out"]}

    return Case(f"{op}/{name}", op, build, run, slow)


def vector_cases() -> list[Case]:
    return [*map(_project, PROJECTS), *map(_lift, LIFTS), *map(_edit, EDITS)]
