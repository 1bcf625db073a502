"""diffusers' schedulers with a fused step.

    import fastdiff.integrations.diffusers

    pipe = fd.integrations.diffusers.fuse(pipe)

The scheduler stays an instance of its class. Its ``step`` becomes one call of the step op, with coefficients found by
``probing``: what the scheduler keeps of earlier steps is kept by the run, its counters stay where they were. A step that
no row can express is the scheduler's own, and a warning says so once.

Steering acts in the same call of the op, or, for concepts, in the pipeline's network.
"""

from __future__ import annotations

import copy
import functools
import logging
import warnings
from collections.abc import Sequence

import torch
from diffusers import DiffusionPipeline, SchedulerMixin

from .. import ops
from ..checks import FLOATS, dense
from ..noise import unknown
from ..steering.inject import Injection
from . import rows, spread
from .calls import BASIS, Call, NotLinear, Signature
from .injected import Injected, network_of
from .paths import along_path
from .probing import Node
from .runs import OWN, Draws, Run, check_generators, drawn
from .state import filled
from .steered import Steered, SteeredSteps, checked
from .timesteps import Unusual, check_order, host_time

__all__ = ["BROWNIAN", "NOISES", "fuse"]

NOISES = ("torch", "philox")
BROWNIAN = ("torchsde",)
_log = logging.getLogger("fastdiff")
_PLAIN = (type(None), bool, int, float, str)
_SHARED = (OWN + "steering", OWN + "injected")  # by all copies of a scheduler


def fuse(pipe_or_scheduler, noise: str = "torch", steering: Sequence = (), *, brownian: str | None = None):
    """The same pipeline, or the same scheduler, with a fused ``step``.

    pipe_or_scheduler: a pipeline, whose ``scheduler`` is replaced and which is returned; or a scheduler, of which a fused
    copy is returned, an instance of its class. Saved configurations name the class of diffusers: fuse again after loading.

    noise: "torch": drawn with the given generator as the scheduler itself draws, so that the picture is the same, up to
    rounding. "philox": drawn inside of the step, each sample from a seed of its own, which the generator gives at the first
    draw after ``set_timesteps``: a list of generators one each, one generator (or torch's default one) a seed s, and sample
    b takes s + b. Noise along a Brownian path is that of ``fastdiff.brownian``: one path a seed, for any number of steps.

    brownian: whence noise along a Brownian path comes (DPMSolverSDEScheduler, CosineDPMSolverMultistepScheduler). None: as
    `noise` says, "torch" being torchsde's tree as the scheduler itself makes it; "torchsde": that tree beside "philox" too.

    steering: actions, as ``fd.sample`` takes them. They act on the output that ``step`` is given (after a pipeline's own
    guidance), at the noise level of the call, m + u / b with d = a x + b m: noise alignment, latent vectors, guidance by
    classifiers of noisy images. Concepts act in the network that the pipeline calls, from ``set_timesteps`` to the last step of a
    run. Windows are checked by ``set_timesteps``, concepts and their network here, shapes and weights by the first step.

    A step that no row can express (learned variance, timesteps of each sample where there is a history) is the scheduler's own,
    and a warning says so once. A step raises ``ValueError`` for a timestep out of order where the scheduler
    counts its steps, a latent of another shape than the history's, and a list of generators of another length than the batch.

    Raises ``TypeError`` for what is neither and for actions that cannot act in a step, ``ValueError`` for a scheduler without
    ``step``, another noise, or a concept of another network.

    >>> from diffusers import EulerDiscreteScheduler
    >>> import fastdiff as fd, fastdiff.integrations.diffusers
    >>> scheduler = fd.integrations.diffusers.fuse(EulerDiscreteScheduler())
    >>> isinstance(scheduler, EulerDiscreteScheduler)
    True
    """
    if noise not in NOISES:
        raise ValueError(unknown("noise", noise, NOISES))
    if brownian is not None and brownian not in BROWNIAN:
        raise ValueError(unknown("brownian", brownian, BROWNIAN))
    made = noise, brownian
    steering = checked(steering)
    if isinstance(pipe_or_scheduler, SchedulerMixin):
        return _fused(pipe_or_scheduler, made, steering, pipe_or_scheduler)
    parts = [name for name, part in getattr(pipe_or_scheduler, "__dict__", {}).items() if isinstance(part, DiffusionPipeline)]
    if parts:
        raise ValueError(f"{type(pipe_or_scheduler).__name__} steps the schedulers of its own pipelines: fuse {' and '.join(parts)}, "
                         "one by one")
    scheduler = getattr(pipe_or_scheduler, "scheduler", None)
    if not isinstance(scheduler, SchedulerMixin):
        raise TypeError(
            f"pipe_or_scheduler is {type(pipe_or_scheduler).__name__}: a pipeline with a scheduler, or a scheduler of "
            "diffusers is taken"
        )
    pipe_or_scheduler.scheduler = _fused(scheduler, made, steering, pipe_or_scheduler)
    return pipe_or_scheduler


