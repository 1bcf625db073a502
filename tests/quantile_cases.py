"""Cases of ``quantile_``: drawn at random or by hypothesis, with what the reference says they must give.

    case = random_quantile_case(random.Random(0))      or      @given(case=quantile_cases())
    expected = case.expected()                         a clone of the case after the op, by the exact reference
    case.run()                                         calls torch.ops.fastdiff
    assert_same(case, expected)                        every byte of every storage, what lies between the samples included
"""

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from hypothesis import strategies as st

from cases import (NAMES, Options, _array, _coefficients, _Hypothesis, _lay_out, _Random, _shape, _values, _wide, _write, assert_same,
                   mover)
from fastdiff import reference

__all__ = ["QuantileCase", "assert_same", "quantile_cases", "random_quantile_case"]

# Around the blocks of C++ and the tiles of Triton.
SIZES = (1, 2, 3, 4, 7, 16, 33, 64, 100, 127, 128, 129, 255, 256, 257, 511, 512, 513, 784, 1000, 1024, 1025, 2048, 2049, 5000)
QUANTILES = (0.0, 1.0, 0.5, 0.25, 0.995, 0.999, 0.75, 1 / 3)


@dataclass
class QuantileCase:
    """Arguments of the op, by name and in the order of its schema."""

    arguments: dict
    note: str = field(default="", compare=False)

    def items(self):
        return list(self.arguments.items())

    def args(self):
        return tuple(self.arguments.values())

    def to(self, device):
        """A copy with the same strides, offsets and aliases, on ``device``."""
        move = mover(device)
        return QuantileCase({name: move(value) for name, value in self.items()}, self.note)

    def clone(self):
        return self.to(self.arguments["coef"].device)

    def run(self, ops=None):
        (ops or torch.ops.fastdiff).quantile_(*self.args())

    def written(self):
        return [self.arguments[name] for name in ("out", "clip") if self.arguments[name] is not None]

    def stored(self, arithmetic=reference.EXACT):
        """What out and clip must hold, as the reference stores it."""
        a = self.arguments
        row = a["row_index"] if a["row"] is None else _array(a["row"])
        return reference.quantile([_wide(v, len(v)) for v in a["inputs"]], _array(a["coef"]), row, a["q"], scale=_array(a["scale"]),
                                  low=a["low"], high=a["high"], arithmetic=arithmetic)

    def expected(self):
        after = self.clone()
        if len(self.arguments["inputs"][0]):
            for name, values in zip(("out", "clip"), self.stored()):
                if after.arguments[name] is not None:
                    _write(after.arguments[name], values)
        return after

    def __repr__(self):
        def show(v):
            if isinstance(v, list):
                return "[" + ", ".join(map(show, v)) + "]"
            if not isinstance(v, torch.Tensor):
                return repr(v)
            return f"{NAMES.get(v.dtype, v.dtype)}{tuple(v.shape)} strides {v.stride()} + {v.storage_offset()}"

        lines = [f"  {name} = {show(value)}" for name, value in self.items()]
        small = {name: self.arguments[name] for name in ("coef", "row", "scale")}
        lines += [f"  {name}: {t.tolist()}" for name, t in small.items() if t is not None]
        return "quantile_(" + self.note + "\n" + "\n".join(lines) + ")"


def _written(c, B, width):
    """Where a result may stand: dense, or in something wider."""
    whole = torch.full((B, c.pick([width, width + 2])), 7.0)
    return whole[:, 0] if width == 1 else whole[:, -width:]


def _build_quantile(c, options):
    data = np.random.default_rng(c.integer(0, 2**32 - 1))
    B = 0 if options.empty and c.chance(0.03) else c.integer(1, options.max_batch)
    shape = (min(c.pick(SIZES), options.max_numel),) if c.chance(0.5) else _shape(c, options)
    special = c.pick([0, 0, 0.001, 0.2]) if options.specials else 0
    K = c.pick([1, 1, 2, 2, 3, 5, 12])
    kind = c.pick(["drawn", "drawn", "drawn", "equal", "few", "tiny"])

    def tensor():
        values = _values(data, (B, *shape), special)
        if kind == "equal":
            values = values.sign()
        if kind == "few":
            values = (values * 2).round()
        if kind == "tiny":
            values = values * 1e-39
        return _lay_out(c, values, c.pick(options.dtypes), options, expandable=True)

    N = c.integer(1, options.max_rows)
    coef = np.ascontiguousarray(_coefficients(c, data, (N, K + c.pick([0, 0, 7])), options, c.pick([0.5, 0.9, 1.0])), np.float32)
    row_kind = c.pick([k for k in options.row_kinds if k != "tokens"])
    row = None
    if row_kind != "int":
        row = torch.from_numpy(np.asarray(data.integers(0, N, () if row_kind == "scalar" else (B,)))).to(c.pick([torch.int32, torch.int64]))
    scale = None
    if c.chance(0.3):
        scale = torch.from_numpy(np.ascontiguousarray(_coefficients(c, data, (B, K), options, 0.9), np.float32))
        scale = scale.t().contiguous().t() if c.chance(0.3) else scale
    out = None if c.chance(0.2) else _written(c, B, 1)
    clip = None if out is not None and c.chance(0.2) else _written(c, B, 3)
    q = c.pick(QUANTILES) if c.chance(0.7) else c.integer(0, 10**6) / 10**6
    low = c.pick([1.0, 1.0, 0.5, 1e-40])
    return QuantileCase(dict(out=out, clip=clip, inputs=[tensor() for _ in range(K)], coef=torch.from_numpy(coef), row=row,
                             row_index=c.integer(0, N - 1), scale=scale, q=q, low=low, high=c.pick([low, 1.5, 3e38, math.inf])),
                        f"{(B, *shape)}, {kind}, rows by {row_kind}")


DEFAULTS = dict(max_numel=5000)


def random_quantile_case(rng, **options):
    """A case from a ``random.Random``; the same seed gives the same case."""
    return _build_quantile(_Random(rng), Options(**{**DEFAULTS, **options}))


@st.composite
def quantile_cases(draw, **options):
    """The hypothesis strategy of cases."""
    return _build_quantile(_Hypothesis(draw), Options(**{**DEFAULTS, **options}))
