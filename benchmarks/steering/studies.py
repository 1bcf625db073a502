"""What stands beside the table: transfer between noise levels, blocks, several concepts at once, and what a steered step costs.

Each study is a function of the run and of the results so far, and is made of units like everything else.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.steering.fits import ATTRIBUTES, BLOCK, DIRECTIONS, SIGMA
from benchmarks.steering.score import Scored, judged, summary
from benchmarks.steering.store import Missing
from benchmarks.zoo.data import CLASSES
from benchmarks.zoo.threads import memory_is_kept

__all__ = ["STUDIES", "Study"]

LEARNT = (0.3, 0.6, 1.0, 2.0, 4.0)
INJECTED = ((0.1, 0.3), (0.3, 1.0), (1.0, 3.0), (3.0, 10.0))
BLOCKS = ("enc.0", "enc.1", "enc.2", "mid", "dec.2", "dec.1")
WEIGHTS = (0.1, 0.2, 0.4)
GROUPS = ((2, 6), (5, 9), (0, 1, 3))
ATTRIBUTE_WEIGHTS = {"NA": (0.5, 1.0, 2.0), "RFM": (0.05, 0.1, 0.2)}
AMPLIFIED = {"weight": 0.2, "scale": 2.0}
OVERHEAD_ROUNDS = 6  # for each round of the timing
LEVELS = (2.0, 1.8, 1.6, 1.4, 1.2, 1.0, 0.8, 0.6, 0.5)


@dataclass(frozen=True)
class Study:
    """run(run, results): a JSON object; cost(run, costs): estimated seconds; render(what run returned): Markdown."""

    run: Callable
    cost: Callable
    render: Callable


def needed(results: dict, name: str) -> dict:
    """The best setting of a method that a study builds on."""
    found = results["search"].get(name, {}).get("best")
    if found is None:
        raise Missing
    return found


def cell(run, name: str, setting: dict) -> dict:
    """Accuracy, pooled distance and diversity of a method at a setting, on the calibration seeds."""
    scored, about = run.drawn_all("study", run.methods[name], setting, run.budget.extra_samples, 10_000_000)
    if scored is None:
        return {"accuracy": None, "pooled": None, "diversity": None, **about}
    found = summary(scored, run.world.calibration)
    return {k: round(found[k], 5) for k in ("accuracy", "pooled", "diversity")}


# ---- noise levels


def transfer(run, results) -> dict:
    """Directions alone, at the method's best weight and scale: learnt at one level, injected in a window of others."""
    kinds = {}
    for kind in DIRECTIONS:
        best = needed(results, kind)
        cells = [[cell(run, kind, {**best, "learnt": s, "low": low, "high": high}) for low, high in INJECTED] for s in LEARNT]
        kinds[kind] = {
            "weight": best["weight"],
            "scale": best["scale"],
            "accuracy": [[c["accuracy"] for c in row] for row in cells],
            "pooled": [[c["pooled"] for c in row] for row in cells],
            "cosine": cosines(run, kind),
        }
    return {"learnt": LEARNT, "injected": INJECTED, "kinds": kinds}


def cosines(run, kind: str) -> list[list[float]]:
    """Between directions of one class learnt at two levels, mean over the classes."""

    def make():
        found = [run.fits.concepts(kind, BLOCK, s) for s in LEARNT]
        v = torch.stack(
            [torch.stack([concepts[c].direction.flatten() for c in run.world.classes]) for concepts in found]
        ).double()
        return {"cosine": torch.einsum("scd,tcd->st", v, v).div(v.shape[1]).tolist()}, {}

    return run.unit({"what": "cosines", "kind": kind, "learnt": LEARNT, "block": BLOCK}, run.methods[kind].code(), make).found[
        "cosine"
    ]


def transfer_cost(run, costs) -> float:
    return sum(costs[k]["price"] for k in DIRECTIONS if k in costs) * len(LEARNT) * len(INJECTED) * run.budget.extra_samples


