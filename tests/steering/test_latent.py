"""Latent vectors: a fixed direction in the row's bank."""

import math

import numpy as np
import pytest
import torch

import fastdiff as fd
from fastdiff.action import Actions
from fastdiff.steering import LatentVector, NoiseAlignment
from fastdiff.steering.window import rows_in
from steering.classes import SHAPE, made, small


def images(count, seed=0, mean=0.0):
    return mean + 0.3 * fd.randn((count, *SHAPE), seeds=range(seed, seed + count))


@pytest.fixture(scope="module")
def two():
    return LatentVector.mean_difference({"dark": images(40, 100, -1.0), 7: images(30, 500, 0.5)}, images(90, 1000))


def test_it_is_the_difference_of_means_of_clean_and_of_noised_data():
    target, rest = images(4000, mean=0.7), images(4000, 10**5)
    clean = LatentVector.mean_difference(target, rest.split(999))
    assert np.allclose(clean.vectors[0], target.double().mean(0) - rest.double().mean(0), atol=1e-7)
    noise = 2.0 * fd.randn((8000, *SHAPE), seeds=10**6)
    noised = LatentVector.mean_difference(target + noise[:4000], rest + noise[4000:])
    assert (clean.vectors - noised.vectors).abs().max() < 5 * 2.0 * math.sqrt(2 / 4000)
    assert (clean.vectors - 0.7).abs().max() < 0.05


@pytest.mark.parametrize("name", ["euler", "heun", "dpmpp_sde", "dpmpp_2m"])
def test_d_is_moved_by_the_vector_in_every_stage_of_the_window_and_nowhere_else(two, name):
    """The run's own model input, through the model alone: what is left over is the vector."""
    plan, window, weights = made(name), (0.3, 20.0), [1.5, 0.0, -2.0]
    inside = rows_in(plan, window)
    with Actions([two.at(weights, window, "dark")], plan, (3, *SHAPE), small) as actions:
        actions.select(torch.arange(3))
        run = fd.Stepper(actions.plan.with_denoised(), (3, *SHAPE), 0, **actions.bank)
        while not run.done:
            outputs, here = actions.outputs(run), run.row
            run.step(*outputs)
            added = torch.tensor(weights).view(3, 1, 1, 1) * two.vectors[0] * float(inside[here])
            assert torch.allclose(run.denoised(), outputs[0] + added, rtol=1e-6, atol=1e-7)
    assert 3 <= inside.sum() < plan.evaluations


def test_it_is_noise_alignment_without_directions(two):
    sets = {"dark": images(40, 100, -1.0), 7: images(30, 500, 0.5)}
    alignment = NoiseAlignment.fit(sets, images(90, 1000), rank=0)
    added = fd.sample(small, made(), (2, *SHAPE), 0, steering=[two.at(1.5, (0.3, 80), [7, "dark"])])
    bank, lift = (fd.sample(small, made(), (2, *SHAPE), 0, steering=[alignment.at(1.5, (0.3, 80), ["7", "dark"], how=how)])
                  for how in ("bank", "lift"))
    assert torch.equal(bank, added)
    assert torch.allclose(lift, added, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["euler_ancestral", "heun", "dpmpp_2m_sde"])
def test_zero_weight_changes_no_bit(two, name):
    plain = fd.sample(small, made(name), (3, *SHAPE), 0)
    for weight in (0.0, -0.0, {"dark": 0, 7: [0.0, 0.0, 0.0]}):
        target = None if isinstance(weight, dict) else "dark"
        assert torch.equal(fd.sample(small, made(name), (3, *SHAPE), 0, steering=[two.at(weight, (0.3, 80), target)]), plain)
    some = fd.sample(small, made(name), (3, *SHAPE), 0, steering=[two.at([0, 1, 0], (0.3, 80), "dark")])
    assert torch.equal(some[::2], plain[::2]) and not torch.allclose(some[1], plain[1], atol=1e-3)


def test_a_sample_depends_on_itself_only(two):
    weights, targets, seeds = [3.0, 0.0, -1.0, 2.0, 0.5], ["dark", "7", 7, "dark", 7], [4, 5, 6, 7, 8]
    whole = fd.sample(small, made(), (5, *SHAPE), seeds, steering=[two.at(weights, (0.3, 80), targets)])
    for b in range(5):
        alone = fd.sample(small, made(), (1, *SHAPE), seeds[b : b + 1], steering=[two.at(weights[b], (0.3, 80), targets[b])])
        assert torch.equal(alone[0], whole[b])
    for size in (2, 3, 7):
        parts = fd.sample(small, made(), (5, *SHAPE), seeds, batch_size=size, steering=[two.at(weights, (0.3, 80), targets)])
        assert torch.equal(parts, whole)


def test_a_loop_of_ones_own_need_not_select(two):
    plan, shape, steering = made(), (3, *SHAPE), [two.at({"dark": [1.0, 0.0, 2.0], 7: -1})]
    with Actions(steering, plan, shape, small) as actions:
        run = fd.Stepper(actions.plan, shape, 0, **actions.bank)
        while not run.done:
            run.step(*actions.outputs(run))
    assert torch.equal(run.result(), fd.sample(small, plan, shape, 0, steering=steering))
    assert not torch.equal(run.result(), fd.sample(small, plan, shape, 0))


