"""Gradients against finite differences, in float64; what is left of them in memory; and networks, left as they were."""

import gc
import weakref
from functools import partial

import pytest
import torch
from torch import nn

import fastdiff as fd
from fastdiff import guidance, steering
from fastdiff.action import Actions
from fastdiff.guidance.gradient import gradient
from fastdiff.guidance.training_free import log_mean_exp, pull_back
from fastdiff.steering.concept import network_checksum

SHAPE = (3, 2, 3)


class Network(nn.Module):
    """A small denoiser or classifier: whatever the dtype of its input, it computes in float64."""

    def __init__(self, outputs=6, seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.layers = nn.Sequential(nn.Linear(7, 16), nn.Tanh(), nn.Linear(16, outputs)).double()
        for p in self.parameters():
            p.data = torch.randn(p.shape, generator=generator, dtype=torch.float64) / 2
        self.held = []

    def forward(self, x, time=None):
        time = torch.zeros(len(x)) if time is None else time
        hidden = self.layers[0](torch.cat([x.double().flatten(1), time.double().view(-1, 1)], 1)).tanh()
        self.held.append(weakref.ref(hidden))
        out = self.layers[2](hidden)
        return out.view(x.shape) if out.shape[1] == x[0].numel() else out


def differences(f, x, direction, h=1e-5):
    """d f / dh along a direction, to O(h^4). f: (B, ...) to (B,)."""
    at = [f(x + k * h * direction) for k in (-2, -1, 1, 2)]
    return (at[0] - 8 * at[1] + 8 * at[2] - at[3]) / (12 * h)


def check(f, x, gradient_at_x, tolerance):
    assert gradient_at_x.norm() > 1e-2
    for seed in range(4):
        direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        along = (gradient_at_x.double() * direction).flatten(1).sum(1)
        torch.testing.assert_close(along, differences(f, x.double(), direction), rtol=tolerance, atol=tolerance)


def point(seed=1):
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_pieces_in_float64():
    network, classifier = Network(), Network(4, seed=1)
    log_prob, y = guidance.labels(classifier, 4), torch.tensor([0, 3, 1])
    noise = 0.3 * torch.stack([point(s) for s in (5, 6, 7)])

    def smoothed(x0):
        return log_mean_exp(log_prob((x0 + noise).flatten(0, 1), y.repeat(3)).view(3, -1))

    def through(x):
        return smoothed(0.4 * x - 1.3 * network(x))

    x = point().requires_grad_()
    estimate = 0.4 * x - 1.3 * network(x)
    x0 = estimate.detach().requires_grad_()
    here = gradient(smoothed(x0), x0)
    check(smoothed, x0.detach(), here, 1e-9)
    check(through, x.detach(), pull_back(estimate, x, here), 1e-9)


def vp(**options):
    return fd.plan("ddim", schedule="linear", sigmas=[2.0, 1.0, 0.4, 0.0], time="sigma", **options)


def guided(guide, model, prediction="epsilon", dtype=torch.float32, row=2):
    """The run at its second call, the tensors for its row, and x there."""
    plan = vp(prediction=prediction)
    with torch.no_grad(), Actions([guide], plan, SHAPE, model, dtype=dtype) as actions:
        actions.select(torch.arange(SHAPE[0]))
        run = fd.Stepper(actions.plan, SHAPE, 0, dtype=dtype)
        while run.row < row:
            run.step(*(o.float() for o in actions.outputs(run)))
        return run, actions.outputs(run)


@pytest.mark.parametrize("prediction", ["epsilon", "v", "sample"])
def test_the_gradient_through_the_network(prediction):
    """What DPS hands to the row is the gradient of log p(y | x0_hat(x_t)) by x_t, over |log p|."""
    network, classifier = Network(), Network(4, seed=1)
    log_prob, y = guidance.labels(classifier, 4), torch.tensor([2, 0, 1])
    run, (out, slope) = guided(guidance.dps(log_prob, y), network, prediction)
    sigma, alpha = run.sigma, 1 / (1 + run.sigma**2) ** 0.5

    def estimate(x):
        out = network(x, run.time)
        if prediction == "sample":
            return out
        return x / alpha - sigma * out if prediction == "epsilon" else alpha * x - alpha * sigma * out

    def log_p(x):
        return log_prob(estimate(x), y)

    x = run.model_input.double()
    with torch.no_grad():
        torch.testing.assert_close(out, network(x, run.time))
        check(log_p, x, slope.double() * log_p(x).abs().view(-1, 1, 1), 1e-5)


def test_the_gradient_at_the_estimate():
    network, classifier = Network(), Network(4, seed=1)
    log_prob, y = guidance.labels(classifier, 4), torch.tensor([2, 0, 1])
    _, (out, slope) = guided(guidance.mpgd(log_prob, y), network, "sample")
    with torch.no_grad():
        check(lambda x0: log_prob(x0, y), out, slope, 1e-5)


def test_the_gradient_of_a_noisy_classifier():
    network, classifier = Network(), Network(4, seed=1)
    log_prob, y = guidance.labels(classifier, 4), torch.tensor([2, 0, 1])
    run, (_, slope) = guided(guidance.classifier(log_prob, y), network)
    scale = (1 + run.sigma**2) ** 0.5  # x = x_t / sqrt(abar)
    with torch.no_grad():
        sigma = torch.full((SHAPE[0],), run.sigma)
        check(lambda x: log_prob(x, sigma, y), run.model_input.double() * scale, slope, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bits_come_close(dtype):
    network, classifier = Network(), Network(4, seed=1)
    log_prob, y = guidance.labels(classifier, 4), torch.tensor([2, 0, 1])
    exact = guided(guidance.tfg(log_prob, y), network)[1]
    rough = guided(guidance.tfg(log_prob, y), network, dtype=dtype)[1]
    assert rough[1].dtype == (torch.float32 if dtype == torch.float16 else dtype)
    for a, b in zip(exact[1:], rough[1:]):
        assert 0 < (a - b.float()).norm() < 0.05 * a.norm()


@pytest.mark.parametrize("steepness", [1e-9, 1.0, 1e3])
def test_slopes_beyond_the_range_of_float16(steepness):
    """A slope times sigma = 157 passes 65504, one of 1e-9 is 0 in float16: neither is lost, each sample at its own scale."""
    mixing = torch.randn(6, 6, generator=torch.Generator().manual_seed(3))
    scale = torch.tensor([steepness, 1.0, steepness])

    def model(x, t):
        return (x.flatten(1) @ mixing.to(x.dtype)).tanh().view(x.shape)

    def through(dtype):
        guide = guidance.freedom(lambda x0, y: -scale * (x0 - 0.3).square().flatten(1).sum(1), None)
        plan = fd.plan("ddim", schedule="linear", prediction="epsilon", steps=4)
        with torch.no_grad(), Actions([guide], plan, SHAPE, model, dtype=dtype) as actions:
            return actions.outputs(fd.Stepper(actions.plan, SHAPE, 0, dtype=dtype))[1]

    exact, rough = through(torch.float32), through(torch.float16)
    for a, b in zip(exact, rough):
        assert a.norm() > 0 and (a - b).norm() < 0.05 * a.norm()


METHODS = {
    "classifier": guidance.classifier,
    "dps": guidance.dps,
    "lgd": guidance.lgd,
    "freedom": lambda *args: guidance.freedom(*args, n_recur=2),
    "mpgd": guidance.mpgd,
    "ugd": lambda *args: guidance.ugd(*args, strength=0.1),
    "tfg": lambda *args: guidance.tfg(*args, n_recur=2, n_mc=2),
}


@pytest.mark.parametrize("name", METHODS)
def test_a_call_leaves_nothing_in_memory(name):
    """When a row has been applied no activation of its call is left; parameters neither gather gradients nor change."""
    network, classifier = Network(), Network(4, seed=1)
    network.layers[2].bias.requires_grad_(False)
    wanted = [p.requires_grad for m in (network, classifier) for p in m.parameters()]
    before = [p.clone() for m in (network, classifier) for p in m.parameters()]
    alive = []

    def look(progress):
        gc.collect()
        alive.append(sum(r() is not None for m in (network, classifier) for r in m.held))
        assert not progress.x.requires_grad

    plan = vp()
    x = fd.sample(lambda x, t: network(x, t).float(), plan, SHAPE, 0, callback=look,
                  steering=[METHODS[name](guidance.labels(classifier, 4), 1)])
    assert alive and not any(alive) and not x.requires_grad and bool(x.isfinite().all())
    after = [p for m in (network, classifier) for p in m.parameters()]
    assert [p.requires_grad for p in after] == wanted and all(p.grad is None for p in after)
    assert all(torch.equal(a, b) for a, b in zip(before, after))


@pytest.mark.parametrize("name", METHODS)
def test_parameters_ask_for_no_gradient_while_it_runs(name):
    """Found as a module, in what it is bound to, in a closure; and restored when the model raises."""
    network, classifier = Network(), Network(4, seed=1)
    plan = vp()
    seen, calls = [], []

    def model(x, t):
        seen.append(any(p.requires_grad for p in classifier.parameters()))
        if name != "classifier":
            seen.append(any(p.requires_grad for p in network.parameters()))
        calls.append(1)
        if len(calls) > 1:
            raise KeyError("from the model")
        return network(x, t).float()

    with pytest.raises(KeyError, match="from the model"):
        fd.sample(model, plan, SHAPE, 0, steering=[METHODS[name](guidance.labels(classifier, 4), 1)])
    assert not any(seen)
    assert all(p.requires_grad for m in (network, classifier) for p in m.parameters())


GLOBAL = Network()


def by_name(x, t):
    return GLOBAL(x, t).float()


def test_a_network_is_found_where_a_function_has_it():
    class Holder:
        def __init__(self, network):
            self.network = network

        def __call__(self, x, t):
            return self.network(x, t).float()

        def method(self, x, t):
            return self(x, t)

    def unset(x, t):
        return later if x is None else GLOBAL(x, t).float()

    held = Network()
    functions = {by_name: GLOBAL, unset: GLOBAL, Holder(held): held, Holder(held).method: held,
                 lambda x, t: held(x, t).float(): held, partial(by_name): GLOBAL, partial(Holder.__call__, Holder(held)): held,
                 torch.autocast("cpu", enabled=False)(Holder(held).method): held, lambda x, t: by_name(x, t): GLOBAL}
    for function, network in functions.items():
        during = []

        def look(_, network=network, during=during):
            during.append(any(p.requires_grad for p in network.parameters()))

        guide = guidance.tfg(lambda x0, y: -x0.flatten(1).square().sum(1), None, rho=0.01, mu=0.01)
        fd.sample(function, vp(), SHAPE, 0, steering=[guide], callback=look)
        assert during and not any(during)
        assert all(p.requires_grad for p in network.parameters())
    later = None


def test_a_classifier_is_found_behind_its_labels():
    network, classifier, during = Network(), Network(4, seed=1), []
    log_prob = guidance.labels(lambda x0: classifier(x0 / 2), 4)
    fd.sample(lambda x, t: network(x, t).float(), vp(), SHAPE, 0, steering=[guidance.mpgd(log_prob, 1)],
              callback=lambda _: during.append(any(p.requires_grad for p in classifier.parameters())))
    assert during and not any(during)
    assert all(p.requires_grad for p in classifier.parameters())


def test_grad_mode_of_the_caller_does_not_matter():
    network, classifier = Network(), Network(4, seed=1)
    plan = vp()

    guide = guidance.tfg(guidance.labels(classifier, 4), 1)

    def sampled():
        return fd.sample(lambda x, t: network(x, t).float(), plan, SHAPE, 0, steering=[guide])

    plain = sampled()
    with torch.no_grad():
        assert torch.equal(sampled(), plain)
    with torch.inference_mode(), pytest.raises(RuntimeError, match="inference_mode"):
        sampled()


def test_two_guidances_share_one_evaluation():
    """Two actions that differentiate the same outputs: what each adds is what it adds alone at this point."""
    calls = []
    network, classifier = Network(), Network(4, seed=1)
    log_prob = guidance.labels(classifier, 4)
    plan = vp()

    def model(x, t):
        calls.append(1)
        return network(x, t)

    def first_call(steering):
        with torch.no_grad(), Actions(steering, plan, SHAPE, model) as actions:
            actions.select(torch.arange(SHAPE[0]))
            return actions.outputs(fd.Stepper(actions.plan, SHAPE, 0))

    alone = [first_call([guidance.dps(log_prob, y)]) for y in (1, 2)]
    noisy = first_call([guidance.classifier(log_prob, 3)])
    calls.clear()
    both = first_call([guidance.dps(log_prob, 1), guidance.classifier(log_prob, 3)])
    assert len(calls) == 1 and len(both) == 3
    torch.testing.assert_close(both[1], alone[0][1], rtol=0, atol=0)
    torch.testing.assert_close(both[2], noisy[1], rtol=0, atol=0)
    calls.clear()
    # the second sees the estimate that the first has moved, so that only the first can be compared
    both = first_call([guidance.dps(log_prob, 1), guidance.dps(log_prob, 2)])
    assert len(calls) == 1 and len(both) == 3 and not any(o.requires_grad for o in both)
    torch.testing.assert_close(both[1], alone[0][1], rtol=0, atol=0)
    assert (both[2] - alone[1][1]).abs().max() > 1e-6


class Behind(nn.Module):
    """A denoiser with a block behind a network."""

    def __init__(self):
        super().__init__()
        self.network, self.block = Network(), nn.Linear(6, 6)

    def forward(self, x, t):
        return self.block(self.network(x, t).float().flatten(1)).view(x.shape)


def test_guidance_and_an_amplified_concept():
    """The concept's second evaluation keeps what lies before its block. After it, guidance differentiates both; before it, the
    gradient of that part would be taken twice, and the way out is said."""
    model = Behind()
    concept = steering.Concept(torch.full((6,), 6**-0.5), "block", 1.0, network_checksum(model), 0, "one's own", 1.0)
    amplified = concept.at(weight=0.1, scale=2.0)
    guide = guidance.dps(guidance.labels(Network(4, seed=1), 4), 1)
    assert bool(fd.sample(model, vp(), SHAPE, 0, steering=[amplified, guide]).isfinite().all())
    with pytest.raises(RuntimeError, match="put that action before the guidance"):
        fd.sample(model, vp(), SHAPE, 0, steering=[guide, amplified])
    assert all(p.requires_grad for p in model.parameters())
