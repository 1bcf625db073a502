"""The plain structs of csrc/row.h and csrc/cuda/launch.h in ctypes, and how a ``Case`` becomes a ``StepArgs``.

Only what a launcher is given is built here, from tensors of any device: no validation, that is csrc/bind.h's part.
"""

import ctypes as c
import math

import torch

MAX_INPUTS, MAX_OUTPUTS = 12, 3
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
i32, i64, ptr = c.c_int32, c.c_int64, c.c_void_p


class RowLayout(c.Structure):
    _fields_ = [(n, i32) for n in ("inputs", "outputs", "bank", "noises")]


class View(c.Structure):
    _fields_ = [("data", ptr), ("batch_stride", i64), ("inner", i64), ("groups", i64), ("dtype", i32)]


class StepArgs(c.Structure):
    _fields_ = [("batch", i64), ("numel", i64), ("tokens", i64), ("layout", RowLayout), ("rows", i32), ("listed", i32),
                ("row_index", i32), ("row_is_64", i32), ("bank_index_is_64", i32), ("bank_size", i32), ("coef", ptr),
                ("meta", ptr), ("row", ptr), ("row_stride_b", i64), ("row_stride_t", i64), ("keys", ptr),
                ("key_stride_row", i64), ("key_stride_noise", i64), ("key_stride_b", i64), ("scale", ptr),
                ("scale_stride_b", i64), ("scale_stride_k", i64), ("bank_index", ptr), ("bank_weight", ptr),
                ("bank_index_stride_b", i64), ("bank_weight_stride_b", i64), ("clip", ptr), ("clip_stride_b", i64),
                ("status", ptr), ("in_", View * MAX_INPUTS), ("out", View * MAX_OUTPUTS), ("bank", View), ("known", View),
                ("mask", View), ("mask_period", i64)]


MAX_DIMS = 8


class NormalArgs(c.Structure):
    _fields_ = [("batch", i64), ("numel", i64), ("keys", ptr), ("key_stride_b", i64), ("key_stride_pair", i64), ("out", View)]


class FoldInArgs(c.Structure):
    _fields_ = [("count", i64), ("dims", i64), ("size", i64 * MAX_DIMS), ("key_stride", i64 * MAX_DIMS),
                ("data_stride", i64 * MAX_DIMS), ("key_stride_pair", i64), ("keys", ptr), ("data", ptr), ("out", ptr)]


class RunKeysArgs(c.Structure):
    _fields_ = [("rows", i64), ("noises", i64), ("batch", i64), ("seed_stride", i64), ("stream_stride", i64 * 2),
                ("draw_stride", i64 * 2), ("seeds", ptr), ("streams", ptr), ("draws", ptr), ("out", ptr)]


class RawWordsArgs(c.Structure):
    _fields_ = [("batch", i64), ("count", i64), ("keys", ptr), ("key_stride_b", i64), ("key_stride_pair", i64), ("out", ptr)]


class Terms(c.Structure):
    _fields_ = [("count", i32), ("vectors", i32), ("index_is_64", i32), ("index", ptr), ("index_stride_b", i64), ("weight", ptr),
                ("weight_stride_b", i64)]


class EditArgs(c.Structure):
    _fields_ = [("batch", i64), ("numel", i64), ("out", View), ("h", View), ("bank", View), ("terms", Terms)]


def layout():
    """What ``emulate_layout`` must report, as far as it concerns this file."""
    return [c.sizeof(View), c.sizeof(StepArgs), StepArgs.coef.offset, StepArgs.in_.offset, StepArgs.mask.offset,
            StepArgs.mask_period.offset, c.sizeof(NormalArgs), c.sizeof(FoldInArgs), c.sizeof(RunKeysArgs), c.sizeof(RawWordsArgs),
            c.sizeof(Terms), c.sizeof(EditArgs), EditArgs.terms.offset]


def view(t):
    """A tensor (B, *shape) of dense samples, contiguous or channels-last."""
    shape, strides = t.shape[1:], t.stride()[1:]

    def dense(order):
        step = 1
        for d in reversed(order):
            if shape[d] != 1 and strides[d] != step:
                return False
            step *= shape[d]
        return True

    axes = list(range(len(shape)))
    groups, inner = 1, 0
    if not dense(axes) and math.prod(shape):
        assert dense(axes[1:] + axes[:1]), (t.shape, t.stride())
        groups, inner = shape[0], math.prod(shape[1:])
    return View(t.data_ptr(), t.stride(0) if t.shape[0] > 1 else 0, inner, groups, DTYPES[t.dtype])


def edit_args(out, h, bank, index, weight):
    """The ``EditArgs`` of a call. It borrows the tensors' memory."""
    terms = Terms(weight.shape[1], len(bank), index is not None and index.dtype == torch.int64, data(index),
                  0 if index is None else index.stride(0), data(weight), weight.stride(0))
    return EditArgs(len(h), h[0].numel() if len(h) else 0, view(out), view(h), view(bank), terms)


def data(t):
    return None if t is None else t.data_ptr()


def step_args(case):
    """The ``StepArgs`` of a case. It borrows the case's memory."""
    batch, numel = case.batch, case.sample[0].numel() if case.batch else 0
    slots = [] if case.ring is None else list(case.ring)
    inputs = [*case.inputs, *slots]
    bank = 0 if case.bank_index is None else case.bank_index.shape[1]
    noises = 0 if case.keys is None else case.keys.shape[1]
    a = StepArgs(batch=batch, numel=numel, tokens=1, rows=len(case.coef), listed=len(case.inputs), row_index=case.row_index,
                 layout=RowLayout(len(inputs), len(case.outputs), bank, noises), coef=data(case.coef), meta=data(case.meta),
                 status=data(case.status))
    if case.row is not None:
        row = case.row
        a.row, a.row_is_64 = data(row), row.dtype == torch.int64
        if row.dim() >= 1:
            a.row_stride_b = row.stride(0)
        if row.dim() == 2:
            a.row_stride_t, a.tokens = row.stride(1), row.shape[1]
    if case.keys is not None:
        k = case.keys
        a.keys, a.key_stride_noise, a.key_stride_b = data(k), k.stride(1), k.stride(2)
        a.key_stride_row = k.stride(0) if k.shape[0] > 1 else 0
    if case.scale is not None:
        a.scale, a.scale_stride_b, a.scale_stride_k = data(case.scale), *case.scale.stride()
    if bank:
        a.bank, a.bank_size = view(case.bank), len(case.bank)
        a.bank_index, a.bank_index_stride_b = data(case.bank_index), case.bank_index.stride(0)
        a.bank_index_is_64 = case.bank_index.dtype == torch.int64
        a.bank_weight, a.bank_weight_stride_b = data(case.bank_weight), case.bank_weight.stride(0)
    if case.clip is not None:
        a.clip, a.clip_stride_b = data(case.clip), case.clip.stride(0)
    if case.known is not None:
        a.known = view(case.known)
    if case.mask is not None:
        a.mask, a.mask_period = view(case.mask), math.prod(case.mask.shape[1:])
    for i, t in enumerate(inputs):
        a.in_[i] = view(t)
    for i, t in enumerate(case.outputs):
        a.out[i] = view(t)
    return a