def _fused(scheduler, made, steering, whole):
    parent = getattr(type(scheduler), OWN + "parent", type(scheduler))
    fused = object.__new__(_fused_class(parent, *made))
    state = scheduler._fastdiff_plain() if isinstance(scheduler, _Fused) else scheduler.__dict__
    concepts = [action for action in steering if isinstance(action, Injection)]
    own = {OWN + "steering": steering} if steering else {}
    if concepts:
        own[OWN + "injected"] = Injected(concepts, network_of(whole, concepts))
    if isinstance(scheduler, _Fused):
        scheduler._fastdiff_end()
    fused.__dict__.update(copy.deepcopy(state), **own)
    return fused


@functools.cache
def _fused_class(parent: type, noise: str, brownian: str | None) -> type:
    """A subclass of a scheduler's class, under the same name: pipelines save the name, and ask for the signatures."""
    method = next((name for name in ("step", "step_pred") if callable(getattr(parent, name, None))), None)
    if method is None:
        raise ValueError(f"{parent.__name__} has no step: a scheduler with step(model_output, timestep, sample, ...) is taken")
    names = {
        OWN + "parent": parent,
        OWN + "noise": noise,
        OWN + "brownian": brownian,
        OWN + "method": method,
        OWN + "signature": Signature(getattr(parent, method)),
        "__module__": parent.__module__,
        "__qualname__": parent.__qualname__,
        "__doc__": parent.__doc__,
    }

    @functools.wraps(getattr(parent, method))
    def step(self, *args, **kwargs):
        return self._fastdiff_step(args, kwargs)

    names[method] = step
    if callable(getattr(parent, "set_timesteps", None)):

        @functools.wraps(parent.set_timesteps)
        def set_timesteps(self, *args, **kwargs):
            self.__dict__[OWN + "run"] = self.__dict__[OWN + "draws"] = None
            self._fastdiff_end()
            result = parent.set_timesteps(self, *args, **kwargs)
            run = self.__dict__[OWN + "run"] = Run(self)  # what lies on the device is read here, not in a step
            run.ahead = True
            self._fastdiff_steered(run)
            return result

        names["set_timesteps"] = set_timesteps
    if callable(getattr(parent, "index_for_timestep", None)):
        names["index_for_timestep"] = _without_reading(parent.index_for_timestep)
    for name in ("add_noise", "scale_noise", "get_velocity"):
        if callable(getattr(parent, name, None)):
            names[name] = _aside(getattr(parent, name))
    return type(parent.__name__, (_Fused, parent), names)


def _aside(function):
    """A method that may move tables to a device, and changes nothing else."""

    @functools.wraps(function)
    def call(self, *args, **kwargs):
        run = self.__dict__.get(OWN + "run")
        if run is None or run.busy:
            return function(self, *args, **kwargs)
        run.busy = True
        try:
            return function(self, *args, **kwargs)
        finally:
            run.busy = False

    return call


