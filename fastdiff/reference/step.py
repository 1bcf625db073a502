"""One row of a plan applied to a batch: what every backend of ``fastdiff::step_`` computes.

For sample b and element e, with v_k the value of input k (input slots first, ring slots after them):

    v_k = mask(v_k)                                                     for the one input that the row masks
    d   = sum_k p_k s_bk v_k + sum_m g_m q_bm V_m                        the denoised estimate
    d   = clip(d, lo, hi) * r                                            where the row clips
    d   = mask(d)
    y_i = sum_k a_ik s_bk v_k + a_id d + sum_m h_im q_bm V_m + sum_j w_ij N(key_bj)
    y_i = mask(y_i)
    ring[slot] = d                                                       where the row keeps it

    mask(v) = fma(m, v, fma(-m, k, k)),  k = k0 known + k1 N(key_b,jm)

Arithmetic. Everything float32. A sum starts at -0.0, the neutral element of IEEE addition, and each term is one fma, in
the order written; a coefficient times its data-dependent factor (s_bk, q_bm) is rounded once, first. A term whose
coefficient after that is exactly 0 is neither read nor applied. d enters y unrounded; outputs are rounded once, to
nearest even, when stored; NaN is stored as the canonical quiet NaN. clip compares and selects, so NaN stays NaN.
"""

from dataclasses import dataclass, field

import numpy as np

from .float32 import fma, narrow
from .normal import normal

__all__ = ["EXACT", "FLOAT64", "Layout", "StepResult", "step"]

CLIP, MASK_INPUT, MASK_D, MASK_Y0 = 1, 2, 4, 8
NO_SLOT = -1
LIMITS = {"inputs": 12, "outputs": 3, "bank": 16, "noises": 16}  # of one row, ring slots being inputs; csrc/row.h has the same
NEVER = np.iinfo(np.int32).max
BAD_ROW, BAD_BANK = 1, 2


@dataclass(frozen=True)
class Layout:
    """Where a row's numbers stand in ``coef`` (N, width) float32. ``meta`` (N, 4) int32 is
    [ring slot or -1, flags, masked input, noise term of the mask]."""

    inputs: int  # input slots plus ring slots
    outputs: int
    bank: int = 0
    noises: int = 0

    @property
    def clip(self):
        return self.inputs + self.bank

    def y(self, i):
        return self.clip + 3 + i * (self.inputs + 1 + self.bank + self.noises)

    @property
    def mask(self):
        return self.y(self.outputs)

    @property
    def width(self):
        return self.mask + 2 * (2 + self.outputs)

    def unpack(self, row):
        """One row of coef as (p, g, (lo, hi, r), [(a, a_d, h, w)], [(k0, k1)])."""
        K, M = self.inputs, self.bank
        ys = [np.split(row[self.y(i) : self.y(i + 1)], [K, K + 1, K + 1 + M]) for i in range(self.outputs)]
        return row[:K], row[K : K + M], row[self.clip : self.clip + 3], ys, row[self.mask :].reshape(-1, 2)


class _Exact:
    """float32 with correctly rounded fma: the meaning of the kernels, bit by bit."""

    dtype = np.float32
    fma = staticmethod(fma)

    @staticmethod
    def scaled(coefficient, factor):
        with np.errstate(all="ignore"):
            return np.float32(coefficient) * np.float32(factor)

    @staticmethod
    def normal(key, count):
        return normal(key, count)

    store = staticmethod(narrow)


class _Float64:
    """float64 throughout: the meaning of the mathematics, for comparisons by tolerance."""

    dtype = np.float64

    @staticmethod
    def fma(a, b, c):
        return np.float64(a) * b + c

    @staticmethod
    def scaled(coefficient, factor):
        return np.float64(coefficient) * np.float64(factor)

    @staticmethod
    def normal(key, count):
        return normal(key, count, exact=False)

    @staticmethod
    def store(values, dtype):
        return values


EXACT, FLOAT64 = _Exact(), _Float64()


@dataclass
class StepResult:
    outputs: list  # one (B, n) array an output: float32, float16, or uint16 bits for bfloat16; float64 in FLOAT64
    ring: object  # (R, B, n) as stored, or None
    d: np.ndarray  # (B, n) unrounded
    written: np.ndarray  # (R, B, n) bool: which ring values this step stored
    status: np.ndarray = field(default=None)  # int32 [first row that met a NaN, flags of clamped indices]


