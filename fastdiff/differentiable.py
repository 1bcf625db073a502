"""The step as a function with gradients.

``step_`` writes in place and has no gradient: registering one would cost several microseconds a call even where nobody
asks for it. This one returns new tensors, of the same bits, and differentiates in the inputs, the ring, the bank with
its weights, the scales and the known image. A row is linear in each of them but for the clip, so the backward pass is
the transposed row, written in torch.
"""

import torch

from .checks import FLOATS
from .reference.step import CLIP, MASK_INPUT, Layout

__all__ = ["step"]

_SCHEMA = (
    "step(Tensor[] inputs, int[] dtypes, Tensor? ring, Tensor coef, Tensor meta, Tensor? row, int row_index, "
    "Tensor? keys, Tensor? scale, Tensor? bank, Tensor? bank_index, Tensor? bank_weight, Tensor? clip, Tensor? known, "
    "Tensor? mask) -> Tensor[]"
)


def step(inputs, dtypes, ring, coef, meta, row=None, row_index=0, keys=None, scale=None, bank=None, bank_index=None,
         bank_weight=None, clip=None, known=None, mask=None):
    """One row, differentiable. Arguments as for ``torch.ops.fastdiff.step_`` (see ``docs/design.md``), but that
    ``dtypes`` names the dtype of each y_i in place of the outputs.

    Returns the list [y_0, ...], and after them the new ring where one is given; nothing is written in place.
    """
    for dtype in dtypes:
        if dtype not in FLOATS:
            raise TypeError(f"dtypes holds {dtype}: torch.float32, torch.float16 or torch.bfloat16 is taken")
    dtypes = [FLOATS.index(dtype) for dtype in dtypes]  # opcheck knows no list of dtypes: places in this tuple
    return torch.ops.fastdiff.step(inputs, dtypes, ring, coef, meta, row, row_index, keys, scale, bank, bank_index,
                                   bank_weight, clip, known, mask)


def _forward(inputs, dtypes, ring, coef, meta, row, row_index, keys, scale, bank, bank_index, bank_weight, clip, known,
             mask):
    like = (list(inputs) + ([] if ring is None else [ring[0]]))[0]
    outputs = [torch.empty(like.shape, dtype=FLOATS[d], device=like.device) for d in dtypes]
    kept = None if ring is None else ring.clone(memory_format=torch.contiguous_format)
    torch.ops.fastdiff.step_(inputs, outputs, kept, coef, meta, row, row_index, keys, scale, bank, bank_index,
                             bank_weight, clip, known, mask, None)
    return outputs + ([] if kept is None else [kept])


class _Row:
    """The numbers of the row(s) in use, as tensors that broadcast with (B, *shape)."""

    def __init__(self, like, coef, meta, row, row_index):
        self.like = like
        if row is None:
            index = torch.zeros((), dtype=torch.int64, device=coef.device) + row_index
        else:
            index = row.to(torch.int64).clamp(0, coef.shape[0] - 1)
        # index_select: indexing with a tensor of no dimension would read it on the host.
        self.coef, self.meta = (t.index_select(0, index.flatten()).reshape(*index.shape, -1) for t in (coef, meta))

    def fit(self, column):
        return column.reshape(*column.shape, *(1,) * (self.like.ndim - column.ndim)) if column.ndim else column

    def c(self, index):
        return self.fit(self.coef[..., index])

    def flag(self, bit):
        return self.fit((self.meta[..., 1] & bit) != 0)

    def m(self, index):
        return self.fit(self.meta[..., index])


def _setup(ctx, inputs, output):
    (values, ctx.dtypes, ring, coef, meta, row, ctx.row_index, keys, scale, bank, bank_index, bank_weight, clip, known,
     mask) = inputs
    ctx.listed = len(values)
    ctx.noises = 0 if keys is None else keys.shape[1]
    ctx.save_for_backward(*values, ring, coef, meta, row, keys, scale, bank, bank_index, bank_weight, clip, known, mask)


