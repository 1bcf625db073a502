"""The comparison of steering and guidance: search, criterion, figures, units, report and command, without a network."""

from __future__ import annotations

import json
import math

import pytest
import torch

from benchmarks.steering import __main__ as command
from benchmarks.steering import plots, report, search
from benchmarks.steering.budget import BUDGETS, Budget
from benchmarks.steering.methods import METHODS
from benchmarks.steering.progress import hours
from benchmarks.steering.score import Reference, Scored, bootstrap, pooled, summary
from benchmarks.steering.space import Levels, Space, Strength
from benchmarks.steering.store import Differs, Store, check_context, code_checksum

TINY = Budget(
    settings=3, extra=1, search_samples=8, samples=4, samples_recurrent=4, rounds=1, extra_samples=4, classes=(1, 6), draws=3
)
STRENGTHS = Space({"weight": Strength(1.0, 2.0, -1, 1), "low": Levels((0.1, 1.0, 10.0)), "high": Levels((1.0, 10.0, 80.0))})

# ---- spaces


def test_a_design_fills_a_space_with_different_valid_settings():
    found = STRENGTHS.design(8)
    assert len(found) == 8 and len({tuple(s.items()) for s in found}) == 8
    assert all(s["low"] < s["high"] and s["weight"] in (0.5, 1.0, 2.0) for s in found)
    assert found == STRENGTHS.design(8) and found[:4] == STRENGTHS.design(4)
    assert {s["weight"] for s in found} == {0.5, 1.0, 2.0}
    assert len(Space({"a": Levels((1, 2))}).design(8)) == 2
    assert Space({}).design(8) == [{}]


