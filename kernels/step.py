"""``step_`` for Triton: one row of a plan applied to a batch, in one launch. ``fastdiff.reference.step`` says what it means.

Every input is read once and every output written once (a bank vector twice where both d and a y_i take it); d and the y_i
live in registers. What a row does not use (an input whose coefficients are all 0, a noise term without weight) is skipped by
a branch that a whole program takes or does not take, since the row is the same for all of a sample, or of a token. Nothing
of a row is compiled in: rows are data.
"""

import triton
import triton.language as tl

from ..checks import check_indices, check_step
from .launch import geometry, periodic_mode, run
from .normal import normal_tile
from .tile import load, load_periodic, split, store

__all__ = ["step_"]

_CLIP, _MASK_INPUT, _MASK_D, _MASK_Y0 = tl.constexpr(1), tl.constexpr(2), tl.constexpr(4), tl.constexpr(8)
_BAD_ROW, _BAD_BANK = tl.constexpr(1), tl.constexpr(2)


@triton.jit
def _zeros(quads: tl.constexpr, V: tl.constexpr):
    """-0.0, where every sum starts. Made from bits: a constant -0.0 may become 0.0 on its way."""
    return tl.full([quads, V], -0x80000000, tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _add(total, coefficient, value):
    if coefficient != 0.0:
        total = tl.fma(coefficient, value, total)
    return total


@triton.jit
def _scaled(at, factor, HAS_FACTOR: tl.constexpr):
    """The coefficient at a place, times a factor that depends on data, rounded once; 0 stays 0 whatever the factor."""
    c = tl.load(at)
    if HAS_FACTOR:
        c = tl.where(c == 0.0, 0.0, c * factor)
    return c


@triton.jit
def _mix(value, m, k, factors, known, noise, HAS_KNOWN: tl.constexpr, HAS_NOISE: tl.constexpr):
    """fma(m, v, fma(-m, k, k)), k = k0 known + k1 noise. factors: pointer to k0, k1; k: -0.0"""
    if HAS_KNOWN:
        k = _add(k, tl.load(factors), known)
    if HAS_NOISE:
        k = _add(k, tl.load(factors + 1), noise)
    # The sign is flipped as a bit: some versions of Triton negate by subtracting from 0, which loses that of a zero.
    minus = (m.to(tl.int32, bitcast=True) ^ -0x80000000).to(tl.float32, bitcast=True)
    return tl.fma(m, value, tl.fma(minus, k, k))


@triton.jit
def _vector(bank, bank_stride, bank_size, index, status):
    """Pointer to the vector that a bank term names, the nearest one where there is none of that number."""
    v = tl.load(index).to(tl.int64)
    nearest = tl.minimum(tl.maximum(v, 0), bank_size - 1)
    if status is not None:
        if nearest != v:
            tl.atomic_or(status + 1, _BAD_BANK, sem="relaxed")
    return bank + nearest * bank_stride


@triton.jit
def _noise(ys, at_w, keys, first, row, O: tl.constexpr, Y_WIDTH: tl.constexpr, V: tl.constexpr):
    """y_i + w_i N(key) for all i. at_w: pointer to w_0; w_i follow in steps of Y_WIDTH."""
    drawn = tl.load(at_w) != 0.0
    for i in tl.static_range(1, O):
        drawn = drawn | (tl.load(at_w + i * Y_WIDTH) != 0.0)
    if drawn:
        z = normal_tile(keys, first, row, V)
        noisy = ()
        for i in tl.static_range(O):
            noisy = noisy + (_add(ys[i], tl.load(at_w + i * Y_WIDTH), z),)
        ys = noisy
    return ys


@triton.jit
def _has_nan(value, row, low, high, RAGGED: tl.constexpr, V: tl.constexpr):
    """(quads, V) to (quads,): is any element of a row NaN? RAGGED: rows may reach beyond [low, high)."""
    lanes = split(value)
    met = row < 0
    for lane in tl.static_range(V):
        nan = lanes[lane] != lanes[lane]
        if RAGGED:
            nan = nan & (row + lane >= low) & (row + lane < high)
        met = met | nan
    return met


# Neither values nor alignments are compiled in: INPUT_MODES and their like say what is aligned. So nothing is recompiled
# from step to step, nor from one size to the next of the same kind.
@triton.jit(do_not_specialize=list(range(41)))
def step_kernel(
    inputs, input_strides, outputs, output_strides, ring, ring_stride_slot, ring_stride,
    coef, meta, row, row_index, row_stride, row_stride_token, rows,
    keys, key_stride_row, key_stride_noise, key_stride,
    scale, scale_stride, scale_stride_slot,
    bank, bank_stride, bank_size, bank_index, bank_index_stride, bank_weight, bank_weight_stride,
    clip, clip_stride, known, known_stride, mask, mask_stride, mask_period, status,
    batch_tokens, numel, tokens, inner, groups,
    K: tl.constexpr, R: tl.constexpr, O: tl.constexpr, M: tl.constexpr, J: tl.constexpr,
    INPUT_MODES: tl.constexpr, OUTPUT_MODES: tl.constexpr, RING_MODE: tl.constexpr, BANK_MODE: tl.constexpr,
    KNOWN_MODE: tl.constexpr, MASK_MODE: tl.constexpr, MASK_WHOLE: tl.constexpr, TOKENS: tl.constexpr,
    RAGGED: tl.constexpr, LARGE: tl.constexpr, QUADS: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    """Program (x, y, z): tile x of token-part y + z num_programs(1). K listed inputs, R ring slots, O outputs, M bank and
    J noise terms; what is absent is None and costs nothing."""
    HAS_MASK: tl.constexpr = mask is not None
    SLOTS: tl.constexpr = K + R
    Y_WIDTH: tl.constexpr = SLOTS + 1 + M + J
    Y0: tl.constexpr = SLOTS + M + 3
    MIX: tl.constexpr = Y0 + O * Y_WIDTH

    b = tl.program_id(1).to(tl.int64) + tl.program_id(2).to(tl.int64) * tl.num_programs(1)
    if b >= batch_tokens:
        return
    token = b - b
    first = tl.program_id(0).to(tl.int64) * (QUADS * V)
    start = token
    part = numel
    if TOKENS:
        token = b % tokens
        b = b // tokens
        part = numel // tokens
        start = token * part
        first += start // V * V
    low = tl.maximum(start - first, 0).to(tl.int32)
    high = tl.minimum(start + part - first, QUADS * V).to(tl.int32)
    at = tl.arange(0, QUADS) * V

    # Which row.
    if row is None:
        r = row_index.to(tl.int64)
    else:
        r = tl.load(row + b * row_stride + token * row_stride_token).to(tl.int64)
    inside = tl.minimum(tl.maximum(r, 0), rows - 1)
    if status is not None:
        if inside != r:
            tl.atomic_or(status + 1, _BAD_ROW, sem="relaxed")
    r = inside
    coef += r * (MIX + 2 * (2 + O))
    meta += r * 4
    slot = tl.load(meta)
    flags = tl.load(meta + 1)

    # Coefficients of the inputs: p_k, then a_ik for each i.
    weights = ()
    for i in tl.static_range(1 + O):
        for k in tl.static_range(SLOTS):
            place = coef + k
            if i > 0:
                place = coef + Y0 + (i - 1) * Y_WIDTH + k
            factor = 1.0
            if scale is not None:
                factor = tl.load(scale + b * scale_stride + k * scale_stride_slot)
            weights = weights + (_scaled(place, factor, scale is not None),)

    # Every input once.
    values = ()
    for k in tl.static_range(SLOTS):
        used = weights[k] != 0.0
        for i in tl.static_range(O):
            used = used | (weights[(i + 1) * SLOTS + k] != 0.0)
        if k < K:
            base = inputs[k] + b * input_strides[k]
            values = values + (load(base, first, at, low, high, used, inner, groups, INPUT_MODES[k], LARGE, V),)
        else:
            base = ring + (k - K) * ring_stride_slot.to(tl.int64) + b * ring_stride
            values = values + (load(base, first, at, low, high, used, inner, groups, RING_MODE, LARGE, V),)

    zero = _zeros(QUADS, V)
    key_row = keys
    if J > 0:
        key_row = keys + r * key_stride_row + b * key_stride

    # What a mask mixes in.
    m_tile = zero
    known_tile = zero
    mask_noise = zero
    if HAS_MASK:
        MASKS: tl.constexpr = _MASK_INPUT + _MASK_D + _MASK_Y0 * (2**O - 1)
        masked = (flags & MASKS) != 0
        m_tile = load_periodic(mask, b * mask_stride, first, at, low, high, masked, mask_period, inner, groups,
                               MASK_MODE, MASK_WHOLE, LARGE, V)
        wants_known = masked & False
        wants_noise = masked & False
        for target in tl.static_range(2 + O):
            on = (flags & (_MASK_INPUT << target)) != 0
            wants_known = wants_known | (on & (tl.load(coef + MIX + 2 * target) != 0.0))
            wants_noise = wants_noise | (on & (tl.load(coef + MIX + 2 * target + 1) != 0.0))
        if known is not None:
            known_tile = load(known + b * known_stride, first, at, low, high, wants_known, inner, groups, KNOWN_MODE,
                              LARGE, V)
        if J > 0:
            j = tl.load(meta + 3)
            if wants_noise & (j >= 0) & (j < J):
                mask_noise = normal_tile(key_row + j * key_stride_noise, first, at, V)
        if flags & _MASK_INPUT:
            which = tl.load(meta + 2)
            mixed = ()
            for k in tl.static_range(SLOTS):
                value = values[k]
                if which == k:
                    value = _mix(value, m_tile, zero, coef + MIX, known_tile, mask_noise, known is not None, J > 0)
                mixed = mixed + (value,)
            values = mixed

    # d
    d = zero
    for k in tl.static_range(SLOTS):
        d = _add(d, weights[k], values[k])
    if M > 0:
        for m in range(M):
            c = _scaled(coef + SLOTS + m, tl.load(bank_weight + b * bank_weight_stride + m), True)
            if c != 0.0:
                vector = _vector(bank, bank_stride, bank_size, bank_index + b * bank_index_stride + m, status)
                d = tl.fma(c, load(vector, first, at, low, high, True, inner, groups, BANK_MODE, LARGE, V), d)
    if flags & _CLIP:
        bounds = coef + SLOTS + M
        if clip is not None:
            bounds = clip + b * clip_stride
        lo = tl.load(bounds)
        hi = tl.load(bounds + 1)
        d = tl.where(d < lo, lo, d)
        d = tl.where(d > hi, hi, d) * tl.load(bounds + 2)
    if HAS_MASK:
        if flags & _MASK_D:
            d = _mix(d, m_tile, zero, coef + MIX + 2, known_tile, mask_noise, known is not None, J > 0)

    # y_i without noise
    ys = ()
    for i in tl.static_range(O):
        y = zero
        for k in tl.static_range(SLOTS):
            y = _add(y, weights[(i + 1) * SLOTS + k], values[k])
        y = _add(y, tl.load(coef + Y0 + i * Y_WIDTH + SLOTS), d)
        ys = ys + (y,)
    if O * M > 0:
        for m in range(M):
            q = tl.load(bank_weight + b * bank_weight_stride + m)
            at_h = coef + Y0 + SLOTS + 1 + m
            used = slot != slot
            for i in tl.static_range(O):
                used = used | (_scaled(at_h + i * Y_WIDTH, q, True) != 0.0)
            if used:
                vector = _vector(bank, bank_stride, bank_size, bank_index + b * bank_index_stride + m, status)
                value = load(vector, first, at, low, high, True, inner, groups, BANK_MODE, LARGE, V)
                steered = ()
                for i in tl.static_range(O):
                    steered = steered + (_add(ys[i], _scaled(at_h + i * Y_WIDTH, q, True), value),)
                ys = steered

    # Noise: each term is drawn once, whichever outputs take it.
    at_w = coef + Y0 + SLOTS + 1 + M
    if O > 0:
        if J == 1:
            ys = _noise(ys, at_w, key_row, first, at, O, Y_WIDTH, V)
        elif J > 1:
            for j in range(J):
                ys = _noise(ys, at_w + j, key_row + j * key_stride_noise, first, at, O, Y_WIDTH, V)

    keeps = (slot >= 0) & (slot < R)
    met = at < 0
    if (status is not None) & (R > 0):
        met = _has_nan(d, at, low, high, RAGGED, V) & keeps
    for i in tl.static_range(O):
        y = ys[i]
        if HAS_MASK:
            if flags & (_MASK_Y0 << i):
                y = _mix(y, m_tile, zero, coef + MIX + 4 + 2 * i, known_tile, mask_noise, known is not None, J > 0)
        if status is not None:
            met = met | _has_nan(y, at, low, high, RAGGED, V)
        store(outputs[i] + b * output_strides[i], first, at, low, high, True, y, inner, groups, OUTPUT_MODES[i], LARGE, V)
    if R > 0:
        base = ring + tl.minimum(tl.maximum(slot, 0), R - 1).to(tl.int64) * ring_stride_slot + b * ring_stride
        store(base, first, at, low, high, keeps, d, inner, groups, RING_MODE, LARGE, V)
    if status is not None:
        tl.atomic_min(status + (at - at), (r + (at - at)).to(tl.int32), mask=met & (at < high), sem="relaxed")


def step_(inputs, outputs, ring, coef, meta, row, row_index, keys, scale, bank, bank_index, bank_weight, clip, known, mask,
          status):
    """Apply row ``row`` (a tensor (), (B,) or (B, T)), or ``row_index`` where it is None, of the table coef, meta to inputs
    (B, *shape) and ring (R, B, *shape); write outputs, and ring where the row says so. ``docs/design.md`` has the table of
    arguments."""
    args = (inputs, outputs, ring, coef, meta, row, row_index, keys, scale, bank, bank_index, bank_weight, clip, known, mask,
            status)
    # What may be launched and how follows from where the tensors are and how they lie: in a run, the same every few steps.
    places = tuple(map(_place, (*inputs, *outputs, ring, coef, meta, row, keys, scale, bank, bank_index, bank_weight, clip,
                                known, mask, status))), len(inputs)
    numbers = None if coef.is_cpu else _prepared.get(places)  # the CPU is there for tests: it checks every call
    if numbers is None:
        check_step(*args)
        if len(_prepared) >= 512:
            _prepared.clear()
        numbers = _prepared[places] = prepare(*args)
    elif row is None:
        check_indices(row, row_index, len(coef))
    if numbers is not EMPTY:
        grid, positional, options = arguments(numbers, *args)
        run(step_kernel, coef.device, grid, *positional, **options)


_prepared = {}
EMPTY = ()


def _place(t):
    return t if t is None else (t.data_ptr(), t.dtype, t.shape, t.stride(), t.device)


def _batch_stride(t):
    return t.stride(0) if t is not None and t.shape[0] > 1 else 0


def prepare(inputs, outputs, ring, coef, meta, row, row_index, keys, scale, bank, bank_index, bank_weight, clip, known,
            mask, status):
    """Everything about a launch that is not a tensor: (grid, strides and sizes by name, options of ``step_kernel``), or EMPTY
    where there is no element."""
    if not outputs and ring.shape[0] == 0:
        return EMPTY
    sample = (*outputs, *inputs)[0] if outputs or inputs else ring[0]
    if sample.numel() == 0:
        return EMPTY
    J = 0 if keys is None else keys.shape[1]
    M = 0 if bank_index is None else bank_index.shape[1]
    R = 0 if ring is None else ring.shape[0]
    tokens = row.shape[1] if row is not None and row.dim() == 2 else 1
    whole = mask is not None and mask[0].numel() == sample[0].numel()
    periodic = mask is not None and not whole

    # How each tensor is accessed: those of the batch first, then the others in this order.
    full = [*inputs, *outputs] + ([] if known is None else [known])
    others = [(t, lead) for t, lead, there in ((ring, 2, R), (bank, 1, M), (mask, 1, whole)) if there]
    g = geometry(full or [ring[0]], others=[t for t, _ in others], axes=[lead for _, lead in others],
                 periodic=mask if periodic else None, tokens=tokens, noisy=J > 0 or periodic)
    modes = list(g.modes)
    input_modes, output_modes = tuple(modes[: len(inputs)]), tuple(modes[len(inputs) : len(inputs) + len(outputs)])
    modes = modes[len(inputs) + len(outputs) + (not full) :]
    known_mode = modes.pop(0) if known is not None else 0
    ring_mode = modes.pop(0) if R else 0
    bank_mode = modes.pop(0) if M else 0
    mask_mode = modes.pop(0) if whole else periodic_mode(mask, g.V, g.part) if periodic else 0

    def stride(t, d, there=True):
        return t.stride(d) if t is not None and there else 0

    numbers = dict(
        inputs=tuple(map(_batch_stride, inputs)), outputs=tuple(map(_batch_stride, outputs)),
        ring=(stride(ring, 0, R), stride(ring, 1, R)), row=(stride(row, 0, row is not None and row.dim()), stride(row, 1, tokens > 1)),
        keys=(stride(keys, 0, J and keys.shape[0] > 1), stride(keys, 1, J), stride(keys, 2, J)),
        scale=(stride(scale, 0), stride(scale, 1)), bank=(_batch_stride(bank), len(bank) if M else 0), bank_index=stride(bank_index, 0, M),
        bank_weight=stride(bank_weight, 0, M), clip=stride(clip, 0), known=_batch_stride(known),
        mask=(_batch_stride(mask), mask[0].numel() if mask is not None else 0),
        sizes=(g.batch * tokens, g.numel, tokens, g.inner, g.groups),
    )  # fmt: skip
    options = dict(
        K=len(inputs), R=R, O=len(outputs), M=M, J=J, INPUT_MODES=input_modes, OUTPUT_MODES=output_modes, RING_MODE=ring_mode,
        BANK_MODE=bank_mode, KNOWN_MODE=known_mode, MASK_MODE=mask_mode, MASK_WHOLE=whole, TOKENS=tokens > 1,
        RAGGED=g.part % g.V != 0, LARGE=g.large, QUADS=g.quads, V=g.V, num_warps=g.num_warps,
    )  # fmt: skip
    return g.grid, numbers, options


def arguments(planned, inputs, outputs, ring, coef, meta, row, row_index, keys, scale, bank, bank_index, bank_weight, clip,
              known, mask, status):
    """What ``step_kernel`` is launched with: (grid, positional arguments, options)."""
    grid, n, options = planned
    R, M, J = options["R"], options["M"], options["J"]
    return grid, (
        tuple(inputs), n["inputs"], tuple(outputs), n["outputs"], ring if R else None, *n["ring"],
        coef, meta, row, row_index, *n["row"], len(coef), keys if J else None, *n["keys"], scale, *n["scale"],
        bank if M else None, *n["bank"], bank_index if M else None, n["bank_index"], bank_weight if M else None, n["bank_weight"],
        clip, n["clip"], known, n["known"], mask, *n["mask"], status, *n["sizes"],
    ), options  # fmt: skip