def test_several_at_once(two):
    weights = {"dark": [1.0, 0.0, 0.5], "7": 0.25}
    once = fd.sample(small, made(), (3, *SHAPE), 0, steering=[two.at(weights, (0.3, 80))])
    both = [two.at(weights["dark"], (0.3, 80), "dark"), two.at(0.25, (0.3, 80), 7)]
    each = fd.sample(small, made(), (3, *SHAPE), 0, steering=both)
    assert torch.equal(once, each)
    alone = fd.sample(small, made(), (3, *SHAPE), 0, steering=[two.at(0.25, (0.3, 80), 7)])
    assert torch.equal(once[1], alone[1]) and not torch.equal(once[0], alone[0])


def test_a_saved_vector_steers_with_the_same_bits(two, tmp_path):
    path = tmp_path / "two.safetensors"
    two.save(path)
    back = LatentVector.load(path, shape=SHAPE)
    assert back.names == ("dark", "7") and back.about["fitted"]["target.0"]["count"] == 40
    before, after = (fd.sample(small, made(), (2, *SHAPE), 0, steering=[v.at(1.0, (0.3, 80), "7")]) for v in (two, back))
    assert torch.equal(before, after)
    with pytest.raises(ValueError, match=r"made for samples of shape \(1, 3, 2\): it cannot be used for \(3, 8, 8\)"):
        LatentVector.load(path, shape=(3, 8, 8))
    LatentVector.load(path, values=back.about["fitted"]["rest"]["range"])
    with pytest.raises(ValueError, match="it cannot be used for 0 to 255"):
        LatentVector.load(path, values=(0, 255))
    own = LatentVector(torch.ones(1, *SHAPE))
    own.save(path)
    assert torch.equal(LatentVector.load(path).vectors, own.vectors)


@pytest.mark.parametrize("vectors, names, error, says", [
    (torch.zeros(2, 3), ("a",), ValueError, r"shape \(2, 3\) for 1 names"),
    (torch.zeros(2, 3), ("a", "a"), ValueError, "two vectors have one name"),
    (torch.zeros(2, 3, dtype=torch.int64), ("a", "b"), TypeError, "int64"),
    ([1.0], ("a",), TypeError, "list"),
    (torch.full((1, 3), math.nan), ("a",), ValueError, "not finite"),
    (torch.zeros(0, 3), (), ValueError, r"shape \(0, 3\)"),
    (torch.zeros(1, 3), (1.5,), TypeError, "1.5"),
])
def test_wrong_vectors(vectors, names, error, says):
    with pytest.raises(error, match=says):
        LatentVector(vectors, names)


def test_wrong_sets():
    with pytest.raises(ValueError, match="no target"):
        LatentVector.mean_difference({}, images(4))
    with pytest.raises(ValueError, match="target 'vector' holds 0 samples"):
        LatentVector.mean_difference(images(0), images(4))
    with pytest.raises(ValueError, match="rest: the data holds a NaN"):
        LatentVector.mean_difference(images(4), images(4) * math.nan)
    with pytest.raises(ValueError, match="one range of values"):
        LatentVector.mean_difference(images(4) * 100 + 128, images(4))


@pytest.mark.parametrize("options, error, says", [
    ({"target": "drak"}, ValueError, "did you mean 'dark'"),
    ({}, ValueError, "no vector was chosen of 2: one of dark, 7 is taken"),
    ({"weight": {"dark": 1, "light": 2}}, ValueError, "vector 'light' is not known"),
    ({"weight": {"dark": 1}, "target": 7}, ValueError, "weights for dark and target 7"),
    ({"weight": {}}, ValueError, "weights for no vector"),
    ({"weight": {"dark": [1.0]}}, ValueError, r"the weight of 'dark' has shape \(1,\), the batch has 3"),
    ({"target": "dark", "weight": math.inf}, ValueError, "weight holds inf"),
    ({"target": "dark", "window": (81, 90)}, ValueError, "no call of the model falls into window"),
])
def test_wrong_actions(two, options, error, says):
    called = []
    with pytest.raises(error, match=says):
        fd.sample(lambda x, t: called.append(1), made(), (3, *SHAPE), 0, steering=[two.at(**options)])
    assert not called


def test_wrong_shapes_and_ranges_in_a_run(two):
    with pytest.raises(ValueError, match=r"made for samples of shape \(1, 3, 2\): it cannot be used for \(3, 2\)"):
        fd.sample(small, made(), (2, 3, 2), 0, steering=[two.at(target="dark")])
    clipped = made(clip_denoised=(0.0, 0.5))
    with pytest.raises(ValueError, match="clips its estimates to 0 to 0.5"):
        fd.sample(small, clipped, (2, *SHAPE), 0, steering=[two.at(target="dark")])
