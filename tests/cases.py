"""Cases of ``fastdiff::step_``: drawn at random or by hypothesis, with what the reference says they must give.

    case = random_case(random.Random(0))      or      @given(case=cases())
    expected = expected_case(case)            a clone of the case after the step, by the exact reference
    torch.ops.fastdiff.step_(*case.args())
    assert_same(case, expected)               every byte of every storage, what lies between the samples included

Options of both generators are the fields of ``Options``: a backend that lacks something switches it off.
"""

import dataclasses
from dataclasses import dataclass, field

import numpy as np
import torch
from hypothesis import strategies as st

from fastdiff import reference

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
NAMES = {v: k for k, v in DTYPES.items()}
BITS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16,
        torch.int32: torch.int32, torch.int64: torch.int64}

CLIP, MASK_INPUT, MASK_D, MASK_Y0 = 1, 2, 4, 8


@dataclass(frozen=True)
class Options:
    max_numel: int = 700  # elements a sample
    max_batch: int = 5
    max_rows: int = 4
    dtypes: tuple = ("float32", "float16", "bfloat16")
    empty: bool = True  # batches and samples of no element
    layouts: tuple = ("contiguous", "channels_last", "strided", "expanded", "offset")
    row_kinds: tuple = ("int", "scalar", "batch", "tokens")
    specials: bool = True  # NaN, infinities, subnormals ...
    aliases: bool = True  # outputs that are inputs
    noise: bool = True
    masks: bool = True
    bank: bool = True
    ring: bool = True


def mover(device):
    """A function that copies tensors, and lists of them, to ``device`` with the same strides, offsets and aliases."""
    storages = {}

    def move(t):
        if not isinstance(t, torch.Tensor):
            return [move(v) for v in t] if isinstance(t, list) else t
        key = t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()
        if key not in storages:
            whole = torch.empty(0, dtype=torch.uint8, device=t.device).set_(t.untyped_storage())
            storages[key] = whole.to(device, copy=True).untyped_storage()
        return torch.empty(0, dtype=t.dtype, device=device).set_(storages[key], t.storage_offset(), t.shape, t.stride())

    return move


@dataclass
class Case:
    """Arguments of ``fastdiff::step_``, by name and in the order of its schema."""

    inputs: list
    outputs: list
    ring: torch.Tensor = None
    coef: torch.Tensor = None
    meta: torch.Tensor = None
    row: torch.Tensor = None
    row_index: int = 0
    keys: torch.Tensor = None
    scale: torch.Tensor = None
    bank: torch.Tensor = None
    bank_index: torch.Tensor = None
    bank_weight: torch.Tensor = None
    clip: torch.Tensor = None
    known: torch.Tensor = None
    mask: torch.Tensor = None
    status: torch.Tensor = None
    note: str = field(default="", compare=False)

    def items(self):
        return [(f.name, getattr(self, f.name)) for f in dataclasses.fields(self) if f.name != "note"]

    def args(self):
        return tuple(value for _, value in self.items())

    def to(self, device):
        """A copy with the same strides, offsets and aliases, on ``device``."""
        move = mover(device)
        return Case(**{name: move(value) for name, value in self.items()}, note=self.note)

    def clone(self):
        return self.to(self.coef.device)

    @property
    def batch(self):
        return self.sample.shape[0]

    @property
    def sample(self):
        """A tensor of the shape (B, *shape)."""
        return self.inputs[0] if self.inputs else self.outputs[0] if self.outputs else self.ring[0]

    def __repr__(self):
        def show(v):
            if isinstance(v, torch.Tensor):
                return f"{NAMES.get(v.dtype, v.dtype)}{tuple(v.shape)} strides {v.stride()} + {v.storage_offset()}"
            return "[" + ", ".join(map(show, v)) + "]" if isinstance(v, list) else repr(v)

        lines = [f"  {name} = {show(value)}" for name, value in self.items() if value is not None]
        for name in ("coef", "meta", "row", "scale", "bank_index", "bank_weight", "clip"):
            value = getattr(self, name)
            if value is not None and value.numel() <= 200:
                lines.append(f"  {name}: {value.tolist()}")
        return "Case(" + self.note + "\n" + "\n".join(lines) + ")"


def _stored(t):
    """The values of a float tensor as the reference stores them: (numpy array, dtype name)."""
    t = t.detach().cpu()
    if t.dtype == torch.bfloat16:
        return t.contiguous().view(torch.int16).numpy().view(np.uint16), "bfloat16"
    return t.contiguous().numpy(), NAMES[t.dtype]


def _wide(t, rows):
    """(rows, n) float32, exactly."""
    values, dtype = _stored(t)
    return reference.widen(values, dtype).reshape(rows, -1) if t.numel() else np.zeros((rows, 0), np.float32)


