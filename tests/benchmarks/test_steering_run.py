"""The comparison at work on small networks: every method, an interrupted run, the studies, the demo."""

from __future__ import annotations

import copy
import json

import pytest
import torch

from benchmarks.steering import fits, plots, short, studies
from benchmarks.steering.budget import Budget
from benchmarks.steering.methods import METHODS
from benchmarks.steering.run import Run
from benchmarks.steering.store import Stopped
from benchmarks.steering.world import counted, peak_memory

TINY = Budget(
    settings=3, extra=1, search_samples=8, samples=4, samples_recurrent=4, rounds=1, extra_samples=4, classes=(1, 6), draws=3
)

# ---- methods


@pytest.mark.parametrize("name", METHODS)
def test_every_method_steers(name, make_world):
    world = make_world()
    run = Run(world, METHODS, TINY)
    method, labels = METHODS[name], torch.tensor([1, 6, 1, 6])
    setting = method.space.design(4)[-1]
    drawn = world.draw(method.model(world), method.build(world, run.fits, setting, labels), torch.arange(4))
    assert drawn.images.shape == (4, 1, 12, 12) and bool(drawn.images.isfinite().all()) and float(drawn.images.abs().max()) <= 1
    unguided = world.draw(world.net, [], torch.arange(4))
    assert unguided.counts == {"decoder": 6, "encoder": 6}
    assert (name == "unguided") == torch.equal(drawn.images, unguided.images)
    if method.family in ("gradient-free", "conditional network"):
        assert not any("backward" in part or part == "classifier" for part in drawn.counts)
    if method.family == "clean classifier":
        assert drawn.counts["classifier backward"] > 0 and ("decoder backward" in drawn.counts) == (name != "MPGD")
    if method.recurrences > 1:
        assert drawn.counts["encoder"] > 6
    for fit in method.uses(setting):
        assert run.fits.cost(fit) > 0


def test_each_sample_is_steered_to_its_own_class(make_world):
    world = make_world()
    run = Run(world, METHODS, TINY)
    for name, setting in (
        ("NA", {"weight": 2.0, "low": 0.5, "high": 80.0}),
        ("RFM", {"weight": 0.4, "scale": 2.25, "low": 0.1, "high": 20.0, "learnt": 1.0}),
        ("classifier guidance", {"scale": 4.0, "low": 0.1, "high": 80.0}),
    ):
        method, seeds = METHODS[name], torch.arange(4)
        both = [
            world.draw(world.net, method.build(world, run.fits, setting, torch.tensor(labels)), seeds).images
            for labels in ([1, 6, 1, 6], [1, 1, 1, 1])
        ]
        torch.testing.assert_close(both[0][[0, 2]], both[1][[0, 2]], rtol=0, atol=1e-4)
        assert not torch.allclose(both[0][[1, 3]], both[1][[1, 3]], rtol=0, atol=1e-4)


def test_the_conditional_network_is_missed_aloud(make_world):
    run = Run(make_world(without=("unet_cond",)), METHODS, TINY)
    assert "has not been trained" in run.refused["CFG"] and "CFG" not in run.methods


def test_passes_are_counted_and_hooks_removed(networks):
    net, x = networks["unet"], torch.zeros(2, 1, 28, 28, requires_grad=True)
    with counted(networks) as counts:
        net(x, torch.zeros(2)).sum().backward()
        net.decode(*net.encode(x.detach(), torch.zeros(2)))
        networks["guide"](x.detach())
        networks["judge"](x.detach())
    net(x, torch.zeros(2))
    assert counts == {"encoder": 4, "decoder": 4, "encoder backward": 2, "decoder backward": 2, "classifier": 2}


def test_peak_memory_is_what_was_held_at_once():
    def function():
        a = torch.zeros(1000, 250)  # 1 MB
        for _ in range(3):
            b = a + 1
            del b

    assert 2e6 <= peak_memory(function, torch.device("cpu")) < 2.2e6


# ---- the run


def without_times(value):
    """A JSON object without what another run measures otherwise."""
    if isinstance(value, dict):
        return {
            k: without_times(v)
            for k, v in value.items()
            if k not in ("seconds_per_image", "all", "fits", "machine", "overhead", "memory")
        }
    return [without_times(v) for v in value] if isinstance(value, list) else value


def chosen(*names):
    return {n: METHODS[n] for n in names}


def through_json(results):
    return json.loads(json.dumps(results))


