"""Two evaluations of a network that differ behind one block: what lies before the block is computed once.

Amplification of a concept, eps = eps0 + s (eps1 - eps0), takes the network twice, without the edit and with it. Up to the
edited block both are the same. So the first evaluation keeps what the modules returned that had finished when the block had,
the outermost of them only; in the second one these modules return what was kept, and only what lies between them (Python, a
concatenation, a residual sum) and what lies behind the block is computed. Nothing has to be known of the network: the order of
the calls says which modules come before the block. Where the block is the last of a U-Net's encoder, the encoder is shared.

The second evaluation has the bits of a whole one. What could spoil that is looked at, and computed again:

- a tensor that something wrote into after a module had returned it, as torch's version counters tell (``torch.inference_mode``
  has none: the first evaluation leaves it, for ``torch.no_grad``),
- a module that writes into its arguments (an activation in place, a list that grows), or that takes or returns objects other
  than tensors, numbers, text and containers of them: it may do something beside returning a value,
- a call that comes in another order than in the first evaluation, and all that follow it,
- a further call of the whole network in one evaluation (a model that calls it for the condition, then without it), unless
  its arguments have the values that they had: the first call could have changed them.

A module is taken for a function of its arguments, parameters and buffers. Random numbers drawn before the block are not drawn
again.
"""

import warnings
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch
from torch.utils import _pytree as pytree

from .collect import find_block

__all__ = ["Branch", "inside_compiled"]

_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)

_found: WeakKeyDictionary[torch.nn.Module, dict] = WeakKeyDictionary()
"""By network and blocks, the names of the modules worth keeping, found by a first evaluation, which looks at all of them; and of
those that it called."""


class Branch:
    """A network's evaluations that share what lies before the first of some blocks.

        branch = Branch(network, ["enc.2"])
        with branch.first():
            eps0 = model(x, t)
        with branch.second(), edited(network, "enc.2", direction, weight):
            eps1 = model(x, t)

    network: any module; blocks: names of ``network.named_modules()``; model: what calls the network, with the same arguments both
    times. ``second`` may follow a ``first`` several times. Inside, the ``forward`` of modules is replaced; outside it is what it
    was, whatever happened. The kept outputs live until the next ``first``, or ``forget``.

    ``shared``: names of the modules that the last second evaluation did not compute, in the order of their calls;
    ``computed``: those that it did although they had finished before the block, with the reason.
    Raises ``ValueError`` or ``TypeError`` for a block that is not there.
    """

    def __init__(self, network: torch.nn.Module, blocks: Sequence[str]):
        blocks = [blocks] if isinstance(blocks, str) else list(blocks)
        self._blocks = [find_block(network, name) for name in blocks]
        self._network = network
        self._names = {module: name for name, module in network.named_modules()}
        self._compiled = inside_compiled(network)
        found, self._called = _found.get(network, {}).get(tuple(blocks), (set(), set()))
        known = {module for module, name in self._names.items() if name in found and module not in self._compiled}
        self._outermost = known or None  # None: not known yet
        self._warned = False
        self._frames = None
        self.shared: tuple[str, ...] = ()
        self.computed: dict[str, str] = {}

    @contextmanager
    def first(self):
        """The evaluation without the edit, which is kept. Modules outside of it are not looked at."""
        self._frames = None
        recorder = _Recorder(self._network, self._blocks)
        with _versions(), _forwards({module: recorder.forward(module) for module in self._watched()}):
            yield
        recorder.end()
        self._frames = recorder.frames
        kept = {call.module for frame in self._frames for call in frame.calls}
        if kept:  # a model that does not come to the block says nothing about it
            as_before = self._outermost is None or kept == self._outermost
            self._outermost = kept if as_before else None  # called in another way: all of them are looked at next time
            found = {self._names[module] for module in self._outermost or ()}
            self._called = self._called | {self._names[module] for module in recorder.called} if as_before else set()
            _found.setdefault(self._network, {})[tuple(self._names[block] for block in self._blocks)] = found, self._called

    @contextmanager
    def second(self):
        """The evaluation with the edit: what was kept is returned, the rest is computed."""
        if self._frames is None:
            self.shared, self.computed = (), {}
            yield
            return
        replay = _Replay(self._frames, self._network)
        modules = {call.module for frame in self._frames for call in frame.calls} | {self._network}
        with _forwards({m: replay.forward(m) for m in modules}):
            yield
        self.shared = tuple(dict.fromkeys(self._names[m] for m in replay.shared))
        self.computed = {self._names[m]: reason for m, reason in replay.computed.items()}
        if not self.shared:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in self.computed.items())
            self._warn(reasons or "no module had finished when the block had")

    def forget(self) -> None:
        """Lets go of the kept outputs."""
        self._frames = None

    def _watched(self):
        if self._outermost is None:
            return [m for m in self._names if m not in self._compiled]
        # Modules that the finding evaluation did not call may be called now: they are looked at too.
        others = {m for m, name in self._names.items() if name not in self._called and m not in self._compiled}
        return {*others, *self._outermost, *self._blocks, self._network}

    def _warn(self, reason):
        if not self._warned:
            self._warned = True
            blocks = ", ".join(repr(self._names[m]) for m in self._blocks)
            warnings.warn(f"nothing before block {blocks} is shared, each evaluation is a whole one: {reason}", stacklevel=4)


