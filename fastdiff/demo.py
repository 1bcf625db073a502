"""The demonstration: pictures from a small trained network, and the time that each sampler takes of a run.

Each sampler draws the same images twice with the same network, time grid, dtype and seeds: once by the fused step and
once by the scheduler of diffusers, if that is installed. What is timed is the run as a user would write it.
"""

import importlib.util
import os
import time
from pathlib import Path

import torch

import fastdiff as fd

from .files import written

__all__ = ["run", "save_grids"]

SAMPLERS = {  # name -> steps, class in diffusers
    "ddim": (50, "DDIMScheduler"),
    "dpmpp_2m": (20, "DPMSolverMultistepScheduler"),
    "euler_ancestral": (30, "EulerAncestralDiscreteScheduler"),
}


class _Epsilon(torch.nn.Module):
    """An EDM network as a noise predictor in the variance-preserving coordinates of ``schedule``.

    x_t = sqrt(alpha_bar) (x0 + sigma n), so D is asked at x_t / sqrt(alpha_bar), and epsilon = (x - D) / sigma.
    """

    def __init__(self, module, net, alpha_bar):
        super().__init__()
        self.net, self.denoise = net, module.denoise
        self.register_buffer("alpha_bar", alpha_bar)

    def forward(self, x, t):
        alpha_bar = self.alpha_bar[torch.as_tensor(t).long()].expand(len(x)).view(-1, 1, 1, 1)
        sigma = ((1 - alpha_bar) / alpha_bar).sqrt()
        y = x / alpha_bar.sqrt()
        return (y - self.denoise(self.net, y, sigma.flatten())) / sigma


class _Clock:
    """Seconds spent in the model, to be told from the rest of the run."""

    def __init__(self, model):
        self.model, self.seconds, self.bar = model, 0.0, None

    def __call__(self, x, t):
        start = time.perf_counter()
        out = self.model(x, t)
        self.seconds += time.perf_counter() - start
        if self.bar is not None:
            self.bar.update()
        return out


def load_network(folder: Path):
    """The trained network beside its module, from a checkout's folder."""
    spec = importlib.util.spec_from_file_location("fastdiff_zoo_unet", folder / "unet.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module, module.load()


def _ours(name, steps, model, shape, progress):
    plan = fd.plan(name, schedule="linear", prediction="epsilon", grid="trailing", steps=steps)
    return lambda: fd.sample(model, plan, shape, seeds=0, progress=progress)


def _theirs(name, steps, model, shape, noise):
    """The same run by the scheduler of diffusers, from the same noise; None where it is not installed."""
    try:
        import diffusers
    except ImportError:
        return None
    config = {"clip_sample": False} if name == "ddim" else {}
    if name == "dpmpp_2m":
        config = {"final_sigmas_type": "zero"}
    scheduler = getattr(diffusers, SAMPLERS[name][1])(beta_schedule="linear", timestep_spacing="trailing", **config)

    def run():
        scheduler.set_timesteps(steps)
        generator = torch.Generator().manual_seed(0)
        extra = {"generator": generator} if name == "euler_ancestral" else {}
        x = noise * scheduler.init_noise_sigma
        with torch.no_grad():
            for t in scheduler.timesteps:
                # Euler in diffusers keeps x / alpha and hands the model a scaled copy, which is x_t again.
                x = scheduler.step(model(scheduler.scale_model_input(x, t), t), t, x, **extra).prev_sample
        return x

    return run


def run(out: Path, network: Path, count: int = 64) -> list[dict]:
    """Draws, times, prints the table, writes ``out/samples.png`` and ``out/samples.safetensors``. Returns the table's rows."""
    from rich.console import Console
    from rich.table import Table
    from safetensors.torch import save_file
    from tqdm import tqdm

    module, net = load_network(network)
    model = _Clock(_Epsilon(module, net, torch.from_numpy(fd.schedules.VP.linear().alphas_cumprod).float()))
    shape = (count, *net.image_shape)
    out.mkdir(parents=True, exist_ok=True)
    noise = fd.randn(shape, seeds=0, stream="init")
    images, rows = {}, []
    jobs = [(name, steps, who) for name, (steps, _) in SAMPLERS.items() for who in ("fastdiff", "diffusers")]
    bar = model.bar = tqdm(total=sum(steps for _, steps, _ in jobs), unit="call", disable=not os.isatty(2), leave=False)
    for name, steps, who in jobs:
        bar.set_description(f"{who} {name}")
        draw = _ours(name, steps, model, shape, False) if who == "fastdiff" else _theirs(name, steps, model, shape, noise)
        if draw is None:
            continue
        model.seconds = 0.0
        start = time.perf_counter()
        x = draw()
        total = time.perf_counter() - start
        rows.append({"sampler": name, "steps": steps, "by": who, "ms_per_image": 1e3 * total / count,
                     "sampler_ms_per_step": 1e3 * (total - model.seconds) / steps, "sampler_share": 1 - model.seconds / total,
                     "difference": None})
        if who == "fastdiff":
            images[name] = x
        elif name != "euler_ancestral":  # which draws other noise
            rows[-1]["difference"] = float((x - images[name]).abs().max())

    bar.close()
    table = Table("sampler", "steps", "by", "ms / image", "sampler, ms / step", "sampler's share", "largest difference",
                  title=f"{count} images of {tuple(net.image_shape)}, {torch.get_num_threads()} threads")
    for r in rows:
        table.add_row(r["sampler"], str(r["steps"]), r["by"], f"{r['ms_per_image']:.1f}", f"{r['sampler_ms_per_step']:.3f}",
                      f"{100 * r['sampler_share']:.2f} %", "" if r["difference"] is None else f"{r['difference']:.1e}")
    Console(width=None if os.isatty(1) else 120).print(table)
    with written(out / "samples.safetensors") as temporary:
        save_file({name: x.contiguous() for name, x in images.items()}, temporary)
    save_grids(out / "samples.png", {f"{name}, {SAMPLERS[name][0]} steps": x for name, x in images.items()})
    print(f"{out / 'samples.png'}")
    return rows


def save_grids(path: Path, images: dict[str, torch.Tensor]) -> None:
    """One grid of images (B, 1 or 3, H, W) in [-1, 1] for each title, side by side, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(images), figsize=(4.6 * len(images), 5), squeeze=False)
    for axis, (title, x) in zip(axes[0], images.items()):
        if x.ndim != 4 or x.shape[1] not in (1, 3):
            raise ValueError(f"a picture takes (B, 1 or 3, H, W), the samples have shape {tuple(x.shape)}")
        columns = max(1, round(len(x) ** 0.5))
        lines = -(-len(x) // columns)
        x = torch.nn.functional.pad((x.clamp(-1, 1) + 1) / 2, (1, 1, 1, 1), value=1.0)
        x = torch.cat([x, x.new_ones(lines * columns - len(x), *x.shape[1:])])
        grid = x.view(lines, columns, *x.shape[1:]).permute(0, 3, 1, 4, 2).reshape(lines * x.shape[2], columns * x.shape[3], -1)
        axis.imshow(grid.expand(-1, -1, 3).numpy() if grid.shape[-1] == 1 else grid.numpy(), interpolation="nearest")
        axis.set_title(title)
        axis.axis("off")
    figure.tight_layout()
    with written(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
    pyplot.close(figure)
