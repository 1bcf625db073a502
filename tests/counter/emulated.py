"""Emulated CUDA tensors on the CPU, and a count of what a GPU would have been asked to do.

Inside ``with Gpu(latent) as gpu`` a tensor made on "cuda" says that it is on a GPU and keeps its data on the CPU, so that
results are real and can be compared with those of a CPU run bit by bit. Every op that reaches the dispatcher is counted:
one aten op is one kernel, and so is one op of fastdiff's, but for those in ``LAUNCHES``; views and metadata are none. What PyTorch does inside an op on a
GPU and not here is written down in ``_HOST_READS``, ``_copy`` and ``_indices``. Two things stay out of sight: ops that
launch several kernels (a sort), and what the driver and the allocator do.
"""

from collections import Counter
from dataclasses import dataclass, field, fields

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

DEVICE = torch.device("cuda", 0)
aten = torch.ops.aten


@dataclass
class Counts:
    """What the GPU was asked for since the last ``Gpu.take``.

    big, small: kernels that touch a tensor of at least the latent's size, and others; reads: the host waited for a value
    (``.item``, ``bool()``, ``nonzero``); h2d, d2h: copies; waits: reads, and copies that block; cpu: ops on CPU tensors;
    graphs: replays of captured graphs, whose kernels are not in big and small but in replayed. ops: all of it by name.
    """

    big: int = 0
    small: int = 0
    reads: int = 0
    h2d: int = 0
    d2h: int = 0
    waits: int = 0
    cpu: int = 0
    graphs: int = 0
    ops: Counter = field(default_factory=Counter)
    replayed: Counter = field(default_factory=Counter)

    @property
    def launches(self) -> int:
        return self.big + self.small

    @property
    def copies(self) -> int:
        return self.h2d + self.d2h

    def numbers(self) -> dict[str, int]:
        return {f.name: getattr(self, f.name) for f in fields(self) if f.type is int}


class Emulated(torch.Tensor):
    """A tensor that reports a CUDA device; ``inner`` has its data on the CPU."""

    @staticmethod
    def __new__(cls, inner):
        self = torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype, device=DEVICE)
        self.inner = inner
        return self

    def __repr__(self):
        return f"Emulated({self.inner})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(f"{func}: an emulated CUDA tensor is used outside of `with Gpu(...)`")


# The norms, then the edit; the counts of four digits, then the quantile. tests/proof/test_vectors.py counts what the launchers do.
LAUNCHES = {"fastdiff.edit_": 2, "fastdiff.quantile_": 5}
_RESHAPE_IN_PLACE = {
    aten.squeeze_.dim, aten.squeeze_.default, aten.squeeze_.dims, aten.unsqueeze_.default, aten.t_.default,
    aten.transpose_.default,
}
METADATA = {
    *_RESHAPE_IN_PLACE,
    aten.empty.memory_format, aten.empty_strided.default, aten.empty_like.default, aten.new_empty.default,
    aten.new_empty_strided.default, aten._unsafe_view.default, aten._reshape_alias.default,
}
_HOST_READS = {  # the result's size, or a decision, waits for the device
    aten.equal.default, aten.nonzero.default, aten.masked_select.default, aten._unique2.default, aten.unique_dim.default,
    aten.unique_consecutive.default, aten.repeat_interleave.Tensor, aten.bincount.default, aten._linalg_check_errors.default,
}
_INDEXED = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default}


def _inner(tree):
    return tree_map_only(Emulated, lambda t: t.inner, tree)


# What looks up the device's guard, which a torch without CUDA lacks, before it calls an op.
_GUARDED = {getattr(torch.Tensor, name) for name in (
    "__getitem__", "__setitem__", "copy_", "item", "__bool__", "__float__", "__int__", "__index__", "contiguous", "nonzero")}
_GUARDED.add(torch.nonzero)


