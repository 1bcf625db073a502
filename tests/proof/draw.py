"""What the proof is run on: cases of every op, the same ones for every backend and target."""

import itertools
import random
from unittest import mock

import numpy as np
import torch

import cases
from fastdiff import reference

# Samples whose rows can be read 16 bytes at a time, and tokens that begin inside such a row.
WHOLE = [(8,), (3, 4, 4), (4, 8, 8), (2, 2, 4, 4), (8, 5), (2, 260), (1032,), (5, 7), (3, 15), (4, 1, 7)]
DENSE = [(16,), (4, 8, 8), (2, 2, 4, 4), (128,), (3, 16, 16), (5, 512), (4, 32, 32)]  # threads have all their elements, side by side
DTYPES = [("float32",), ("float16",), ("bfloat16",), ("float32", "float16", "bfloat16")]
HALF_AND_WHOLE = [torch.float16, torch.bfloat16, torch.float32]
EDGES = [0, 1, -1, 2**63 - 1, -(2**63), 2**32 - 1, 2**32, 2**31, -(2**32), -2, -3, 0x123456789ABCDEF]


def step_case(i):
    """Case i of ``step_``: by turns plain (with one to three outputs), with a bank, with a mask or tokens; of each dtype and of all;
    of any layout and aligned. 72 in a row are all combinations."""
    features, outputs, dtypes, aligned = i % 3, 1 + i // 3 % 3, DTYPES[i // 3 % 4], i // 36 % 2
    options = dict(dtypes=dtypes, bank=features > 0, masks=features > 1, empty=False,
                   row_kinds=("int", "scalar", "batch", "tokens")[: 3 + (features > 1)])
    shape = cases._shape
    if aligned:
        options |= dict(layouts=("contiguous",), max_batch=3)
        shape = lambda c, options: c.pick(WHOLE if features else DENSE)  # noqa: E731
    rng = random.Random(i)
    with mock.patch.object(cases, "_shape", shape):
        while True:
            case = cases.random_case(rng, **options)
            tokens = case.row is not None and case.row.dim() == 2 and case.row.shape[1] > 1
            if (len(case.outputs) == outputs, case.bank is not None, case.mask is not None or tokens)[features]:
                return case


def _placed(values, order, gap, offset=1):
    """A tensor of these values with bytes that belong to no element around every sample. order: of the dimensions in memory."""
    B, shape = len(values), values.shape[1:]
    strides, step = [0] * len(shape), 1
    for d in reversed(order):
        strides[d], step = step, step * shape[d]
    out = torch.full((offset + B * (step + gap),), 7.0, dtype=values.dtype).as_strided(values.shape, (step + gap, *strides), offset)
    return out.copy_(values)


def dense_case(i):
    """``plain_case`` with one output, for threads that have all their elements, some of 16 bits."""
    return plain_case(i, dense=True)