@pytest.mark.parametrize("name", [n for n in METHODS if METHODS[n].space.axes])
def test_every_method_has_as_many_settings_as_its_budget_takes(name):
    for budget in BUDGETS.values():
        design = METHODS[name].space.design((budget.settings + 1) // 2)
        assert len(design) == (budget.settings + 1) // 2
        assert all(METHODS[name].space.valid(s) for s in design)
    assert any(axis in METHODS[name].space.axes for axis in ("low", "NA low")), "windows are part of every search"


def test_neighbours_and_natural_ends():
    assert STRENGTHS.beside({"weight": 2.0, "low": 0.1, "high": 10.0}) == [
        {"weight": 1.0, "low": 0.1, "high": 10.0},
        {"weight": 4.0, "low": 0.1, "high": 10.0},
        {"weight": 2.0, "low": 1.0, "high": 10.0},
        {"weight": 2.0, "low": 0.1, "high": 1.0},
        {"weight": 2.0, "low": 0.1, "high": 80.0},
    ]
    halves = STRENGTHS.beside({"weight": 2.0, "low": 0.1, "high": 10.0}, 0.5)
    assert [s["weight"] for s in halves] == [1.414, 2.828]
    amplified = Strength(1.0, 1.5, 0, 4, natural=1.0)
    assert amplified.beside(1.0, -1) is None and amplified.beside(1.5, -1) == 1.0
    thirds = Strength(2.0, 1.5, -2, 2)
    value = 2.0
    for _ in range(4):
        value = thirds.beside(value, -1)
    for _ in range(4):
        value = thirds.beside(value, 1)
    assert value == 2.0  # rounding does not drift


# ---- the search


def trial(accuracy, distance, **setting):
    return {"setting": setting, "accuracy": accuracy, "pooled": distance}


def test_the_criterion():
    trials = [
        trial(0.99, 9.0, a=1),
        trial(0.955, 4.0, a=2),
        trial(0.935, 3.0, a=3),
        trial(0.92, 1.0, a=4),
        {"setting": {"a": 5}, "failed": "NaN"},
    ]
    assert search.best_of(trials, real_accuracy=1.0)["setting"] == {"a": 1}  # only it is within two points of the best
    assert search.best_of(trials, real_accuracy=0.95)["setting"] == {"a": 3}  # accuracy above real images' does not count
    assert search.best_of(trials, real_accuracy=0.94)["setting"] == {"a": 4}
    assert search.best_of(trials[-1:], 0.9) is None


def bowl(centre, calls=None):
    """Accuracy 1 everywhere, distance least at `centre`, in levels."""

    def try_setting(setting):
        if calls is not None:
            calls.append(setting)
        return {"accuracy": 1.0, "pooled": sum((math.log2(setting[k]) - math.log2(v)) ** 2 for k, v in centre.items())}

    return try_setting


def test_every_method_gets_the_same_number_of_settings():
    for space in (STRENGTHS, Space({"weight": Strength(1.0, 2.0, -1, 1)}), METHODS["NA + RFM"].space, METHODS["TFG-4"].space):
        calls = []
        found = search.search(space, bowl({next(iter(space.axes)): 1.0}, calls), real_accuracy=1.0, budget=12, extra=0)
        assert len(calls) == len(found["trials"]) == 12 and all(calls.count(c) == 1 for c in calls)
        assert sum(t["why"] == "design" for t in found["trials"]) <= 6


def test_a_best_setting_at_the_end_of_its_grid_extends_it():
    space = Space({"weight": Strength(1.0, 2.0, -1, 1)})
    without = search.search(space, bowl({"weight": 64.0}), real_accuracy=1.0, budget=4, extra=0)
    assert not without["inside"]
    extended = search.search(space, bowl({"weight": 64.0}), real_accuracy=1.0, budget=4, extra=10)
    assert extended["best"] == {"weight": 64.0} and extended["inside"]
    assert extended["trials"][-1]["why"] == "extension" and extended["trials"][-1]["setting"]["weight"] > 64
    assert len(extended["trials"]) <= 14
    inside = search.search(space, bowl({"weight": 1.0}), real_accuracy=1.0, budget=8, extra=10)
    assert len(inside["trials"]) == 8 and inside["inside"]  # nothing to extend


def test_failed_settings_are_trials_and_never_the_best():
    def try_setting(setting):
        return {"failed": "NaN"} if setting["weight"] > 1 else {"accuracy": 0.5, "pooled": 1.0}

    found = search.search(STRENGTHS, try_setting, real_accuracy=1.0, budget=8, extra=2)
    assert any("failed" in t for t in found["trials"]) and found["best"]["weight"] <= 1
    nothing = search.search(STRENGTHS, lambda setting: {"failed": "NaN"}, real_accuracy=1.0, budget=4, extra=2)
    assert nothing["best"] is None and len(nothing["trials"]) == 4


# ---- figures


def draws(each, spread=1.0, wrong=0, seed=0, classes=10, width=64):
    """Features of classes at their own means; `spread` about the mean, the first `wrong` of each class from the next one."""
    generator = torch.Generator().manual_seed(seed)
    means = 3 * torch.randn(classes, width, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    labels = torch.arange(classes).repeat(each)
    predicted = torch.where(torch.arange(len(labels)) // classes < wrong, (labels + 1) % classes, labels)
    features = means[predicted] + spread * torch.randn(len(labels), width, generator=generator, dtype=torch.float64)
    return Scored(labels, predicted, features)


def test_few_samples_are_put_in_the_right_order_by_the_pooled_distance_only():
    reference = Reference(draws(1000, seed=5))
    real, collapsed = draws(12), draws(12, spread=0.6)
    assert pooled(real, reference) < pooled(collapsed, reference)
    plain = [summary(s, reference, least=2)["frechet"] for s in (real, collapsed)]
    assert plain[0] > plain[1], "the plain distance prefers the collapsed ones: why the search does not use it"
    assert pooled(real, reference) < pooled(draws(12, wrong=2), reference)


def test_a_summary_says_what_is_wrong():
    reference = Reference(draws(500, seed=5))
    same = summary(draws(500, seed=6), reference)
    assert same["accuracy"] == 1.0 and same["frechet"] < 7 and abs(same["diversity"] - 1) < 0.02 and abs(same["pooled"]) < 1
    half = summary(draws(500, spread=0.5, seed=6), reference)
    assert abs(half["diversity"] - 0.25) < 0.01 and half["frechet"] > same["frechet"]
    mixed = summary(draws(50, wrong=10, seed=6), reference)
    assert mixed["accuracy"] == pytest.approx(0.8) and mixed["per_class"]["Bag"]["count"] == 50
    assert summary(draws(12), reference)["frechet"] is None  # too few for it to mean anything
    assert pooled(draws(500, seed=5), reference) < 1e-6 + 0  # the bias is subtracted: slightly below 0 for the reference itself


def test_the_interval_is_that_of_a_share():
    scored = draws(100, wrong=20, seed=3, classes=2, width=8)
    half = bootstrap(scored, Reference(draws(200, seed=5, classes=2, width=8)), draws=200)["accuracy"]
    assert half == pytest.approx(1.96 * math.sqrt(0.8 * 0.2 / 200), rel=0.2)


# ---- units


def test_what_was_found_is_read_in_the_order_it_was_put(tmp_path):
    store = Store(tmp_path, {"unet": "w1"})
    store.put({"what": "overhead"}, "code", {"seconds": {"unsteered": 1.0, "NA": 1.1}}, {"x": torch.zeros(1)})
    assert list(store.get({"what": "overhead"}, "code").found["seconds"]) == ["unsteered", "NA"]


def test_units_of_other_weights_are_never_read_and_stale_ones_only_when_asked(tmp_path):
    store = Store(tmp_path, {"weights": "a"})
    store.put({"method": "NA", "setting": {"w": 1.0}}, "code1", {"seconds": 2.0}, {"x": torch.arange(3)})
    held = store.get({"setting": {"w": 1.0}, "method": "NA"}, "code1")
    assert held.found == {"seconds": 2.0} and held.tensors["x"].tolist() == [0, 1, 2]
    assert store.get({"method": "NA", "setting": {"w": 2.0}}, "code1") is None
    assert Store(tmp_path, {"weights": "b"}).get({"method": "NA", "setting": {"w": 1.0}}, "code1") is None
    with pytest.raises(Differs, match="NA .*other code"):
        store.get({"method": "NA", "setting": {"w": 1.0}}, "code2")
    assert Store(tmp_path, {"weights": "a"}, "redo").get({"method": "NA", "setting": {"w": 1.0}}, "code2") is None
    assert Store(tmp_path, {"weights": "a"}, "keep").get({"method": "NA", "setting": {"w": 1.0}}, "code2").code == "code1"


def test_results_of_another_run_are_named(tmp_path):
    check_context(None, {"unet": "1"}, "there")
    check_context({"unet": "1"}, {"unet": "1"}, "there")
    with pytest.raises(Differs, match='steps: 50 there, 20 now\n  unet: "1" there, "2" now'):
        check_context({"unet": "1", "steps": 50}, {"unet": "2", "steps": 20}, "there")


def test_comments_do_not_make_code_another(tmp_path):
    def checksum(name, text):
        path = tmp_path / name / "code.py"
        path.parent.mkdir()
        path.write_text(text)
        return code_checksum((path,))

    first = checksum("a", '"""What it is."""\n\ndef f(x):\n    """Doubles."""\n    return 2 * x  # twice\n')
    assert first == checksum("b", '"""Other words."""\ndef f(x):\n    return 2 * x\n')
    assert first != checksum("c", '"""What it is."""\ndef f(x):\n    """Doubles."""\n    return 3 * x\n')


# ---- the report


def made_up(name, accuracy, distance, **more):
    per_class = {"Bag": {"accuracy": accuracy, "frechet": distance, "diversity": 0.8, "count": 50}}
    return {
        "setting": {},
        "accuracy": accuracy,
        "frechet": distance,
        "pooled": distance,
        "diversity": 0.8,
        "per_class": per_class,
        "count": 50,
        "counts": {"encoder": 50.0, "decoder": 50.0},
        "seconds_per_image": 0.1,
        "interval": {"accuracy": 0.01},
        **more,
    }


@pytest.fixture
def results():
    entries = {
        "unguided": made_up("unguided", 0.1, 100.0),
        "NA": made_up("NA", 0.94, 3.0),
        "NA + RFM": made_up("NA + RFM", 0.95, 2.0),
        "classifier guidance": made_up("classifier guidance", 0.94, 2.5),
        "DPS": made_up("DPS", 0.98, 9.0),
        "TFG-1": {"setting": {}, "failed": "NaN"},
    }
    trials = {
        n: [{"setting": {"weight": 1.0}, "why": "design", "accuracy": e["accuracy"], "pooled": e["frechet"], "diversity": 0.8}]
        for n, e in entries.items()
        if "failed" not in e
    }
    budget = vars(TINY) | {"classes": ["Bag"]}
    return {
        "context": {
            "sampler": {"name": "euler", "steps": 50, "sigma_max": 80.0, "sigma_min": 0.01, "batch": 64},
            "unet": "ab" * 32,
        },
        "budget": budget,
        "criterion": {"margin": 0.02, "real_accuracy": 0.94},
        "machine": {"processor": "P", "threads": 2, "torch": "2"},
        "not_available": {"CFG": "not trained"},
        "real": made_up("real", 0.94, 0.7),
        "results": entries,
        "memory": {"NA": 5e6},
        "complete": False,
        "search": {
            n: {"best": {"weight": 1.0}, "inside": n != "DPS", "trials": t if n != "unguided" else []} for n, t in trials.items()
        },
        "timing": {
            "threads": 2,
            "batch": 64,
            "rounds": 3,
            "seconds_per_image": {"NA": 0.1, "NA + RFM": 0.12, "classifier guidance": 0.15, "DPS": 0.2},
        },
        "uses": {"NA + RFM": ["noise alignment"]},
        "fits": {"noise alignment": 12.0},
        "studies": {},
    }


def test_targets_are_judged_as_they_come_out(results):
    assert report.best_gradient_free(results) == "NA + RFM"
    found = {(t["what"], t["target"][:12]): t["reached"] for t in report.targets(results)}
    assert found == {
        ("accuracy", "at least 0.9"): True,
        ("diversity", "at least 0.7"): True,
        ("Frechet distance", "at most 3.00"): True,
        ("Frechet distance", "at most 2.50"): True,
        ("time over DPS's", "at most 0.5"): False,
        ("time over classifier guidance's", "at most 0.85"): True,
        ("gradient methods above its curve", "none"): False,
    }
    assert report.above_the_curve(results) == ["DPS"]  # more accurate than every gradient-free trial
    results["search"]["NA"]["trials"].append({"accuracy": 0.99, "pooled": 8.0, "diversity": 0.5, "setting": {}, "why": "design"})
    assert report.above_the_curve(results) == []


def test_the_section_is_written_between_its_markers(results, tmp_path):
    document = tmp_path / "steering.md"
    text = report.render(results, {"curves": "curves.png"})
    for part in (
        "Not complete yet",
        "| **NA + RFM** | 0.950 ± 0.010 | 2.00 |",
        "failed: NaN",
        "CFG is missing",
        "curves.png",
        "**missed**",
        "DPS: 150 samples",
        "| DPS | weight 1 | 1 | no |",
    ):
        assert part in text, part
    report.write_section(document, text)
    once = document.read_text()
    report.write_section(document, text)
    assert document.read_text() == once and once.startswith("# Steering")
    document.write_text("# My title\n\nBefore.\n\n" + once.partition("# Steering\n\n")[2] + "\nAfter.\n")
    report.write_section(document, "other")
    assert (
        document.read_text().startswith("# My title\n\nBefore.")
        and document.read_text().endswith("After.\n")
        and "NA + RFM" not in document.read_text()
    )


def test_few_samples_a_class_are_reported_by_the_pooled_distance(results):
    results["results"]["NA"]["frechet"] = None
    assert report.measure(results) == "pooled" and "| NA | 0.940 ± 0.010 | 3.00 |" in report.render(results, {})


def test_plots(results, tmp_path):
    plots.curves(results, tmp_path / "curves.png")
    plots.methods({"NA": torch.zeros(4, 1, 28, 28, dtype=torch.uint8)}, [1, 1, 6, 6], tmp_path / "methods.png")
    assert (tmp_path / "curves.png").stat().st_size > 10_000 and (tmp_path / "methods.png").stat().st_size > 1000
    assert not plots.studies({}, tmp_path / "none.png")


def test_the_front_is_what_no_other_trial_beats():
    trials = [trial(0.9, 5.0), trial(0.8, 4.0), trial(0.85, 6.0), trial(0.7, 4.5), {"failed": "NaN"}]
    assert [t["pooled"] for t in report.front(trials, report.distance)] == [5.0, 4.0]


# ---- the command


def test_what_is_said_wrongly_is_refused(capsys, tmp_path):
    for argv, message in (
        (["--methods", "NO"], "did you mean"),
        (["--classes", "Bagg"], "did you mean"),
        (["--until", "soon"], "HH:MM"),
    ):
        with pytest.raises(SystemExit):
            command.parsed(argv)
        assert message in capsys.readouterr().err
    assert command.parsed(["--classes", "Bag,6,Trouser"]).classes == (1, 6, 8)
    assert command.parsed(["--methods", "DPS,NA"]).methods == ["DPS", "NA"]
    assert command.parsed(["--minutes", "5"]).stop is not None and command.parsed([]).stop is None


def test_fewer_results_never_replace_more_of_the_same_run(results, tmp_path):
    path = tmp_path / "steering.json"
    less = {**results, "results": {}}
    command.keeper(path, results)(less)
    assert not path.exists()
    command.keeper(path, less)(results)
    assert json.loads(path.read_text())["results"].keys() == results["results"].keys()


def test_hours():
    assert [hours(s) for s in (12, 600, 4000)] == ["12 s", "10 min", "1 h 07 min"]
