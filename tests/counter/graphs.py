"""CUDA graphs for emulated tensors: work is recorded op by op, and a replay does it again in the same tensors.

While a graph is captured nothing happens to the data, as on a GPU: what was written is put back, and what was made holds
NaN until the first replay. So whatever the host decided during the capture is frozen, and shows. What would wait for the
device is refused.
"""

import contextlib
from collections import Counter

import torch
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_flatten

from counter.emulated import METADATA, Gpu


def _tensors(tree):
    return [t for t in tree_flatten(tree)[0] if isinstance(t, torch.Tensor)]


def _written(func, args, kwargs):
    """The arguments that an op changes, by its schema."""
    given = [*zip(func._schema.arguments, args)] + [(a, kwargs[a.name]) for a in func._schema.arguments if a.name in kwargs]
    return _tensors([value for argument, value in given if argument.alias_info is not None and argument.alias_info.is_write])


class Tape:
    """What a graph holds: ops with the very tensors that they read and write."""

    def __init__(self):
        self.kernels = Counter()  # filled by Gpu
        self._entries, self._before, self._made = [], {}, []

    def before(self, func, args, kwargs):
        for t in _written(func, args, kwargs):
            storage = t.untyped_storage()
            if storage.data_ptr() not in self._before:
                with _disable_current_modes():
                    self._before[storage.data_ptr()] = storage, storage.clone()

    def record(self, func, args, kwargs, result):
        if not (func.is_view or func in METADATA):
            self._entries.append((func, args, kwargs, result))
        given = {t.untyped_storage().data_ptr() for t in _tensors((args, kwargs))}
        self._made += [t for t in _tensors(result) if t.untyped_storage().data_ptr() not in given]

    def end(self):
        with _disable_current_modes():
            for storage, content in self._before.values():
                storage.copy_(content)
            for t in self._made:
                t.untyped_storage().fill_(255)  # NaN, or -1

    def replay(self):
        with _disable_current_modes():
            for func, args, kwargs, result in self._entries:
                again = func(*args, **kwargs)
                if not _written(func, args, kwargs):
                    for old, new in zip(_tensors(result), _tensors(again), strict=True):
                        old.copy_(new)


class _Stream:
    """Streams run one after the other here; what waits for what is kept for the tests to see."""

    def __init__(self, log, name):
        self.log, self.name = log, name

    def wait_stream(self, other):
        self.log.append(f"{self.name} waits for {other.name}")


class EmulatedGraphs:
    """Stands in for torch.cuda's graphs and streams. log: captures, replays and what waited for what, in order."""

    def __init__(self, gpu: Gpu, monkeypatch):
        self.gpu, self.log = gpu, []
        stand_in = self
        self.stream = self.main = _Stream(self.log, "main")

        class Graph:
            def replay(self):
                if gpu.tape is not None:
                    raise RuntimeError("a replay while another graph is captured")
                self.tape.replay()
                gpu.counts.graphs += 1
                gpu.counts.replayed += self.tape.kernels
                stand_in.log.append("replay")

        @contextlib.contextmanager
        def graph(into, stream):
            into.tape = gpu.tape = Tape()
            try:
                with on(stream):
                    yield
            finally:
                gpu.tape = None
                into.tape.end()
                self.log.append("capture")

        @contextlib.contextmanager
        def on(stream):
            before, self.stream = self.stream, stream
            self.log.append(f"on {stream.name}")
            try:
                yield
            finally:
                self.stream = before
                self.log.append(f"back on {before.name}")

        def stream(device=None):
            return _Stream(self.log, "side" if device is None else f"capture of {device}")

        for name, value in {
            "CUDAGraph": Graph, "graph": graph, "stream": on, "Stream": stream, "current_stream": lambda: self.stream,
            "device": lambda device: contextlib.nullcontext(),
            # Emulated tensors draw from the CPU's generator, which torch.random.fork_rng keeps too.
            "get_rng_state": lambda device: torch.empty(0, device="cpu"), "set_rng_state": lambda state, device: None,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr("fastdiff.ops.chosen", lambda device: "cuda")
