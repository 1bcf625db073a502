"""Brownian paths: weights against the law and the path itself, plans against k-diffusion, runs against each other."""

import inspect
import itertools
import math
import random

import numpy as np
import pytest
import torch
from plan.harness import denoise, k_diffusion, relative

import fastdiff as fd
from fastdiff.brownian import DEPTH, NORMALS, Path, draw_of, increments
from fastdiff.reference import path
from fastdiff.samplers.stage import Noise
from fastdiff.samplers.table import addresses
from fastdiff.schedules import EDM

OF_K_DIFFUSION = ("dpmpp_sde", "dpmpp_2m_sde", "dpmpp_3m_sde", "dpmpp_2s_ancestral", "euler_ancestral")
SAMPLERS = (*OF_K_DIFFUSION, "dpm_2_ancestral", "ddim", "ddpm", "res_multistep_ancestral", "seeds_2", "seeds_3", "er_sde")
SEVERAL = ("dpmpp_sde", "seeds_2", "seeds_3")  # draws in one step: all but one are the step's own
DRAWING = {"ddim": {"eta": 1.0}}


def karras(steps, low=0.03, high=14.6):
    return EDM(low, high).grid("karras", steps)[:-1].tolist()


def random_levels(generator, count, low=-14.0, high=14.0):
    """Levels down from 2^high to 2^low, not closer than a path is followed."""
    logs = sorted((generator.uniform(low, high) for _ in range(count)), reverse=True)
    return [2.0**u for u, above in zip(logs, [math.inf, *logs]) if above - u > 1e-3]


def product(a, b):
    return math.fsum(w * b.get(draw, 0.0) for draw, w in a.items())


def check_law(levels, most=NORMALS):
    """Unit variance, independence, at most so many normals. Returns the levels that were followed."""
    draws = increments(levels, most)
    assert len(draws) == len(levels) - 1 and max(map(len, draws)) <= most
    for i, a in enumerate(draws):
        for j, b in enumerate(draws[: i + 1]):
            assert abs(product(a, b) - (i == j)) < 1e-12
    return [level.sigma for level in Path(levels[::-1], most).levels[::-1]]


# ---- weights


@pytest.mark.parametrize("most", [NORMALS, NORMALS - 1])
def test_the_law_is_exact_for_random_levels(most):
    generator = random.Random(0)
    for _ in range(150):
        ends = sorted(generator.uniform(-14, 14) for _ in range(2))
        levels = random_levels(generator, generator.randint(2, 40), *ends)
        if len(levels) > 1:
            followed = check_law(levels, most)
            assert followed == sorted(followed, reverse=True) and len(set(followed)) == len(levels)


@pytest.mark.parametrize("steps", [2, 5, 20, 40, 100])
def test_usual_plans_are_followed_at_their_own_levels(steps):
    levels = karras(steps, 0.002, 80)
    assert check_law(levels) == levels


def test_many_steps_move_levels_by_less_than_half_a_step():
    levels = karras(1000)
    followed = np.array(check_law(levels[:300]))
    assert (followed != levels[:300]).any() and (np.diff(followed) < 0).all()
    assert np.abs(np.log(followed / levels[:300])).max() < 0.51 * math.log(levels[298] / levels[299])
    assert max(map(len, increments(levels))) <= NORMALS


def test_any_two_levels_take_at_most_14_normals():
    generator = random.Random(1)
    for _ in range(3000):
        low, high = sorted(2.0 ** generator.uniform(-40, 40) for _ in range(2))
        if high / low > 1.001:
            (weights,) = increments([high, low])
            assert len(weights) <= NORMALS
            assert abs(math.fsum(w * w for w in weights.values()) - 1) < 1e-12


def test_a_step_over_many_octaves():
    check_law([1e6, 1.0, 1e-6])
    check_law([9999.0, 80.0, 3e-4, 2e-4])
    check_law([1e30, 1e-30])


def test_powers_of_two_are_sums_of_whole_octaves():
    expected = {draw_of(2, 0): math.sqrt(2 / 3), draw_of(1, 0): math.sqrt(1 / 3)}
    assert increments([8.0, 2.0]) == [pytest.approx(expected, rel=1e-15)]


