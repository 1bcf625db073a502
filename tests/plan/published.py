"""Samplers that diffusers and k-diffusion lack, straight from their formulas, in float64 and VE coordinates.

Each takes D(x, sigma), the start at sigmas[0], the levels and N(draw), and returns the end and the calls (x, sigma).
"""

import numpy as np

__all__ = ["PUBLISHED"]


class Calls(list):
    """D with a record of where it was called."""

    def __init__(self, denoiser):
        super().__init__()
        self.denoiser = denoiser

    def __call__(self, x, sigma):
        self.append((x, sigma))
        return self.denoiser(x, sigma)

    def slope(self, x, sigma):
        return (x - self(x, sigma)) / sigma


def heunpp2(D, x, s, N):
    """Heun++: slopes at s_i, s_{i+1}, s_{i+2}; weights s_{i+1}/3s_0 and s_{i+2}/3s_0 for the later two."""
    last = len(s) - 1
    for i in range(last):
        h = s[i + 1] - s[i]
        k1 = D.slope(x, s[i])
        if i == last - 1:
            x = x + h * k1
            continue
        x2 = x + h * k1
        k2 = D.slope(x2, s[i + 1])
        if i == last - 2:
            b2 = s[i + 1] / (2 * s[0])
            x = x + h * ((1 - b2) * k1 + b2 * k2)
            continue
        k3 = D.slope(x2 + (s[i + 2] - s[i + 1]) * k2, s[i + 2])
        b2, b3 = s[i + 1] / (3 * s[0]), s[i + 2] / (3 * s[0])
        x = x + h * ((1 - b2 - b3) * k1 + b2 * k2 + b3 * k3)
    return x


def ipndm(D, x, s, N, order=4):
    """iPNDM, eqs. for 1 to 4 slopes, equal steps; the last step to 0 is D."""
    past = []
    for i in range(len(s) - 1):
        denoised = D(x, s[i])
        past = [(x - denoised) / s[i], *past][:order]
        e = past + [0] * 4
        mixed = [e[0], (3 * e[0] - e[1]) / 2, (23 * e[0] - 16 * e[1] + 5 * e[2]) / 12,
                 (55 * e[0] - 59 * e[1] + 37 * e[2] - 9 * e[3]) / 24][len(past) - 1]
        x = denoised if s[i + 1] == 0 else x + (s[i + 1] - s[i]) * mixed
    return x


def res_multistep(D, x, s, N, eta=0.0, s_noise=1.0):
    """RES in h, c2, phi_1(-h), phi_2(-h), b1 = phi_1 - phi_2 / c2, b2 = phi_2 / c2, with ancestral noise."""
    before, old_down = None, None
    for i in range(len(s) - 1):
        denoised = D(x, s[i])
        up = min(s[i + 1], eta * np.sqrt(s[i + 1] ** 2 * (s[i] ** 2 - s[i + 1] ** 2) / s[i] ** 2))
        down = np.sqrt(s[i + 1] ** 2 - up**2)
        if down == 0 or before is None:
            x = x + (down - s[i]) * (x - denoised) / s[i]
        else:
            h = np.log(s[i] / down)
            c2 = (np.log(old_down) - np.log(s[i - 1])) / h
            phi_1 = (np.exp(-h) - 1) / -h
            phi_2 = (phi_1 - 1) / -h
            x = np.exp(-h) * x + h * ((phi_1 - phi_2 / c2) * denoised + phi_2 / c2 * before)
        if s[i + 1] > 0:
            x = x + up * s_noise * N(i)
        before, old_down = denoised, down
    return x


def gradient_estimation(D, x, s, N, gamma=2.0):
    """Permenter & Yuan: eps_bar = gamma eps_t + (1 - gamma) eps_{t+1}."""
    old = None
    for i in range(len(s) - 1):
        denoised = D(x, s[i])
        eps = (x - denoised) / s[i]
        mixed = eps if old is None else gamma * eps + (1 - gamma) * old
        x, old = denoised if s[i + 1] == 0 else x + (s[i + 1] - s[i]) * mixed, eps
    return x


def er_sde(D, x, s, N, order=3, s_noise=1.0):
    """ER-SDE-Solver-1 to 3 with phi(x) = x (exp(x^0.3) + 10) and sums of 200 points."""
    def fn(v):
        return v * (np.exp(v**0.3) + 10)

    m, dm = [], []
    for i in range(len(s) - 1):
        m.append(D(x, s[i]))
        if s[i + 1] == 0:
            x = m[-1]
            continue
        a, b = s[i], s[i + 1]
        r = fn(b) / fn(a)
        dt = b - a
        grid = b + np.arange(200) * (-dt / 200)
        new = r * x + (1 - r) * m[-1]
        if order > 1 and i > 0:
            dm.append((m[-1] - m[-2]) / (a - s[i - 1]))
            new = new + (dt + fn(b) * np.sum(1 / fn(grid)) * -dt / 200) * dm[-1]
        if order > 2 and i > 1:
            ddm = 2 * (dm[-1] - dm[-2]) / (a - s[i - 2])
            new = new + (dt**2 / 2 + fn(b) * np.sum((grid - a) / fn(grid)) * -dt / 200) * ddm
        x = new + s_noise * np.sqrt(b**2 - a**2 * r**2) * N(i)
    return x


