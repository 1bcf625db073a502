"""A Gaussian mixture, known in closed form: its denoiser, and p(y | x) of clean and of noisy points. All in float64."""

import math

import torch


class Mixture:
    """p(x0 | y) = N(means[y], variances[y] I), p(y) = weights[y]; points are (B, *shape)."""

    def __init__(self, shape=(3, 2), classes=3, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.shape, self.dims = shape, math.prod(shape)
        self.means = 1.2 * torch.randn(classes, self.dims, generator=generator, dtype=torch.float64)
        self.variances = torch.linspace(0.2, 0.5, classes, dtype=torch.float64)
        self.log_weights = torch.linspace(1.0, 2.0, classes, dtype=torch.float64).log_softmax(0)

    def log_joint(self, x, sigma):
        """log p(y, x) for each y, (B, classes), at x = x0 + sigma n. sigma: a number or (B,)."""
        x = x.double().flatten(1)
        sigma = torch.as_tensor(sigma, dtype=torch.float64).expand(len(x))
        spread = self.variances + sigma[:, None] ** 2
        squares = (x[:, None] - self.means).square().sum(2)
        return self.log_weights - squares / (2 * spread) - self.dims / 2 * spread.log()

    def denoised_of(self, x, sigma):
        """E[x0 | x, y] for each y, (B, classes, dims)."""
        x = x.double().flatten(1)
        sigma = torch.as_tensor(sigma, dtype=torch.float64).expand(len(x))
        gain = self.variances / (self.variances + sigma[:, None] ** 2)
        return self.means + gain[..., None] * (x[:, None] - self.means)

    def denoised(self, x, sigma):
        """E[x0 | x], in the shape of x."""
        weights = self.log_joint(x, sigma).softmax(1)
        return (weights[..., None] * self.denoised_of(x, sigma)).sum(1).view(x.shape)

    def conditional(self, x, sigma, y):
        """E[x0 | x, y], in the shape of x. y: (B,)."""
        return self.denoised_of(x, sigma)[torch.arange(len(x)), y].view(x.shape)

    def log_prob(self, x0, y):
        """log p(y | x0), (B,)."""
        return self.log_joint(x0, 0.0).log_softmax(1)[torch.arange(len(x0)), y]

    def doubtful(self, x0, y):
        """log p(y | x0) of a classifier that always keeps a doubt: log p never reaches 0."""
        return (0.7 * self.log_prob(x0, y).exp() + 0.1).log()

    def log_prob_noisy(self, x, sigma, y):
        """log p(y | x, sigma), (B,)."""
        return self.log_joint(x, sigma).log_softmax(1)[torch.arange(len(x)), y]

    # ---- as models of a plan whose time is sigma

    def model(self, prediction):
        """What a network of this prediction returns: x is in the coordinates of its schedule, time is sigma."""
        return lambda x, sigma: self._predict(prediction, x, sigma, lambda z, s: self.denoised(z, s))

    def conditional_model(self, prediction):
        return lambda x, sigma, y: self._predict(prediction, x, sigma, lambda z, s: self.conditional(z, s, y))

    def _predict(self, prediction, x, sigma, denoise):
        s = sigma.double()[0]
        alpha = {"epsilon": 1 / torch.hypot(s, s.new_ones(())), "v": 1 / torch.hypot(s, s.new_ones(())), "denoised": 1.0,
                 "edm": torch.hypot(s, s.new_full((), 0.5)), "flow": 1 / (1 + s)}[prediction]
        z = x.double() * (alpha if prediction == "edm" else 1 / alpha)
        d = denoise(z, s)
        n = (z - d) / s
        if prediction == "epsilon":
            out = n
        elif prediction == "v":
            out = alpha * n - alpha * s * d
        elif prediction == "flow":
            out = n - d
        elif prediction == "edm":
            total = s**2 + 0.25
            out = (d - 0.25 / total * z) / (s * 0.5 / total.sqrt())
        else:
            out = d
        return out.float()
