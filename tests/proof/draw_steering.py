"""Cases of the ops on vectors, for every backend and target: arguments as their schemas list them, the first of which is written.

    op, args = case("edit_", 3)        the same case for the same number; twelve in a row are every kind of sample

Samples of every layout, sizes that are no multiple of anything and those of whole vectors; NaN, infinities and numbers whose
squares overflow; samples without a term, and terms that are nothing; ``clamped``: indices outside their tables.
"""

import random

import numpy as np
import torch

import cases
from proof.draw import HALF_AND_WHOLE, _placed

OPS = ("project_", "lift_", "edit_")
# Sizes about a chunk of 2048 elements and a row of 256, and those whose threads have all their elements (DENSE).
RAGGED = [(), (1,), (3,), (257,), (2047,), (2049,), (4100,), (3, 700), (5, 7, 3)]
IMAGES = [(3, 5, 7), (16, 9, 9), (5, 24, 24), (8, 3, 2, 5), (33, 8, 8)]
DENSE = [(512,), (2048,), (8, 8, 8), (16, 16, 16), (8, 1024)]
KINDS = ("dense", "aligned", "ragged", "channels-last")
LONG = 2048 * 256 + 2048 * 3 + 8  # more chunks than lanes: the second level takes two rounds


class _Draw:
    """What a case is made of. Everything follows from its number."""

    def __init__(self, op, i):
        self.rng, self.data = random.Random(f"{op} {i}"), np.random.default_rng([OPS.index(op), i])
        self.kind, self.special = KINDS[i % 4], i % 5 == 3
        self.batch = self.rng.randint(1, 4)
        shapes = {"dense": DENSE, "aligned": [(24,), (1032,), (2056,), (3, 40)], "ragged": RAGGED, "channels-last": IMAGES}
        self.shape = self.rng.choice(shapes[self.kind])
        self.terms, self.vectors = self.rng.choice([1, 1, 2, 3, 7]), self.rng.randint(1, 5)

    def tensor(self, dtype, count=None, kind=None):
        """(count, *shape): samples that lie as those of this case do, or as those of another kind."""
        size, kind = (self.batch if count is None else count, *self.shape), kind or self.kind
        values = cases._values(self.data, size, 0.02 if self.special else 0)
        if self.special and self.rng.random() < 0.5:
            values = values * 1e20
        values, dims = values.to(dtype), list(range(len(self.shape)))
        n = int(np.prod(self.shape, dtype=np.int64))
        if kind in ("dense", "aligned"):
            return _placed(values, dims, 16 * self.rng.randint(0, 1) + -n % 16, 16)  # each begins at a multiple of 16 bytes
        return _placed(values, dims[1:] + dims[:1] if kind == "channels-last" else dims, self.rng.randint(0, 3), self.rng.randint(0, 3))

    def weight(self, none=0.3, terms=None):
        """(B, M) float32 in wider memory; some 0, all of a sample now and then."""
        shape = self.batch, self.terms if terms is None else terms
        values = self.data.standard_normal(shape).astype(np.float32) * (self.data.random(shape) >= none)
        values[self.data.random(self.batch) < 0.2] = 0
        if self.special and values.size:
            values.flat[self.rng.randrange(values.size)] = self.rng.choice([np.nan, np.inf, -0.0, 1e-45])
        wide = torch.full((shape[0], shape[1] + 2), 7.0)
        wide[:, 1:-1] = torch.from_numpy(values)
        return wide[:, 1:-1]

    def index(self, clamped=False, terms=None):
        """(B, M) of either integer type, or None where vectors stand for themselves."""
        terms = self.terms if terms is None else terms
        if self.rng.random() < 0.3 and not clamped:
            self.vectors = max(self.vectors, terms)
            return None
        beyond = 3 if clamped else 0
        values = self.data.integers(-beyond, self.vectors + beyond, (self.batch, terms))
        return torch.from_numpy(values).to(self.rng.choice([torch.int32, torch.int64]))