def _array(t):
    return None if t is None else t.detach().cpu().numpy()


def reference_outputs(case):
    """``reference.StepResult`` of a case, whose arrays are (B, n) in logical order."""
    B = case.batch
    ring = None if case.ring is None else _wide(case.ring, len(case.ring) * B).reshape(len(case.ring), B, -1)
    return reference.step(
        [_wide(v, B) for v in case.inputs], _array(case.coef), _array(case.meta),
        case.row_index if case.row is None else _array(case.row),
        outputs=[NAMES[y.dtype] for y in case.outputs], ring=ring,
        ring_dtype="float32" if ring is None else NAMES[case.ring.dtype], keys=_array(case.keys), scale=_array(case.scale),
        bank=None if case.bank is None else _wide(case.bank, len(case.bank)), bank_index=_array(case.bank_index),
        bank_weight=_array(case.bank_weight), clip=_array(case.clip),
        known=None if case.known is None else _wide(case.known, B),
        mask=None if case.mask is None else _wide(case.mask, len(case.mask)), status=_array(case.status))


def _write(target, stored):
    """Put stored values (B, n) into a tensor of any strides, bit by bit."""
    bits = torch.from_numpy(np.ascontiguousarray(stored).view(np.int32 if stored.itemsize == 4 else np.int16))
    target.view(BITS[target.dtype]).copy_(bits.reshape(target.shape))