def inside_compiled(network) -> set:
    """Modules that Python does not call: those inside of a compiled one, and scripted ones."""
    inside = set()
    for module in network.modules():
        if "_orig_mod" in module._modules:  # what torch.compile returns; its own call is Python's
            inside.update(module._orig_mod.modules())
        elif isinstance(module, torch.jit.ScriptModule) or module._compiled_call_impl is not None:
            inside.update(module.modules())
    return inside


@contextmanager
def _versions():
    """Tensors have version counters. Those of an inference mode around it have none, but in here nobody can write into them."""
    if not torch.is_inference_mode_enabled():
        yield
    else:
        with torch.inference_mode(False), torch.no_grad():
            yield


@contextmanager
def _forwards(replacements: dict):
    """``forward`` of some modules is replaced, on the instance: their hooks stay as they are. Undone whatever happens."""
    missing, before = object(), {}
    try:
        for module, make in replacements.items():
            before[module] = module.__dict__.get("forward", missing)
            module.__dict__["forward"] = make(module.forward)
        yield
    finally:
        for module, forward in reversed(before.items()):
            if forward is missing:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = forward


# ---- what a call took and returned


class _Values:
    """The tensors of nested containers as they are now, and whether something has written into them since."""

    def __init__(self, tree):
        self.leaves, self.spec = pytree.tree_flatten(tree)
        self.tensors = [leaf for leaf in self.leaves if isinstance(leaf, torch.Tensor)]
        self.plain = all(isinstance(leaf, (torch.Tensor, *_PLAIN)) for leaf in self.leaves)
        self._versions = self._now()

    def _now(self):
        return [0 if t.is_inference() else t._version for t in self.tensors]

    def written(self) -> bool:
        return self._versions != self._now()

    def holds(self, tree) -> bool:
        """Whether the containers still hold the same things."""
        leaves, spec = pytree.tree_flatten(tree)
        return spec == self.spec and len(leaves) == len(self.leaves) and all(a is b for a, b in zip(leaves, self.leaves))

    def equal(self, tree) -> bool:
        """Whether other containers hold equal values. On a GPU this waits for the device."""
        leaves, spec = pytree.tree_flatten(tree)
        if spec != self.spec or not self.plain or self.written():
            return False
        return all(a is b or _same_value(a, b) for a, b in zip(leaves, self.leaves))

    def again(self):
        """The same tensors in new containers: what the caller did to the old ones is not seen."""
        return pytree.tree_unflatten(self.leaves, self.spec)


def _same_value(a, b) -> bool:
    if not isinstance(a, torch.Tensor):
        return type(a) is type(b) and a == b
    if not isinstance(b, torch.Tensor) or a.requires_grad or b.requires_grad:
        return False
    if (a.shape, a.dtype, a.device, a.stride()) != (b.shape, b.dtype, b.device, b.stride()):
        return False
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}.get(a.itemsize) if a.is_floating_point() else None
    return torch.equal(a.view(bits), b.view(bits)) if bits else torch.equal(a, b)


class _Call:
    """One finished call of a module: what it returned, or why that cannot stand for it."""

    def __init__(self, module, output: _Values, reason: str | None):
        self.module, self._output, self._reason = module, output, reason

    def reason(self) -> str | None:
        if self._reason is None and self._output.written():
            return "its output was written into"
        return self._reason

    def output(self):
        return self._output.again()


