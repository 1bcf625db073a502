"""docs/steering.md's section between two markers, from `benchmarks/results/steering.json` alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from benchmarks.steering.methods import CLEAN, ENCODED, GRADIENT_FREE, METHODS, NOISY
from benchmarks.steering.search import MARGIN
from fastdiff.files import written

__all__ = ["BEGIN", "END", "best_gradient_free", "render", "targets", "write_section"]

BEGIN, END = "<!-- comparison: written by python -m benchmarks.steering -->", "<!-- end of comparison -->"
TITLE = "# Steering\n"


def write_section(path: Path, text: str) -> None:
    """Puts the text between the markers; adds them at the end of a file that has none."""
    whole = path.read_text() if path.is_file() else TITLE
    if BEGIN in whole:
        before, _, rest = whole.partition(BEGIN)
        _, found, after = rest.partition(END)
        if not found:
            raise ValueError(f"{path} holds {BEGIN!r} without {END!r}")
    else:
        before, after = whole.rstrip() + "\n\n", "\n"
    with written(path) as temporary:
        temporary.write_text(f"{before}{BEGIN}\n\n{text.strip()}\n\n{END}{after}")


def number(value, digits=2) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def with_interval(entry: dict, name: str, digits: int) -> str:
    half = (entry.get("interval") or {}).get(name)
    return number(entry[name], digits) + (f" ± {half:.{digits}f}" if half is not None and entry[name] is not None else "")


def setting_text(setting: dict) -> str:
    def one(name, value):
        return f"{name} {value:g}" if isinstance(value, (int, float)) else f"{name} {value}"

    return ", ".join(one(n, v) for n, v in setting.items()) or "–"


def passes(counts: dict, name: str) -> str:
    """forwards / backwards."""
    forward, backward = counts.get(name, 0.0), counts.get(f"{name} backward", 0.0)
    return f"{forward:.0f} / {backward:.0f}" if forward or backward else "0"


def seconds(results: dict, name: str) -> float | None:
    timing = results.get("timing")
    return timing["seconds_per_image"].get(name) if timing else results["results"].get(name, {}).get("seconds_per_image")


def family(results: dict, *families: str) -> list[str]:
    return [n for n, r in results["results"].items() if "failed" not in r and n in METHODS and METHODS[n].family in families]


NAMES = {"frechet": "Frechet", "pooled": "Frechet, pooled"}


def measure(results: dict) -> str:
    """The Frechet distance, or, with few samples a class, the pooled one."""
    entries = [results["real"], *(r for r in results["results"].values() if "failed" not in r)]
    return "pooled" if any(e["frechet"] is None for e in entries) else "frechet"


def best_gradient_free(results: dict) -> str | None:
    """Of the gradient-free methods within the margin of real images' accuracy (else of the best of them), the one with the
    smallest distance: the criterion of the search, applied to the results."""
    names, what = family(results, GRADIENT_FREE), measure(results)
    if not names:
        return None
    found = results["results"]
    bar = min(max(found[n]["accuracy"] for n in names), results["real"]["accuracy"]) - MARGIN
    return min((n for n in names if found[n]["accuracy"] >= bar), key=lambda n: found[n][what])


def targets(results: dict) -> list[dict]:
    """What the best gradient-free method was to reach: {"what", "target", "found", "reached"}."""
    ours = best_gradient_free(results)
    if ours is None:
        return []
    entry, real, what, found = results["results"][ours], results["real"], measure(results), results["results"]
    rows = [
        (
            "accuracy",
            f"at least {real['accuracy'] - MARGIN:.3f}, real images' less {MARGIN}",
            entry["accuracy"],
            entry["accuracy"] >= real["accuracy"] - MARGIN,
        ),
        ("diversity", "at least 0.7", entry["diversity"], entry["diversity"] >= 0.7),
    ]
    if clean := family(results, CLEAN):
        best = min(clean, key=lambda n: found[n][what])
        limit = found[best][what] / 3
        rows.append(
            (
                "Frechet distance",
                f"at most {limit:.2f}, a third of {best}'s, the lowest of the clean-classifier methods",
                entry[what],
                entry[what] <= limit,
            )
        )
    if "classifier guidance" in found and "failed" not in found["classifier guidance"]:
        limit = found["classifier guidance"][what]
        rows.append(("Frechet distance", f"at most {limit:.2f}, classifier guidance's", entry[what], entry[what] <= limit))
    for other, share in (("DPS", 0.5), ("TFG-1", 0.35), ("TFG-4", 0.1), ("classifier guidance", 0.85)):
        if (theirs := seconds(results, other)) and (mine := seconds(results, ours)):
            rows.append((f"time over {other}'s", f"at most {share}", mine / theirs, mine / theirs <= share))
    above = above_the_curve(results)
    rows.append(("gradient methods above its curve", "none", ", ".join(above) or "none", not above))
    return [dict(zip(("what", "target", "found", "reached"), row)) for row in rows]


def front(trials: list[dict], cost: Callable[[dict], float]) -> list[dict]:
    """Trials that no other beats in accuracy and cost both, less of which is better. From the most accurate on."""
    found, best = [], float("inf")
    for t in sorted((t for t in trials if t.get("pooled") is not None), key=lambda t: (-t["accuracy"], cost(t))):
        if cost(t) < best:
            best = cost(t)
            found.append(t)
    return found


def distance(trial: dict) -> float:
    return trial["pooled"]


def narrowness(trial: dict) -> float:
    """Diversity above that of real images is no merit: it is distortion, or other classes."""
    return -min(trial["diversity"], 1.0)


def above_the_curve(results: dict) -> list[str]:
    """Methods that differentiate with a trial that is more accurate and closer to the real images than every trial of the
    gradient-free ones that is as accurate."""
    own = [
        t
        for n, s in results["search"].items()
        if METHODS[n].family == GRADIENT_FREE
        for t in s["trials"]
        if t.get("pooled") is not None
    ]
    found = []
    for name, searched in results["search"].items():
        if METHODS[name].family not in (CLEAN, ENCODED, NOISY):
            continue
        for t in front(searched["trials"], distance):
            if not any(o["accuracy"] >= t["accuracy"] and o["pooled"] <= t["pooled"] for o in own):
                found.append(name)
                break
    return found


# ---- the section


def render(results: dict, pictures: dict[str, str]) -> str:
    """pictures: {"methods" | "curves" | "studies": path relative to the document}."""
    parts = [
        _introduction(results),
        _table(results, pictures),
        _targets(results),
        _search(results, pictures),
        _offline(results),
        _studies(results, pictures),
    ]
    return "\n\n".join(p for p in parts if p)


def _introduction(results: dict) -> str:
    c, b, m, s = results["context"], results["budget"], results["machine"], results["context"]["sampler"]
    state = "" if results["complete"] else "**Not complete yet: the run goes on with `python -m benchmarks.steering`.**\n\n"
    missing = "".join(f"\n\n{name} is missing: {reason}." for name, reason in results["not_available"].items())
    return f"""## The comparison

