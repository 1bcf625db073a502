"""Small cases that tell the instructions of the CUDA step kernels apart: few threads, and in each case few things that differ
from a row of plain numbers. ``cases_of(features)`` has all of those that are made for a kernel."""

import itertools
import random

import numpy as np
import torch

import cases
from fastdiff import reference
from proof.draw import HALF_AND_WHOLE, _placed, keys, telling_keys

VECTORS = [(n,) for n in (1, 2, 3, 4, 5, 6, 7, 8, 9, 11)]
PIXELS = [(5, 3, 1), (3, 7, 1), (2, 3, 1), (4, 5, 1), (3, 1, 1), (2, 2, 2)]
PARTS = [(2, 3), (3, 2), (2, 5), (3, 1), (2, 6), (2, 7), (3, 3, 1), (2, 5, 1), (4, 3, 1), (2, 7, 1), (3, 5, 1)]  # by token
PERIODS = [(2, 4), (3, 3), (2, 6), (3, 4, 2), (2, 1, 3), (3, 2), (2, 2, 5), (4, 3)]
SPECIAL = np.array([0, 0, 0, 0, 0, 1, 1, 2, -1, 1e-45], np.float32)  # coefficients
COUNT = {"plain": 240, "bank": 160, "everything": 240, "dense": 160, "dense float32": 160}
ELEMENTS = {"dense": 16, "dense float32": 8}  # of a thread


def cases_of(features):
    """(case, tensors that must not be read) of every case for a kernel: "plain", "bank", "everything", "dense" (one output,
    something of 16 bits) or "dense float32"."""
    for i in range(COUNT[features]):
        yield aimed_case(i, features)
    yield normals_case(features), []
    if features == "everything":
        yield from ((case, []) for case in (*alone_cases(features), *token_nan_cases(features)))
    yield from ((case, []) for case in access_cases(features))
    yield from ((case, []) for case in nan_cases(features))
    for case in (*stray_cases(features), *mask_cases(features)):
        yield case, [v for v in (*case.inputs, case.mask) if v is not None and v.isnan().all()]