def _without_reading(find):
    """``index_for_timestep`` that does not read timesteps from the device."""

    @functools.wraps(find)
    def index_for_timestep(self, timestep, schedule_timesteps=None, *args, **kwargs):
        run = self.__dict__.get(OWN + "run")
        if (
            run is None
            or schedule_timesteps is not None
            or not isinstance(timestep, torch.Tensor)
            or timestep.device.type == "cpu"
            or "timesteps" in run.pending
        ):
            return find(self, timestep, schedule_timesteps, *args, **kwargs)
        kind, value = host_time(self, run.node, timestep)
        return find(self, torch.tensor(value, dtype=kind[0], device="cpu"), run.node.attributes["timesteps"], *args, **kwargs)

    return index_for_timestep


class _Fused(SteeredSteps):
    """The half of a fused scheduler that is not the scheduler. Its attributes stay out of the configuration."""

    def __setattr__(self, name, value):
        run = self.__dict__.get(OWN + "run")
        if run is not None and not run.busy and not run.own_step:
            old = self.__dict__.get(name, run)
            if name in run.pending or not (type(value) in _PLAIN and type(old) is type(value) and old == value):
                run.pending[name] = value
        super().__setattr__(name, value)

    def __deepcopy__(self, memo):
        twin = object.__new__(type(self))
        memo[id(self)] = twin
        for name in _SHARED:
            if name in self.__dict__:
                memo[id(self.__dict__[name])] = self.__dict__[name]
        injected = self.__dict__.get(OWN + "injected")
        if injected is not None and id(injected.network) in memo:  # the pipeline is copied, with its network
            memo[id(injected)] = injected.of(memo[id(injected.network)])
        twin.__dict__.update((name, copy.deepcopy(value, memo)) for name, value in self.__dict__.items())
        return twin

    def __reduce__(self):
        own = {name: self.__dict__[name] for name in (OWN + "draws", OWN + "steering") if name in self.__dict__}
        return _rebuilt, (self._fastdiff_parent, self._fastdiff_noise, self._fastdiff_brownian), {**self._fastdiff_plain(), **own}

    def _fastdiff_plain(self) -> dict:
        """The attributes as the scheduler itself would hold them now."""
        plain = {name: value for name, value in self.__dict__.items() if not name.startswith(OWN)}
        run = self.__dict__.get(OWN + "run")
        if run is not None and run.brownian is not None:
            plain["noise_sampler"] = run.brownian
        return plain

    # ---- the step

    def _fastdiff_call(self, run: Run, given: dict) -> tuple[Call, list, object]:
        """The call as a row knows it, and its tensors. Raises ``Unusual``."""
        sample = given["sample"]
        if not isinstance(sample, torch.Tensor) or sample.ndim < 2 or sample.dtype not in FLOATS:
            what = f"{sample.dtype} of {sample.ndim} dimensions" if isinstance(sample, torch.Tensor) else type(sample).__name__
            raise Unusual(f"sample is {what}: float32, float16 and bfloat16 of two dimensions or more are fused")
        if sample.device.type not in ops.BACKENDS:
            raise Unusual(f"sample is on {sample.device}: {' and '.join(ops.BACKENDS)} are fused")
        run.look(self)
        if run.pending:
            run.settle(sample)
        if torch._C._functorch.peek_interpreter_stack() is not None or torch.autograd.forward_ad._current_level >= 0:
            raise Unusual("functions of torch.func and forward-mode gradients go through the scheduler's own step")
        if run.kept and (run.kept[0].shape != sample.shape or run.kept[0].device != sample.device):
            kept = run.kept[0]
            raise ValueError(
                f"sample has shape {tuple(sample.shape)} on {sample.device}, the run was begun with {tuple(kept.shape)} on "
                f"{kept.device}: set_timesteps begins another run"
            )
        shape, device = sample.shape, sample.device
        tensors, names, times, plain, generator = [], [], [], [], None
        for name, role in self._fastdiff_signature.roles:
            value = given[name]
            if role == "time":
                kind, host = host_time(self, run.node, value)
                if name == "timestep":
                    check_order(self, run.node, value, host)
                times.append((name, kind, host))
            elif role == "generator":
                generator = value is not None
            elif isinstance(value, torch.Tensor):
                if value.shape != shape or value.dtype not in FLOATS or value.device != device or value.layout != torch.strided:
                    raise Unusual(
                        f"{name} is {value.dtype} of shape {tuple(value.shape)} on {value.device}, sample is {sample.dtype} of "
                        f"{tuple(shape)} on {device}"
                    )
                value = dense(value)
                if name == "sample":
                    sample = value
                tensors.append(value)
                names.append((name, value.dtype))
            elif type(value) in _PLAIN and name not in ("sample", "model_output"):
                plain.append((name, value))
            else:
                raise Unusual(f"{name} is {type(value).__name__}")
        return Call(len(shape), tuple(names), tuple(times), tuple(plain), generator), tensors, sample

    @torch.compiler.disable  # it probes, and counts: nothing that may be traced
    def _fastdiff_step(self, args, kwargs):
        run = self.__dict__.get(OWN + "run")
        if run is None:
            run = self.__dict__[OWN + "run"] = Run(self)
        signature = self._fastdiff_signature
        given = None if run.own_step or not signature.fits else signature.bind(args, kwargs)
        if given is None:
            why = None if run.own_step or signature.fits else "its step takes no model_output, timestep and sample"
            return self._fastdiff_own_step(run, why, args, kwargs)
        try:
            call, tensors, sample = self._fastdiff_call(run, given)
        except Unusual as why:
            return self._fastdiff_unusual(run, why, given, args, kwargs)
        philox, steer = self._fastdiff_philox(run), None
        steered = self._fastdiff_steered(run)
        if steered is not None:
            place = steered.place(self, lambda: call.time)
            steered.begin(place, sample)
            steer = steered.steer(place, call.names.index("model_output"))
        try:
            if run.ahead:
                run.ahead = False
                self._fastdiff_ahead(run.node, call, philox, sample.device, steered)
            row, node, changes = run.node.advance(call)
            if row.thresholds and torch.is_grad_enabled() and any(t.requires_grad for t in (*tensors, *run.kept)):
                raise NotLinear("dynamic thresholding is not fused where gradients are asked for")
            ready = rows.ready(row, philox, sample.device, None if row.thresholds else steer)
        except Exception as why:  # not linear, or what the scheduler raises: then it raises it here too
            return self._fastdiff_own_step(run, why, args, kwargs)
        bank, more = (None, None, None), []
        if steer is not None and row.thresholds:  # the quantile is that of the steered estimate
            tensors[steer.output] = steered.whole_output(place, sample, tensors[steer.output])
        elif steer is not None:
            tensors[steer.output], more, bank = steered.outputs(place, sample, tensors[steer.output])
        values, draws = [*tensors, *run.kept], None
        if row.draws:
            generator = given.get("generator")
            check_generators(generator, len(sample))
            if philox:
                draws = self._fastdiff_draws_of(generator, len(sample))
            else:
                noises = drawn(run, self, row, generator, tensors, sample)
                values += [noises.get(slot) for slot in range(len(values), row.slots)]
        if more:
            values += [None] * (BASIS - len(values)) + more
        outputs = rows.apply(ready, values, sample, draws, bank)
        if draws is not None:
            draws.count += len(row.draws)
        run.kept = [outputs[slot] if kind == "target" else values[slot] for kind, slot in ready.origin]
        run.node = node
        if changes:
            self.__dict__.update(filled(changes, run.kept))
        if steered is not None:
            self._fastdiff_taken(steered, place)
        return row.build(outputs[: len(row.returned)])

    def _fastdiff_unusual(self, run: Run, why, given: dict, args, kwargs):
        """A step with timesteps of each sample or token, or else the scheduler's own."""
        lead = spread.lead_of(given)
        if lead is not None:
            if self.__dict__.get(OWN + "steering"):
                raise ValueError("steering acts at one noise level a step: timesteps of each sample or token were given")
            try:
                return spread.step(self, run, given, lead, self._fastdiff_draws_of if self._fastdiff_philox(run) else None)
            except NotLinear as error:
                why = Unusual(f"{why} ({error})")
            except Exception as error:  # of the scheduler's: then it raises it here too
                _log.debug("timesteps of each sample or token: %s", error)
        return self._fastdiff_own_step(run, why, args, kwargs)

    def _fastdiff_philox(self, run: Run) -> bool:
        """Whether noise is drawn by the op."""
        return self._fastdiff_noise == "philox" and not (self._fastdiff_brownian and "noise_sampler" in run.node.attributes)

    def _fastdiff_draws_of(self, generator, batch: int) -> Draws:
        draws = self.__dict__.get(OWN + "draws")
        if draws is None or len(draws.seeds) != batch:
            draws = self.__dict__[OWN + "draws"] = Draws(generator, batch)
        return draws

    def _fastdiff_ahead(self, node: Node, call: Call, philox: bool, device, steered: Steered | None) -> None:
        """Finds the rows of the steps that will follow, if they are called like the first one, and brings them to the device."""
        places = node.counted, *(place for place, time in enumerate(node.times) if time == call.time), len(node.times)
        first = next(place for place in places if place is not None)
        output, ahead = call.names.index("model_output"), []

        def steer(place):
            return None if steered is None or place >= len(node.times) else steered.steer(place, output)

        if (philox, device, steer(first)) in node.ready_for(call):
            return
        try:
            for place in range(first, max(len(node.times), first + 1)):
                row, node, _ = node.advance(call.at(node.times[place]) if place > first else call)
                ahead.append((row, None if row.thresholds else steer(place)))
            if philox:
                along_path([row for row, _ in ahead])
            rows.prepare(ahead, philox, device)
        except Exception as error:  # the step that meets it says so
            _log.debug("rows ahead end after %d steps: %s", len(ahead), error)

    def _fastdiff_own_step(self, run: Run, why, args, kwargs):
        """The scheduler's own step, from the state in which the run is."""
        if not run.own_step:
            if run.brownian is not None:
                self.__dict__["noise_sampler"] = run.brownian
            if run.kept or isinstance(why, NotLinear):
                kept = [t.to(dtype) for t, dtype in zip(run.kept, run.node.dtypes)]  # as the scheduler itself has it
                held = {name: run.node.attributes[name] for name in run.node.held if name not in run.pending}
                self.__dict__.update(filled(held, kept))
                run.own_step, run.kept = True, []
            else:
                self.__dict__[OWN + "run"] = None  # this step only
        steered = self._fastdiff_steered(run)
        given = None if steered is None else self._fastdiff_signature.bind(args, kwargs)
        if given is not None:
            place = steered.place(self, lambda: host_time(self, run.node, given["timestep"])[1])
            args, kwargs = (), {**given, "model_output": steered.whole_output(place, given["sample"], given["model_output"])}
        result = getattr(self._fastdiff_parent, self._fastdiff_method)(self, *args, **kwargs)
        if given is not None:
            self._fastdiff_taken(steered, place)
        if why is not None and str(why) not in self.__dict__.setdefault(OWN + "said", set()):
            self.__dict__[OWN + "said"].add(str(why))
            noise = " Its noise is torch's then." if self._fastdiff_noise == "philox" else ""
            warnings.warn(
                f"{type(self).__name__}: the scheduler's own step is used, not the fused one: {why}.{noise}", stacklevel=5
            )
        return result


def _rebuilt(parent: type, noise: str, brownian: str | None):
    return object.__new__(_fused_class(parent, noise, brownian))