{state}The zoo's unconditional Fashion-MNIST network, steered to {len(b["classes"])} classes
({", ".join(b["classes"])}). Every method draws with the same sampler ({s["name"]}, which is DDIM with eta 0;
{s["steps"]} steps, sigma {s["sigma_max"]:g} to {s["sigma_min"]:g}, batches of {s["batch"]}) from the same seeds:
{b["samples"]} samples of each class, {b["samples_recurrent"]} for methods that take each step four times. A classifier that guides
nobody judges them, and its features carry the distances; they refer to test images that are not in the row of real images
({results["real"]["count"]} of them). Network sha256 {c["unet"][:12]}, {m["processor"]}, {m["threads"]} threads,
torch {m["torch"]}.{missing}"""


def table_row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def figures(entry: dict, what: str) -> list[str]:
    return [with_interval(entry, "accuracy", 3), with_interval(entry, what, 2), with_interval(entry, "diversity", 2)]


def _table(results: dict, pictures: dict) -> str:
    what, real, ours = measure(results), results["real"], best_gradient_free(results)
    lines = [
        table_row(
            "method", "accuracy", NAMES[what], "diversity", "s / image", "U-Net encoder", "decoder", "classifier", "peak MB"
        ),
        "|---" * 9 + "|",
        table_row("real test images", *figures(real, what), *"–––––"),
    ]
    for name, entry in results["results"].items():
        if "failed" in entry:
            lines.append(table_row(name, f"failed: {entry['failed']}", *[""] * 7))
            continue
        memory = results["memory"].get(name)
        counted = [passes(entry["counts"], part) for part in ("encoder", "decoder", "classifier")]
        shown = f"**{name}**" if name == ours else name
        peak = number(None if memory is None else memory / 1e6, 0)
        lines.append(table_row(shown, *figures(entry, what), number(seconds(results, name), 3), *counted, peak))
    timing = results.get("timing")
    how = "medians over batches, not interleaved yet"
    if timing:
        how = f"medians of {timing['rounds']} interleaved rounds of {timing['batch']} images of one class"
    batch = results["context"]["sampler"]["batch"]
    lines += [
        "",
        f"± : 95 % by bootstrap. Passes of an image: forwards / backwards. Seconds: {how}. Peak: tensors of one batch of {batch} "
        "beyond the networks, as torch records them. Bold: the best gradient-free method, by the criterion below.",
    ]
    if "methods" in pictures:
        lines += ["", f"![one row a method, the same seeds in the columns]({pictures['methods']})"]
    return "\n".join(lines + _hardest(results, what))


def _hardest(results: dict, what: str) -> list[str]:
    real = results["real"]
    hardest = min(real["per_class"], key=lambda c: real["per_class"][c]["accuracy"])
    lines = [
        "",
        f"The class that is hardest to judge, {hardest}:",
        "",
        table_row("method", "accuracy", NAMES[what]),
        "|---" * 3 + "|",
    ]
    for name, entry in [("real test images", real), *results["results"].items()]:
        if "failed" not in entry:
            one = entry["per_class"][hardest]
            lines.append(table_row(name, number(one["accuracy"], 3), number(one.get(what), 2)))
    return lines


def _targets(results: dict) -> str:
    rows = targets(results)
    if not rows:
        return ""
    ours = best_gradient_free(results)

    def shown(value):
        return value if isinstance(value, str) else f"{value:.3f}"

    lines = [f"What {ours}, the best gradient-free method, was to reach:", "", "| | target | found | |", "|---|---|---|---|"]
    lines += [
        f"| {r['what']} | {r['target']} | {shown(r['found'])} | {'reached' if r['reached'] else '**missed**'} |" for r in rows
    ]
    return "\n".join(lines)


def _search(results: dict, pictures: dict) -> str:
    b, c = results["budget"], results["criterion"]
    each = b["search_samples"] // len(b["classes"])
    text = f"""### How settings were found