def transfer_text(found) -> str:
    lines = [
        "### Transfer between noise levels",
        "",
        f"Directions alone, each kind at its best weight and scale, block {BLOCK}; accuracy by the sigma at "
        "which a direction was learnt (down) and the window that it is injected in.",
        "",
    ]
    for kind, one in found["kinds"].items():
        lines += [
            f"| {kind} | "
            + " | ".join(f"{low:g} to {high:g}" for low, high in found["injected"])
            + " | cosine with the one learnt at "
            f"{SIGMA:g} |",
            "|---" * (len(found["injected"]) + 2) + "|",
        ]
        at = found["learnt"].index(SIGMA)
        lines += [
            f"| {s:g} | " + " | ".join(shown(a) for a in row) + f" | {cosine[at]:.2f} |"
            for s, row, cosine in zip(found["learnt"], one["accuracy"], one["cosine"])
        ]
        lines.append("")
    return "\n".join(lines).rstrip()


# ---- blocks


def blocks(run, results) -> dict:
    """Directions alone by the block that they are learnt and injected at, at several weights."""
    kinds = {}
    for kind in DIRECTIONS:
        best = needed(results, kind)
        cells = [[cell(run, kind, {**best, "learnt": SIGMA, "block": block, "weight": w}) for w in WEIGHTS] for block in BLOCKS]
        kinds[kind] = {name: [[c[name] for c in row] for row in cells] for name in ("accuracy", "pooled", "diversity")}
    return {"blocks": BLOCKS, "weights": WEIGHTS, "kinds": kinds}


def blocks_cost(run, costs) -> float:
    return sum(costs[k]["price"] for k in DIRECTIONS if k in costs) * len(BLOCKS) * len(WEIGHTS) * run.budget.extra_samples


def blocks_text(found) -> str:
    lines = [
        "### Blocks",
        "",
        "Directions alone, learnt and injected at one block; the best of weights "
        f"{', '.join(f'{w:g}' for w in found['weights'])} by accuracy: accuracy, diversity.",
        "",
        "| | " + " | ".join(found["blocks"]) + " |",
        "|---" * (len(found["blocks"]) + 1) + "|",
    ]
    for kind, one in found["kinds"].items():
        row = []
        for accuracy, diversity in zip(one["accuracy"], one["diversity"]):
            tried = [(a, d) for a, d in zip(accuracy, diversity) if a is not None]
            row.append(f"{max(tried)[0]:.2f}, {max(tried)[1]:.2f}" if tried else "–")
        lines.append(f"| {kind} | " + " | ".join(row) + " |")
    return "\n".join(lines)


# ---- several at once


def combined(run, results) -> dict:
    """A class and one or two attributes at once, in several ways; and two or three classes at once."""
    na, rfm = needed(results, "NA"), needed(results, "NA + RFM")
    window = (na["low"] / 1.001, na["high"] * 1.001)
    own = {"scale": rfm["scale"], "window": (rfm["low"] / 1.001, rfm["high"] * 1.001)}

    def by_class(labels):
        return run.fits.alignment().at(na["weight"], window, labels.tolist())

    def ways(wanted):
        yield "class alone", (None,), lambda labels, w: [by_class(labels)]
        yield (
            "NA of each",
            ATTRIBUTE_WEIGHTS["NA"],
            lambda labels, w: [by_class(labels), *(run.fits.attribute_alignment().at(w, window, a) for a in wanted)],
        )
        yield (
            "NA of the class, RFM of the rest",
            ATTRIBUTE_WEIGHTS["RFM"],
            lambda labels, w: [*(run.fits.attribute_concepts("RFM")[a].at(w, **own) for a in wanted), by_class(labels)],
        )
        yield (
            "NA of what has all",
            (None,),
            lambda labels, w: [run.fits.joint_alignment(wanted).at(na["weight"], window, labels.tolist())],
        )

    found = {"attributes": [], "groups": []}
    for wanted in (ATTRIBUTES[:1], ATTRIBUTES):
        for way, weights, build in ways(wanted):
            tried = [{"weight": w, **_attributes(run, na, rfm, wanted, way, w, build)} for w in weights]
            found["attributes"].append({"wanted": wanted, "way": way, **max(tried, key=lambda t: t["all"]), "tried": tried})
    for group in GROUPS:
        if set(group) <= set(run.world.classes):
            found["groups"].append(_group(run, na, window, group))
    return found