def test_draws_are_the_path_and_add_up():
    """Random partitions, in float64 by the path itself and in float32 by the normals that the kernels draw."""
    generator, seeds, count = random.Random(2), [3, -5], 6
    for _ in range(6):
        levels = random_levels(generator, 14, -7, 7)
        placed = Path(levels[::-1], NORMALS).levels[::-1]
        values = [path(seeds, level.sigma, level.depth, count) for level in placed]
        total, total32 = np.zeros((2, count)), np.zeros((2, count), np.float32)
        for i, weights in enumerate(increments(levels)):
            root = math.sqrt(placed[i].sigma - placed[i + 1].sigma)
            exact, drawn, drawn32 = (values[i] - values[i + 1]) / root, 0.0, np.float32(0)
            for draw, w in weights.items():
                key = fd.reference.run_keys(np.array(seeds), [[4]], [[draw]])[0, 0]
                drawn = drawn + w * fd.reference.normal(key, count, exact=False)
                drawn32 = drawn32 + np.float32(w) * fd.randn((2, count), seeds=seeds, stream="brownian", draw=draw).numpy()
            assert np.abs(drawn - exact).max() < 1e-12
            assert np.abs(drawn32 - exact).max() < 2e-5
            total += root * drawn
            total32 += np.float32(root) * drawn32
        whole = values[0] - values[-1]
        assert np.abs(total - whole).max() < 1e-12 * math.sqrt(levels[0])
        assert np.abs(total32 - whole).max() < 2e-5 * math.sqrt(levels[0])


@pytest.mark.parametrize("steps, least", [(77, 0.99), (153, 0.88), (305, 0.8)])
def test_the_path_is_the_same_for_any_number_of_steps(steps, least):
    """A step's draw against the draws of the finer steps that make it up: their weights' product is the correlation."""
    fine = karras(steps)
    finest = increments(fine)
    for stride in (2, 4, 19):
        coarse = fine[::stride]
        for i, draw in enumerate(increments(coarse)):
            together = {}
            for k in range(stride * i, stride * (i + 1)):
                for normal, w in finest[k].items():
                    share = (fine[k] - fine[k + 1]) / (coarse[i] - coarse[i + 1])
                    together[normal] = together.get(normal, 0.0) + w * math.sqrt(share)
            assert product(draw, together) > least


def test_plans_of_few_steps_see_the_same_function():
    """Where every level goes down equally far, W(sigma) is one function, and draws add up from plan to plan."""
    fine = karras(41)
    assert {level.depth for level in Path(fine[::-1], NORMALS).levels} == {DEPTH}
    values = {}
    for levels in (fine, fine[::2], fine[::4]):
        at = {}
        for (s, t), weights in zip(itertools.pairwise(levels), increments(levels)):
            for draw, w in weights.items():
                at[draw] = at.get(draw, 0.0) + w * math.sqrt(s - t)
        values[len(levels)] = {draw: w for draw, w in at.items() if abs(w) > 1e-12}
    assert all(at == pytest.approx(values[41], abs=1e-12) for at in values.values())


@pytest.mark.parametrize("steps", [3, 5, 10, 40, 60, 100, 300, 1000])
def test_a_run_adds_up_to_the_same_increment(steps):
    """However many the steps, the first and the last level stay where they are, and all draws together are W(first) - W(last):
    with its variance, and nearly the same as in 20 steps (exactly, where every level goes down equally far)."""

    def whole(levels):
        assert [level.sigma for level in Path(levels[::-1], NORMALS).levels][:: len(levels) - 1] == [levels[-1], levels[0]]
        at = {}
        for (s, t), weights in zip(itertools.pairwise(levels), increments(levels)):
            for draw, w in weights.items():
                at[draw] = at.get(draw, 0.0) + w * math.sqrt((s - t) / (levels[0] - levels[-1]))
        return at

    together = whole(karras(steps))
    assert product(together, together) == pytest.approx(1, abs=1e-12)
    assert product(together, whole(karras(20))) > (1 - 1e-12 if 5 <= steps <= 100 else 0.996)


@pytest.mark.parametrize("levels", [(1.0, 0.0), (1.0, 1.0), (1.0, 2.0), (math.inf, 1.0), (2.0, -1.0), (math.nan, 1.0)])
def test_levels_go_down_and_are_finite(levels):
    with pytest.raises(ValueError, match="it takes finite levels, downwards, above 0"):
        increments(levels)


def test_levels_that_nothing_tells_apart_are_refused():
    with pytest.raises(ValueError, match="closer to each other than a Brownian path"):
        increments([1.3, 1.3 - 1e-9, 1.0])


# ---- plans


@pytest.mark.parametrize("name", SAMPLERS)
def test_plans_draw_from_the_path(name):
    options = {"schedule": "scaled_linear", "steps": 12, **DRAWING.get(name, {})}
    made = fd.plan(name, noise="brownian", **options)
    drawn = [{n.stream for n in addresses(row)} for row in made.rows]
    assert set().union(*drawn) - {"step"} == {"init", "brownian"} and made.noises <= NORMALS
    assert ("step" in set().union(*drawn)) == (name in SEVERAL)
    assert made.info["noise"] == "brownian"
    same = fd.Plan.from_json(made.to_json())
    assert same.to_json() == made.to_json() and (same.draws == made.draws).all()
    assert repr(same.rows) != repr(fd.plan(name, **options).rows)
    assert repr(fd.plan(name, noise="independent", **options).rows) == repr(fd.plan(name, **options).rows)