Every method was searched with {b["settings"]} settings, at most {b["extra"]} more where the best lay at the end of its grid, of
{b["search_samples"]} samples each, on other seeds than the results' and judged against training images. Half of the settings fill
the method's space evenly, the rest are neighbours of the best so far; windows are part of every search. Fixed before any
result was looked at: of the settings whose accuracy is within {100 * c["margin"]:.0f} points of the method's best (accuracy above that
of real images, {c["real_accuracy"]:.3f}, does not count), the one with the smallest distance is taken. That distance pools the
covariances of the classes: with {each} samples a class the plain Frechet distance prefers collapsed samples. All trials are in
`benchmarks/results/steering.json`.
"""
    lines = [text, "| method | setting | trials | inside its grid |", "|---|---|---|---|"]
    for name, found in results["search"].items():
        if found["trials"]:
            setting = "none worked" if found["best"] is None else setting_text(found["best"])
            lines.append(table_row(name, setting, str(len(found["trials"])), "yes" if found["inside"] else "no"))
    if "curves" in pictures:
        lines += ["", f"![accuracy over distance and over diversity, all trials]({pictures['curves']})"]
    return "\n".join(lines)


def _offline(results: dict) -> str:
    """What the fits cost, and after how many samples they have paid."""
    if not results["fits"]:
        return ""
    ours = best_gradient_free(results)
    lines = ["### What it costs before the first sample", "", "| fitted once, for all classes | s |", "|---|---|"]
    lines += [f"| {name} | {taken:.1f} |" for name, taken in results["fits"].items()]
    if ours and (mine := seconds(results, ours)):
        cost = sum(results["fits"].get(n, 0.0) for n in results["uses"].get(ours, []))
        pays = []
        for other in ("classifier guidance", "DPS", "TFG-1", "TFG-4"):
            if theirs := seconds(results, other):
                pays.append(f"{other}: {cost / (theirs - mine):.0f} samples" if theirs > mine else f"{other}: never")
        lines += [
            "",
            f"{ours} needs {cost:.0f} s of fits. They are saved again after: {'; '.join(pays)}. The classifiers of the others were "
            "trained before, which is not counted.",
        ]
    return "\n".join(lines)


def _studies(results: dict, pictures: dict) -> str:
    from benchmarks.steering import studies

    parts = [studies.STUDIES[name].render(found) for name, found in results["studies"].items()]
    if parts and "studies" in pictures:
        parts.insert(0, f"![accuracy by level learnt and injected, cosines, accuracy by block]({pictures['studies']})")
    return "\n\n".join(parts)
