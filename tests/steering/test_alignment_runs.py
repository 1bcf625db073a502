"""Aligned runs: bits against everything that they must not depend on, what is launched, files, and what is refused."""

import math
import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

import fastdiff as fd
from fastdiff.action import Actions, Setting
from fastdiff.steering import Gaussian, NoiseAlignment, alignment, maps
from fastdiff.steering.window import rows_in
from steering.classes import PLANS, SHAPE, data, difference, made, small

HOW = ("bank", "lift", "map")
BANKED = ("_vectors", "_gain", "_offset")


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("name", PLANS)
def test_zero_weight_changes_no_bit_and_reads_nothing(na, name, how):
    plan, shape = made(name), (4, *SHAPE)
    plain = fd.sample(small, plan, shape, 0)
    for weight in (0.0, -0.0, [0.0] * 4):
        assert torch.equal(fd.sample(small, plan, shape, 0, steering=[na.at(weight, (0.3, 80), "low", rank=5, how=how)]), plain)
    some = fd.sample(small, plan, shape, 0, steering=[na.at([0, 2, 0, 1], (0.3, 80), "low", rank=5, how=how)])
    assert torch.equal(some[::2], plain[::2]) and not torch.isclose(some[1::2], plain[1::2]).any(0).all()

    class Poisoned:
        """The action, with NaN wherever a weight of zero must not look."""

        def begin(self, setting):
            acting = na.at([0, 0, 0, 0], (0.3, 80), "low", rank=5, how=how).begin(setting)
            if how == "map":
                acting._maps = [None if m is None else torch.full_like(m, math.nan) for m in acting._maps]
            for name in {"bank": BANKED, "lift": (*BANKED, "_sum"), "map": ("_sum",)}[how]:
                setattr(acting, name, torch.full_like(getattr(acting, name), math.nan))
            acting.vectors = acting.vectors if how != "bank" else acting._vectors
            return acting

    assert torch.equal(fd.sample(small, plan, shape, 0, steering=[Poisoned()]), plain)


@pytest.mark.parametrize("how", HOW)
def test_rows_outside_of_the_window_are_left_alone(na, how):
    plan, shape = made("heun"), (3, *SHAPE)
    plain, steered = [], []
    fd.sample(small, plan, shape, 0, callback=lambda p: plain.append(p.denoised.clone()))
    fd.sample(small, plan, shape, 0, callback=lambda p: steered.append(p.denoised.clone()),
              steering=[na.at(2.0, (0.0, 1.0), "low", rank=4, how=how)])
    inside = rows_in(plan, (0.0, 1.0))[plan.calls_model]
    first = int(inside.argmax())
    assert first > 2
    for i, (a, b) in enumerate(zip(plain, steered)):
        assert torch.equal(a, b) == (i < first)


@pytest.mark.parametrize("name", PLANS)
def test_all_ways_agree(na, name):
    plan, shape = made(name), (4, *SHAPE)
    bank, lift, mapped = (fd.sample(small, plan, shape, 0, steering=[na.at(1.5, (0.3, 80), ["low", "3", "high", 3], how=how, rank=6)])
                          for how in HOW)
    assert torch.allclose(bank, lift, rtol=0, atol=2e-6) and torch.allclose(bank, mapped, rtol=0, atol=2e-6)
    assert not torch.allclose(bank, fd.sample(small, plan, shape, 0), atol=0.05)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("name", PLANS)
def test_a_sample_depends_on_itself_only(na, name, how):
    plan = made(name)
    weights, targets, seeds = [3.0, 0.0, -1.0, 2.0, 0.5], ["low", "high", "3", "high", "low"], [4, 5, 6, 7, 8]
    options = {"window": (0.3, 80), "rank": 5, "how": how}
    whole = fd.sample(small, plan, (5, *SHAPE), seeds, steering=[na.at(weights, target=targets, **options)])
    for b in range(5):  # one by one, and of another number of targets
        alone = fd.sample(small, plan, (1, *SHAPE), seeds[b : b + 1], steering=[na.at(weights[b], target=targets[b], **options)])
        assert torch.equal(alone[0], whole[b]), b
    for size in (1, 2, 3, 7, 5):
        parts = fd.sample(small, plan, (5, *SHAPE), seeds, batch_size=size, steering=[na.at(weights, target=targets, **options)])
        assert torch.equal(parts, whole), size