def seeds(D, x, s, N, places=(0.5,), eta=1.0, s_noise=1.0, phi_2=False):
    """SEEDS-2 (one place r) and SEEDS-3 (r_1, r_2): the noise is one Ornstein-Uhlenbeck path w through the step, from 0:
    w' = e^{-g} w + sqrt(1 - e^{-2g}) N over a share g / (h eta) of it."""
    draw = 0
    for i in range(len(s) - 1):
        m = [D(x, s[i])]
        if s[i + 1] == 0:
            x = m[0]
            continue
        h = np.log(s[i] / s[i + 1])
        H, w, before, start = (1 + eta) * h, 0.0, 0.0, x
        for k, r in enumerate((*places, 1.0)):
            level = s[i] * np.exp(-r * h)
            g = (r - before) * h * eta
            w, draw, before = np.exp(-g) * w + np.sqrt(1 - np.exp(-2 * g)) * N(draw), draw + 1, r
            z = r * H
            one, two = 1 - np.exp(-z), 1 - (1 - np.exp(-z)) / z  # z phi_1(-z), z phi_2(-z)
            b = 0.0 if k == 0 else two * r / places[k - 1]
            if len(places) == 1 and k == 1 and not phi_2:
                b = one / (2 * places[0])
            if len(places) == 2 and k == 2:
                b = two / places[1]
            x = np.exp(-r * h * (1 + eta)) * start + (one - b) * m[0] + b * m[-1] + level * s_noise * w
            if k < len(places):
                m.append(D(x, level))
    return x


def ddpm(D, x, s, N):
    """Ho et al. 2020, algorithm 2, with beta~: in x_t = x / sqrt(1 + s^2), as ComfyUI's sampler of that name."""
    for i in range(len(s) - 1):
        bar, bar_next = 1 / (1 + s[i] ** 2), 1 / (1 + s[i + 1] ** 2)
        alpha = bar / bar_next
        eps = (x - D(x, s[i])) / s[i]
        mean = (x * np.sqrt(bar) - (1 - alpha) / np.sqrt(1 - bar) * eps) / np.sqrt(alpha)
        x = mean / np.sqrt(bar_next) + np.sqrt((1 - alpha) * (1 - bar_next) / (1 - bar) / bar_next) * N(i)
    return x


def deis_t(D, x, s, N, order=3):
    """DEIS, tAB: with alpha_bar(t) = exp(-beta_0 t - (beta_1 - beta_0) t^2 / 2), sums of 10000 terms of
    -(1/2) dln(alpha_bar)/dt / sqrt(alpha_bar (1 - alpha_bar)) l_j(t)."""
    a, b = np.log(0.002**2 + 1), np.log(80.0**2 + 1)
    slope = 2 * (a / 1e-3 - b) / (1e-3 - 1)
    first = b - slope / 2
    times = (np.sqrt(first**2 + 2 * slope * np.log(np.array(s) ** 2 + 1)) - first) / slope
    past = []
    for i in range(len(s) - 1):
        past = [D.slope(x, s[i]), *past][:order]
        if s[i + 1] == 0 or len(past) == 1:
            x = x + (s[i + 1] - s[i]) * past[0]
            continue
        tau = np.linspace(times[i], times[i + 1], 10000)
        bar = np.exp(-tau * first - tau**2 * slope / 2)
        f = 0.5 * (first + slope * tau) / np.sqrt(bar * (1 - bar))
        nodes = [times[i - k] for k in range(len(past))]
        for j, e in enumerate(past):
            basis = np.prod([(tau - u) / (nodes[j] - u) for k, u in enumerate(nodes) if k != j], axis=0)
            x = x + np.sum(f * basis) * (times[i + 1] - times[i]) / 10000 * e
    return x


