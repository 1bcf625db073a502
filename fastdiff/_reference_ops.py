"""The ops on torch tensors, computed by ``fastdiff.reference``. Slow; for machines with nothing better, and for tests."""

from contextlib import contextmanager

import numpy as np
import torch

from . import reference
from .checks import check_fold_in, check_normal, check_raw_words, check_run_keys, check_step
from .quantile_checks import check_quantile
from .vector_checks import check_edit, check_lift, check_project

__all__ = ["edit_", "fold_in", "lift_", "normal_", "project_", "quantile_", "raw_words", "run_keys", "step_"]

_NAMES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


def _flat(tensor):
    """(B, ...) to (B, n) float32 values in logical order."""
    return tensor.detach().to("cpu", torch.float32).reshape(len(tensor), -1 if tensor.numel() else 0).numpy()


def _stored(tensor):
    """(B, ...) to (B, n) as the reference stores values: bfloat16 as bits."""
    tensor = tensor.detach().cpu().reshape(len(tensor), -1 if tensor.numel() else 0)
    return tensor.view(torch.int16).numpy().view(np.uint16) if tensor.dtype == torch.bfloat16 else tensor.numpy()


def _put(tensor, values, where=None):
    """Stores what ``reference.narrow`` returned. As bits: torch's own casts must not touch a NaN."""
    integer = np.int32 if values.itemsize == 4 else np.int16
    target = tensor.view(torch.int32 if values.itemsize == 4 else torch.int16)
    bits = torch.from_numpy(np.ascontiguousarray(values).view(integer)).reshape(tensor.shape).to(tensor.device)
    if where is not None:
        bits = torch.where(where.reshape(tensor.shape).to(tensor.device), bits, target)
    target.copy_(bits)


def _array(tensor):
    return None if tensor is None else tensor.detach().cpu().numpy()


@contextmanager
def _subnormals():
    """NumPy follows the thread's mode, which torch.set_flush_denormal may have changed; the op keeps subnormals."""
    tiny = np.array([1e-39], dtype=np.float32)
    flushed = (tiny * np.float32(1))[0] == 0
    if flushed:
        torch.set_flush_denormal(False)
    try:
        yield
    finally:
        if flushed:
            torch.set_flush_denormal(True)


@_subnormals()
def step_(inputs, outputs, ring, coef, meta, row, row_index, keys, scale, bank, bank_index, bank_weight, clip, known,
          mask, status):
    check_step(inputs, outputs, ring, coef, meta, row, row_index, keys, scale, bank, bank_index, bank_weight, clip,
               known, mask, status)
    first = (inputs + outputs + ([] if ring is None else [ring[0]]))[0]
    if first.numel() == 0:
        return
    result = reference.step(
        [_flat(v) for v in inputs], _array(coef), _array(meta), row_index if row is None else _array(row),
        outputs=[_NAMES[v.dtype] for v in outputs],
        ring=None if ring is None else np.stack([_flat(slot) for slot in ring]),
        ring_dtype="float32" if ring is None else _NAMES[ring.dtype],
        keys=_array(keys), scale=_array(scale), bank=None if bank is None else _flat(bank),
        bank_index=_array(bank_index), bank_weight=_array(bank_weight), clip=_array(clip),
        known=None if known is None else _flat(known), mask=None if mask is None else _flat(mask),
        status=_array(status), batch=first.shape[0], numel=first[0].numel(),
    )
    for tensor, values in zip(outputs, result.outputs):
        _put(tensor, values)
    if ring is not None:
        for slot in np.flatnonzero(result.written.any(axis=(1, 2))):
            _put(ring[slot], result.ring[slot], torch.from_numpy(result.written[slot]))
    if status is not None:
        status.copy_(torch.from_numpy(result.status))


@_subnormals()
def normal_(out, keys):
    check_normal(out, keys)
    if out.numel():
        _put(out, reference.narrow(reference.normal(_array(keys), out[0].numel()), _NAMES[out.dtype]))


@_subnormals()
def project_(out, x, basis, index, gain, offset, weight, row, row_index):
    check_project(out, x, basis, index, gain, offset, weight, row, row_index)
    if out.numel():
        _put(out, reference.project(_flat(x), _flat(basis), _array(index), _array(gain), _array(offset), _array(weight),
                                    row_index if row is None else _array(row), count=out.shape[1]))


@_subnormals()
def lift_(out, basis, index, weight):
    check_lift(out, basis, index, weight)
    if out.numel():
        _put(out, reference.lift(_flat(basis), _array(index), _array(weight)))


@_subnormals()
def edit_(out, h, bank, index, weight):
    check_edit(out, h, bank, index, weight)
    if out.numel():
        _put(out, reference.edit(_stored(h), _flat(bank), _array(index), _array(weight), dtype=_NAMES[h.dtype],
                                 output=_NAMES[out.dtype]))


@_subnormals()
def quantile_(out, clip, inputs, coef, row, row_index, scale, q, low, high):
    check_quantile(out, clip, inputs, coef, row, row_index, scale, q, low, high)
    if len(inputs[0]):
        results = reference.quantile([_flat(v) for v in inputs], _array(coef), row_index if row is None else _array(row), q,
                                     scale=_array(scale), low=low, high=high)
        for tensor, values in zip((out, clip), results):
            if tensor is not None:
                _put(tensor, values)


def fold_in(keys, data):
    check_fold_in(keys, data)
    return torch.from_numpy(reference.fold_in(_array(keys), _array(data))).to(keys.device)


def run_keys(seeds, streams, draws):
    check_run_keys(seeds, streams, draws)
    return torch.from_numpy(reference.run_keys(_array(seeds), _array(streams), _array(draws))).to(seeds.device)


def raw_words(keys, count):
    check_raw_words(keys, count)
    return torch.from_numpy(reference.raw_words(_array(keys), 0, count).view(np.int32).copy()).to(keys.device)