def test_targets_of_different_ranks_stand_in_one_batch(na):
    few = NoiseAlignment(na.full, {**na.targets, "few": Gaussian.fit(data(3, 5))})
    assert few.targets["few"].rank == 2
    plan, targets = made("heun"), ["few", "low", "few"]
    options = {"window": (0.3, 80), "how": "lift", "gain": 0.0}
    whole = fd.sample(small, plan, (3, *SHAPE), 0, steering=[few.at(2.0, target=targets, **options)])
    for b in range(3):
        alone = fd.sample(small, plan, (1, *SHAPE), [b], steering=[few.at(2.0, target=targets[b], **options)])
        assert torch.equal(alone[0], whole[b]), b
    with Actions([few.at(2.0, target=targets, **options)], plan, (3, *SHAPE), small) as actions:
        actions.select(torch.arange(3))
        run = fd.Stepper(actions.plan, (3, *SHAPE), 0)
        x = run.model_input.double()
        added = actions.outputs(run)[-1]
    for b in range(3):
        assert (added[b] - 2 * difference(few, x[[b]], run.sigma, targets[b])[0]).abs().max() < 1e-5


@pytest.mark.parametrize("how, expected", [("bank", ["project_"]), ("lift", ["project_", "lift_"]), ("map", ["lift_"])])
def test_what_is_launched(na, how, expected):
    """One projection a row of the window, and one pass more where the sum is lifted; with a map one pass; elsewhere nothing."""
    plan, launched = made("heun"), []

    class Counted(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "fastdiff" and func.__name__.split(".")[0] in ("project_", "lift_"):
                launched.append(func.__name__.split(".")[0])
            return func(*args, **(kwargs or {}))

    with Counted():
        fd.sample(small, plan, (2, *SHAPE), 0, steering=[na.at(1.0, (0.3, 20), "low", rank=3, how=how)])
    assert launched == expected * int(rows_in(plan, (0.3, 20)).sum())


@pytest.mark.parametrize("how", HOW)
def test_two_alignments_add_up(na, how):
    plan, shape = made("dpmpp_2m"), (2, *SHAPE)
    options = {"window": (0.3, 80), "rank": 1, "how": how}
    both = fd.sample(small, plan, shape, 0, steering=[na.at(1.0, target="low", **options), na.at(0.5, target="high", **options)])
    other = fd.sample(small, plan, shape, 0, steering=[na.at(0.5, target="high", **options), na.at(1.0, target="low", **options)])
    assert torch.allclose(both, other, atol=2e-6)
    mixed = fd.sample(small, plan, shape, 0, steering=[na.at(1.0, target="low", **options | {"how": "lift"}),
                                                     na.at(0.5, target="high", **options | {"how": "bank"})])
    assert torch.allclose(both, mixed, atol=2e-6)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("targets", ["low", ["low", "high", "3"]])
def test_a_loop_of_ones_own_need_not_select(na, targets, how):
    plan, shape = made("heun"), (3, *SHAPE)
    steering = [na.at([1.0, -2.0, 0.0], (0.3, 80), targets, rank=3, how=how)]
    with Actions(steering, plan, shape, small) as actions:
        run = fd.Stepper(actions.plan, shape, 0, **actions.bank)
        while not run.done:
            run.step(*actions.outputs(run))
    assert torch.equal(run.result(), fd.sample(small, plan, shape, 0, steering=steering))
    assert not torch.equal(run.result(), fd.sample(small, plan, shape, 0))


@pytest.mark.parametrize("weight", [[1.0, -2.0, 3.0], (1, -2, 3), np.array([3, -2, 1])[::-1], np.array([1.0, -2.0, 3.0]),
                                    [torch.tensor(1.0), -2, np.float64(3)], torch.tensor([1.0, -2.0, 3.0], requires_grad=True)])
def test_weights_of_any_kind(na, weight):
    plan, shape = made("euler"), (3, *SHAPE)
    expected = fd.sample(small, plan, shape, 0, steering=[na.at([1.0, -2.0, 3.0], (0.3, 80), "low")])
    assert torch.equal(fd.sample(small, plan, shape, 0, steering=[na.at(weight, (0.3, 80), "low")]), expected)


def test_under_another_default_device(na):
    plan, shape = made("heun"), (3, *SHAPE)

    def run():
        actions = [na.at([1.0, 0.0, 2.0], (0.3, 80), ["low", "high", 3], rank=2, how=how) for how in ("bank", "lift")]
        return fd.sample(small, plan, shape, 0, device="cpu", steering=[*actions, na.at(1.0, (0.3, 80), "low")])

    expected = run()
    with torch.device("meta"):
        assert torch.equal(run(), expected)


@pytest.mark.parametrize("how", HOW)
def test_what_is_kept_is_that_of_the_targets_there_are(na, how):
    """What runs made for one another neither changes nor outlives what it was made of, nor goes along in copies."""
    plan, options = made("euler"), {"window": (0.3, 80), "rank": 3, "how": how}
    own = NoiseAlignment(na.full, dict(na.targets))

    def run(alignment=own, **more):
        return fd.sample(small, plan, (3, *SHAPE), 0, steering=[alignment.at(1.0, target=["low", "high", "low"], **options)], **more)

    with torch.inference_mode():
        first = run(batch_size=1)
    assert torch.equal(run(), first) and torch.equal(run(pickle.loads(pickle.dumps(own))), first)
    assert len(pickle.dumps(own)) == len(pickle.dumps(NoiseAlignment(na.full, dict(na.targets))))
    own.targets["low"] = own.targets["3"]
    expected = run(NoiseAlignment(own.full, dict(own.targets)))
    assert torch.equal(run(), expected) and not torch.equal(expected, first)
    with ThreadPoolExecutor(4) as pool:
        assert all(torch.equal(image, expected) for image in pool.map(lambda _: run(), range(12)))
    for rank in (True, 1.0, np.array(1.0)):
        with pytest.raises(ValueError, match="rank is"):
            fd.sample(small, plan, (3, *SHAPE), 0, steering=[own.at(1.0, target="low", **options | {"rank": rank})])


@pytest.mark.parametrize("how", HOW)
def test_under_another_default_dtype(na, how):
    plan, steering = made("heun"), [na.at([1.0, 0.0, 2.0], (0.3, 80), ["low", "high", 3], rank=2, how=how)]
    expected = fd.sample(small, plan, (3, *SHAPE), 0, steering=steering)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(fd.sample(small, plan, (3, *SHAPE), 0, steering=steering), expected)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("how", HOW)
def test_a_weight_of_zero_reads_no_latent(na, how):
    plan, shape = made("euler"), (3, *SHAPE)
    init = torch.ones(shape)
    init[1] = math.inf
    start = fd.plan("euler", schedule="edm", prediction="denoised", steps=8, start="latent")
    with Actions([na.at([1.0, 0.0, 2.0], (0.3, 80), "low", rank=2, how=how)], start, shape, lambda x, t: torch.zeros_like(x)) as actions:
        run = fd.Stepper(actions.plan, shape, 0, init=init, **actions.bank)
        outputs = actions.outputs(run)
        added = outputs[-1] if how != "bank" else actions.bank["bank_weight"]
        assert torch.isfinite(added).all() and not added[1].any() and added[0].any() and added[2].any()


def test_maps_are_made_once(na, monkeypatch):
    made_of, affine = [], maps.affine
    monkeypatch.setattr(alignment, "affine", lambda *args: made_of.append(args) or affine(*args))
    fresh, plan = NoiseAlignment(na.full, na.targets), made("heun")
    first, again = (fd.sample(small, plan, (2, *SHAPE), 0, steering=[fresh.at(1.0, (0.3, 80), "low", how="map")]) for _ in range(2))
    assert torch.equal(pickle.loads(pickle.dumps(fresh)).full.mean, fresh.full.mean)
    assert torch.equal(first, again) and len(made_of) == len(set(plan.sigmas[rows_in(plan, (0.3, 80))].tolist())) > 3
    monkeypatch.setattr(fresh._maps, "_most", 1)  # what a run needs is there, whatever is kept
    assert torch.equal(fd.sample(small, plan, (2, *SHAPE), 0, steering=[fresh.at(1.0, (0.3, 80), "low", how="map")]), first)
    assert len(fresh._maps._values) == 1


def test_maps_of_large_samples_are_refused():
    large = Gaussian.fit(fd.randn((9, 4, 32, 32), seeds=0), rank=2)
    with pytest.raises(ValueError, match="a sample has 4096 values, how='map' takes 4095 at most"):
        NoiseAlignment(large, {"a": large}).at(1.0, (0.3, 80), rank=1, how="map").begin(
            Setting(made("euler"), (1, 4, 32, 32), 1, small, torch.device("cpu"), torch.float32))


def test_no_samples(na):
    assert fd.sample(small, made("euler"), (0, *SHAPE), [], steering=[na.at(target="low")]).shape == (0, *SHAPE)
    for size in (None, 4):
        action = na.at(target=[], weight=[])
        assert fd.sample(small, made("euler"), (0, *SHAPE), [], batch_size=size, steering=[action]).shape == (0, *SHAPE)


def test_a_saved_alignment_steers_with_the_same_bits(na, tmp_path):
    path = tmp_path / "na.safetensors"
    na.save(path)
    back = NoiseAlignment.load(path, shape=SHAPE, values=(na.full.about["range"][0], na.full.about["range"][1]))
    assert list(back.targets) == ["low", "high", "3"]
    assert back.full.about == na.full.about and back.targets["3"].about["count"] == 70
    plan, shape = made("heun"), (3, *SHAPE)
    before, after = (fd.sample(small, plan, shape, 0, steering=[a.at(2.0, (0.3, 80), ["low", 3, "high"])]) for a in (na, back))
    assert torch.equal(before, after)
    with pytest.raises(ValueError, match=r"made for samples of shape \(1, 3, 2\): it cannot be used for \(3, 32, 32\)"):
        NoiseAlignment.load(path, shape=(3, 32, 32))
    with pytest.raises(ValueError, match="cannot be used for 0 to 255"):
        NoiseAlignment.load(path, values=(0, 255))
    with pytest.raises(TypeError, match="values is 1: "):
        NoiseAlignment.load(path, values=1)
    with pytest.raises(TypeError, match="shape is 6: the sizes of one sample"):
        NoiseAlignment.load(path, shape=6)


# ---- wrong input


def test_wrong_sets():
    images = data(20)
    with pytest.raises(ValueError, match="no target"):
        NoiseAlignment.fit({}, images)
    with pytest.raises(ValueError, match=r"target 'cat' has samples of shape \(2,\), the full data of \(1, 3, 2\)"):
        NoiseAlignment.fit({"cat": torch.randn(5, 2)}, images)
    with pytest.raises(ValueError, match="one range of values"):
        NoiseAlignment.fit({"cat": images * 127.5 + 127.5}, images)
    with pytest.raises(ValueError, match="target 'cat' holds 0 samples"):
        NoiseAlignment.fit({"cat": images[:0]}, images)
    with pytest.raises(ValueError, match="target 'cat' holds 1 sample:"):
        NoiseAlignment.fit({"cat": images[:1]}, images)
    with pytest.raises(ValueError, match="target 'cat': the data holds a NaN"):
        NoiseAlignment.fit({"cat": images * math.nan}, images)
    with pytest.raises(ValueError, match="the full data: batch 1 holds a NaN, in sample 2"):
        NoiseAlignment.fit(images, [images[:2], images * math.nan])
    with pytest.raises(TypeError, match="Tensor was given: Gaussians are taken"):
        NoiseAlignment(Gaussian.fit(images), {"cat": images})
    with pytest.raises(ValueError, match="two targets have one name: 1, 1"):
        NoiseAlignment.fit({1: images, "1": images}, images)
    with pytest.raises(TypeError, match="1.5"):
        NoiseAlignment.fit({1.5: images}, images)


@pytest.mark.parametrize("options, error, says", [
    ({"target": "hihg"}, ValueError, "did you mean 'high'"),
    ({"target": 7}, ValueError, "target '7' is not known"),
    ({}, ValueError, "no target was chosen of 3: one of low, high, 3 is taken"),
    ({"target": ["low", "high"]}, ValueError, "target has 2 entries, the batch has 3"),
    ({"target": 1.5}, TypeError, "target is 1.5"),
    ({"target": [None] * 3}, TypeError, "None"),
    ({"target": "low", "weight": math.nan}, ValueError, "weight holds nan"),
    ({"target": "low", "weight": np.array([1.0, 1e39, 0.0])}, ValueError, "weight holds inf: finite numbers of float32"),
    ({"target": {"low", "high", "3"}}, TypeError, "a name, or one a sample, is taken"),
    ({"target": "low", "weight": [1.0, 2.0]}, ValueError, r"weight has shape \(2,\), the batch has 3"),
    ({"target": "low", "weight": "3"}, TypeError, "weight is '3'"),
    ({"target": "low", "weight": None}, TypeError, "weight is None"),
    ({"target": "low", "window": (100, 200)}, ValueError, r"window \(100, 200\): the plan \('euler'\) calls it at sigma 80, 34"),
    ({"target": "low", "window": (5, 1)}, ValueError, r"window is \(5, 1\): 0 <= low <= high"),
    ({"target": "low", "window": (math.nan, 1)}, ValueError, "window is"),
    ({"target": "low", "window": 5}, TypeError, "window is 5"),
    ({"target": "low", "window": None}, ValueError, "neither window nor steps"),
    ({"target": "low", "window": None, "steps": (9, 12)}, ValueError, "steps 9 to 12: .* in steps 0 to 7"),
    ({"target": "low", "steps": 4}, TypeError, "steps is 4"),
    ({"target": "low", "steps": (3, 1)}, ValueError, "0 <= first <= last"),
    ({"target": "low", "rank": -1}, ValueError, "rank is -1"),
    ({"target": "low", "gain": 1.5}, ValueError, "gain is 1.5"),
    ({"target": "low", "how": "gemm"}, ValueError, "'bank', 'lift', 'map' or None"),
])
def test_wrong_actions(na, options, error, says):
    called = []
    with pytest.raises(error, match=says):
        fd.sample(lambda x, t: called.append(1), made("euler"), (3, *SHAPE), 0, steering=[na.at(**options)])
    assert not called


def test_wrong_shapes_and_ranges_in_a_run(na):
    with pytest.raises(ValueError, match=r"made for samples of shape \(1, 3, 2\): it cannot be used for \(3, 2\)"):
        fd.sample(small, made("euler"), (2, 3, 2), 0, steering=[na.at(target="low")])
    clipped = fd.plan("euler", schedule="edm", prediction="denoised", steps=8, clip_denoised=(0.0, 1.0))
    with pytest.raises(ValueError, match="clips its estimates to 0 to 1"):
        fd.sample(small, clipped, (2, *SHAPE), 0, steering=[na.at(target="low")])
