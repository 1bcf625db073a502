"""k-diffusion's samplers with a fused step.

    from fastdiff.integrations import k_diffusion as sampling

    x = sampling.sample_dpmpp_2m_sde(model, x, sigmas, extra_args={"cond": cond}, eta=0.8)

Every function has the arguments of k-diffusion's function of that name, calls the model in the same way, and gives the
callback the same. ``install()`` puts them into ``k_diffusion.sampling``.

Common to all: model: called as ``model(x, sigma, **extra_args)``, x (B, ...) as given, sigma (B,) in x's dtype; returns the
denoised estimate. x: float32, float16 or bfloat16, noised to the first level; a result of its dtype is returned, the latent
between is float32. sigmas: (steps + 1,), downwards, read once to the host. callback: gets {"x", "i", "sigma", "sigma_hat",
"denoised"} after the first model call of each step. disable: of the progress bar.

noise: "torch" draws as k-diffusion does (``torch.randn_like``, a Brownian tree of torchsde for the SDE samplers, or the
noise_sampler given) and hands the draws to the step: the same pictures, up to rounding. "philox" draws inside of the step, each
sample from a seed of its own: seeds is B of them, or an int s for s, s + 1, ...; by default torch's generator gives s. The SDE
samplers then follow fastdiff's own Brownian path.

Raises ``ValueError`` or ``TypeError`` before the model is called, for levels that do not go down among others.
"""

from __future__ import annotations

import importlib
import math

from .k_runs import NOISES, Levels, run, whole

__all__ = [
    "NOISES",
    "install",
    "sample_dpm_2",
    "sample_dpm_2_ancestral",
    "sample_dpm_fast",
    "sample_dpmpp_2m",
    "sample_dpmpp_2m_sde",
    "sample_dpmpp_2s_ancestral",
    "sample_dpmpp_3m_sde",
    "sample_dpmpp_sde",
    "sample_euler",
    "sample_euler_ancestral",
    "sample_heun",
    "sample_lms",
    "uninstall",
]


def sample_euler(model, x, sigmas, extra_args=None, callback=None, disable=None, s_churn=0.0, s_tmin=0.0, s_tmax=math.inf,
                 s_noise=1.0, *, noise="torch", seeds=None):
    """Euler steps (Karras et al. 2022, algorithm 2)."""
    options = {"s_churn": s_churn, "s_tmin": s_tmin, "s_tmax": s_tmax, "s_noise": s_noise}
    return run("euler", model, x, Levels.of(sigmas), extra_args, callback, disable, options, noise, seeds)


def sample_euler_ancestral(model, x, sigmas, extra_args=None, callback=None, disable=None, eta=1.0, s_noise=1.0,
                           noise_sampler=None, *, noise="torch", seeds=None):
    """Euler steps to a lower level, and noise back up."""
    options = {"eta": eta, "s_noise": s_noise}
    return run("euler_ancestral", model, x, Levels.of(sigmas), extra_args, callback, disable, options, noise, seeds,
               noise_sampler)


def sample_heun(model, x, sigmas, extra_args=None, callback=None, disable=None, s_churn=0.0, s_tmin=0.0, s_tmax=math.inf,
                s_noise=1.0, *, noise="torch", seeds=None):
    """Heun steps (Karras et al. 2022, algorithm 2): two model calls a step but for the last."""
    options = {"s_churn": s_churn, "s_tmin": s_tmin, "s_tmax": s_tmax, "s_noise": s_noise}
    return run("heun", model, x, Levels.of(sigmas), extra_args, callback, disable, options, noise, seeds)


def sample_dpm_2(model, x, sigmas, extra_args=None, callback=None, disable=None, s_churn=0.0, s_tmin=0.0, s_tmax=math.inf,
                 s_noise=1.0, *, noise="torch", seeds=None):
    """The midpoint rule, its midpoint in ln sigma (DPM-Solver-2, Lu et al. 2022)."""
    options = {"s_churn": s_churn, "s_tmin": s_tmin, "s_tmax": s_tmax, "s_noise": s_noise}
    return run("dpm_2", model, x, Levels.of(sigmas), extra_args, callback, disable, options, noise, seeds)


def sample_dpm_2_ancestral(model, x, sigmas, extra_args=None, callback=None, disable=None, eta=1.0, s_noise=1.0,
                           noise_sampler=None, *, noise="torch", seeds=None):
    """``sample_dpm_2`` to a lower level, and noise back up."""
    options = {"eta": eta, "s_noise": s_noise}
    return run("dpm_2_ancestral", model, x, Levels.of(sigmas), extra_args, callback, disable, options, noise, seeds,
               noise_sampler)


def sample_lms(model, x, sigmas, extra_args=None, callback=None, disable=None, order=4, *, noise="torch", seeds=None):
    """Adams-Bashforth in sigma, of order 1 to 4; its integrals are exact here."""
    return run("lms", model, x, Levels.of(sigmas), extra_args, callback, disable, {"order": whole("order", order)}, noise, seeds)