class _Aimed:
    """One case while it is drawn."""

    def __init__(self, i, features):
        self.i, self.features = i, features
        self.dense, everything = features.startswith("dense"), features == "everything"
        self.rng, self.data = random.Random(i), np.random.default_rng(i)
        self.kind = (0, 1, 2, 3, 4, 5, 1, 2, 0, 3)[i % 10]
        chance = self.rng.random
        self.tokens = everything and chance() < 0.45
        self.masked = everything and (not self.tokens or chance() < 0.5)
        vectors = [(n * ELEMENTS[features],) for n in (1, 1, 2, 4)] if self.dense else VECTORS
        others = [vectors, vectors if self.dense else PIXELS] + [PERIODS] * self.masked
        self.shape = self.rng.choice(PARTS if self.tokens else self.rng.choice(others))
        self.B, self.N = self.rng.choice([1, 1, 1, 2, 2]), 3
        self.K, self.R = self.rng.choice([(1, 0), (2, 0), (1, 1), (2, 1), (1, 2), (3, 0), (0, 1), (0, 2), (4, 0), (3, 2)])
        self.O = 1 if self.dense else 1 + (i // 4) % 3
        self.M = self.rng.choice({"everything": [0, 0, 1, 2], "bank": [1, 1, 2, 3]}.get(features, [0]))
        self.J = self.rng.choice([0, 0, 1, 1, 2])
        self.last = len(self.shape) == 3 and chance() < 0.7
        self.aligned = chance() < 0.4
        self.dtypes = self.rng.choice([HALF_AND_WHOLE, HALF_AND_WHOLE, *([d] for d in HALF_AND_WHOLE)]) if everything else \
            HALF_AND_WHOLE if features == "dense" else [torch.float32]
        self.layout = reference.Layout(self.K + self.R, self.O, self.M, self.J)
        self.hidden, self.drawn = [], 0

    def values(self, *size):
        return torch.from_numpy(self.data.standard_normal(size).astype(np.float32))

    def placed(self, values, last=True):
        """A tensor with memory that is not there around every sample."""
        if self.dense:
            return _placed(values.to(self.dtype()), list(range(values.dim() - 1)), 16, 16)
        n = values[0].numel()
        order = list(range(values.dim() - 1))
        if self.last and last and self.rng.random() < 0.8:
            order = order[1:] + order[:1]
        gap = -n % 8 + 8 if self.aligned and self.rng.random() < 0.9 else self.rng.randint(1, 4)
        return _placed(values.to(self.rng.choice(self.dtypes)), order, gap, 8 if gap > 4 else self.rng.randint(1, 4))

    def dtype(self):
        """Of the next tensor of a dense case; the first is of 16 bits where one must be."""
        self.drawn += 1
        return self.dtypes[self.i // 2 % 2] if self.drawn == 1 and len(self.dtypes) > 1 else self.rng.choice(self.dtypes)

    def tensor(self, lead=None):
        return self.placed(self.values(lead or self.B, *self.shape))

    def coefficients(self, *size):
        values = self.values(*size).numpy()
        return np.where(self.data.random(size) < 0.3, self.data.choice(SPECIAL, size), values)


def aimed_case(i, features):
    """(case, tensors that must not be read)"""
    c = _Aimed(i, features)
    many = i % 60 == 58  # more samples than a block takes
    if many:
        c.B = 130
    rng, data, layout, B, N = c.rng, c.data, c.layout, c.B, c.N
    inputs, outputs = [c.tensor() for _ in range(c.K)], [c.tensor() for _ in range(c.O)]
    ring = None
    if c.R:
        flat = c.tensor(c.R * B)
        ring = flat.as_strided((c.R, B, *c.shape), (B * flat.stride(0), *flat.stride()), flat.storage_offset())
    coef = c.coefficients(N, layout.width)
    coef[:, layout.clip : layout.clip + 2] = np.sort(coef[:, layout.clip : layout.clip + 2])
    meta = np.zeros((N, 4), np.int32)
    meta[:, 0], meta[:, 1] = data.integers(-1, c.R, N), data.random(N) < 0.4
    if c.kind == 1 and c.K:
        _one_nan(c, inputs, coef, meta)
    if c.kind == 2:  # infinite products; where there is no element, 0 times infinity
        places = [p + k for p in (0, *(layout.y(j) for j in range(c.O))) for k in range(c.K)]
        coef[:, places] = np.inf
        coef[:, [layout.y(j) + c.K + c.R for j in range(c.O)]] = meta[:, 1] = 0
        for v in inputs:
            v.abs_().add_(1)
    if c.kind == 5:  # no term but noise; d = -0.0, which a bound of 0 does not move
        coef[:, : layout.clip] = 0
        coef[:, layout.clip : layout.clip + 3], meta[:, 1] = ((0, 1, 1), (-1, 0, 1))[i // 10 % 2], 1
        for j in range(c.O):
            coef[:, layout.y(j) : layout.y(j) + c.K + c.R] = 0
    mask, known = _mask(c, coef, meta)
    factors = np.where(data.random((B, c.K + c.R)) < 0.1, 0, data.standard_normal((B, c.K + c.R)))
    scale = torch.from_numpy(factors.astype(np.float32))
    unread = list(range(c.K)) if c.kind == 5 else [rng.randrange(c.K)] if c.kind == 3 and c.K else []
    for k in unread:
        coef[:, [k, *(layout.y(j) + k for j in range(c.O))]] = 0
        inputs[k].fill_(float("nan"))
        scale[:, k] = float("nan")
        c.hidden.append(inputs[k])
    bank, index, weight = _bank(c, coef)
    row = None
    if c.tokens or rng.random() < 0.75 and not many:
        low, high = (-2, N + 2) if c.kind == 4 else (0, N)
        row = torch.from_numpy(data.integers(low, high, (B, 2 * c.shape[0]) if c.tokens else B))
        row = row.to(rng.choice([torch.int32, torch.int64]))
        row = row[:, ::2] if c.tokens and rng.random() < 0.5 else row[:, : c.shape[0]] if c.tokens else row
    some = keys(i, N * c.J * B).reshape(N, c.J, B, 2) if c.J else None
    if c.J and rng.random() < 0.3:
        some = some[:1]
    clip = torch.from_numpy(np.sort(data.standard_normal((B, 5)).astype(np.float32)))[:, :3] if rng.random() < 0.3 else None
    status = None if rng.random() < 0.1 else torch.tensor([2**31 - 1, 0], dtype=torch.int32)
    case = cases.Case(inputs, outputs, ring, torch.from_numpy(coef.astype(np.float32)), torch.from_numpy(meta), row,
                      rng.randrange(N), some, scale if rng.random() < 0.6 and c.K + c.R else None, bank, index, weight,
                      None if clip is None else clip.contiguous(), known, mask, status, note=f"aimed {i}")
    return case, c.hidden


def _one_nan(c, inputs, coef, meta):
    """One NaN, in one sample or in each, that comes to d and the ring or to one output alone: its input has no other weight."""
    layout, rng = c.layout, c.rng
    k = rng.randrange(c.K)
    which = slice(None) if c.i % 3 == 0 else rng.randrange(c.B)
    inputs[k][(which, *(rng.randrange(n) for n in c.shape))] = float("nan")
    places = [0, *(layout.y(j) for j in range(c.O))]
    coef[:, [p + k for p in places]] = 0
    coef[:, rng.choice(places) + k] = 1
    coef[:, [layout.y(j) + c.K + c.R for j in range(c.O)]] = 0
    meta[:, 0] = 0 if c.R else -1


def _mask(c, coef, meta):
    """(mask, known) with rows that use them: flags, the input that is masked, the noise term."""
    if not c.masked:
        return None, None
    rng, data, layout = c.rng, c.data, c.layout
    lead = rng.randint(0, len(c.shape))
    size = (rng.choice([1, c.B]), *[1] * lead, *c.shape[lead:])
    values = c.values(*size) if rng.random() < 0.7 else torch.from_numpy((data.random(size) < 0.5).astype(np.float32))
    mask, known = c.placed(values, lead == 0), c.tensor()
    first = 0 if c.K + c.R else 1
    what = rng.choice(["known", "noise", "both", "both", "neither"] if c.J else ["known", "known", "neither"])
    several = rng.random() < 0.3
    mixes = coef[:, layout.mask :].reshape(c.N, -1, 2)
    # Those of other targets: all 0, or all not.
    mixes[...] = np.where(data.random(mixes.shape) < 0.5, data.choice([1, 2]), mixes) * (c.i % 2)
    if not c.J:
        mixes[..., 1] = 0
    for r in range(c.N):
        for target in data.integers(first, 2 + c.O, rng.randint(0, 4)) if several else [first + c.i % (2 + c.O - first)]:
            meta[r, 1] |= cases.MASK_INPUT << target
            mixes[r, target] = data.choice([1, 1, 2, -0.5, 0.7], 2) * (what in ("known", "both"), what in ("noise", "both"))
    meta[:, 2] = data.integers(0, max(1, c.K + c.R), c.N)
    meta[:, 3] = data.integers(0, c.J, c.N) if c.J else 0
    coef[:, layout.mask :] = mixes.reshape(c.N, -1)
    if what in ("noise", "neither"):
        c.hidden.append(known)
        known.fill_(float("nan"))
        if rng.random() < 0.3:
            mixes[..., 0] = 0
            coef[:, layout.mask :] = mixes.reshape(c.N, -1)
            known = None
    if not (meta[:, 1] & -cases.MASK_INPUT).any():
        c.hidden.append(mask)
    return mask, known


def _bank(c, coef):
    """(bank, bank_index, bank_weight)"""
    if not c.M:
        return None, None, None
    rng, data, layout = c.rng, c.data, c.layout
    V = rng.randint(1, 3)
    bank = c.tensor(V)
    low, high = (-2, V + 2) if c.kind == 4 else (0, V)
    index = torch.from_numpy(data.integers(low, high, (c.B, c.M + 2))).to(rng.choice([torch.int32, torch.int64]))[:, : c.M]
    weight = torch.from_numpy(c.coefficients(c.B, c.M + 1).astype(np.float32))[:, : c.M]
    if c.kind in (3, 5):  # no term
        if rng.random() < 0.5:
            coef[:, [p + m for p in (c.K + c.R, *(layout.y(j) + c.K + c.R + 1 for j in range(c.O))) for m in range(c.M)]] = 0
            weight.fill_(float("nan"))
        else:
            weight.fill_(0)
        bank.fill_(float("nan"))
        c.hidden.append(bank)
    return bank, index, weight


def _plain(features, shape, B=1, inputs=1, ring=0, outputs=None, noises=0, dtype=torch.float32, rows=1):
    """A case of a kernel with inputs, a ring and outputs of zeros, and a table of zeros: (case, its layout)."""
    if outputs is None:
        outputs = 1 if features.startswith("dense") else 3
    layout = reference.Layout(inputs + ring, outputs, int(features == "bank"), noises)
    half = dtype if dtype != torch.float32 or features != "dense" else torch.float16  # some view of it has 16 bits

    def zeros(dtype, lead=B):
        return torch.zeros(lead, *shape, dtype=dtype)

    case = cases.Case([zeros(half) for _ in range(inputs)], [zeros(dtype) for _ in range(outputs)],
                      zeros(dtype, ring * B).reshape(ring, B, *shape) if ring else None, torch.zeros(rows, layout.width),
                      torch.tensor([[-1, 0, 0, 0]] * rows, dtype=torch.int32), None, 0,
                      keys(1, rows * noises * B).reshape(rows, noises, B, 2) if noises else None,
                      status=torch.tensor([2**31 - 1, 0], dtype=torch.int32))
    if features == "bank":
        case.bank, case.bank_weight = zeros(torch.float32, 1), torch.zeros(B, 1)
        case.bank_index = torch.zeros(B, 1, dtype=torch.int32)
    if features == "everything":
        case.mask = torch.zeros(1, *[1] * len(shape))
    return case, layout


def normals_case(features):
    """Normals as they are, among them those that a wrong last place of a constant changes: one output of them, and in the most
    general kernel another one whose mask takes nothing else."""
    E = ELEMENTS.get(features, 4)
    special = telling_keys(range(E // 4))
    case, layout = _plain(features, (E,), len(special), noises=1)
    case.keys = special.reshape(1, 1, -1, 2)
    case.note = "normals"
    case.coef[0, layout.y(0) + 2 + layout.bank] = 1
    if features == "everything":
        case.coef[0, layout.mask + 2 * 3 + 1], case.meta[0, 1] = 1, 2 * cases.MASK_Y0
    return case


def alone_cases(features):
    """Noise that one output takes, where the others have no term at all and stay -0.0; then a mask whose only term is of a noise
    that is not there, which leaves -0.0 too."""
    for j in range(3):
        case, layout = _plain(features, (4,), noises=1)
        case.coef[0, layout.y(j) + 2 + layout.bank] = 1
        case.note = f"noise of output {j}"
        yield case
    case, layout = _plain(features, (4,), inputs=2, noises=1, rows=3)
    case.mask = torch.full((1, 4), -0.5)
    case.meta[:, 1], case.meta[:, 3] = 15 * cases.MASK_D, 1
    case.coef[:, [0, *(layout.y(j) for j in range(3))]] = 1
    case.coef[:, layout.mask + 1 :: 2] = 0.7
    case.note = "a mask of noise that is not there"
    yield case


def token_nan_cases(features):
    """One NaN in a token whose row is higher than those of the tokens behind it in the same thread."""
    for lane, dtype in itertools.product(range(4), HALF_AND_WHOLE):
        case, layout = _plain(features, (4, 1), ring=1, dtype=dtype, rows=4)
        case.coef[:, [0, *(layout.y(j) for j in range(3))]] = 1
        case.meta[:, 0], case.mask, case.row = 0, None, torch.arange(4).flip(0).reshape(1, 4)
        case.inputs[0].view(1, -1)[0, lane] = float("nan")
        case.note = f"a NaN in token {lane} of 4, {dtype}"
        yield case


def access_cases(features):
    """Everything that a row may use, for each way to access it: by dtype and layout, samples that end and tokens that begin at
    each lane of a thread, with memory that is not there behind them; then samples that can be accessed in vectors."""
    everything = features == "everything"
    if features.startswith("dense"):
        return
    flat = [((4 + n,), 1) for n in (1, 2, 3, 4)] + [((2, 4 + n), 2) for n in (1, 2, 3) if everything]
    last = [((3, 3, 1), 1), ((2, 3, 1), 1), ((3, 5, 1), 1), ((4, 3, 1), 1)]
    last += [((2, 4 + n, 1), 2) for n in (1, 2, 3) if everything]
    last += [((3, 2, 1), 1)]  # of four elements behind its last, one lies outside
    vectors = [((12,), 1)] + [(shape, n) for shape, n in (((2, 4), 1), ((4, 1), 4), ((4, 3), 4), ((4, 5), 4)) if everything]
    dtypes = HALF_AND_WHOLE if everything else [torch.float32]
    for i, (dtype, (shape, tokens)) in enumerate(itertools.product(dtypes, flat + last + vectors)):
        data = np.random.default_rng(i)
        order, aligned = list(range(len(shape))), (shape, tokens) in vectors
        B = 2

        def tensor(lead=B, shape=shape):
            values = torch.from_numpy(data.standard_normal((lead, *shape)).astype(np.float32)).to(dtype)
            if aligned:
                return _placed(values, order, -values[0].numel() % 8 + 8, 8)
            return _placed(values, order[1:] + order[:1] if len(shape) == 3 else order, 3)

        noises = 1 if len(shape) == 3 and not everything else i % 2  # without noise, samples are walked as they lie
        case, layout = _plain(features, shape, B, inputs=2, ring=1, noises=noises)
        case.inputs, case.outputs, case.ring = [tensor(), tensor()], [tensor() for _ in range(3)], tensor()[None]
        if everything:
            layout = reference.Layout(3, 3, 1, noises)
            case.meta[:, 1] = cases.MASK_D
            case.mask, case.known = tensor(shape=(1, *shape[1:]) if len(shape) == 2 and tokens == 1 else shape), tensor()
        case.coef = torch.from_numpy(data.standard_normal((1, layout.width)).astype(np.float32))
        case.meta[:, 0] = 0
        if layout.bank:
            case.bank, case.bank_index = tensor(2), torch.ones(B, 1, dtype=torch.int32)
            case.bank_weight = torch.ones(B, 1) / 3
        if not noises:
            case.coef[:, layout.mask + 1 :: 2] = 0
        if tokens > 1:
            case.row = torch.zeros(B, tokens, dtype=torch.int64)
        case.note = f"access {dtype}, {shape}"
        yield case


def nan_cases(features):
    """One NaN at each lane of a thread, that comes to d, to one output or to all; in threads that are cut behind it, and in those
    where each element is a token of its own."""
    E, dense = ELEMENTS.get(features, 4), features.startswith("dense")
    dtypes = HALF_AND_WHOLE if features in ("dense", "everything") else [torch.float32]
    outputs = 1 if dense else 3
    for lane, place in itertools.product(range(E), [*range(1 + outputs), None]):
        for shape in [(E,)] + [(lane + 1,)] * (not dense) + [(E, 1)] * (features == "everything"):
            for dtype in dtypes if place is None else [dtypes[(lane + place + len(shape)) % len(dtypes)]]:
                case, layout = _plain(features, shape, ring=1, dtype=dtype, rows=E)
                places = [0, *(layout.y(j) for j in range(outputs))]
                case.coef[:, places if place is None else places[place]] = 1
                case.meta[:, 0] = 0
                case.inputs[0].view(1, -1)[0, lane] = float("nan")
                if len(shape) == 2:
                    case.mask, case.row = None, torch.arange(E).reshape(1, E)
                case.note = f"a NaN at {lane} of {shape}, {dtype}, place {place}"
                yield case


def _bank_cases(numbers):
    """The last of three samples has a bank index that is not there, or the vectors are infinite: taken by d, or by one output."""
    layout = reference.Layout(3, 3, 1, 0)
    for place, index, status in itertools.product(range(4), (-1, 2, 0), (True, False)):
        case = numbers(B=3)
        case.bank, case.bank_weight = case.inputs[0][:2] * 2, torch.ones(3, 1)
        case.bank_index = torch.tensor([[1], [1], [index]])
        case.coef = torch.ones(1, layout.width)
        case.coef[:, layout.mask :] = 0
        case.coef[:, [p for j, p in enumerate((3, *(layout.y(j) + 4 for j in range(3)))) if j != place]] = 0
        if index == 0:
            case.bank.fill_(float("inf"))
        case.status = case.status if status else None
        yield case
    for outputs in (0, 1, 2):  # no term of the bank, and numbers behind the row's
        case = numbers(B=3, outputs=outputs)
        case.bank, case.bank_weight, case.bank_index = case.inputs[0][:2] * 2, torch.ones(3, 1), torch.tensor([[1], [1], [5]])
        layout = reference.Layout(3, outputs, 1, 0)
        case.coef = torch.ones(1, layout.width)
        case.coef[:, [3, *(layout.y(j) + 4 for j in range(outputs))]] = 0
        case.meta[:, 0] = 0
        yield case


def mask_cases(features):
    """One target is masked: by the known image, by noise, by both, by neither, which leaves -0.0; or by neither where another
    target takes an infinite known image, or noise."""
    if features != "everything":
        return
    for outputs in (1, 2, 3):
        for target, what in itertools.product(range(2 + outputs), ("known", "noise", "both", "neither", *range(2 + outputs))):
            other = what if isinstance(what, int) else None
            if other == target:
                continue
            for k0, k1 in ((1, 0), (0, 1)) if other is not None else [(what in ("known", "both"), what in ("noise", "both"))]:
                case, layout = _plain(features, (4,), inputs=2, ring=1, outputs=outputs, noises=1)
                masked = (target + outputs) % 2
                case.meta[0, 2] = masked
                case.coef[:, [masked + p for p in (0, *(layout.y(j) for j in range(outputs)))]] = 1
                case.meta[0, 0] = 0
                case.mask = torch.full((1, 4), -0.5)
                case.known = torch.full((1, 4), 1.25 if other is None else float("inf"))
                case.meta[0, 1] = cases.MASK_INPUT << target
                at = target if other is None else other
                case.meta[0, 1] |= cases.MASK_INPUT << at
                case.coef[0, layout.mask + 2 * at] = 0.7 * k0
                case.coef[0, layout.mask + 2 * at + 1] = -0.3 * k1
                case.note = f"mask of {target}, {what}, {outputs} outputs"
                yield case


def stray_cases(features):
    """Rows that name what is not there: a ring slot, a target or a noise term of the mask. They are to be passed over."""

    def numbers(shape=(ELEMENTS.get(features, 4),), **others):
        case, layout = _plain(features, shape, inputs=2, ring=1, **others)
        for k, v in enumerate(case.inputs):
            v.add_(1.5 + k)
        case.coef[:, : layout.mask] = 1
        return case

    for slot in (1, 2, -2):
        case = numbers()
        case.meta[:, 0] = slot
        yield case
    for status in (True, False):  # the last of three samples has a row that is not there
        case = numbers(B=3)
        case.row = torch.tensor([0, 0, 7])
        case.status = case.status if status else None
        yield case
    if features in ("bank", "everything"):
        yield from _bank_cases(numbers)
    if not features.startswith("dense"):
        for k in (None, 0, 1):  # no output; an input that nothing takes
            case = numbers(outputs=0)
            case.coef[:], case.meta[:, 0] = 1, 0
            if k is not None:
                case.coef[:, k] = 0
                case.inputs[k].fill_(float("nan"))
            yield case
    case = numbers((256 * ELEMENTS.get(features, 4) + 3 * (not features.startswith("dense")),), noises=1)  # more than a block
    case.coef[:] = 1
    yield case
    if features != "everything":
        return
    for outputs, noises in ((1, 0), (2, 1), (3, 2)):
        for flags, term in ((-2, noises), (-2, -1), (cases.MASK_INPUT + cases.MASK_D, noises), (cases.MASK_Y0 << outputs, 0)):
            case = numbers(outputs=outputs, noises=noises)
            case.known, case.coef[:, -2 * (2 + outputs) :] = case.inputs[0] + 1, 1
            case.meta[:, 1], case.meta[:, 3] = flags, term
            if flags == cases.MASK_Y0 << outputs:
                case.mask.fill_(float("nan"))  # nothing is masked
            yield case
    case = numbers()
    case.meta[:, 1], case.coef[:, -10:] = cases.MASK_D, 1
    yield case
    case = numbers((2, 2))
    case.meta[:, 1], case.mask, case.row = -2, None, torch.zeros(1, 2, dtype=torch.int32)
    yield case