class _Frame:
    """One call of the whole network, or what is called outside of any: the calls that finished before the block had."""

    def __init__(self, arguments: _Values | None = None):
        self.arguments = arguments  # to be compared: None where nothing can have been edited yet
        self.levels = [[]]  # finished calls, one list for each call that is still open
        self.calls: list[_Call] = []
        self.reached = False

    def close(self):
        self.reached = True
        self.calls = [call for level in self.levels for call in level]
        self.levels = [[]]


class _Evaluation:
    """What stands in for the modules' ``forward`` while a model runs. Subclasses say which frame a call of the network enters,
    ``_entered(args, kwargs)``, and what a module's call does, ``_of_module(module, forward)``."""

    def __init__(self, network, outside: _Frame):
        self._network, self._outside, self._frame = network, outside, outside

    def forward(self, module) -> Callable:
        return self._of_network if module is self._network else lambda forward: self._of_module(module, forward)

    def _of_network(self, forward):
        def call(*args, **kwargs):
            if self._frame is not self._outside:  # a network that calls itself
                return forward(*args, **kwargs)
            self._frame = self._entered(args, kwargs)
            try:
                return forward(*args, **kwargs)
            finally:
                self._frame = self._outside

        return call


class _Recorder(_Evaluation):
    """The first evaluation."""

    def __init__(self, network, blocks):
        super().__init__(network, _Frame())
        self._blocks = set(blocks)
        self.called: set[torch.nn.Module] = set()
        self.frames = [self._outside]

    def _entered(self, args, kwargs):
        edited = any(frame.reached for frame in self.frames)
        self.frames.append(_Frame(_Values((args, kwargs)) if edited else None))
        return self.frames[-1]

    def _of_module(self, module, forward):
        def call(*args, **kwargs):
            frame = self._frame
            self.called.add(module)
            if frame.reached or frame is self._outside and any(f.reached for f in self.frames):
                return forward(*args, **kwargs)
            given = _Values((args, kwargs))
            depth = len(frame.levels)
            frame.levels.append([])
            try:
                output = forward(*args, **kwargs)
            except BaseException:  # the model may catch it, and go on
                if not frame.reached:
                    del frame.levels[depth:]
                    frame.levels[-1].append(_Call(module, given, "it raised an error"))
                raise
            if frame.reached:  # the block lies inside
                return output
            del frame.levels[depth:]
            frame.levels[-1].append(self._finished(module, given, args, kwargs, output))
            if module in self._blocks:
                frame.close()
            return output

        return call

    def _finished(self, module, given, args, kwargs, output):
        output = _Values(output)
        reason = None
        if given.written() or not given.holds((args, kwargs)):
            reason = "it writes into its arguments"
        elif not given.plain:
            reason = "it takes an object that cannot be looked into"
        elif not output.plain:
            reason = "it returns an object that cannot be looked into"
        return _Call(module, output, reason)

    def end(self):
        """Calls of the network that do not come to the block are kept too, if another one comes to it."""
        if any(frame.reached for frame in self.frames):
            for frame in self.frames:
                if not frame.reached:
                    frame.close()


class _Replay(_Evaluation):
    """The second evaluation."""

    def __init__(self, frames, network):
        super().__init__(network, frames[0])
        self._frames = frames  # their ids are theirs as long as they live
        self._left = iter(frames[1:])
        self._places = {id(frame): iter(frame.calls) for frame in frames}
        self._off, self._depth = set(), 0
        self.shared: list = []
        self.computed: dict = {}

    def _entered(self, args, kwargs):
        frame = next(self._left, _Frame())
        if frame.arguments is not None and not frame.arguments.equal((args, kwargs)):
            self._off.add(id(frame))
        return frame

    def _of_module(self, module, forward):
        def call(*args, **kwargs):
            kept = self._next(module)
            if kept is not None:
                reason = kept.reason()
                if reason is None:
                    self.shared.append(module)
                    return kept.output()
                self.computed[module] = reason
            self._depth += 1
            try:
                return forward(*args, **kwargs)
            finally:
                self._depth -= 1

        return call

    def _next(self, module) -> _Call | None:
        """What was kept of this call: the outermost calls come in the order in which they came."""
        frame = self._frame
        if self._depth or id(frame) in self._off or id(frame) not in self._places:
            return None
        kept = next(self._places[id(frame)], None)
        if kept is None or kept.module is not module:
            self._off.add(id(frame))
            return None
        return kept