def sample_dpm_fast(model, x, sigma_min, sigma_max, n, extra_args=None, callback=None, disable=None, eta=0.0, s_noise=1.0,
                    noise_sampler=None, *, noise="torch", seeds=None):
    """DPM-Solver-fast (Lu et al. 2022, section 3.4): n model calls from sigma_max to sigma_min. The callback gets "t" and
    "t_up", -ln sigma, too."""
    levels, options = Levels.fast(sigma_min, sigma_max, n, getattr(x, "device", None)), {"eta": eta, "s_noise": s_noise}
    return run("dpm_fast", model, x, levels, extra_args, callback, disable, options, noise, seeds, noise_sampler)


def sample_dpmpp_2s_ancestral(model, x, sigmas, extra_args=None, callback=None, disable=None, eta=1.0, s_noise=1.0,
                              noise_sampler=None, *, noise="torch", seeds=None):
    """DPM-Solver++(2S) to a lower level (Lu et al. 2022b, algorithm 1), and noise back up."""
    options = {"eta": eta, "s_noise": s_noise}
    return run("dpmpp_2s_ancestral", model, x, Levels.of(sigmas), extra_args, callback, disable, options, noise, seeds,
               noise_sampler)


def sample_dpmpp_sde(model, x, sigmas, extra_args=None, callback=None, disable=None, eta=1.0, s_noise=1.0, noise_sampler=None,
                     r=1 / 2, *, noise="torch", seeds=None):
    """DPM-Solver++ with noise in both of its stages; r, 0 < r <= 1, places the inner one."""
    options = {"eta": eta, "s_noise": s_noise, "r": r}
    return run("dpmpp_sde", model, x, Levels.of(sigmas), extra_args, callback, disable, options, noise, seeds, noise_sampler)


def sample_dpmpp_2m(model, x, sigmas, extra_args=None, callback=None, disable=None, *, noise="torch", seeds=None):
    """DPM-Solver++(2M) (Lu et al. 2022b, algorithm 2)."""
    return run("dpmpp_2m", model, x, Levels.of(sigmas), extra_args, callback, disable, {}, noise, seeds)


def sample_dpmpp_2m_sde(model, x, sigmas, extra_args=None, callback=None, disable=None, eta=1.0, s_noise=1.0,
                        noise_sampler=None, solver_type="midpoint", *, noise="torch", seeds=None):
    """SDE-DPM-Solver++(2M) (Lu et al. 2022b, appendix D). solver_type: "midpoint" or "heun"."""
    options = {"eta": eta, "s_noise": s_noise, "solver_type": solver_type}
    return run("dpmpp_2m_sde", model, x, Levels.of(sigmas), extra_args, callback, disable, options, noise, seeds, noise_sampler)


def sample_dpmpp_3m_sde(model, x, sigmas, extra_args=None, callback=None, disable=None, eta=1.0, s_noise=1.0,
                        noise_sampler=None, *, noise="torch", seeds=None):
    """SDE-DPM-Solver++(3M)."""
    options = {"eta": eta, "s_noise": s_noise}
    return run("dpmpp_3m_sde", model, x, Levels.of(sigmas), extra_args, callback, disable, options, noise, seeds,
               noise_sampler)


def __getattr__(name):
    """``sample_dpm_adaptive`` is k-diffusion's own: it chooses its steps by what the model returns."""
    if name == "sample_dpm_adaptive":
        return importlib.import_module("k_diffusion.sampling").sample_dpm_adaptive
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


# ---- in the place of k-diffusion's

_OURS = {name: function for name, function in globals().items() if name.startswith("sample_")}
_replaced: list[tuple] = globals().get("_replaced", [])  # module, name, original, ours; kept when this module is reloaded


class _Installed:
    def __enter__(self):
        return self

    def __exit__(self, *unused):
        uninstall()


def install() -> _Installed:
    """Puts the functions into ``k_diffusion.sampling``, where that has one of the name; ``sample_dpm_adaptive`` stays.

    What has been imported from there by name before stays k-diffusion's. Returns a context manager, for those who want
    ``uninstall()`` at the end of a block. Twice is as good as once. Raises ``ImportError`` where k-diffusion does not import.
    """
    sampling = importlib.import_module("k_diffusion.sampling")
    for name, function in _OURS.items():
        there = getattr(sampling, name, None)
        if there is not None and there is not function:
            _replaced.append((sampling, name, there, function))
            setattr(sampling, name, function)
    return _Installed()


def uninstall() -> None:
    """Gives ``k_diffusion.sampling`` its own functions back, but for those that somebody has replaced since."""
    while _replaced:
        sampling, name, original, ours = _replaced.pop()
        if getattr(sampling, name, None) is ours:
            setattr(sampling, name, original)