def _attributes(run, na, rfm, wanted, way, weight, build) -> dict:
    """Share of samples of the class, with each attribute, and with all of that."""
    right, has, parts, price = [], [], [], run.price(run.methods["NA + RFM"])
    for labels, seeds in run.batches(run.budget.extra_samples, 10_000_000, run.budget.classes):
        spec = {
            "what": "combined",
            "wanted": wanted,
            "way": way,
            "weight": weight,
            "NA": na,
            "RFM": rfm,
            "labels": labels.tolist(),
            "seeds": seeds.tolist(),
        }

        def make():
            images = run.world.draw(run.world.net, build(labels, weight), seeds).images
            scored = judged(run.world.judge, images, labels)
            has = torch.stack([run.fits.has(a, images, labels) for a in wanted], 1)
            return {}, {"labels": labels, "predicted": scored.predicted, "features": scored.features.float(), "has": has}

        unit = run.unit(spec, run.methods["NA + RFM"].code(), make)
        run.advance(price * len(labels), "several at once")
        t = unit.tensors
        parts.append(Scored(t["labels"], t["predicted"], t["features"].double()))
        right.append(parts[-1].right)
        has.append(t["has"])
    right, has = torch.cat(right), torch.cat(has)
    return {
        "accuracy": float(right.double().mean()),
        "attributes": has.double().mean(0).tolist(),
        "all": float((right & has.all(1)).double().mean()),
        "diversity": summary(Scored.joined(parts), run.world.calibration)["diversity"],
    }


def _group(run, na, window, group) -> dict:
    """Two or three classes at once, each with its share of the weight: which class the judge sees."""
    count = min(run.budget.extra_samples, run.world.sampler.batch)
    seeds = 10_000_000 + torch.arange(count)
    spec = {"what": "group", "group": group, "NA": na, "seeds": seeds.tolist()}

    def make():
        actions = [run.fits.alignment().at(na["weight"] / len(group), window, c) for c in group]
        images = run.world.draw(run.world.net, actions, seeds).images
        return {"predicted": judged(run.world.judge, images, torch.zeros(count, dtype=torch.int64)).predicted.tolist()}, {}

    price = run.price(run.methods["NA"])
    predicted = torch.tensor(run.unit(spec, run.methods["NA"].code(), make).found["predicted"])
    run.advance(price * count, "several at once")
    counts = torch.bincount(predicted, minlength=len(CLASSES)).double()
    return {
        "classes": [CLASSES[c] for c in group],
        "shares": (counts[list(group)] / counts.sum()).tolist(),
        "within": float(counts[list(group)].sum() / counts.sum()),
    }


def combined_cost(run, costs) -> float:
    price = costs.get("NA + RFM", costs.get("NA", {"price": 0.0}))["price"]
    ways = 2 * (2 + len(ATTRIBUTE_WEIGHTS["NA"]) + len(ATTRIBUTE_WEIGHTS["RFM"])) + len(GROUPS)
    return price * ways * run.budget.extra_samples


def combined_text(found) -> str:
    lines = [
        "### Several at once",
        "",
        "A class and an attribute (bright: the mean of what is not background; large: its share of the picture; each among the "
        "upper quarter of the class's training images), steered to together. The weight of the attribute is the best of those "
        "tried, by the share of samples that have all.",
        "",
        "| wanted | how | class | attributes | all | diversity |",
        "|---|---|---|---|---|---|",
    ]
    for one in found["attributes"]:
        weight = "" if one["weight"] is None else f", weight {one['weight']:g}"
        lines.append(
            f"| class, {', '.join(one['wanted'])} | {one['way']}{weight} | {one['accuracy']:.2f} | "
            f"{', '.join(f'{a:.2f}' for a in one['attributes'])} | {one['all']:.2f} | {one['diversity']:.2f} |"
        )
    lines += [
        "",
        "Classes together, each with its share of NA's weight: what the judge sees.",
        "",
        "| classes | shares | one of them |",
        "|---|---|---|",
    ]
    lines += [
        f"| {', '.join(g['classes'])} | {', '.join(f'{s:.2f}' for s in g['shares'])} | {g['within']:.2f} |"
        for g in found["groups"]
    ]
    return "\n".join(lines)


