"""Noise alignment: the map against float64, samples against closed forms, which rows and directions it takes."""

import math

import numpy as np
import pytest
import torch

import fastdiff as fd
from fastdiff.action import Actions
from fastdiff.steering import Gaussian, NoiseAlignment
from fastdiff.steering.alignment import faster
from fastdiff.steering.window import rows_in
from plan.harness import predict
from steering.classes import SHAPE, SIZE, data, difference, fitted, made, small


def toy(plan, schedule):
    """A model whose denoised estimate is the harness's toy D, whatever it predicts."""
    prediction = plan.info["prediction"]

    def model(x, time):
        r = int(np.flatnonzero(plan.calls_model & (np.abs(plan.times - float(time[0])) <= 1e-6 * abs(plan.times)))[0])
        sigma = float(plan.sigmas[r])
        alpha = float(schedule.alpha_at(sigma))
        x_t = x.double() * alpha / plan.input_scales[r]
        return torch.from_numpy(predict(prediction, x_t.flatten(1).numpy(), sigma, alpha)).reshape(x.shape).float()

    return model


COORDINATES = [("edm", "edm"), ("edm", "denoised"), ("linear", "epsilon"), ("scaled_linear", "v"), ("flow", "flow")]


@pytest.mark.parametrize("how", ["bank", "lift", "map"])
@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_2m", "dpmpp_sde", "dpmpp_2s_ancestral", "dpm_2"])
@pytest.mark.parametrize("schedule, prediction", COORDINATES)
def test_the_map_is_that_of_two_float64_denoisers(na, schedule, prediction, sampler, how):
    """In every row of every sampler that calls the model, in every coordinate system, and nowhere else."""
    noise = fd.schedules.schedule(schedule)
    plan = fd.plan(sampler, schedule=noise, prediction=prediction, steps=7)
    window = (0.4, 10.0)
    shape, weights, names = (3, *SHAPE), [1.0, -2.5, 0.3], ["low", "high", "low"]
    action = na.at(weights, window, names, gain=0.0, how=how, rank=6 if how == "bank" else None)
    inside, seen = rows_in(plan, window), 0
    with Actions([action], plan, shape, toy(plan, noise)) as actions:
        actions.select(torch.arange(3))
        run = fd.Stepper(actions.plan.with_denoised(), shape, 5, **actions.bank)
        while not run.done:
            row, x = run.row, run.model_input.double() / plan.input_scales[run.row]
            outputs = actions.outputs(run)
            sigma = run.sigma
            exact = torch.stack([w * difference(na, x[[b]], sigma, name)[0] for b, (w, name) in enumerate(zip(weights, names))])
            if inside[row]:
                seen += 1
                if how != "bank":
                    added = outputs[-1].double()
                else:
                    bank, index, weight = (actions.bank[name] for name in ("bank", "bank_index", "bank_weight"))
                    added = torch.einsum("bm,bm...->b...", weight.double(), bank[index].double())
                assert (added - exact).abs().max() < 1e-5  # the data's values go from -2 to 2
            run.step(*outputs)
            alone = torch.from_numpy(predict("denoised", x.flatten(1).numpy(), sigma, 1.0)).reshape(shape)
            expected = alone + exact if inside[row] else alone
            rounded = max(1.0, sigma, float(expected.abs().max()))  # the model's output is float32
            assert (run.denoised().double() - expected).abs().max() < 1e-5 * rounded
    assert seen == inside.sum() >= 3
    assert not inside[plan.calls_model].all()


