"""GaussianDiffusion and SpacedDiffusion as their papers have them, written plainly in float64."""

import enum
import math

import numpy as np
import torch

SHAPE = (4, 2, 4, 5)
STEPS = {"full": 20, "respaced": 18}


class Mean(enum.Enum):
    PREVIOUS_X, START_X, EPSILON = range(3)


class Variance(enum.Enum):
    LEARNED, FIXED_SMALL, FIXED_LARGE, LEARNED_RANGE = range(4)


class Diffusion:
    """The attributes and methods of GaussianDiffusion and SpacedDiffusion that matter here, in float64.

    Ho et al. 2020, eq. 7; Nichol & Dhariwal 2021, eq. 15; Dhariwal & Nichol 2021, algorithms 1 and 2; Song et al. 2021, eq. 12.
    """

    dtype = torch.float32

    def __init__(self, mean="EPSILON", variance="LEARNED_RANGE", steps="respaced", rescale=False):
        betas = np.linspace(1e-4, 0.02, 1000)
        self.model_mean_type, self.model_var_type, self.rescale_timesteps = Mean[mean], Variance[variance], rescale
        if steps == "respaced":
            self.original_num_steps = len(betas)
            self.timestep_map = np.linspace(0, len(betas) - 1, STEPS[steps]).round().astype(int).tolist()
            kept = np.cumprod(1 - betas)[self.timestep_map]
            betas = 1 - kept / np.append(1.0, kept[:-1])
        else:
            betas = np.linspace(5e-3, 0.4, STEPS[steps])
        self.betas, self.num_timesteps = betas, len(betas)
        self.alphas_cumprod = np.cumprod(1 - betas)

    def times(self, t):
        value = getattr(self, "timestep_map", range(self.num_timesteps))[t]
        if self.rescale_timesteps:
            value = float(np.float32(value) * np.float32(1000 / getattr(self, "original_num_steps", self.num_timesteps)))
        return torch.full((SHAPE[0],), value)

    def estimate(self, model, x, t, clip_denoised, denoised_fn, kwargs):
        """x0, and ln Sigma."""
        out, beta, abar = model(x.float(), self.times(t)[: len(x)], **kwargs).double(), self.betas, self.alphas_cumprod
        posterior = [beta[max(u, 1)] * (1 - abar[max(u, 1) - 1]) / (1 - abar[max(u, 1)]) for u in range(len(beta))]
        kind = self.model_var_type.name
        if kind.startswith("LEARNED"):
            out, v = out.chunk(2, 1)
            f = (v + 1) / 2
            log_variance = v if kind == "LEARNED" else f * math.log(beta[t]) + (1 - f) * math.log(posterior[t])
        else:
            fixed = beta[t] if t else posterior[1]  # both at t = 0 without noise, but there may be a gradient
            fixed = fixed if kind == "FIXED_LARGE" else posterior[t] if t else 0.0
            log_variance = torch.full_like(x, math.log(fixed) if fixed else -math.inf)
        x0 = out if self.model_mean_type is Mean.START_X else (x - math.sqrt(1 - abar[t]) * out) / math.sqrt(abar[t])
        x0 = x0 if denoised_fn is None else denoised_fn(x0)
        return x0.clamp(-1, 1) if clip_denoised else x0, log_variance

    def drawn(self, x):
        """As the original's torch.randn_like(x): in the order of x's strides, and in its dtype, which is that of x_T."""
        return torch.randn_like(x, dtype=self.dtype).double()

    def gradient(self, cond_fn, x, t, kwargs):
        return cond_fn(x.float(), self.times(t), **kwargs).double()

    def p_sample(self, model, x, t, clip_denoised=True, denoised_fn=None, cond_fn=None, model_kwargs=None):
        t, x, kwargs = int(t[0]), x.double(), model_kwargs or {}
        beta, abar, before = self.betas[t], self.alphas_cumprod[t], self.alphas_cumprod[t - 1] if t else 1.0
        x0, log_variance = self.estimate(model, x, t, clip_denoised, denoised_fn, kwargs)
        mean = math.sqrt(before) * beta / (1 - abar) * x0 + math.sqrt(1 - beta) * (1 - before) / (1 - abar) * x
        noise = self.drawn(x)
        if cond_fn is not None:
            mean = mean + log_variance.exp() * self.gradient(cond_fn, x, t, kwargs)
        return {"sample": mean + (log_variance / 2).exp() * noise * (t > 0), "pred_xstart": x0}

    def ddim_sample(self, model, x, t, clip_denoised=True, denoised_fn=None, cond_fn=None, model_kwargs=None, eta=0.0):
        t, x, kwargs = int(t[0]), x.double(), model_kwargs or {}
        abar, before = self.alphas_cumprod[t], self.alphas_cumprod[t - 1] if t else 1.0
        x0, _ = self.estimate(model, x, t, clip_denoised, denoised_fn, kwargs)
        epsilon = (x - math.sqrt(abar) * x0) / math.sqrt(1 - abar)
        if cond_fn is not None:
            epsilon = epsilon - math.sqrt(1 - abar) * self.gradient(cond_fn, x, t, kwargs)
            x0 = (x - math.sqrt(1 - abar) * epsilon) / math.sqrt(abar)
        sigma = eta * math.sqrt((1 - before) / (1 - abar) * (1 - abar / before))
        noise = self.drawn(x)
        return {"sample": math.sqrt(before) * x0 + math.sqrt(1 - before - sigma**2) * epsilon + sigma * noise * (t > 0),
                "pred_xstart": x0}

    def _loop(self, step, model, shape, noise, device, **options):
        x = torch.randn(*shape, device=device) if noise is None else noise
        self.dtype = x.dtype
        for t in reversed(range(self.num_timesteps)):
            out = step(model, x, torch.tensor([t] * shape[0]), **options)
            yield out
            x = out["sample"]

    def p_sample_loop_progressive(self, model, shape, noise=None, clip_denoised=True, denoised_fn=None, cond_fn=None,
                                  model_kwargs=None, device=None, progress=False):
        return self._loop(self.p_sample, model, shape, noise, device, clip_denoised=clip_denoised, denoised_fn=denoised_fn,
                          cond_fn=cond_fn, model_kwargs=model_kwargs)

    def ddim_sample_loop_progressive(self, model, shape, noise=None, clip_denoised=True, denoised_fn=None, cond_fn=None,
                                     model_kwargs=None, device=None, progress=False, eta=0.0):
        return self._loop(self.ddim_sample, model, shape, noise, device, clip_denoised=clip_denoised, denoised_fn=denoised_fn,
                          cond_fn=cond_fn, model_kwargs=model_kwargs, eta=eta)

    def p_sample_loop(self, model, shape, noise=None, clip_denoised=True, denoised_fn=None, cond_fn=None, model_kwargs=None,
                      device=None, progress=False):
        *_, last = self.p_sample_loop_progressive(model, shape, noise, clip_denoised, denoised_fn, cond_fn, model_kwargs, device)
        return last["sample"]

    def ddim_sample_loop(self, model, shape, noise=None, clip_denoised=True, denoised_fn=None, cond_fn=None, model_kwargs=None,
                         device=None, progress=False, eta=0.0):
        *_, last = self.ddim_sample_loop_progressive(model, shape, noise, clip_denoised, denoised_fn, cond_fn, model_kwargs,
                                                     device, eta=eta)
        return last["sample"]


def model_of(diffusion, seen=None):
    """Reads t and y, and returns twice the channels where the variance is learned."""
    kind = diffusion.model_var_type.name

    def model(x, t, y=0.0):
        if seen is not None:
            seen.append((t.dtype, t.tolist()))
        out = torch.sin(1.5 * x + 0.3 * torch.cos(t.float() / 50).view(-1, 1, 1, 1) + y)
        variance = torch.cos(2 * x) - 4 * (kind == "LEARNED")
        return torch.cat([out, variance], 1) if kind.startswith("LEARNED") else out

    return model