# ---- what a step costs


def overhead(run, results) -> dict:
    """Short runs whose every step is steered, beside unsteered ones: seconds of a step over those of an unsteered one. In
    an order drawn anew for each round: otherwise each would always run after the same one."""
    weight, label, sampler = needed(results, "NA")["weight"], run.budget.classes[0], run.world.sampler
    spec = {"what": "overhead", "levels": LEVELS, "weight": weight, "amplified": AMPLIFIED, "batch": sampler.batch}
    spec |= {"threads": torch.get_num_threads(), "rounds": OVERHEAD_ROUNDS * run.budget.rounds, "order": "random"}
    spec |= {"blocks": BLOCKS, "memory": "kept" if memory_is_kept() else "returned"}

    def make():
        concept, plan, seeds = run.fits.concepts("RFM")[label], sampler.plan([*LEVELS, 0.0]), torch.arange(sampler.batch)
        ways = {
            "unsteered": [],
            "latent vector": [run.fits.latent().at(1.0, (0.0, 80.0), label)],
            "NA": [run.fits.alignment().at(weight, (0.0, 80.0), label)],
            "NA, a matrix for each level": [run.fits.alignment().at(weight, (0.0, 80.0), label, how="map")],
            "concept": [concept.at(AMPLIFIED["weight"])],
            f"concept, amplified by {AMPLIFIED['scale']:g}": [concept.at(**AMPLIFIED)],
        }
        for block in BLOCKS:
            if block != BLOCK:  # which direction it is takes no time
                other = run.fits.concepts("mean difference", block)[label]
                ways[f"the same at {block}"] = [other.at(**AMPLIFIED)]
        taken, order = {name: [] for name in ways}, random.Random(0)
        for turn in range(spec["rounds"] + 1):
            for name, steering in order.sample(list(ways.items()), len(ways)):
                seconds = run.world.draw(run.world.net, steering, seeds, plan).seconds
                if turn:  # the first warms up
                    taken[name].append(seconds / len(LEVELS))
        return {"seconds": {name: statistics.median(t) for name, t in taken.items()}}, {}

    seconds = run.unit(spec, run.methods["NA"].code(), make).found["seconds"]
    return {"seconds_per_step": seconds, "over_unsteered": {name: s / seconds["unsteered"] for name, s in seconds.items()}}


def overhead_cost(run, costs) -> float:
    price = costs.get("unguided", {"price": 0.0})["price"]
    passes = 5 + 2 * len(BLOCKS)  # of all ways, where an amplified one is two at most
    steps = passes * len(LEVELS) * (OVERHEAD_ROUNDS * run.budget.rounds + 1)
    return price / run.world.sampler.steps * run.world.sampler.batch * steps


def overhead_text(found) -> str:
    lines = [
        "### What a steered step costs",
        "",
        f"Runs of {len(LEVELS)} steps, all of them steered, and unsteered ones, in random order; medians; one class, batches as above. "
        f"Matrices are made before, in the round that warms up. Concepts are at {BLOCK} unless said otherwise.",
        "",
        "| | ms / step of a batch | over unsteered |",
        "|---|---|---|",
    ]
    lines += [
        f"| {name} | {1e3 * s:.1f} | {found['over_unsteered'][name]:.3f} |" for name, s in found["seconds_per_step"].items()
    ]
    return "\n".join(lines)


def shown(value) -> str:
    return "–" if value is None else f"{value:.2f}"


STUDIES = {
    "overhead": Study(overhead, overhead_cost, overhead_text),
    "transfer": Study(transfer, transfer_cost, transfer_text),
    "blocks": Study(blocks, blocks_cost, blocks_text),
    "combined": Study(combined, combined_cost, combined_text),
}