@pytest.mark.parametrize("name", SAMPLERS)
def test_brownian_steps_have_the_law_of_independent_ones(name):
    """The noises of all outputs of all rows: the same covariance as with independent draws."""

    def noise_weights(made):
        return [{n: c for n, c in y.items() if isinstance(n, Noise)} for row in made.rows for y in row.y]

    taken = inspect.signature(fd.SAMPLERS[name].stages).parameters
    wanted = {"eta": 0.8, "s_noise": 1.1, "r": 0.3, "r_1": 0.2, "r_2": 0.9}
    options = {"schedule": "edm", "steps": 9, **{k: v for k, v in wanted.items() if k in taken}}
    ours = noise_weights(fd.plan(name, noise="brownian", **options))
    theirs = noise_weights(fd.plan(name, **options))
    for (a, c), (b, d) in itertools.product(zip(ours, theirs), repeat=2):
        assert product(a, b) == pytest.approx(product(c, d), rel=1e-9, abs=1e-9)


def test_options_are_checked():
    for name in ("dpmpp_sde", "er_sde"):
        with pytest.raises(ValueError, match="noise 'brownain' is not known: did you mean 'brownian'"):
            fd.plan(name, schedule="edm", steps=4, noise="brownain")
    with pytest.raises(TypeError, match="option of heun 'noise' is not known"):
        fd.plan("heun", schedule="edm", steps=4, noise="brownian")
    fd.plan("dpmpp_2m_sde", schedule="edm", steps=4, noise="brownian", eta=0.0)
    for name in ("dpmpp_sde", "seeds_3"):
        inpaint = fd.plan(name, schedule="edm", steps=1000, noise="brownian", inpaint="x").with_model_dtype("bfloat16")
        assert inpaint.noises <= 16


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", OF_K_DIFFUSION)
def test_follows_k_diffusion_with_this_path(name):
    """k-diffusion's function with a noise sampler that evaluates the path, against the run in float32."""
    sampling, seeds, shape = k_diffusion(), [11, 12], (2, 24)
    levels = [*karras(15), 0.0]
    made = fd.plan(name, schedule="edm", sigmas=levels, prediction="denoised", noise="brownian")
    placed = Path(levels[-2::-1], NORMALS - (name == "dpmpp_sde")).levels
    values = {level.sigma: torch.from_numpy(path(seeds, level.sigma, level.depth, shape[1])) for level in placed}

    def near(sigma):
        return min(values, key=lambda s: abs(s - sigma))  # theirs goes through exp and log

    def noise_sampler(s, s_next):
        s, below = near(float(s)), [v for v in values if v < near(float(s))]
        if not below or float(s_next) == 0:
            return torch.zeros(shape, dtype=torch.float64)
        bottom, inner = max(below), float(s_next)
        whole = (values[s] - values[bottom]) / math.sqrt(s - bottom)
        if abs(inner / bottom - 1) < 1e-9:
            return whole
        step, shared = levels.index(s), (s - inner) / (s - bottom)  # the inner level of dpmpp_sde
        key = fd.reference.run_keys(np.array(seeds), [[1]], [[step]])[0, 0]
        own = torch.from_numpy(fd.reference.normal(key, shape[1], exact=False))
        return math.sqrt(shared) * whole + math.sqrt(1 - shared) * own

    run = fd.Stepper(made, shape, seeds)
    start = run.x.double().clone()
    while not run.done:
        run.step(torch.from_numpy(denoise(run.model_input.numpy(), run.sigma)).float())
    theirs = getattr(sampling, f"sample_{name}")(
        lambda x, sigma: torch.from_numpy(denoise(x.numpy(), sigma[0])),
        start, torch.tensor(levels, dtype=torch.float64), disable=True, noise_sampler=noise_sampler)
    assert relative(run.result().numpy(), theirs.numpy()) < 1e-5


# ---- runs


def sample(name, steps, noise, seeds, batch):
    made = fd.plan(name, schedule=EDM(0.03, 14.6), steps=steps, prediction="denoised", noise=noise, **DRAWING.get(name, {}))
    run = fd.Stepper(made, (batch, 4, 8, 8), seeds)
    while not run.done:
        x = run.model_input.reshape(batch, -1)
        total = 0.25 + run.sigma**2
        d = (0.25 * x + run.sigma**2 * torch.tanh((x + 0.3 * x.roll(1, -1)) / total)) / total
        run.step(d.reshape(batch, 4, 8, 8))
    return run.result()


@pytest.mark.parametrize("name", SAMPLERS)
def test_pictures_at_20_and_40_steps_are_alike(name):
    def distance(noise):
        return float((sample(name, 20, noise, 0, 32) - sample(name, 40, noise, 0, 32)).square().mean().sqrt())

    assert distance("brownian") < distance("independent") / 4


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_sample_is_the_same_in_any_batch(name):
    together = sample(name, 12, "brownian", [5, 2**63, -9, 77], 4)
    for b, seed in enumerate([5, 2**63, -9, 77]):
        assert torch.equal(together[b : b + 1], sample(name, 12, "brownian", [seed], 1))