class _AboveTheDispatcher(TorchFunctionMode):
    """What torch's Python bindings do for a device that this torch was not built for."""

    def __init__(self, gpu):
        super().__init__()
        self.gpu = gpu

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.cuda:
            return args[0].to(DEVICE, **kwargs)
        if func is torch.Tensor.tolist and isinstance(args[0], Emulated):
            return args[0].cpu().tolist()  # as torch does for CUDA tensors, and does not for subclasses
        if func in _GUARDED and isinstance(args[0], Emulated):
            return self.gpu.on_inner(func, args, kwargs)
        if kwargs.get("device") is not None:  # "cuda" is "cuda:0": nobody here knows which is the current one
            kwargs["device"] = _indexed(kwargs["device"])
        if func is torch.Tensor.to:
            args = tuple(_indexed(a) if isinstance(a, (str, torch.device)) else a for a in args)
        return func(*args, **kwargs)


def _indexed(device):
    device = torch.device(device)
    return DEVICE if device.type == "cuda" else device


class _Generator(torch.Generator):
    """A generator for any device draws on the CPU."""

    def __new__(cls, device="cpu"):
        return super().__new__(cls, device="cpu")


class Gpu(TorchDispatchMode):
    """Makes CUDA tensors possible and counts. latent: elements from which on a tensor counts as big."""

    def __init__(self, latent: int):
        super().__init__()
        self.latent = latent
        self.counts = Counts()
        self.tape = None  # where the work of a capture is recorded, see counter.graphs
        self._bindings = _AboveTheDispatcher(self)
        self._stand_ins = {}  # inner tensors that stand for emulated ones while `index` runs

    def take(self) -> Counts:
        """The counts since the last time, and a new start."""
        counts, self.counts = self.counts, Counts()
        return counts

    def __enter__(self):
        self._before = torch._C._only_lift_cpu_tensors(), torch.cuda._lazy_init, torch.Generator
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device="cuda") then copies where we see it
        torch.cuda._lazy_init, torch.Generator = lambda: None, _Generator
        self._bindings.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self._bindings.__exit__(*error)
        only_lift, torch.cuda._lazy_init, torch.Generator = self._before
        torch._C._set_only_lift_cpu_tensors(only_lift)

    def on_inner(self, func, args, kwargs):
        """x[i], x.copy_(v), float(x) and others make the device the current one before they call an op. So they run on the
        inner tensors, and the ops that they call are taken for what they would have been."""
        self._stand_ins = {id(t.inner): t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Emulated)}
        try:
            if func is torch.Tensor.__setitem__ and not isinstance(args[2], torch.Tensor):
                self._launch("aten.scalar_tensor", [])
            result = func(*_inner(args), **_inner(kwargs))
            return tree_map_only(torch.Tensor, lambda t: self._stand_ins.get(id(t), t), result)
        finally:
            self._stand_ins = {}

    # ---- one op

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not self._stand_ins:
            return self._op(func, args, dict(kwargs or {}))
        args, kwargs = tree_map_only(torch.Tensor, lambda t: self._stand_ins.get(id(t), t), (args, kwargs or {}))
        result = self._op(func, args, kwargs)
        self._stand_ins |= {id(t.inner): t for t in tree_flatten(result)[0] if isinstance(t, Emulated)}
        return _inner(result)

    def _op(self, func, args, kwargs):
        if func.namespace == "aten" and func._can_decompose():
            return self._decomposed(func, args, kwargs)
        tensors = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, torch.Tensor)]
        there = any(isinstance(t, Emulated) for t in tensors)
        target = kwargs.pop("device", None)
        on_gpu = there if target is None else torch.device(target).type == "cuda"
        if target is not None:
            kwargs["device"] = torch.device("cpu")
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        if there or on_gpu:
            self._check_devices(func, tensors)
        inner_args, inner_kwargs = _inner(args), _inner(kwargs)
        if self.tape is not None and there:
            self.tape.before(func, inner_args, inner_kwargs)
        result = func(*inner_args, **inner_kwargs)
        if self.tape is not None and on_gpu:
            self.tape.record(func, inner_args, inner_kwargs, result)
        self._reshape_in_place(func, args, kwargs, tensors)
        touched = tensors + [t for t in tree_flatten(result)[0] if isinstance(t, torch.Tensor)]
        self._note(func, args, kwargs, touched, there, on_gpu)
        return self._wrapped(result, tensors, on_gpu)

    def _decomposed(self, func, args, kwargs):
        """Under inference mode, composite ops come here in one piece."""
        TorchDispatchMode.__enter__(self)
        try:
            return func.decompose(*args, **kwargs)
        finally:
            TorchDispatchMode.__exit__(self, None, None, None)

    def _note(self, func, args, kwargs, touched, there, on_gpu):
        name = str(func).removesuffix(".default")
        if func in (aten.copy_.default, aten._to_copy.default):
            self._copy(name, func, args, on_gpu, kwargs, touched)
        elif func is aten._local_scalar_dense.default and there:
            self._wait("reads", name)
        elif func.is_view or func in METADATA:
            return
        elif not (there or on_gpu):
            self._count("cpu", name)
        else:
            if func in _INDEXED:
                self._indices(name, args[1])
            if func in _HOST_READS:
                self._wait("reads", name)
            if any(t.numel() for t in touched):
                for _ in range(LAUNCHES.get(name, 1)):
                    self._launch(name, touched)

    def _count(self, what, name, number=1):
        setattr(self.counts, what, getattr(self.counts, what) + number)
        self.counts.ops[name if what in ("big", "small") else f"{what}: {name}"] += number

    def _wait(self, what, name):
        if self.tape is not None:
            raise RuntimeError(f"{name}: operation not permitted when stream is capturing")
        self._count(what, name)
        self.counts.waits += 1

    def _launch(self, name, tensors):
        if self.tape is not None:
            self.tape.kernels[name] += 1
        else:
            self._count("big" if max((t.numel() for t in tensors), default=0) >= self.latent else "small", name)

    def _copy(self, name, func, args, on_gpu, kwargs, touched):
        """Between devices a copy waits, unless it is asked not to; a GPU packs what is not contiguous in a kernel."""
        in_place = func is aten.copy_.default
        source, to_gpu = args[in_place], isinstance(args[0], Emulated) if in_place else on_gpu
        from_gpu = isinstance(source, Emulated)
        if not (to_gpu or from_gpu):
            self._count("cpu", name)
        elif to_gpu and from_gpu:
            self._launch(name, touched)
        else:
            on_its_side = source if from_gpu else args[0]
            if isinstance(on_its_side, Emulated) and not on_its_side.is_contiguous():
                self._launch(f"{name} (packed)", touched)
            blocks = not (kwargs.get("non_blocking") or (in_place and len(args) > 2 and args[2]))
            self._wait("d2h" if from_gpu else "h2d", name)
            self.counts.waits -= not blocks

    def _indices(self, name, indices):
        """Indices on the CPU are copied over; a mask is first turned into indices, whose number the host must know."""
        for index in indices:
            if index is not None and not isinstance(index, Emulated):
                self._wait("h2d", f"{name} (indices)")
            if index is not None and index.dtype in (torch.bool, torch.uint8):
                self._wait("reads", f"{name} (mask)")

    @staticmethod
    def _check_devices(func, tensors):
        """What a GPU refuses: tensors on the CPU beside tensors on it, but for numbers, for indices and for copies."""
        if func in _INDEXED or func in (aten.copy_.default, aten._to_copy.default):
            return
        for t in tensors:
            numbers = t.ndim == 0 and func.namespace != "fastdiff" and func not in (aten.cat.default, aten.stack.default)
            if not isinstance(t, Emulated) and not numbers:
                raise RuntimeError(f"{func}: expected all tensors to be on the same device, found {DEVICE} and {t.device}")

    @staticmethod
    def _reshape_in_place(func, args, kwargs, tensors):
        """squeeze_ and the like: what the op did to the inner tensor's shape is done to the outer one too."""
        if all(t.shape == t.inner.shape and t.stride() == t.inner.stride() for t in tensors if isinstance(t, Emulated)):
            return
        if func not in _RESHAPE_IN_PLACE:
            raise NotImplementedError(f"{func} changes the shape of an emulated tensor in place")
        with no_dispatch():
            func(*args, **kwargs)

    @staticmethod
    def _wrapped(result, tensors, on_gpu):
        """What the op returns: an argument itself where it was changed in place, else a new emulated tensor."""
        if not on_gpu:
            return result
        same = {id(t.inner): t for t in tensors if isinstance(t, Emulated)}
        return tree_map_only(torch.Tensor, lambda t: same[id(t)] if id(t) in same else Emulated(t), result)