def _edit(d, i, clamped):
    """In place in every third. By turns one dtype, two, all float32."""
    if i % 23 == 22:
        d.shape, d.batch, d.kind, d.terms = (LONG,), 1, "aligned", 1
    if i % 11 == 9:
        d.shape = (2048 * d.rng.randint(30, 36) + 8 * d.rng.randint(0, 1),)  # about as many chunks as a warp has threads
    dtype = HALF_AND_WHOLE[i % 3]
    other = d.rng.choice(HALF_AND_WHOLE) if i % 6 == 1 else dtype
    h, index = d.tensor(dtype), d.index(clamped)
    if i % 7 == 5 and not clamped:
        d.terms, index = 0, None
    elsewhere = "ragged" if i % 8 == 6 else None  # a layout that h does not have
    out = h if i % 3 == 2 and other == dtype else d.tensor(other, kind=elsewhere)
    if d.special and i % 2:
        h.zero_()  # a norm of 0: no term, whatever the weights
    return out, h, d.tensor(torch.float32, d.vectors, kind="ragged" if i % 16 == 7 else None), index, d.weight()


def _lift(d, i, clamped):
    if i % 11 == 10:
        d.terms, d.vectors = 65, 67  # as many as noise alignment takes
    index = d.index(clamped)
    return d.tensor(torch.float32), d.tensor(torch.float32, d.vectors, kind="ragged" if i % 8 == 5 else None), index, d.weight(0.2)


def _project(d, i, clamped):
    """The projections have strides of any kind; rows by sample, for all, or as a number."""
    if i % 23 == 22:
        d.shape, d.batch, d.kind, d.terms = (LONG,), 1, "aligned", 1
    if i % 11 == 10:
        d.terms, d.vectors = 65, 67
    index, rows = d.index(clamped), d.rng.randint(1, 3)
    x, basis = d.tensor(HALF_AND_WHOLE[i % 3]), d.tensor(torch.float32, d.vectors, kind="ragged" if i % 8 == 5 else None)
    gain, offset = (torch.from_numpy(d.data.standard_normal((rows, d.vectors)).astype(np.float32)) for _ in range(2))
    gain[torch.from_numpy(d.data.random(gain.shape) < 0.25)] = 0
    weight = d.weight() if i % 3 else None
    row, beyond = None, 2 if clamped else 0
    if i % 4:
        row = torch.from_numpy(np.asarray(d.data.integers(-beyond, rows + beyond, () if i % 4 == 1 else (d.batch,))))
        row = row.to(d.rng.choice([torch.int32, torch.int64]))
    whole = torch.full((d.batch + 1, d.terms + 2), 7.0)
    out = whole[1:, 1:-1] if i % 2 else whole.t().contiguous().t()[1:, 1:-1]
    return out, x, basis, index, gain, offset, weight, row, d.rng.randrange(rows)


_MADE = {"edit_": _edit, "lift_": _lift, "project_": _project}


def case(op, i, clamped=False):
    """The arguments of case i. clamped: with indices and rows outside of their tables."""
    return _MADE[op](_Draw(op, i), i, clamped)


def within(op, args):
    """The same arguments with every index and row inside of its table."""
    names = {"edit_": (3, 2), "lift_": (2, 1), "project_": (3, 2)}
    at, vectors = names[op]
    args = list(args)
    if args[at] is not None:
        args[at] = args[at].clamp(0, len(args[vectors]) - 1)
    if op == "project_" and args[7] is not None:
        args[7] = args[7].clamp(0, len(args[4]) - 1)
    return args


def dtype_of(op, args):
    """The dtype of a case's samples, or "mixed"."""
    written = {"edit_": (0, 1), "lift_": (0,), "project_": (1,)}[op]
    names = {cases.NAMES[args[k].dtype] for k in written}
    return names.pop() if len(names) == 1 else "mixed"