def _backward(ctx, grads):
    if torch.is_grad_enabled():
        raise RuntimeError("fd.step can be differentiated once: its gradient was asked for with create_graph=True")
    saved = ctx.saved_tensors
    values, (ring, coef, meta, row, keys, scale, bank, bank_index, bank_weight, clip, known, mask) = (
        list(saved[: ctx.listed]), saved[ctx.listed :])
    slots = 0 if ring is None else ring.shape[0]
    stored = values + [ring[r] for r in range(slots)]
    like, O, K = stored[0], len(ctx.dtypes), len(stored)
    M = 0 if bank_index is None else bank_index.shape[1]
    at = _Row(like, coef, meta, row, ctx.row_index)
    layout = Layout(K, O, M, ctx.noises)
    per_sample = [1] * (like.ndim - 1)
    reduce = list(range(1, like.ndim))

    def s(k):
        return 1.0 if scale is None else scale[:, k].reshape(-1, *per_sample)

    def q(m):
        return bank_weight[:, m].reshape(-1, *per_sample)

    def vector(m):
        return bank[bank_index[:, m].long().clamp(0, bank.shape[0] - 1)].float()

    zero = torch.zeros(like.shape, dtype=torch.float32, device=like.device)
    grad_known = zero

    def unmix(grad, target):
        """Through mask(v): what reaches v, and what reaches the known image."""
        nonlocal grad_known
        if mask is None:
            return grad
        masked = at.flag(MASK_INPUT << target)
        grad_known = grad_known + torch.where(masked, (1 - mask.float()) * at.c(layout.mask + 2 * target) * grad, 0.0)
        return torch.where(masked, mask.float() * grad, grad)

    gy = [zero if g is None else g.float() for g in grads[:O]]
    gy = [unmix(g, 2 + i) for i, g in enumerate(gy)]
    gd = zero
    for i, g in enumerate(gy):
        gd = gd + at.c(layout.y(i) + K) * g
    grad_ring = [None] * slots
    if slots and grads[O] is not None:
        for r in range(slots):
            keeps = at.m(0) == r
            gd = gd + torch.where(keeps, grads[O][r].float(), 0.0)
            grad_ring[r] = torch.where(keeps, 0.0, grads[O][r].float())
    gd = unmix(gd, 1)

    def probe(p, g, a, factors):
        """One linear form of what the row reads, by the op itself: masks and their noise are then the row's own."""
        parts = [p, g, coef.new_zeros(coef.shape[0], 3), a]
        table = torch.cat([*parts, coef.new_zeros(coef.shape[0], 1 + M + ctx.noises), coef[:, layout.mask : layout.mask + 2],
                           coef.new_zeros(coef.shape[0], 4)], dim=1)
        table[:, Layout(K, 1, M, ctx.noises).y(0) + K] = (p != 0).any(1) | (g != 0).any(1)  # a_d
        flags = meta.clone()
        flags[:, 0], flags[:, 1] = -1, meta[:, 1] & MASK_INPUT
        (out,) = _forward(values, [0], ring, table, flags, row, ctx.row_index, keys, factors, bank, bank_index,
                          bank_weight, None, known, mask)[:1]
        return out

    def read(k):
        """v_k where some term reads it, 0 where none does: history that nobody reads may hold anything."""
        used = (coef[:, [k] + [layout.y(i) + k for i in range(O)]] != 0).any(1)
        one = torch.zeros_like(coef[:, :K])
        one[:, k] = used.float()
        return probe(torch.zeros_like(one), coef.new_zeros(coef.shape[0], M), one, None)

    d = probe(coef[:, :K], coef[:, K : K + M], torch.zeros_like(coef[:, :K]), scale)
    lo, hi, factor = (at.c(layout.clip + j) if clip is None else clip[:, j].reshape(-1, *per_sample) for j in range(3))
    gd = torch.where(at.flag(CLIP), torch.where((d < lo) | (d > hi), 0.0, gd * factor), gd)

    grad_values, grad_scale = [], None if scale is None else torch.zeros_like(scale)
    for k in range(K):
        g = at.c(k) * gd
        for i in range(O):
            g = g + at.c(layout.y(i) + k) * gy[i]
        if scale is not None:
            grad_scale[:, k] = (g * read(k)).sum(reduce)
        g = g * s(k)
        if mask is not None:
            masked = at.flag(MASK_INPUT) & (at.m(2) == k)
            grad_known = grad_known + torch.where(masked, (1 - mask.float()) * at.c(layout.mask) * g, 0.0)
            g = torch.where(masked, mask.float() * g, g)
        grad_values.append(g.broadcast_to(like.shape))
    for r in range(slots):
        extra = 0.0 if grad_ring[r] is None else grad_ring[r]
        grad_ring[r] = grad_values[ctx.listed + r] + extra

    grad_bank = grad_weight = None
    if M:
        grad_bank, grad_weight = torch.zeros(bank.shape, device=bank.device), torch.zeros_like(bank_weight)
        for m in range(M):
            g = at.c(K + m) * gd
            for i in range(O):
                g = g + at.c(layout.y(i) + K + 1 + m) * gy[i]
            grad_weight[:, m] = (g * vector(m)).sum(reduce)
            grad_bank = grad_bank.index_add(0, bank_index[:, m].long(), (q(m) * g).broadcast_to(like.shape))

    return (
        [g.to(v.dtype) for g, v in zip(grad_values, values)], None if ctx.dtypes else [],
        None if ring is None else torch.stack(grad_ring).to(ring.dtype), None, None, None, None, None, grad_scale,
        None if bank is None else grad_bank.to(bank.dtype), None, grad_weight, None,
        None if known is None else grad_known.to(known.dtype), None,
    )


def _fake(inputs, dtypes, ring, *rest):
    like = (list(inputs) + ([] if ring is None else [ring[0]]))[0]
    outputs = [torch.empty(like.shape, dtype=FLOATS[d], device=like.device) for d in dtypes]
    return outputs + ([] if ring is None else [torch.empty(ring.shape, dtype=ring.dtype, device=ring.device)])


_library = torch.library.Library("fastdiff", "FRAGMENT")
_library.define(_SCHEMA)
_library.impl("step", _forward, "CompositeExplicitAutograd")
torch.library.register_fake("fastdiff::step", _fake, lib=_library)
torch.library.register_autograd("fastdiff::step", _backward, setup_context=_setup, lib=_library)