def test_an_interrupted_run_goes_on_to_the_same_results(make_world, monkeypatch):
    monkeypatch.setattr(studies, "STUDIES", {})
    methods = chosen("unguided", "latent vector", "MPGD")
    whole = Run(make_world("whole"), methods, TINY).comparison()
    assert whole["complete"] and set(whole["results"]) == set(methods)
    assert len(whole["search"]["MPGD"]["trials"]) in (3, 4)

    kept, rounds = [], 0
    for _ in range(60):
        run = Run(make_world("parts"), methods, TINY)
        put = run.world.store.put

        def interrupted(*args, run=run, put=put):
            if run.drawn == 6:
                raise KeyboardInterrupt
            return put(*args)

        run.world.store.put = interrupted
        rounds += 1
        try:
            again = run.comparison(lambda results: kept.append(copy.deepcopy(results)))
            break
        except KeyboardInterrupt:
            assert run.drawn == 6
    assert rounds > 3 and not kept[0]["complete"]
    assert without_times(through_json(again)) == without_times(through_json(whole))
    replayed = Run(make_world("parts"), methods, TINY, drawing=False)
    assert without_times(through_json(replayed.comparison())) == without_times(through_json(whole)) and replayed.drawn == 0


def test_a_run_stops_in_time(make_world):
    run = Run(make_world(), chosen("unguided"), TINY, until=1.0)
    with pytest.raises(Stopped):
        run.comparison()
    assert run.drawn == 0


def test_methods_that_were_not_chosen_are_not_drawn(make_world, monkeypatch):
    monkeypatch.setattr(studies, "STUDIES", {})
    methods = chosen("unguided", "latent vector")
    run = Run(make_world(), methods, TINY, only=["unguided"])
    assert set(run.cost()) == {"unguided"} and run.drawn == 1  # its price: nothing was fitted for the other
    found = run.comparison()
    assert set(found["results"]) == {"unguided"} and found["timing"] is None and not found["complete"]


def test_the_studies(make_world, monkeypatch, tmp_path):
    for name, value in (
        ("LEARNT", (0.6, 1.0)),
        ("INJECTED", ((0.1, 1.0), (1.0, 10.0))),
        ("BLOCKS", ("enc.1", "enc.2")),
        ("WEIGHTS", (0.2,)),
        ("GROUPS", ((1, 6),)),
        ("DIRECTIONS", ("mean difference", "RFM")),
        ("ATTRIBUTE_WEIGHTS", {"NA": (1.0,), "RFM": (0.2,)}),
    ):
        monkeypatch.setattr(studies, name, value)
    monkeypatch.setattr(fits, "SHARE", 0.5)  # few images are both bright and large
    run = Run(make_world(), METHODS, TINY)
    direction = {"weight": 0.2, "scale": 1.5, "low": 0.1, "high": 10.0, "learnt": 1.0}
    results = {
        "search": {
            "NA": {"best": {"weight": 2.0, "low": 0.5, "high": 80.0}},
            "NA + RFM": {"best": {"NA weight": 2.0, "NA low": 0.5, "weight": 0.2, "scale": 1.5, "low": 0.1, "high": 10.0}},
            **{k: {"best": direction} for k in ("mean difference", "covariance-aware", "RFM")},
        }
    }
    found = {name: through_json(study.run(run, results)) for name, study in studies.STUDIES.items()}
    cosine = found["transfer"]["kinds"]["RFM"]["cosine"]
    assert cosine[0][0] == pytest.approx(1) and cosine[0][1] == pytest.approx(cosine[1][0]) and abs(cosine[0][1]) < 1
    assert len(found["combined"]["attributes"]) == 8 and len(found["combined"]["groups"]) == 1
    assert found["overhead"]["over_unsteered"]["unsteered"] == 1
    for name, study in studies.STUDIES.items():
        assert study.render(found[name]).startswith("### ")
        assert study.cost(run, {n: {"price": 1.0} for n in METHODS}) > 0
    assert plots.studies(found, tmp_path / "studies.png") and (tmp_path / "studies.png").stat().st_size > 10_000
    before = run.drawn
    assert through_json(studies.blocks(run, results)) == found["blocks"] and run.drawn == before


# ---- the demo


def test_the_demo_shows_a_table_and_a_picture(make_world, tmp_path, capsys):
    settings = json.loads(short.SETTINGS.read_text())["settings"]
    assert len(settings) == 5 and set(settings) <= set(METHODS)
    for name, setting in settings.items():
        assert set(setting) == set(METHODS[name].space.axes) and METHODS[name].space.valid(setting)
    rows = short.show(make_world(), settings, tmp_path / "demo", classes=(1, 6), samples=6)
    assert [r["method"] for r in rows] == list(settings) and (tmp_path / "demo" / "steering.png").is_file()
    assert "real test images" in capsys.readouterr().out