@pytest.mark.parametrize("dtype, close", [(torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
def test_a_model_in_16_bits_is_steered_at_what_it_sees(na, dtype, close):
    plan = fd.plan("heun", schedule="edm", prediction="denoised", steps=8)
    zero = lambda x, t: torch.zeros_like(x)
    action = na.at(2.0, (0.0, 80), "high")
    steered, same = (fd.sample(zero, plan, (4, *SHAPE), 3, steering=[action], dtype=d) for d in (dtype, torch.float32))
    assert not torch.equal(steered, same)
    assert (steered - same).abs().max() < close


# ---- against closed forms


def denoiser(g):
    return lambda x, sigma: g.denoise(x, sigma).float()


def transported(g, x, sigma):
    """The end of the probability flow of a Gaussian that starts at x, level sigma (Wang and Vastola, arXiv:2412.09726)."""
    basis, values = g.basis.double().flatten(1), g.eigenvalues
    along = (x.double() - g.mean).flatten(1) @ basis.T * (values / (values + sigma**2)).sqrt()
    return (g.mean.flatten() + along @ basis).reshape(x.shape)


def test_a_gaussian_model_is_turned_into_the_class(na):
    """Where the network is D_full, w = 1 makes it D_class: every sample goes where the class's flow takes it, at second order."""
    target, errors = na.targets["high"], []
    for steps in (32, 64):
        plan = fd.plan("heun", schedule="edm", prediction="denoised", steps=steps)
        out = fd.sample(denoiser(na.full), plan, (8, *SHAPE), 0, steering=[na.at(1.0, (0, 100), "high", gain=0.0)])
        assert torch.allclose(out, fd.sample(denoiser(target), plan, (8, *SHAPE), 0), rtol=0, atol=2e-6)
        start = fd.randn((8, *SHAPE), seeds=0, stream="init") * 80
        errors.append(float((out.double() - transported(target, start, 80)).abs().max()))
    assert errors[1] < 5e-3
    assert 3.5 < errors[0] / errors[1] < 5


@pytest.mark.skipif(fd.ops.chosen("cpu") == "reference", reason="hundreds of samples: minutes with the reference")
@pytest.mark.parametrize("sampler", ["heun", "dpmpp_2m_sde"])
def test_many_samples_have_the_class_s_mean_and_covariance(na, sampler):
    count, target = 400, na.targets["low"]
    plan = fd.plan(sampler, schedule="edm", prediction="denoised", steps=24)
    out = fd.sample(denoiser(na.full), plan, (count, *SHAPE), 0, steering=[na.at(1.0, (0, 100), "low", gain=0.0)])
    flat = out.double().flatten(1)
    basis, values = target.basis.double().flatten(1), target.eigenvalues
    along = (flat - target.mean.flatten()) @ basis.T / values.sqrt()  # standard normal, if the samples are the class's
    assert along.mean(0).abs().max() < 4 / count**0.5
    assert (torch.cov(along.T) - torch.eye(SIZE)).abs().max() < 5 * (2 / count) ** 0.5
    unsteered = fd.sample(denoiser(na.full), plan, (count, *SHAPE), 0).double().flatten(1)
    assert (((unsteered - target.mean.flatten()) @ basis.T / values.sqrt()).mean(0).abs().max()) > 0.5  # it had to be steered


def test_of_a_mixture_the_error_vanishes_as_noise_grows(na):
    """Full data that are a mixture of two Gaussians, exactly: D_mixture + D_class - D_full nears D_class as the noise grows."""
    low, high = na.targets["low"], na.targets["high"]
    values = [torch.cov(data(4000, s, m, c).flatten(1).T) for s, m, c in ((1, -0.4, 0.3), (2, 0.5, 0.4))]
    means = [g.mean.flatten() for g in (low, high)]
    made = [gaussian_of(m, c) for m, c in zip(means, values)]
    apart = means[0] - means[1]
    full = gaussian_of(sum(means) / 2, sum(values) / 2 + torch.outer(apart, apart) / 4)
    na = NoiseAlignment(full, {"low": made[0]})

    def mixture(x, sigma):
        noisy = [torch.distributions.MultivariateNormal(m, c + sigma**2 * torch.eye(SIZE).double()) for m, c in zip(means, values)]
        logs = torch.stack([p.log_prob(x.flatten(1)) for p in noisy])
        return sum(p.view(-1, 1, 1, 1) * g.denoise(x, sigma) for p, g in zip(logs.softmax(0), made))

    share = []
    for sigma in (0.5, 2.0, 8.0, 32.0):
        x = data(500, 1, -0.4, 0.3) + sigma * fd.randn((500, *SHAPE), seeds=10**6).double()
        plan = fd.plan("euler", schedule="edm", prediction="denoised", sigmas=[sigma, sigma / 2], start="latent")
        action = na.at(1.0, (0, 100), gain=0.0)
        with Actions([action], plan, x.shape, lambda x, t: mixture(x.double(), float(t[0])).float()) as actions:
            actions.select(torch.arange(500))
            run = fd.Stepper(actions.plan.with_denoised(), x.shape, 0, init=x.float(), **actions.bank)
            run.step(*actions.outputs(run))
        exact = made[0].denoise(x, sigma)
        share.append(float((run.denoised() - exact).norm() / (mixture(x, sigma) - exact).norm()))
    assert share[1] < 0.4 and share[2] < 0.06 and share[3] < 0.01
    assert share == sorted(share, reverse=True)


def gaussian_of(mean, cov):
    values, vectors = torch.linalg.eigh(cov)
    about = {"count": 0, "shape": list(SHAPE), "range": [-2.0, 2.0], "asked": None}
    return Gaussian(mean.reshape(SHAPE), vectors.T.flip(0).float().reshape(SIZE, *SHAPE), values.flip(0), 0.0, about)


def test_pure_noise_is_a_level_too(na):
    """A flow starts where alpha is 0: the map is finite there, and nearly the difference of the means."""
    plan = fd.plan("flow_heun", schedule="flow", prediction="flow", steps=6)
    assert plan.sigmas[plan.calls_model][0] > 1e11
    zero = lambda x, t: torch.zeros_like(x)
    bank, lift = (fd.sample(zero, plan, (2, *SHAPE), 0, steering=[na.at(1.0, (0, math.inf), "low", rank=6, how=how)])
                  for how in ("bank", "lift"))
    assert torch.isfinite(bank).all() and torch.allclose(bank, lift, atol=1e-5)
    with Actions([na.at(1.0, (1e9, math.inf), "low", how="lift")], plan, (1, *SHAPE), zero) as actions:
        actions.select(torch.zeros(1, dtype=torch.int64))
        added = actions.outputs(fd.Stepper(actions.plan, (1, *SHAPE), 0))[-1]
    assert torch.allclose(added[0].double(), na.targets["low"].mean - na.full.mean, atol=1e-7)


# ---- windows and ranks


def test_the_published_windows_of_cifar10():
    """EDM's 18 steps of Heun, sigma 80 to 5.315 in steps 0 to 7 (steering notes of the paper's author)."""
    plan = fd.plan("heun", schedule="edm", prediction="edm", steps=18)
    grid = [80, 57.586, 40.786, 28.375, 19.352, 12.910, 8.401, 5.315, 3.257, 1.923, 1.088, 0.5853, 0.2964, 0.1395, 0.0599, 0.0229,
            0.00753, 0.002]
    calls = np.flatnonzero(plan.calls_model)
    firsts = [r for r in calls if r == calls[plan.steps[calls] == plan.steps[r]][0]]
    assert plan.evaluations == 35
    assert np.allclose(plan.sigmas[firsts], grid, rtol=2e-3)
    assert np.allclose(plan.sigmas[firsts][:10], grid[:10], rtol=2e-4)
    by_level, by_step = rows_in(plan, (5.3, 80)), rows_in(plan, steps=(0, 7))
    assert [int(s) for s in sorted(set(plan.steps[by_level]))] == list(range(8))
    assert sorted(plan.sigmas[by_level], reverse=True) == pytest.approx(sorted([*grid[:8], *grid[1:8]], reverse=True), rel=2e-4)
    assert sorted(plan.sigmas[by_step], reverse=True) == pytest.approx(sorted([*grid[:8], *grid[1:9]], reverse=True), rel=2e-4)
    low, high = plan.sigmas[firsts[7]], plan.sigmas[firsts[3]]  # both ends are in it
    assert rows_in(plan, (low, high)).sum() == 10
    assert rows_in(plan, (np.nextafter(low, 9), np.nextafter(high, 9))).sum() == 6
    na = fitted()
    for options, count in (({}, 15), ({"window": None, "steps": (0, 7)}, 16), ({"steps": (2, 7)}, 11)):
        action = na.at(target="low", **options)
        assert action.weight == 3.0
        with Actions([action], plan, (1, *SHAPE), small) as actions:
            changed = (actions.plan.coef[:, : len(actions.plan.slots) + actions.plan.bank] != 0).sum(1)
            before = (plan.coef[:, : len(plan.slots)] != 0).sum(1)
        assert (changed > before).sum() == count


def test_the_default_window_reaches_up_to_pure_noise(na):
    """A VP schedule begins at sigma 157, a flow at infinity."""
    for schedule, prediction in (("linear", "epsilon"), ("flow", "flow")):
        plan = fd.plan("euler", schedule=schedule, prediction=prediction, steps=12)
        with Actions([na.at(target="low", how="lift")], plan, (1, *SHAPE), small) as actions:
            acts = [bool(row.d.get("steer")) for row in actions.plan.rows]
        assert acts == list(rows_in(plan, (5.3, math.inf))) and acts[plan.calls_model.argmax()]


def test_higher_levels_take_fewer_directions_and_lose_no_more():
    na = fitted(sigma=0.0)
    plan = fd.plan("euler", schedule="edm", prediction="denoised", steps=12)
    with Actions([na.at(1.0, (0.2, 80), "low", gain=0.05, how="lift")], plan, (1, *SHAPE), small) as actions:
        gain = actions._acting[0]._gain
    inside = np.flatnonzero(rows_in(plan, (0.2, 80)))
    own = na.targets["low"]
    most = int((own.gains(plan.sigmas[inside].min()) > 0.05).sum())
    used = [int((gain[r, 1 : 1 + most] != 0).sum()) for r in inside]
    assert used == sorted(used) and used[0] < used[-1] == most
    allowed = own.error(most, plan.sigmas[inside].min())
    for r, count in zip(inside, used):
        assert own.error(count, plan.sigmas[r]) <= allowed * (1 + 1e-9)
        assert count == 0 or own.error(count - 1, plan.sigmas[r]) > allowed


def test_the_bank_is_taken_for_few_columns_where_it_has_room(na):
    plan = made("euler")

    def kinds(*ranks, **options):
        actions = [na.at(1.0, target="low", window=(0.3, 80), rank=rank, **options) for rank in ranks]
        with Actions(actions, plan, (2, *SHAPE), small) as begun:
            return [type(a).__name__.strip("_") for a in begun._acting]

    assert kinds(0, 2, 3) == ["Banked", "Banked", "Lifted"]
    assert kinds(2, 2, 2, 2) == ["Banked", "Banked", "Banked", "Lifted"]
    assert kinds(6, how="bank") == ["Banked"]
    with pytest.raises(ValueError, match="the bank has 3 columns free and the alignment takes 5"):
        kinds(6, 2, how="bank")


def test_which_way_is_faster():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert [faster(5, 16, 784, d) for d in (cpu, gpu)] == ["bank", "bank"]
    assert [faster(5, 4, 784, d) for d in (cpu, gpu)] == ["lift", "lift"]
    assert [faster(392, 16, 784, d) for d in (cpu, gpu)] == ["lift", "lift"]
    assert [faster(393, 16, 784, d) for d in (cpu, gpu)] == ["lift", "map"]
    assert [faster(2048, 16, 4095, d) for d in (cpu, gpu)] == ["lift", "lift"] and faster(2049, 16, 4095, gpu) == "map"
    assert faster(4000, 16, 4096, gpu) == "lift"
    assert [faster(3000, 16, 3072, gpu, maps) for maps in (28, 29)] == ["map", "lift"]  # 1 GiB of matrices


def test_a_window_below_what_it_was_fitted_for_is_refused():
    na = fitted(sigma=2.0)
    plan = made("euler", 12)
    fd.sample(small, plan, (2, *SHAPE), 0, steering=[na.at(1.0, (2.0, 80), "low")])
    says = r"goes down to sigma 0\.\d+: target 'low' was fitted with . directions.*fit it with sigma=0\.\d+, or say rank="
    with pytest.raises(ValueError, match=says):
        fd.sample(small, plan, (2, *SHAPE), 0, steering=[na.at(1.0, (0.1, 80), "low")])
    fd.sample(small, plan, (2, *SHAPE), 0, steering=[na.at(1.0, (0.1, 80), "low", rank=1)])
    chosen = fitted(rank=2)  # whoever asked for a rank gets that
    fd.sample(small, plan, (2, *SHAPE), 0, steering=[chosen.at(1.0, (0.1, 80), "low")])


def test_the_level_that_it_was_fitted_for_is_not_below():
    """Whatever the last direction's gain is there; a smaller gain asks for more directions than were kept."""
    for sigma in (0.9, 1.3, 2.0, 2.5):
        na = fitted(sigma=sigma)
        plan = fd.plan("euler", schedule="edm", prediction="denoised", sigmas=[20.0, sigma, 0.0])
        fd.sample(small, plan, (2, *SHAPE), 0, steering=[na.at(1.0, (sigma, 80), "low")])
        g = na.targets["low"]
        if g.about["enough"] is not None and g.gains(sigma)[-1] > 0.011:
            with pytest.raises(ValueError, match="goes down to"):
                fd.sample(small, plan, (2, *SHAPE), 0, steering=[na.at(1.0, (sigma, 80), "low", gain=0.001)])


def test_the_benchmark_measures_both_ways():
    from benchmarks.alignment import measured

    both, one = measured((1, 4, 4), 2, 3, 0.01), measured((1, 4, 4), 8, 3, 0.01)
    assert both["columns"] == 5 and min(both[f"{side}_us"] for side in ("plain", "bank", "lift")) > 0
    assert one["columns"] == 17 and "bank_us" not in one