def sa_solver(D, x, s, N, orders=(3, 4), tau=1.0, pece=False):
    """SA-Solver as ComfyUI runs it to sigma = 0: its orders fall before that step. With eqs. 15 and 18's integrals by
    Vandermonde's system for the moments of e^{(1 + tau^2)(u - t)}, and the corrector's noise that of the predictor."""
    lam, steps, rate = -np.log(np.maximum(s, 1e-300)), len(s) - 1, 1 + tau**2

    def advance(x, a, b, nodes, values, noise):
        h = lam[b] - lam[a]
        u = np.array([lam[k] - lam[b] for k in nodes])  # counted from the end
        moments = []
        for p in range(len(nodes)):  # of rate e^{rate u} u^p over [-h, 0], by parts
            moments.append((0.0**p - np.exp(-rate * h) * (-h) ** p) - (p / rate * moments[-1] if p else 0.0))
        c = np.linalg.solve(np.vander(u, increasing=True).T, moments)
        return s[b] / s[a] * np.exp(-(tau**2) * h) * x + sum(w * v for w, v in zip(c, values)) + noise

    m, predicted, noise = [], x, 0.0
    for i in range(steps):
        m.append(D(predicted, s[i]))
        last = s[i + 1] == 0
        used = min(orders[1], i + 1, steps - i)
        if i == 0 or (last and not pece):
            x = predicted
        else:
            nodes = [i - k for k in range(used)]
            x = advance(x, i - 1, i, nodes, [m[k] for k in nodes], noise)
            if pece:
                m[-1] = D(x, s[i])
        if last:
            return m[-1]
        noise = s[i + 1] * np.sqrt(1 - np.exp(-2 * tau**2 * (lam[i + 1] - lam[i]))) * N(i)
        nodes = [i - k for k in range(min(orders[0], i + 1, steps - 1 - i))]
        predicted = advance(x, i, i + 1, nodes, [m[k] for k in nodes], noise)
    raise AssertionError("the levels do not end at 0")


SA = {"few_steps": False, "predictor_order": 3, "corrector_order": 4}
# case: (formula, its options, our sampler, our options)
PUBLISHED = {
    "heunpp2": (heunpp2, {}, "heunpp2", {}),
    "ipndm": (ipndm, {}, "ipndm", {}),
    "ipndm 1": (ipndm, {"order": 1}, "ipndm", {"order": 1}),
    "ipndm 2": (ipndm, {"order": 2}, "ipndm", {"order": 2}),
    "ipndm 3": (ipndm, {"order": 3}, "ipndm", {"order": 3}),
    "res_multistep": (res_multistep, {}, "res_multistep", {}),
    "res_multistep_ancestral": (res_multistep, {"eta": 1.0}, "res_multistep_ancestral", {}),
    "res_multistep_ancestral, eta 0.6": (
        res_multistep, {"eta": 0.6, "s_noise": 0.9}, "res_multistep_ancestral", {"eta": 0.6, "s_noise": 0.9}),
    "gradient_estimation": (gradient_estimation, {}, "gradient_estimation", {}),
    "gradient_estimation, gamma 1.4": (gradient_estimation, {"gamma": 1.4}, "gradient_estimation", {"gamma": 1.4}),
    **{f"er_sde {n}": (er_sde, {"order": n}, "er_sde", {"order": n}) for n in (1, 2, 3)},
    "seeds_2": (seeds, {}, "seeds_2", {}),
    "seeds_2, r 0.4, phi_2": (seeds, {"places": (0.4,), "phi_2": True, "eta": 0.7, "s_noise": 1.1}, "seeds_2",
                              {"r": 0.4, "solver_type": "phi_2", "eta": 0.7, "s_noise": 1.1}),
    "seeds_2, exponential Heun": (seeds, {"places": (1.0,), "phi_2": True, "eta": 0.0}, "seeds_2",
                                  {"r": 1.0, "solver_type": "phi_2", "eta": 0.0}),
    "seeds_3": (seeds, {"places": (1 / 3, 2 / 3)}, "seeds_3", {}),
    "seeds_3, other places": (seeds, {"places": (0.4, 0.9), "eta": 0.5}, "seeds_3", {"r_1": 0.4, "r_2": 0.9, "eta": 0.5}),
    "ddpm": (ddpm, {}, "ddpm", {}),
    "deis in t": (deis_t, {}, "deis", {"variable": "t"}),
    "deis in t, order 2": (deis_t, {"order": 2}, "deis", {"variable": "t", "order": 2}),
    "sa_solver": (sa_solver, {}, "sa_solver", SA),
    "sa_solver, tau 0.5": (sa_solver, {"tau": 0.5}, "sa_solver", {**SA, "tau": 0.5}),
    "sa_solver, pece": (sa_solver, {"pece": True}, "sa_solver", {**SA, "pece": True}),
    "sa_solver, pece 2, 3": (sa_solver, {"orders": (2, 3), "pece": True}, "sa_solver",
                             {"few_steps": False, "predictor_order": 2, "corrector_order": 3, "pece": True}),
}
