"""Runs recorded launches in the PTX executor, on the very memory of the tensors that they were recorded with.

Only bytes that belong to an element of a tensor are there: whatever else a kernel touches (what lies between two samples, or
beyond the last) is an error that names the instruction. What an op must not write cannot be written.
"""

import itertools
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from cases import assert_same, expected_case
from fastdiff import _reference_ops
from fastdiff.testing.inputs import moved
from proof import draw_steering
from ptx import Memory


class Recording(NamedTuple):
    """What an op returned, what it would have launched, and the tensors whose addresses it passed on."""

    result: Any
    launches: list
    tensors: list


def spans(tensor):
    """[(first byte, behind the last byte)] of the elements, as offsets into the tensor's storage; dense runs are one span."""
    if tensor.numel() == 0:
        return []
    size = run_ = tensor.element_size()
    outer = []
    for stride, length in sorted((s * size, n) for n, s in zip(tensor.shape, tensor.stride()) if n > 1 and s):
        if stride == run_ and not outer:
            run_ *= length
        else:
            outer.append(range(0, stride * length, stride))
    base = tensor.storage_offset() * size
    return [(base + sum(at), base + sum(at) + run_) for at in itertools.product(*outer)]


def _merged(ranges):
    out = []
    for low, high in sorted(ranges):
        if out and low <= out[-1][1]:
            out[-1][1] = max(out[-1][1], high)
        else:
            out.append([low, high])
    return out


def _less(ranges, taken):
    """What is left of merged ranges without other merged ranges."""
    out = []
    for low, high in ranges:
        for a, b in taken:
            if a < high and b > low:
                if low < a:
                    out.append([low, a])
                low = max(low, b)
        if low < high:
            out.append([low, high])
    return out


def memory_of(reads, writes):
    """A ``Memory`` of exactly the elements of these tensors."""
    storages = {}
    for writable, tensors in ((False, reads), (True, writes)):
        for t in tensors:
            storage = t.untyped_storage()
            entry = storages.setdefault(storage.data_ptr(), (storage, [], []))
            entry[1 + writable].extend(spans(t))
    memory = Memory()
    for storage, read, written in storages.values():
        data = torch.empty(0, dtype=torch.uint8).set_(storage).numpy()
        written = _merged(written)
        for writable, ranges in ((True, written), (False, _less(_merged(read), written))):
            for low, high in ranges:
                memory.map(data[low:high], address=storage.data_ptr() + low, writable=writable)
    return memory


def execute(recording, writes):
    """Runs the launches of a recording in order; only these tensors may be written. Returns the executor's counts."""
    memory = memory_of(recording.tensors, writes)
    return [one.run(memory) for one in recording.launches]


def written(case):
    """The tensors of a ``cases.Case`` that ``step_`` may write."""
    return [*case.outputs, *(t for t in (case.ring, case.status) if t is not None)]


def prove_step(case, backend, arch, expected=None, checked=True):
    """Records ``step_`` on a case, runs what would be launched, and compares every byte with the reference."""
    expected = expected_case(case) if expected is None else expected
    recording = backend.record(arch, "step_", *case.args()) if checked else backend.record_unchecked_step(arch, case)
    with _naming(recording):
        execute(recording, written(case))
        assert_same(case, expected)
    return recording


def prove(backend, arch, expected, op, *args, out=None):
    """The same of any other op. expected: what ``out``, or what the op returns, must hold in the end."""
    recording = backend.record(arch, op, *args)
    out = recording.result if out is None else out
    if recording.result is not None:
        recording.result.fill_(-0x5A5A5A5B)  # memory as it comes may hold what an earlier run wrote
    with _naming(recording):
        execute(recording, [out])
        assert torch.equal(_bytes(out), _bytes(expected)), f"{op}: {int((out != expected).sum())} of {out.numel()} elements differ"
    return recording


def prove_vectors(backend, arch, op, args, checked=True):
    """The same of an op on vectors, which writes its first argument."""
    copies = list(moved(dict(enumerate(args)), "cpu").values())
    getattr(_reference_ops, op)(*(copies if checked else draw_steering.within(op, copies)))
    recording = (backend.record if checked else backend.record_unchecked)(arch, op, *args)
    own = allocated(recording, args)
    for t in own:
        t.view(torch.int32).fill_(0x7FC5A5A5)  # NaN: what is read before it was written is noticed
    with _naming(recording):
        execute(recording, [args[0], *own])
        out, expected = args[0], copies[0]
        if not torch.equal(_bytes(out), _bytes(expected)):
            wrong = int((out.contiguous().view(torch.uint8) != expected.contiguous().view(torch.uint8)).sum())
            raise AssertionError(f"{op}: {wrong} bytes of {out.numel()} elements differ from what is expected")
    return recording


def prove_quantile(case, backend, arch, checked=True):
    """The same of ``quantile_`` on a ``quantile_cases.QuantileCase``. Its counts begin as zeros, as the op makes them."""
    expected = case.expected()
    recording = (backend.record if checked else backend.record_unchecked)(arch, "quantile_", *case.args())
    with _naming(recording):
        execute(recording, [*case.written(), *allocated(recording, case.args())])
        assert_same(case, expected)
    return recording


def allocated(recording, args):
    """The tensors that an op has made for itself: launches write there for those that follow."""
    every = [t for arg in args for t in (arg if isinstance(arg, list) else [arg])]
    given = {t.untyped_storage().data_ptr() for t in every if isinstance(t, torch.Tensor)}
    own = {t.untyped_storage().data_ptr(): t for t in recording.tensors}
    return [t for at, t in own.items() if at not in given]


@contextmanager
def _naming(recording):
    """An exception of here knows the kernel that it is about."""
    try:
        yield
    except Exception as error:
        error.kernel = recording.launches[0].kernel
        raise


def _bytes(tensor):
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