def plain_case(i, dense=False):
    """(case, inputs that must not be read). A float32 case without bank, mask or tokens, made to tell lanes apart: few elements,
    gaps around every sample, channels-last samples of few pixels; by turns a NaN in one element, products that are NaN beyond the
    last one, inputs that must not be read."""
    if i % 50 == 49:
        return _noise_case(i, dense)
    rng, data = random.Random(i), np.random.default_rng(i)
    kind, last = (0, 1, 1, 2, 1, 3, 1, 2)[i % 8], 0 if dense else i // 32 % 2
    vectors = [(n,) for n in ((16, 16, 32, 64) if dense else (1, 2, 3, 5, 6, 7, 9, 10, 11))]
    shape = rng.choice([(5, 3, 1), (4, 5, 1), (3, 7, 1), (2, 3, 1), (5, 2, 1), (3, 1, 1)] if last else vectors)
    B, N, O, J, n = rng.randint(1, 3), 3, 1 if dense else (1, 2, 3, 3)[i // 8 % 4], 1 + (dense and i % 3 == 0), int(np.prod(shape))
    dtypes = itertools.chain([torch.float16, torch.bfloat16][i // 8 % 2 :][:1], (rng.choice(HALF_AND_WHOLE) for _ in range(9)))
    order = list(range(len(shape)))
    aligned = rng.random() < 0.3

    def tensor(lead=B):
        values = torch.from_numpy(data.standard_normal((lead, *shape)).astype(np.float32))
        if dense:
            return _placed(values.to(next(dtypes)), order, 16, 16)
        there = order[1:] + order[:1] if last and rng.random() < 0.7 else order
        return _placed(values, there, -n % 4 + 4 if aligned else rng.randint(1, 4), 4 if aligned else 1)

    K = rng.randint(2, 3)
    inputs, outputs = [tensor() for _ in range(K)], [tensor() for _ in range(O)]
    layout = reference.Layout(K + 1, O, 0, J)
    coef = data.standard_normal((N, layout.width)).astype(np.float32)
    coef[:, layout.clip : layout.clip + 2] = np.sort(coef[:, layout.clip : layout.clip + 2])
    meta = np.zeros((N, 4), np.int32)
    meta[:, 0], meta[:, 1] = data.integers(-1, 1, N), data.integers(0, 2, N)
    unread = [1] if kind in (1, 3) else []
    if kind == 1:  # one NaN, in one sample, that comes to d and the ring or to one output alone
        which = slice(None) if i % 5 == 0 else rng.randrange(B)  # or in each
        inputs[0][(which, *(rng.randrange(k) for k in shape))] = float("nan")
        places = [0, *(layout.y(j) for j in range(O))]
        coef[:, places] = 0
        coef[:, rng.choice(places)] = 1
        coef[:, [layout.y(j) + K + 1 for j in range(O)]] = 0
        meta[:, 0] = 0
    if kind == 2:  # infinite products; where there is no element, 0 times infinity
        coef[:, [0, *(layout.y(j) for j in range(O))]] = np.inf
        coef[:, [layout.y(j) + K + 1 for j in range(O)]] = meta[:, 1] = 0
        inputs[0].abs_().add_(1)
    if kind == 3:  # noise alone, and outputs without a term
        unread = list(range(K + 1))
        coef[:, [layout.y(j) + K + 1 for j in range(O)]] = 0
        bounds = ((0, 1, 1), (-1, 0, 1))[i // 64 % 2]  # d = -0.0, which a bound of 0 does not move
        coef[:, layout.clip : layout.clip + 3], meta[:, :2] = bounds, (0, 1)
        if O > 1:
            coef[:, layout.y(O - 1) : layout.mask] = 0
    for k in unread:
        coef[:, [k, *(layout.y(j) + k for j in range(O))]] = 0
        if k < K:
            inputs[k].fill_(float("nan"))
    row = torch.from_numpy(data.integers(-1 if i % 5 == 4 else 0, N + (i % 5 == 4), B)).to(rng.choice([torch.int32, torch.int64]))
    scale = torch.from_numpy(data.standard_normal((B, K + 1)).astype(np.float32)) if rng.random() < 0.7 else None
    if scale is not None:
        scale[:, unread] = float("nan")
    clip = torch.from_numpy(np.sort(data.standard_normal((B, 3)).astype(np.float32))) if rng.random() < 0.2 else None
    case = cases.Case(inputs, outputs, tensor()[None], torch.from_numpy(coef), torch.from_numpy(meta), row if rng.random() < 0.8 else None, 1,
                      keys(i, N * J * B).reshape(N, J, B, 2), scale, clip=clip, note=f"plain {i}",
                      status=None if rng.random() < 0.1 else torch.tensor([2**31 - 1, 0], dtype=torch.int32))
    return case, [inputs[k] for k in unread if k < K]


def _noise_case(i, dense=False):
    """Thousands of normals as they are: what a wrong last bit of a constant changes, it changes in few of them."""
    O = 1 if dense else 2
    layout, n, B = reference.Layout(1, O, 0, 2), 8192 if dense else 8196, 2
    coef = np.zeros((1, layout.width), np.float32)
    for j in range(O):
        coef[0, layout.y(j) + 2 + j] = 1
    unused = torch.zeros(B, n, dtype=torch.float16 if dense else torch.float32)
    case = cases.Case([unused], [torch.zeros(B, n) for _ in range(O)], None, torch.from_numpy(coef),
                      torch.tensor([[-1, 0, 0, 0]], dtype=torch.int32), None, 0, keys(i, 2 * B).reshape(1, 2, B, 2),
                      note=f"noise {i}", status=torch.tensor([2**31 - 1, 0], dtype=torch.int32))
    return case, []


def alike_case(i):
    """(case, inputs that must not be read). Cases of one kind, for which Triton compiles one kernel: a float32 input that is read
    16 bytes at a time, a float16 one that is not aligned, a channels-last one; float32 and bfloat16 outputs, a ring, two noise
    terms, factors, rows by sample."""
    rng, data = random.Random(i), np.random.default_rng(i)
    shape, B, N = rng.choice([(3, 14, 14), (5, 12, 12), (4, 18, 18)]), 128 if i % 20 == 5 else rng.randint(1, 3), 3

    def tensor(dtype, layout):
        values = cases._values(data, (B, *shape), 0.02 * (i % 10 == 4))
        return cases._lay_out(cases._Random(rng), values, dtype, cases.Options(layouts=(layout,)))

    def shifted(t, gap):
        return _placed(t, (0, 1, 2), gap)

    x, out = tensor("float32", "contiguous"), [tensor("float32", "contiguous"), shifted(tensor("bfloat16", "contiguous"), 5)]
    y = shifted(tensor("float16", "contiguous"), 3)
    last = tensor("float32", "contiguous").to(memory_format=torch.channels_last)
    ring = tensor("float32", "contiguous")[None].clone()
    layout, kind = reference.Layout(4, 2, 0, 2), (0, 1, 2, 3, 4, 5, 2, 2, 2, 2)[i % 10]
    coef = data.standard_normal((N, layout.width)).astype(np.float32) * (data.random((N, layout.width)) < 0.8)
    coef[:, layout.clip : layout.clip + 2] = np.sort(coef[:, layout.clip : layout.clip + 2])
    meta = np.zeros((N, 4), np.int32)
    meta[:, 0], meta[:, 1] = data.integers(-1, 1, N), data.integers(0, 2, N)
    scale = torch.from_numpy(data.standard_normal((B, 4)).astype(np.float32))
    row = data.integers(-1 if kind == 4 else 0, N + (kind == 4), B)
    places, unread = [0, layout.y(0), layout.y(1)], []
    coef[data.random(coef.shape) < 0.1] = 1
    if kind == 2:  # one NaN, that comes to d and the ring or to one output alone
        x[(rng.randrange(B), *(rng.randrange(k) for k in shape))] = float("nan")
        coef[:, places] = coef[:, [layout.y(0) + 4, layout.y(1) + 4]] = meta[:, 0] = 0
        coef[:, rng.choice(places)] = 1
    if kind == 3:  # infinite products; where there is no element, 0 times infinity; an input that must not be read
        x.abs_().add_(1)
        coef[:, places], scale[:, 0], meta[:, 1] = np.inf, 1, 0
    if kind in (1, 3):  # inputs that must not be read
        unread = [1 + i // 10 % 2] if kind == 3 else [i // 10 % 4]
        for k in unread:
            coef[:, [p + k for p in places]], scale[:, k] = 0, float("nan")
            (x, y, last, ring)[k].fill_(float("nan"))
        if 3 in unread:
            meta[:, 0] = -1
    if kind == 5:  # noise alone, an output without a term, and d = -0.0, which a bound of 0 does not move
        coef[:, :] = 0
        coef[:, layout.y(0) + 5 + i // 10 % 2] = 1
        coef[:, layout.clip : layout.clip + 3], meta[:, :2] = ((0, 1, 1), (-1, 0, 1))[i // 20 % 2], (0, 1)
    case = cases.Case([x, y, last], out, ring, torch.from_numpy(coef), torch.from_numpy(meta),
                      torch.from_numpy(np.stack([row, row + 1], 1))[:, 0], 0, keys(i, N * 2 * B).reshape(N, 2, B, 2), scale,
                      status=torch.tensor([2**31 - 1, 0], dtype=torch.int32), note=f"alike {i}")
    return case, [(x, y, last, ring)[k] for k in unread]


def full_case(i):
    """A case that uses everything: ring, bank, noise, mask, clip, rows by token, by sample or for all. In every sixth, some
    indices lie outside their tables."""
    rng, data = random.Random(i), np.random.default_rng(i)
    options = dict(empty=False, max_batch=3, dtypes=DTYPES[(3, 0, 1, 3, 2)[i % 5]],
                   row_kinds=(("tokens", "batch", "int")[i % 3] if i % 4 != 2 else "batch",),
                   layouts=(cases.Options.layouts, ("contiguous",), ("offset", "strided"), ("channels_last",))[i % 4], specials=False)
    shapes = ([(4, 1, 7), (3, 15), (3, 4, 5), (2, 3, 5)], [(3, 4, 4), (8, 5), (2, 2, 4, 4)], [(4, 2, 3), (21,)],
              [(3, 4, 5), (3, 2, 3, 2)])[i % 4]
    with mock.patch.object(cases, "_shape", lambda c, options: c.pick(shapes)):
        while True:
            case = cases.random_case(rng, **options)
            there = (case.ring, case.bank, case.keys, case.mask, case.status)
            if all(t is not None for t in there) and len(case.outputs) > 1 and len(case.inputs) < 5 and case.meta[:, 1].max() > 8:
                break
    if i % 6 == 1:
        case.row += torch.from_numpy(data.choice([0, 0, -5, 5], case.row.shape))
        case.bank_index += torch.from_numpy(data.choice([0, 0, -5, 5], case.bank_index.shape))
    return case


def clamped_case(i):
    """A case whose row and bank indices lie outside their tables here and there."""
    rng, data = random.Random(i), np.random.default_rng(i)
    while True:
        case = cases.random_case(rng, empty=False, masks=False, row_kinds=("scalar", "batch"), max_numel=80)
        if case.status is not None and case.bank is not None:
            break
    case.row = torch.from_numpy(np.asarray(data.integers(-3, len(case.coef) + 3, case.row.shape)))
    case.bank_index = torch.from_numpy(data.integers(-3, len(case.bank) + 3, case.bank_index.shape))
    slots = len(case.inputs) + (0 if case.ring is None else len(case.ring))
    case.coef[:, slots] = 0.5  # the bank's first term takes part in d
    return case


def dtype_of(case):
    """The dtype of a case's samples, or "mixed"."""
    tensors = [*case.inputs, *case.outputs, *(t for t in (case.ring, case.bank, case.known, case.mask) if t is not None)]
    names = {cases.NAMES[t.dtype] for t in tensors}
    return names.pop() if len(names) == 1 else "mixed"


def keys(i, count):
    """(count, 2) int64, edges among them: counters that carry, and that wrap."""
    data = np.random.default_rng(i)
    pairs = data.integers(-(2**63), 2**63, (count, 2))
    pairs[::2, 1] = data.choice(EDGES, len(pairs[::2]))
    return torch.from_numpy(pairs)


def normal_case(i, dtype):
    """(out, keys, what out must hold)"""
    rng = random.Random(i)
    shape = [(), (1,), (3,), (257,), (5, 7), (3, 8, 8), (4, 5, 9), (2, 3, 4, 5), (1024,), (8, 16, 16)][i % 10]
    layout = rng.choice(["contiguous", "channels_last", "strided"] if len(shape) in (3, 4) else ["contiguous", "strided"])
    batch = rng.randint(1, 4)
    out = cases._lay_out(cases._Random(rng), torch.zeros(batch, *shape), dtype, cases.Options(layouts=(layout,)))
    given = keys(i, batch)
    expected = torch.empty(0, dtype=out.dtype).set_(out.untyped_storage().clone(), out.storage_offset(), out.shape, out.stride())
    count = int(np.prod(shape, dtype=np.int64))
    cases._write(expected, reference.narrow(reference.normal(given.numpy(), count), dtype))
    return out, given, expected


def key_cases(i):
    """[(op, arguments, what it must return)] of fold_in, run_keys and raw_words; some arguments are strided views."""
    rng = random.Random(i)
    many, data = keys(i, rng.randint(1, 40)), torch.from_numpy(np.random.default_rng(i).choice(EDGES, rng.randint(1, 9)))
    strided = torch.cat([many, many], 1).t().contiguous().t()[:, 2:]
    rows, terms = rng.randint(1, 9), rng.randint(1, 4)
    streams, draws = keys(i + 1, rows * terms).reshape(2, rows, terms)
    draws = draws.t().contiguous().t()
    count = rng.choice([1, 2, 3, 4, 5, 37, 1030])
    one = many[0], torch.tensor(5)
    return [
        ("fold_in", (strided[:, None], data), reference.fold_in(many.numpy()[:, None], data.numpy())),
        ("fold_in", one, reference.fold_in(one[0].numpy(), 5)),
        ("run_keys", (many[:, 0], streams, draws), reference.run_keys(many[:, 0].numpy(), streams.numpy(), draws.numpy())),
        ("raw_words", (strided, count), np.ascontiguousarray(reference.raw_words(many.numpy(), 0, count)).view(np.int32)),
    ]
