"""The loop: call the model, apply a row. ``Stepper`` is its other half, for people who write their own loop."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from .action import Action, Actions
from .checks import FLOATS
from .given import Given
from .graphs import check_device
from .noise import as_seeds, checked_shape
from .ops import checked_device
from .plan import Plan
from .stepper import Stepper, check_pairs, check_plan

__all__ = ["Progress", "Stepper", "sample"]


@dataclass(frozen=True)
class Progress:
    """What a callback sees after a row that called the model. The tensors are the run's own: copy what you keep.

    step: the sampler's step, from 0; sigma: the noise level at which the model was called (sigma_t / alpha_t);
    x: (B, ...) float32, the latent after the row, in the schedule's coordinates; denoised: (B, ...) float32, the
    estimate of x0 from this call.
    """

    step: int
    sigma: float
    x: torch.Tensor
    denoised: torch.Tensor


def sample(
    model: Callable[..., torch.Tensor],
    plan: Plan,
    shape: Sequence[int],
    seeds: int | Sequence[int] | torch.Tensor,
    *,
    batch_size: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    init: torch.Tensor | None = None,
    known: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    steering: Sequence[Action] = (),
    noise: Callable[[str, int], torch.Tensor] | None = None,
    progress: bool | None = None,
    callback: Callable[[Progress], None] | None = None,
    cuda_graph: bool = False,
) -> torch.Tensor:
    """Samples from a model. Sample b depends on its own seed and on nothing else.

    model: called as ``model(x, time)``, x (N, ...) in ``dtype``, time (N,) float32 in the plan's units; returns what the
    plan's prediction says, in the shape of x, or a pair (conditional, unconditional) for a guided plan. x is the run's own
    buffer: a model may neither change it nor keep it for later without a copy.
    plan: from ``fd.plan``; shape: (B, ...); seeds: B of them, or one int s for s, s + 1, ..., s + B - 1.
    batch_size: always call the model with exactly this many samples, the last batch padded: since a network's last bits
    depend on its batch size, this makes a sample's bits independent of how many others are drawn. None: all at once.
    device: where to run, by default where the model's parameters are; one that is not there is refused. dtype: of the model's input.
    init: (B, ...), where the plan starts from an image. known, mask: inpainting. steering: what acts on the run
    beside the model, in this order: ``fd.steering`` and ``fd.guidance`` make such actions.
    noise: in place of what the rows draw from seeds: called once as ``noise(stream, draw)`` for each normal of the plan, in
    its order, for a tensor (B, ...); or something with ``randn_like``, such as a ``TorchCudaGenerator``. Not with batch_size,
    cuda_graph or inpainting. Steering that draws does so from seeds.
    progress: show a bar; None: if there is a terminal. callback: called after each model call with ``Progress``.
    cuda_graph: capture model and step in a CUDA graph and replay it, for every batch the same one; on a GPU only. The
    callback is called between replays. See ``docs/graphs.md`` for what can be captured.

    Returns (B, ...) float32. Raises ``ValueError``/``TypeError`` before the model is called, ``FloatingPointError``
    where a NaN appeared, naming the step.

    >>> import fastdiff as fd
    >>> plan = fd.plan("dpmpp_2m", schedule="edm", prediction="denoised", steps=10)
    >>> gaussian = lambda x, sigma: x / (1 + sigma.view(-1, 1, 1, 1) ** 2)  # the exact denoiser of N(0, 1)
    >>> fd.sample(gaussian, plan, (4, 3, 8, 8), seeds=0).shape
    torch.Size([4, 3, 8, 8])
    """
    if not callable(model):
        raise TypeError(f"model is {type(model).__name__}: something that can be called as model(x, time) is taken")
    shape = checked_shape(shape, 2)
    check_plan(plan)
    seeds = as_seeds(seeds, shape[0])
    total = shape[0]
    if batch_size is not None and (isinstance(batch_size, bool) or not hasattr(batch_size, "__index__") or batch_size < 1):
        raise ValueError(f"batch_size is {batch_size!r}: an int of 1 or more is taken")
    if callback is not None and not callable(callback):
        raise TypeError(f"callback is {type(callback).__name__}: something that can be called is taken")
    if device is None:
        parameter = next(model.parameters(), None) if isinstance(model, torch.nn.Module) else None
        device = "cpu" if parameter is None else parameter.device
    device = checked_device(device)
    if callback is not None:
        plan = plan.with_denoised()
    per_sample = {"init": init, "known": known, "mask": mask}
    check_pairs(plan.with_model_dtype(dtype) if dtype in FLOATS else plan, shape, **per_sample)
    if cuda_graph:
        check_device(device)
        if steering:
            raise ValueError("cuda_graph=True was given with steering, which decides on the host what a row needs: one of them is taken")
    if noise is not None and (batch_size is not None or cuda_graph):
        other = "batch_size" if batch_size is not None else "cuda_graph"
        raise ValueError(f"noise was given with {other}, which takes draws that come from seeds: one of them is taken")
    given = None if noise is None else Given(noise)
    if given is not None and (hasattr(steering, "begin") or isinstance(steering, Sequence)):  # else `Actions` says so
        steering = [*([steering] if hasattr(steering, "begin") else steering), given]
    size = total if batch_size is None else batch_size
    show = sys.stderr.isatty() if progress is None else progress

    from tqdm import tqdm

    def part(name, index):
        """The samples of one batch; what all share, and a batch of all, as it is."""
        value = per_sample[name]
        shared = value is None or size == total or (name == "mask" and len(value) == 1)
        return value if shared else value[index.to(value.device)]

    batches = -(-total // size) if total else 0
    results = run = rounds = None
    with (torch.no_grad(), Actions(steering, plan, shape, model, size=size, device=device, dtype=dtype) as actions,
          tqdm(total=batches * actions.plan.evaluations, disable=not show, unit="call", leave=False) as bar):
        plan = actions.plan
        for start in range(0, total, max(size, 1)):
            index = torch.arange(start, start + size, device="cpu").clamp(max=total - 1)  # padded with the last sample
            actions.select(index)
            if run is None:
                held = {name: part(name, index) for name in per_sample}
                if given is not None:
                    held["init"] = given.start(held["init"])
                run = Stepper(plan, (size, *shape[1:]), seeds[index], device=device, dtype=dtype, **held, **actions.bank)
                rounds = run.capture(model) if cuda_graph else None
            else:
                for name in ("known", "mask"):
                    if held[name] is not per_sample[name]:
                        held[name].copy_(part(name, index))
                run.restart(seeds[index], init=part("init", index))
            while not run.done:
                step, sigma = int(plan.steps[run.row]), run.sigma
                if rounds is None:
                    run.step(*actions.outputs(run))
                else:
                    rounds.replay()
                if callback is not None:
                    count = min(size, total - start)
                    callback(Progress(step, sigma, run.x[:count], run.denoised()[:count]))
                bar.update()
            here = run.result()
            if size == total:
                return here
            if results is None:
                results = torch.empty(shape, dtype=torch.float32, device=device)
            results[start : start + size] = here[: total - start]
    return torch.empty(shape, dtype=torch.float32, device=device) if results is None else results