def step(inputs, coef, meta, row, *, outputs=("float32",), ring=None, ring_dtype="float32", keys=None, scale=None,
         bank=None, bank_index=None, bank_weight=None, clip=None, known=None, mask=None, noise=None, status=None,
         batch=None, numel=None, arithmetic=EXACT):
    """Apply rows of a plan.

    inputs: K arrays (B, n), values already widened to float32 (or float64); coef, meta: the table, see ``Layout``;
    row: int, (B,) or (B, T) ints, T dividing n: token t owns elements [t n/T, (t+1) n/T);
    outputs: dtype names of the y_i; ring: (R, B, n) widened values; keys: (N or 1, J, B, 2) int64;
    scale: (B, K + R); bank: (V, n); bank_index: (B, M) int; bank_weight: (B, M); clip: (B, 3) = lo, hi, r in place of
    the row's; known: (B, n); mask: (B or 1, P), P dividing n, element e takes mask[e mod P];
    noise: (J, B, n) takes the place of N(key): for comparing with samplers that draw elsewhere;
    batch, numel: B and n, needed only where there is no input to tell.
    A row or bank index outside its table is clamped and sets a flag in ``status``. Returns ``StepResult``.
    """
    A = arithmetic
    inputs = [np.asarray(v, dtype=A.dtype) for v in inputs] + ([] if ring is None else [np.asarray(v, dtype=A.dtype) for v in ring])
    R = 0 if ring is None else len(ring)
    B, n = inputs[0].shape if inputs else (batch, numel)
    J = keys.shape[1] if keys is not None else len(noise) if noise is not None else 0
    M = bank_index.shape[1] if bank_index is not None else 0
    layout = Layout(len(inputs), len(outputs), M, J)
    assert coef.shape[1] == layout.width, (coef.shape, layout)
    status = np.array([NEVER, 0], dtype=np.int32) if status is None else status.copy()

    rows = np.asarray(row)
    rows = np.broadcast_to(rows.reshape(-1, 1) if rows.ndim == 1 else rows, (B, rows.shape[1] if rows.ndim == 2 else 1))
    tokens = rows.shape[1]
    out = [np.full((B, n), -0.0, A.dtype) for _ in outputs]
    kept = np.array(inputs[len(inputs) - R :], dtype=A.dtype).reshape(R, B, n)
    written = np.zeros((R, B, n), dtype=bool)
    every_d = np.full((B, n), -0.0, A.dtype)

    for b in range(B):
        for t in range(tokens):
            part = slice(t * n // tokens, (t + 1) * n // tokens)
            r = int(rows[b, t])
            if not 0 <= r < len(coef):
                r = min(max(r, 0), len(coef) - 1)
                status[1] |= BAD_ROW
            slot, flags, masked, mask_noise = (int(v) for v in meta[r])
            p, g, bounds, ys, mixes = layout.unpack(coef[r])
            if clip is not None:
                bounds = clip[b]
            zero = np.full(part.stop - part.start, -0.0, A.dtype)

            def draw(j):
                if noise is not None:
                    return np.asarray(noise[j][b, part], dtype=A.dtype)
                return A.normal(keys[r % len(keys), j, b], n)[part]

            def add(total, coefficient, value):
                return A.fma(A.dtype(coefficient), value() if callable(value) else value, total) if coefficient != 0 else total

            def mix(value, target):
                if not flags & (MASK_INPUT << target):
                    return value
                k0, k1 = mixes[target]
                m = np.asarray(mask[b % len(mask)], dtype=A.dtype)[np.arange(part.start, part.stop) % mask.shape[1]]
                k = add(zero, k0, lambda: np.asarray(known[b, part], dtype=A.dtype))
                k = add(k, k1, lambda: draw(mask_noise))
                return A.fma(m, value, A.fma(-m, k, k))

            def read(k):
                value = inputs[k][b, part]
                return mix(value, 0) if k == masked else value

            def linear(weights, total):
                for k, c in enumerate(weights):
                    c = c if scale is None or c == 0 else A.scaled(c, scale[b, k])
                    total = add(total, c, lambda: read(k))
                return total

            def steer(weights, total):
                for m, c in enumerate(weights):
                    c = 0 if c == 0 else A.scaled(c, bank_weight[b, m])
                    index = int(bank_index[b, m])
                    if c != 0 and not 0 <= index < len(bank):
                        index = min(max(index, 0), len(bank) - 1)
                        status[1] |= BAD_BANK
                    total = add(total, c, lambda: np.asarray(bank[index, part], dtype=A.dtype))
                return total

            d = steer(g, linear(p, zero))
            if flags & CLIP:
                lo, hi, factor = (A.dtype(v) for v in bounds)
                with np.errstate(all="ignore"):
                    d = np.where(d < lo, lo, d)
                    d = np.where(d > hi, hi, d) * factor
            d = mix(d, 1)
            every_d[b, part] = d
            bad = slot >= 0 and bool(np.isnan(d).any())
            for i, (a, a_d, h, w) in enumerate(ys):
                y = steer(h, add(linear(a, zero), a_d[0], d))
                for j, c in enumerate(w):
                    y = add(y, c, lambda: draw(j))
                out[i][b, part] = y = mix(y, 2 + i)
                bad |= bool(np.isnan(y).any())
            if slot >= 0:
                kept[slot, b, part] = d
                written[slot, b, part] = True
            if bad:
                status[0] = min(status[0], r)

    return StepResult([A.store(y, dtype) for y, dtype in zip(out, outputs)],
                      None if ring is None else A.store(kept, ring_dtype), every_d, written, status)
