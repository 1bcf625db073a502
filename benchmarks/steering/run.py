"""The run: hours of work cut into units, each kept when it is there; the same program over kept units gives the report.

`Run.comparison()` goes through everything and returns the results as one JSON object. What is in the store is not drawn
again; in a run that draws nothing (`drawing=False`) what is missing is left out. So an interrupted run, gone on with, gives
what an uninterrupted one gives.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Iterable
from functools import partial

import torch

import fastdiff as fd
from benchmarks.steering import fits, studies
from benchmarks.steering.budget import Budget
from benchmarks.steering.methods import Method, window
from benchmarks.steering.score import Scored, bootstrap, judged, summary
from benchmarks.steering.search import MARGIN, search
from benchmarks.steering.store import Differs, Missing, Stopped, Unit
from benchmarks.steering.world import World, peak_memory
from benchmarks.zoo.data import CLASSES

__all__ = ["CALIBRATION", "Run", "in_columns"]

CALIBRATION = 10_000_000  # first seed of searches and studies; results start at 0
PRICE = "price"


class Silent:
    """A progress bar that shows nothing."""

    def advance(self, expected: float, what: str, took: float | None) -> None: ...


class Run:
    """world; methods: {name: Method}, all of them; budget; until: time.time() after which no unit is begun; bar: `progress.Bar`
    or `Silent`; only: names of the methods to draw for. Of the others, and in a run that draws nothing, what is
    there is used; targets: classes that fits are made for, all by default, so that they serve every budget."""

    def __init__(
        self,
        world: World,
        methods: dict[str, Method],
        budget: Budget,
        *,
        drawing: bool = True,
        until: float | None = None,
        bar=None,
        only: Iterable[str] | None = None,
        targets: Iterable[int] | None = None,
    ):
        self.world, self.budget, self.drawing, self.until = world, budget, drawing, until
        self.only = None if only is None else set(only)
        self.bar = bar or Silent()
        self.fits = fits.Fits(world, self._fit, targets)
        self.refused = {name: reason for name, m in methods.items() if (reason := m.missing(world))}
        self.methods = {name: m for name, m in methods.items() if name not in self.refused}
        self.drawn = 0  # units of this run
        self.took = None  # seconds of the last unit, None if it was there
        self._prices: dict[str, float] = {}

    # ---- units

    def unit(self, spec: dict, code: str, make: Callable[[], tuple[dict, dict]]) -> Unit:
        """The kept unit, or a new one: make() returns (a JSON object, tensors)."""
        held = self.world.store.get(spec, code)
        self.took = None
        if held is not None:
            return held
        if not self.drawing:
            raise Missing
        if self.until is not None and time.time() >= self.until:
            raise Stopped
        start = time.perf_counter()
        unit = self.world.store.put(spec, code, *make())
        self.took = time.perf_counter() - start
        self.drawn += 1
        return unit

    def advance(self, expected: float, what: str) -> None:
        """One more unit is there: expected, the seconds that were estimated."""
        self.bar.advance(expected, what, self.took)

    def _advance(self, method, count, what):
        took = self.took
        expected = self.price(method) * count
        self.took = took
        self.advance(expected, f"{method.name}, {what}")

    def _fit(self, spec: dict, code: str, make: Callable) -> Unit:
        return self.unit({"what": "fit", **spec}, code, make)

    def batches(self, count: int, first_seed: int, classes: tuple[int, ...]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(labels, seeds) of `count` samples in batches: the classes in turn, sample i of a class with the same seed always."""
        index = torch.arange(count)
        labels = torch.tensor(classes)[index % len(classes)]
        seeds = first_seed + labels * 100_000 + index // len(classes)
        return list(zip(labels.split(self.world.sampler.batch), seeds.split(self.world.sampler.batch)))

    def draw(self, what: str, method: Method, setting: dict, labels, seeds, *, images: bool = False, **extra) -> Unit:
        """One batch, drawn and judged. A setting that fails (NaN, a window without a level) is a result too."""
        spec = {
            "what": what,
            "method": method.name,
            "network": method.network_checksum(self.world),
            "setting": setting,
            "labels": labels.tolist(),
            "seeds": seeds.tolist(),
            **extra,
        }

        def make():
            try:
                steering = method.build(self.world, self.fits, setting, labels)
                drawn = self.world.draw(method.model(self.world), steering, seeds)
            except (FloatingPointError, ValueError) as error:
                return {"failed": f"{type(error).__name__}: {error}"}, {}
            scored = judged(self.world.judge, drawn.images, labels)
            tensors = {"labels": labels, "predicted": scored.predicted, "features": scored.features.float()}
            if images:
                tensors["images"] = ((drawn.images + 1) * 127.5).round().to(torch.uint8)
            return {"seconds": drawn.seconds, "counts": drawn.counts}, tensors

        unit = self.unit(spec, method.code(), make)
        self._advance(method, len(labels), what)
        return unit

    def drawn_all(self, what, method, setting, count, first_seed, **extra) -> tuple[Scored | None, dict]:
        """Samples in batches: what the judge saw, and {seconds per image (median of the batches), counts, failed}."""
        parts, seconds, counts = [], [], {}
        for labels, seeds in self.batches(count, first_seed, self.budget.classes):
            unit = self.draw(what, method, setting, labels, seeds, **extra)
            if "failed" in unit.found:
                return None, {"failed": unit.found["failed"]}
            t = unit.tensors
            parts.append(Scored(t["labels"], t["predicted"], t["features"].double()))
            seconds.append(unit.found["seconds"] / self.world.sampler.batch)
            counts = unit.found["counts"]
        return Scored.joined(parts), {"seconds_per_image": statistics.median(seconds), "counts": counts}

    # ---- stages

    def price(self, method: Method) -> float:
        """Seconds per image, from one batch of the first setting of the method's design."""
        if method.name in self._prices:
            return self._prices[method.name]
        design = method.space.design((self.budget.settings + 1) // 2)
        labels, seeds = self.batches(self.world.sampler.batch, CALIBRATION, self.budget.classes)[0]
        spec = {"what": PRICE, "method": method.name, "network": method.network_checksum(self.world), "setting": design[0]}

        def make():
            for setting in design:
                steering = method.build(self.world, self.fits, setting, labels)
                try:
                    drawn = self.world.draw(method.model(self.world), steering, seeds)
                except FloatingPointError:  # a setting too strong to be timed by
                    continue
                return {"seconds": drawn.seconds / self.world.sampler.batch}, {}
            raise RuntimeError(f"{method.name}: every setting of its first design gave NaN")

        self._prices[method.name] = self.unit(spec, method.code(), make).found["seconds"]
        return self._prices[method.name]

    def cost(self, say: Callable[[str], None] = lambda name: None) -> dict[str, dict[str, float]]:
        """Estimated seconds of the search and results of each method that is drawn for; measures what it needs first, fits included:
        say(name of the method that is being measured)."""
        b, found = self.budget, {}
        for name, method in self.methods.items():
            if not self.chosen(name):
                continue
            say(name)
            price = self.price(method)
            settings = b.settings if method.space.axes else 0
            found[name] = {
                "price": price,
                "search": price * settings * b.search_samples,
                "results": price * self.samples(method) * len(b.classes),
            }
        return found

    def samples(self, method: Method) -> int:
        return self.budget.samples_recurrent if method.recurrences > 1 else self.budget.samples

    @property
    def real_accuracy(self) -> float:
        chosen = torch.isin(self.world.real.labels, torch.tensor(self.budget.classes))
        return summary(self.world.real.take(chosen), self.world.reference)["accuracy"]

    def search(self, method: Method) -> dict:
        def try_setting(setting):
            scored, about = self.drawn_all("trial", method, setting, self.budget.search_samples, CALIBRATION)
            if scored is None:
                return about
            found = summary(scored, self.world.calibration)
            return {k: round(found[k], 5) for k in ("accuracy", "pooled", "diversity")} | {
                "seconds_per_image": about["seconds_per_image"]
            }

        if not method.space.axes:
            return {"best": {}, "inside": True, "trials": []}
        b = self.budget
        return search(method.space, try_setting, real_accuracy=self.real_accuracy, budget=b.settings, extra=b.extra)

    def result(self, method: Method, setting: dict) -> dict:
        count = self.samples(method) * len(self.budget.classes)
        scored, about = self.drawn_all("result", method, setting, count, 0, images=True)
        if scored is None:
            return {"setting": setting, **about}
        return {"setting": setting, **about, **summary(scored, self.world.reference), "interval": self._interval(scored)}

    def _interval(self, scored):
        return bootstrap(scored, self.world.reference, draws=self.budget.draws)

    def real(self) -> dict:
        chosen = torch.isin(self.world.real.labels, torch.tensor(self.budget.classes))
        scored = self.world.real.take(chosen)
        return {**summary(scored, self.world.reference), "interval": self._interval(scored)}

    def timing(self, settings: dict[str, dict]) -> dict:
        """One batch of each method in turn, several rounds: median seconds per image."""
        threads, size = torch.get_num_threads(), self.world.sampler.batch
        labels, seeds = self.batches(size, 0, self.budget.classes[:1])[0]
        taken = {name: [] for name in settings}
        for turn in range(self.budget.rounds):
            for name, setting in settings.items():
                method = self.methods[name]
                spec = {
                    "what": "timing",
                    "method": name,
                    "network": method.network_checksum(self.world),
                    "setting": setting,
                    "round": turn,
                    "threads": threads,
                }

                def make(method=method, setting=setting):
                    steering = method.build(self.world, self.fits, setting, labels)
                    return {"seconds": self.world.draw(method.model(self.world), steering, seeds).seconds}, {}

                taken[name].append(self.unit(spec, method.code(), make).found["seconds"] / size)
                self._advance(method, size, "timing")
        return {
            "threads": threads,
            "batch": size,
            "rounds": self.budget.rounds,
            "seconds_per_image": {name: statistics.median(t) for name, t in taken.items()},
            "all": taken,
        }

    def memory(self, method: Method, setting: dict) -> int:
        """Peak bytes of tensors of one batch, beyond networks and fits, in a run of a few of the sampler's levels, in and outside
        of each window: what a step holds does not depend on how many there are, and a record of all would be huge."""
        labels, seeds = self.batches(self.world.sampler.batch, 0, self.budget.classes)[0]
        spec = {"what": "memory", "method": method.name, "network": method.network_checksum(self.world), "setting": setting}

        def make():
            steering = method.build(self.world, self.fits, setting, labels)
            plan = self.world.sampler.plan(self._few_levels(setting))
            draw = partial(self.world.draw, method.model(self.world), steering, seeds, plan)
            return {"bytes": peak_memory(draw, self.world.device)}, {}

        unit = self.unit(spec, method.code(), make)
        self._advance(method, len(labels), "memory")
        return unit.found["bytes"]

    def _few_levels(self, setting: dict) -> list[float]:
        """The plan's first and last level, and up to three in each window of a setting; then 0."""
        every = [float(s) for s in self.world.plan.sigmas[self.world.plan.calls_model]]
        found = {every[0], every[-1]}
        for prefix in ("", "NA "):
            if f"{prefix}low" in setting:
                low, high = window(setting, prefix)
                inside = [s for s in every if low <= s <= high]
                found |= {inside[0], inside[len(inside) // 2], inside[-1]}
        return [*sorted(found, reverse=True), 0.0]

    @property
    def budget_json(self) -> dict:
        return vars(self.budget) | {"classes": [CLASSES[c] for c in self.budget.classes]}

    # ---- all of it

    def comparison(self, keep: Callable[[dict], None] = lambda results: None) -> dict:
        """Everything, in order; keep(results) is called whenever a method is done. Raises `Stopped`."""
        results = {
            "context": self.world.context,
            "budget": self.budget_json,
            "criterion": {"margin": MARGIN, "real_accuracy": self.real_accuracy},
            "machine": machine(self.world.device),
            "not_available": self.refused,
            "real": self.real(),
            "search": {},
            "results": {},
            "memory": {},
            "timing": None,
            "code": {name: m.code() for name, m in self.methods.items()},
            "uses": {},
            "fits": {},
            "studies": {},
            "complete": False,
        }

        def part(where, name, make, drawing):
            self.drawing, before = drawing and self.drawing, self.drawing
            try:
                where[name] = make()
                keep(results)
            except Missing:
                pass
            finally:
                self.drawing = before

        for name, method in self.methods.items():
            part(results["search"], name, lambda: self.search(method), self.chosen(name))
        best = {name: found["best"] for name, found in results["search"].items() if found["best"] is not None}
        for name, setting in best.items():
            part(results["results"], name, lambda: self.result(self.methods[name], setting), self.chosen(name))
        done = {name: best[name] for name, found in results["results"].items() if "failed" not in found}
        for name, setting in done.items():
            part(results["memory"], name, lambda: self.memory(self.methods[name], setting), self.chosen(name))
            results["uses"][name] = self.methods[name].uses(setting)
        part(results, "timing", lambda: self.timing(done), self.only is None)
        for name, study in studies.STUDIES.items():
            part(results["studies"], name, lambda: study.run(self, results), self.only is None)
        costs = {name: self.fits.cost(name) for names in results["uses"].values() for name in names}
        results["fits"] = {name: seconds for name, seconds in costs.items() if seconds is not None}
        results["complete"] = (
            set(best) == set(self.methods)
            and set(results["results"]) == set(best)
            and set(results["memory"]) == set(done)
            and results["timing"] is not None
            and set(results["studies"]) == set(studies.STUDIES)
        )
        keep(results)
        return results

    def chosen(self, name: str) -> bool:
        return self.only is None or name in self.only

    def total(self, costs: dict) -> float:
        """Estimated seconds of everything that this run draws or has drawn, fits apart."""
        b, size = self.budget, self.world.sampler.batch
        total = sum(c["search"] + c["results"] + c["price"] * size for c in costs.values())  # memory: one batch
        if self.only is None:
            total += sum(c["price"] for c in costs.values()) * size * b.rounds + sum(
                s.cost(self, costs) for s in studies.STUDIES.values()
            )
        return total


def in_columns(run: Run, results: dict, each: int = 2) -> tuple[dict[str, torch.Tensor], list[int]] | None:
    """For a picture: images (K, 1, 28, 28) uint8 of each method, `each` of every class from the same seeds, and their labels;
    real test images first. None where no method's images are there."""
    classes = run.budget.classes
    labels = [c for c in classes for _ in range(each)]
    test = run.world.test
    real = torch.cat([test.pixels[test.labels == c][:each] for c in classes])
    rows = {}
    for name, found in results["results"].items():
        method = run.methods.get(name)
        if method is None or "failed" in found:
            continue
        parts = []
        try:
            for at in run.batches(run.samples(method) * len(classes), 0, classes)[
                : -(-each * len(classes) // run.world.sampler.batch)
            ]:
                unit = run.draw("result", method, found["setting"], *at, images=True)
                parts.append((unit.tensors["labels"], unit.tensors["images"]))
        except (Missing, Differs):
            continue
        every, images = (torch.cat(p) for p in zip(*parts))
        rows[name] = torch.cat([images[every == c][:each] for c in classes])
    return ({"real test images": real, **rows}, labels) if rows else None


def machine(device: torch.device) -> dict:
    return {
        "processor": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "fastdiff": fd.__version__,
        "instruction_set": fd.ops.instruction_set(),
        "threads": torch.get_num_threads(),
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()
