"""The rules of the training-free family once more: VP coordinates, float64, unfused, one line of the papers after the
other. `alpha_bar`, `prev` are abar_t and abar_{t-1}; net(x_t) returns epsilon; log_p(x0) returns log p(y | x0), (B,)."""

import math

import torch


def slope(f, x):
    x = x.detach().requires_grad_()
    return torch.autograd.grad(f(x).sum(), x)[0]


def x0_hat(net, x, alpha_bar):
    return (x - math.sqrt(1 - alpha_bar) * net(x)) / math.sqrt(alpha_bar)


def ddim(x, eps, alpha_bar, prev, eta):
    """DDIM, eq. 12, without its noise; and the noise's standard deviation."""
    x0 = (x - math.sqrt(1 - alpha_bar) * eps) / math.sqrt(alpha_bar)
    sigma = eta * math.sqrt((1 - prev) / (1 - alpha_bar) * (1 - alpha_bar / prev))
    return math.sqrt(prev) * x0 + math.sqrt(1 - prev - sigma**2) * eps, sigma


def dps(net, log_p, x, alpha_bar, prev, eta, *, strength, **_):
    mean, sigma = ddim(x, net(x).detach(), alpha_bar, prev, eta)
    gradient = slope(lambda z: log_p(x0_hat(net, z, alpha_bar)), x)
    norm = log_p(x0_hat(net, x, alpha_bar)).detach().abs()
    return mean + strength * gradient / norm.view(-1, *[1] * (x.ndim - 1)), sigma


def lgd(net, log_p, x, alpha_bar, prev, eta, *, strength, n, noise, **_):
    mean, sigma = ddim(x, net(x).detach(), alpha_bar, prev, eta)

    def smoothed(z):
        estimate = x0_hat(net, z, alpha_bar)
        return torch.stack([log_p(estimate + math.sqrt(1 - alpha_bar) * noise(i)) for i in range(n)]).logsumexp(0)

    return mean + strength * slope(smoothed, x) / n, sigma


def freedom(net, log_p, x, alpha_bar, prev, eta, *, strength, increase, **_):
    mean, sigma = ddim(x, net(x).detach(), alpha_bar, prev, eta)
    return mean + strength * increase * slope(lambda z: log_p(x0_hat(net, z, alpha_bar)), x), sigma


def mpgd(net, log_p, x, alpha_bar, prev, eta, *, strength, **_):
    eps = net(x).detach()
    x0 = x0_hat(net, x, alpha_bar).detach()
    x0 = x0 + strength * slope(log_p, x0)
    sigma = eta * math.sqrt((1 - prev) / (1 - alpha_bar) * (1 - alpha_bar / prev))
    return math.sqrt(prev) * x0 + math.sqrt(1 - prev - sigma**2) * eps, sigma


def ugd(net, log_p, x, alpha_bar, prev, eta, *, strength, backward_steps, **_):
    eps = net(x).detach()
    x0 = x0_hat(net, x, alpha_bar).detach()
    eps = eps - strength * math.sqrt(1 - alpha_bar) * slope(lambda z: log_p(x0_hat(net, z, alpha_bar)), x)
    moved = x0
    for _i in range(backward_steps):
        moved = moved + strength * slope(log_p, moved)
    eps = eps - math.sqrt(alpha_bar / (1 - alpha_bar)) * (moved - x0)
    return ddim(x, eps, alpha_bar, prev, eta)


def tfg(net, log_p, x, alpha_bar, prev, eta, *, rho, mu, sigma_bar, n_iter, n_mc, increase, noise, clip=None, **_):
    spread = sigma_bar * math.sqrt(1 - alpha_bar)

    def smoothed(estimate):
        return torch.stack([log_p(estimate + spread * noise(i)) for i in range(n_mc)]).logsumexp(0) - math.log(n_mc)

    def bounded(estimate):
        return estimate if clip is None else estimate.clamp(*clip)

    delta_t = rho * increase * slope(lambda z: smoothed(bounded(x0_hat(net, z, alpha_bar))), x)
    x0 = bounded(x0_hat(net, x, alpha_bar)).detach()
    moved = x0
    for _i in range(n_iter):
        moved = moved + mu * increase * slope(smoothed, moved)
    mean, sigma = ddim(x, (x - math.sqrt(alpha_bar) * x0) / math.sqrt(1 - alpha_bar), alpha_bar, prev, eta)
    return mean + delta_t / math.sqrt(alpha_bar / prev) + math.sqrt(prev) * (moved - x0), sigma


def run(rule, net, log_p, sigmas, eta, normal, *, n_recur=1, **settings):
    """The whole loop, from x_T to x_0. sigmas: (steps + 1,), the last 0; net(x_t, sigma); normal(stream, draw) -> (B, ...)."""
    bars = [1 / (1 + s**2) for s in sigmas]
    ratios = [a / b for a, b in zip(bars, bars[1:])]
    x, row, travels = normal("init", 0), 0, 0
    for t, (alpha_bar, prev) in enumerate(zip(bars, bars[1:])):
        for again in range(n_recur):
            row += 1
            n = settings.get("n_mc", settings.get("n", 1))
            given = {
                "noise": lambda i, row=row, n=n: normal("guide", row * n + i),
                "increase": ratios[t] * len(ratios) / sum(ratios),
                **settings,
            }
            mean, sigma = rule(lambda z, t=t: net(z, sigmas[t]), log_p, x, alpha_bar, prev, eta, **given)
            if again + 1 < n_recur:
                # x_{t-1} = mean + sigma z and x_t = sqrt(a) x_{t-1} + sqrt(1 - a) z' with the joint variance of both
                a = alpha_bar / prev
                x = math.sqrt(a) * mean + math.sqrt(a * sigma**2 + 1 - a) * normal("travel", travels)
                travels += 1
            else:
                x = mean + sigma * normal("step", t)
    return x