def expected_case(case):
    """What the case must look like after the step, by the exact reference (computed on the CPU)."""
    after = case.clone()
    if case.sample.numel() == 0:
        return after
    result = reference_outputs(case)
    for y, stored in zip(after.outputs, result.outputs):
        _write(y, stored)
    if case.ring is not None:
        rows = np.asarray(case.row_index if case.row is None else _array(case.row))
        rows = np.clip(rows, 0, len(case.coef) - 1)
        n = result.ring.shape[-1]
        rows = np.broadcast_to(rows.reshape(-1, 1) if rows.ndim == 1 else rows, (case.batch, rows.shape[1] if rows.ndim == 2 else 1))
        slots = np.repeat(_array(case.meta)[rows, 0], n // rows.shape[1], axis=1)  # (B, n)
        for slot in range(len(case.ring)):  # chosen by bits: a NaN that is not overwritten keeps its payload
            old = _stored(case.ring[slot])[0].reshape(case.batch, n)
            bits = np.int32 if old.dtype == np.float32 else np.int16
            _write(after.ring[slot], np.where(slots == slot, result.ring[slot].view(bits), old.view(bits)))
    if case.status is not None:
        after.status.copy_(torch.from_numpy(result.status))
    return after


def assert_same(case, expected):
    """Every byte of every storage agrees."""
    for (name, a), (_, b) in zip(case.items(), expected.items()):
        pairs = zip(a, b) if isinstance(a, list) else [(a, b)] if isinstance(a, torch.Tensor) else []
        for i, (x, y) in enumerate(pairs):
            x, y = x.detach().cpu(), y.detach().cpu()
            left = torch.empty(0, dtype=torch.uint8).set_(x.untyped_storage()).numpy()
            right = torch.empty(0, dtype=torch.uint8).set_(y.untyped_storage()).numpy()
            if np.array_equal(left, right):
                continue
            xb, yb = x.contiguous().view(BITS[x.dtype]), y.contiguous().view(BITS[y.dtype])
            where = torch.nonzero(xb != yb)
            label = f"{name}[{i}]" if isinstance(a, list) else name
            if len(where) == 0:
                raise AssertionError(f"{label}: bytes outside the tensor were changed\n{expected!r}")
            at = tuple(where[0].tolist())
            raise AssertionError(f"{label}{list(at)}: {x[at].item()!r} ({xb[at].item() & 0xFFFFFFFF:#x}), expected {y[at].item()!r} "
                                 f"({yb[at].item() & 0xFFFFFFFF:#x}); {len(where)} of {x.numel()} elements differ\n{expected!r}")


class _Random:
    """Choices from a ``random.Random``."""

    def __init__(self, rng):
        self.rng = rng

    def integer(self, low, high):
        return self.rng.randint(low, high)

    def pick(self, options):
        return self.rng.choice(list(options))

    def chance(self, p=0.5):
        return self.rng.random() < p


class _Hypothesis:
    """The same choices from hypothesis, which shrinks them: towards few, plain and small."""

    def __init__(self, draw):
        self.draw = draw

    def integer(self, low, high):
        return self.draw(st.integers(low, high))

    def pick(self, options):
        return self.draw(st.sampled_from(list(options)))

    def chance(self, p=0.5):
        return self.draw(st.integers(0, 99)) >= 100 - round(100 * p)


_SPECIAL = np.array([np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-45, -1e-45, 1e-40, 1.1754942e-38, 1.1754944e-38, 3.4028235e38,
                     -3.4028235e38, 65504.0, 65520.0, 65519.996, 6e-8, 2.9802322e-8, 2.98023e-8, 6.1e-5, 3.39e38], np.float32)
_PAYLOADS = np.array([0x7F800001, 0xFFC12345, 0xFFFFFFFF, 0x7FC00001], np.uint32).view(np.float32)


def _values(data, shape, special):
    values = data.standard_normal(shape).astype(np.float32)
    if special:
        pool = np.concatenate([_SPECIAL, _PAYLOADS])
        with np.errstate(all="ignore"):
            values = np.where(data.random(shape) < special, pool[data.integers(len(pool), size=shape)],
                              values * np.float32(2.0) ** data.integers(-4, 5, shape).astype(np.float32))
    return torch.from_numpy(np.asarray(values, np.float32).reshape(shape))


def _shape(c, options):
    kind = c.pick(["vector", "vector", "image", "image", "image", "video", "matrix", "scalar"])
    limit = options.max_numel
    if kind == "scalar":
        return ()
    if kind == "vector":
        return (max(1, min(limit, c.pick([1, 2, 3, 4, 5, 15, 16, 17, 31, 63, 64, 65, 127, 128, 130, limit]) + c.integer(0, 3))),)
    side = max(1, int(limit ** (1 / {"matrix": 2, "image": 3, "video": 4}[kind])))
    if kind == "matrix":
        return c.integer(1, 9), max(1, min(limit // 9, c.integer(1, 80)))
    if kind == "image":
        channels = c.integer(1, 5)
        edge = max(1, int((limit / channels) ** 0.5))
        return channels, c.integer(1, edge), c.integer(1, edge)
    return c.integer(1, 3), c.integer(1, side), c.integer(1, side), c.integer(1, side)


def _lay_out(c, values, dtype, options, expandable=False):
    """A tensor of these values with a layout of its own; what lies between its elements is filled with 7."""
    values = values.to(DTYPES[dtype])
    shape, n = tuple(values.shape), values[0].numel() if len(values) else 0
    kinds = [k for k in options.layouts if (k != "expanded" or expandable) and (k != "channels_last" or len(shape) in (4, 5))]
    kind = c.pick(kinds)
    if kind == "expanded" and len(values):
        values[:] = values[:1].clone()
    dense = [1] * len(shape)
    order = list(range(1, len(shape)))
    if len(shape) in (4, 5) and (kind == "channels_last" or c.chance(0.2) and "channels_last" in options.layouts):
        order = order[1:] + order[:1]
    step = 1
    for d in reversed(order):
        dense[d], step = step, step * shape[d]
    gap = c.integer(1, 9) if kind == "strided" else 0
    offset = c.integer(1, 9) if kind in ("offset", "strided") else 0
    dense[0] = 0 if kind == "expanded" else n + gap
    storage = torch.full((offset + (len(values) * (n + gap) if dense[0] else n) + gap + 3,), 7.0, dtype=values.dtype)
    out = storage.as_strided(shape, dense, offset)
    if out.numel():
        (out[:1] if dense[0] == 0 else out).view(BITS[out.dtype]).copy_((values[:1] if dense[0] == 0 else values).view(BITS[out.dtype]))
    return out


def _coefficients(c, data, shape, options, density):
    values = data.standard_normal(shape).astype(np.float32)
    values[data.random(shape) < 0.15] = 1
    if options.specials and c.chance(0.15):
        pool = np.array([-0.0, 1e-38, 1e-45, 1e20, 3e38, np.inf, np.nan, -1.0], np.float32)
        values = np.where(data.random(shape) < 0.1, pool[data.integers(len(pool), size=shape)], values)
    return np.where(data.random(shape) < density, values, np.float32(0))


def _build(c, options):
    data = np.random.default_rng(c.integer(0, 2**32 - 1))
    B = 0 if options.empty and c.chance(0.02) else c.integer(1, options.max_batch)
    shape = _shape(c, options)
    if options.empty and shape and c.chance(0.02):
        shape = (0, *shape[1:])
    special = c.pick([0, 0, 0.02, 0.2]) if options.specials else 0
    whole = (B, *shape)

    def tensor(size=whole, **flags):
        return _lay_out(c, _values(data, size, special), c.pick(options.dtypes), options, **flags)

    R = c.integer(1, 3) if options.ring and c.chance(0.4) else 0
    K = c.integer(0 if R else 1, c.pick([3, 12 - R]))
    O = c.integer(0 if R else 1, 3)
    N = c.integer(1, options.max_rows)
    J = c.integer(1, c.pick([2, 16])) if options.noise and c.chance(0.6) else 0
    M = c.integer(1, c.pick([2, 16])) if options.bank and c.chance(0.3) else 0

    inputs = [tensor(expandable=True) for _ in range(K)]
    if K > 1 and c.chance(0.1):
        inputs[-1] = inputs[0]
    ring = None
    if R:
        dtype = c.pick(options.dtypes)
        flat = _lay_out(c, _values(data, (R * B, *shape), special), dtype, dataclasses.replace(options, layouts=tuple(
            k for k in options.layouts if k != "expanded")))
        ring = flat.as_strided((R, *whole), (B * flat.stride(0), *flat.stride()), flat.storage_offset())

    # Outputs: fresh memory, or exactly one of the inputs that is not expanded.
    free = [v for i, v in enumerate(inputs) if (v.stride(0) or B < 2) and all(v is not u for u in inputs[:i])]
    outputs = []
    for _ in range(O):
        if free and options.aliases and c.chance(0.4):
            outputs.append(free.pop(c.integer(0, len(free) - 1)))
        else:
            outputs.append(tensor())

    layout = reference.Layout(K + R, O, M, J)
    coef = _coefficients(c, data, (N, layout.width), options, c.pick([0.3, 0.6, 0.9]))
    meta = np.zeros((N, 4), np.int32)
    meta[:, 0] = [c.integer(-1, R - 1) for _ in range(N)]
    clips = c.chance(0.3)
    masks = options.masks and c.chance(0.35)
    for r in range(N):
        if clips and c.chance(0.7):
            meta[r, 1] |= CLIP
            bounds = np.sort(coef[r, layout.clip : layout.clip + 2])
            coef[r, layout.clip : layout.clip + 2] = bounds if c.chance(0.8) else (-np.inf, np.inf)
        if masks and c.chance(0.8):
            target = c.integer(0 if K + R else 1, 1 + O)
            meta[r, 1] |= MASK_INPUT << target
            meta[r, 2] = c.integer(0, K + R - 1) if target == 0 else 0
            if J:
                meta[r, 3] = c.integer(0, J - 1)
            else:
                coef[r, layout.mask + 1 :: 2] = 0

    keys = None
    if J:
        keys = torch.from_numpy(data.integers(-(2**63), 2**63 - 1, (c.pick([1, N]), J, B, 2), dtype=np.int64))
        if c.chance(0.3):  # a counter that carries, and one that wraps
            keys[..., 1] = c.pick([0, 2**32 - 3, -2, -1, 2**63 - 2])
        if c.chance(0.2):
            keys = torch.cat([keys, keys], dim=1)[:, :J]
    mask = known = None
    if masks:
        known = tensor(expandable=True)
        lead = c.integer(0, len(shape))
        size = (c.pick([1, B]), *([1] * lead), *shape[lead:])
        values = torch.from_numpy((data.random(size) < 0.5).astype(np.float32)) if c.chance(0.5) else _values(data, size, special)
        mask = _lay_out(c, values, c.pick(options.dtypes), options, expandable=True)
    V = c.integer(1, 4)
    index_type = c.pick([torch.int32, torch.int64])
    kind = c.pick([k for k in options.row_kinds if k != "tokens" or shape and shape[0]])
    size = {"int": None, "scalar": (), "batch": (B,), "tokens": (B, *shape[:1])}[kind]
    row = None if size is None else torch.from_numpy(np.asarray(data.integers(0, N, size))).to(c.pick([torch.int32, torch.int64]))
    scale = None
    if c.chance(0.3) and K + R:
        scale = torch.from_numpy(_coefficients(c, data, (B, K + R), options, 0.9))
        if c.chance(0.3):
            scale = scale.t().contiguous().t()
    return Case(
        inputs, outputs, ring, torch.from_numpy(np.ascontiguousarray(coef, np.float32)), torch.from_numpy(meta), row,
        c.integer(0, N - 1), keys, scale,
        tensor((V, *shape)) if M else None,
        torch.from_numpy(data.integers(0, V, (B, M))).to(index_type) if M else None,
        torch.from_numpy(_coefficients(c, data, (B, M), options, 0.8)) if M else None,
        torch.from_numpy(np.sort(_values(data, (B, 3), 0).numpy(), axis=1)) if clips and c.chance(0.5) else None,
        known, mask,
        torch.tensor([2**31 - 1, 0], dtype=torch.int32) if c.chance(0.7) else None,
        note=f"{whole}, rows by {kind}")


def random_case(rng, **options):
    """A case from a ``random.Random``; the same seed gives the same case."""
    return _build(_Random(rng), Options(**options))


@st.composite
def cases(draw, **options):
    """The hypothesis strategy of cases."""
    return _build(_Hypothesis(draw), Options(**options))
