"""What was published, and where; what was not, and what is taken in its place.

A rule gives an option its value for the data, the format of the checkpoint and the method that it names; the last rule that
fits holds. Every option is one of the command line's too.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass

__all__ = ["DATA", "GUIDANCE", "METHODS", "OPTIONS", "RULES", "SIZES", "STEERING", "Given", "Rule", "flag", "settings", "shown",
           "table"]

DATA = {
    "cifar10": "CIFAR-10, 32 x 32, ten classes",
    "imagenet": "ImageNet, 256 x 256 (EDM: 64 x 64); classes 111, 222, 333, 444 of the paper are n01930112 (nematode), n02104029 "
                "(kuvasz), n02342885 (hamster), n02835271 (tandem)",
    "celebahq": "CelebA-HQ, 256 x 256, two attributes at once: gender with hair or with age",
}
SIZES = {"cifar10": 32, "imagenet": 256, "celebahq": 256}

STEERING = ("none", "latent", "na", "rfm", "na-rfm")
GUIDANCE = ("cg", "dps", "lgd", "freedom", "mpgd", "ugd", "tfg")
METHODS = (*STEERING, *GUIDANCE)

PAPER = "Wang, Belkin, Wang, arXiv:2602.11395"
NOTES = "the first author's notes with EDM (isotrivial/diffusion-steering-preclass-notes)"
TFG = "TFG (YWolfeee/Training-Free-Guidance, scripts)"
EDM = "NVlabs/edm, README"
OURS = "not published"
ABSENT = "absent"  # the value of an option that does not apply


def pair(of: Callable):
    """A parser of two numbers, as 5.3,inf."""

    def parse(text: str):
        try:
            low, high = (of(part) for part in text.split(","))
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r}: two numbers with a comma between are taken") from None
        return low, high

    return parse


def switch(text: str) -> bool:
    if text not in ("yes", "no"):
        raise argparse.ArgumentTypeError(f"{text!r}: yes or no is taken")
    return text == "yes"


OPTIONS: dict[str, tuple[Callable, str]] = {
    "sampler": (str, "its name, as for fd.plan"),
    "steps": (int, "of the sampler"),
    "eta": (float, "share of the noise that DDIM draws anew"),
    "s_churn": (float, "of heun: how much noise is added before a step, in all"),
    "s_tmin": (float, "of heun: the lowest sigma at which it is"),
    "s_tmax": (float, "of heun: the highest"),
    "s_noise": (float, "of heun: what it is multiplied by"),
    "clip": (switch, "yes or no: whether the estimate of x0 is kept in [-1, 1]"),
    "weight": (float, "w of noise alignment, or of the latent vector"),
    "window": (pair(float), "LOW,HIGH: the sigmas in which noise alignment, or the latent vector, acts"),
    "window_steps": (pair(int), "FIRST,LAST: the same in steps of the sampler, with all their stages"),
    "rank": (int, "directions of each Gaussian; none: all whose gain at the window's lowest sigma is above 1 %%"),
    "limit": (int, "images of the full data that its Gaussian is fitted to, evenly drawn; none: all"),
    "direction": (str, "rfm, mean_difference or covariance_aware"),
    "iterations": (int, "of RFM"),
    "block": (str, "whose activations are edited, a name of the network's modules; none: the last of the encoder"),
    "learnt_at": (float, "sigma at which the direction is learnt"),
    "concept_images": (int, "that it is learnt from, half of them of the target"),
    "concept_weight": (float, "w of h += w |h| v"),
    "concept_scale": (float, "s of eps0 + s (eps1 - eps0)"),
    "concept_window": (pair(float), "LOW,HIGH: the sigmas in which it acts"),
    "strength": (float, "of the gradient"),
    "rho": (float, "TFG: of the gradient through the network"),
    "mu": (float, "TFG: of the gradient at the estimate"),
    "sigma_bar": (float, "TFG: spread around the estimate"),
    "n_iter": (int, "TFG, UGD: steps at the estimate"),
    "n_mc": (int, "TFG, LGD: samples around the estimate"),
    "recurrences": (int, "FreeDoM, UGD, TFG: how often each step is taken"),
    "batch_size": (int, "samples in one call of the network"),
}


@dataclass(frozen=True)
class Given:
    """An option's value, and where it is from."""

    value: object
    source: str


@dataclass(frozen=True)
class Rule:
    """data, format: a name, or none for all; methods: that take the option."""

    option: str
    value: object
    source: str
    methods: tuple[str, ...]
    data: str | None = None
    format: str | None = None

    def fits(self, data: str, format: str, method: str) -> bool:
        return method in self.methods and self.data in (None, data) and self.format in (None, format)


ALIGNED, CONCEPTS = ("na", "na-rfm"), ("rfm", "na-rfm")
WINDOWED = (*ALIGNED, "latent")
SCALED = ("cg", "dps", "lgd", "freedom", "mpgd", "ugd")

RULES = (
    Rule("sampler", "ddim", PAPER, STEERING),
    Rule("steps", 100, PAPER, STEERING),
    Rule("eta", 0.0, PAPER, STEERING),
    Rule("clip", True, f"{OURS}: as in TFG, whose benchmark the paper runs", STEERING),
    Rule("sampler", "heun", EDM, STEERING, format="edm"),
    Rule("eta", ABSENT, EDM, STEERING, format="edm"),
    Rule("clip", False, EDM, STEERING, format="edm"),
    Rule("steps", 18, NOTES, STEERING, "cifar10", "edm"),
    Rule("steps", 256, EDM, STEERING, "imagenet", "edm"),
    Rule("s_churn", 40.0, EDM, STEERING, "imagenet", "edm"),
    Rule("s_tmin", 0.05, EDM, STEERING, "imagenet", "edm"),
    Rule("s_tmax", 50.0, EDM, STEERING, "imagenet", "edm"),
    Rule("s_noise", 1.003, EDM, STEERING, "imagenet", "edm"),
    Rule("steps", 40, f"{OURS}: EDM's for FFHQ, its network of faces", STEERING, "celebahq", "edm"),
    Rule("weight", 3.0, f"{OURS}: that of CIFAR-10 with EDM's network", ALIGNED),
    Rule("weight", 3.0, NOTES, ALIGNED, "cifar10", "edm"),
    Rule("weight", 1.0, "not of the paper: the whole difference of the means", ("latent",)),
    Rule("window", (5.3, float("inf")), f"{OURS}: the sigmas of CIFAR-10 with EDM's network", WINDOWED),
    Rule("window", ABSENT, NOTES, WINDOWED, "cifar10", "edm"),
    Rule("window_steps", (0, 7), NOTES, WINDOWED, "cifar10", "edm"),
    Rule("rank", 256, OURS, ALIGNED),
    Rule("rank", None, f"{NOTES}: all 3072; what hardly acts is left out", ALIGNED, "cifar10"),
    Rule("limit", 10_000, OURS, WINDOWED),
    Rule("limit", None, f"{NOTES}: all 50,000", WINDOWED, "cifar10"),
    Rule("direction", "rfm", PAPER, CONCEPTS),
    Rule("iterations", 5, PAPER, CONCEPTS),
    Rule("block", None, f"{PAPER}: the last before the bottleneck", CONCEPTS),
    Rule("block", "input_blocks.9", f"{PAPER}: encoder block 9, 8 x 8, in our counting", CONCEPTS, "cifar10", "openai"),
    Rule("learnt_at", 0.1, f"{OURS}: \"low noise\"", CONCEPTS),
    Rule("concept_images", 2000, OURS, CONCEPTS),
    Rule("concept_weight", 0.2, f"{OURS}: ours on Fashion-MNIST", CONCEPTS),
    Rule("concept_scale", 1.5, f"{OURS}: ours on Fashion-MNIST", CONCEPTS),
    Rule("concept_window", (0.6, 2.0), f"{OURS}: where the paper found directions stable", CONCEPTS),
    Rule("sampler", "ddim", TFG, GUIDANCE),
    Rule("steps", 100, TFG, GUIDANCE),
    Rule("steps", 50, TFG, GUIDANCE, "cifar10"),
    Rule("eta", 1.0, TFG, GUIDANCE),
    Rule("clip", True, TFG, GUIDANCE),
    Rule("strength", 1.0, "TFG's default; it searches for each task", SCALED),
    Rule("n_mc", 10, "fd.guidance.lgd's own", ("lgd",)),
    Rule("n_iter", 3, f"{TFG}: iter_steps - 1", ("ugd",)),
    *(Rule(option, value, TFG, ("tfg",), data)
      for data, values in {"cifar10": (1.0, 0.25, 0.001), "imagenet": (2.0, 0.5, 0.1), "celebahq": (0.5, 8.0, 1.0)}.items()
      for option, value in zip(("rho", "mu", "sigma_bar"), values)),
    Rule("n_iter", 4, TFG, ("tfg",)),
    Rule("n_mc", 1, TFG, ("tfg",)),
    Rule("recurrences", 1, TFG, ("freedom", "ugd", "tfg")),
    Rule("batch_size", 4, f"{PAPER}: of its timings", METHODS),
    Rule("batch_size", 16, f"{PAPER}: of its timings", METHODS, "cifar10"),
)


def settings(data: str, format: str, method: str, own: dict | None = None) -> dict[str, Given]:
    """The options of a method by name. own: those that were given, in place of the rules'.

    Raises ``ValueError`` for an option that the method does not take.
    """
    found = {rule.option: Given(rule.value, rule.source) for rule in RULES if rule.fits(data, format, method)}
    own = dict(own or {})
    if "window" in own and "window_steps" in own:
        raise ValueError("--window and --window-steps were given: one of them is taken")
    of_sampler = {"s_churn", "s_tmin", "s_tmax", "s_noise", "eta"}
    taken = {*found, *of_sampler, *({"window", "window_steps"} if method in WINDOWED else ())}
    for option, value in own.items():
        if option not in taken:
            raise ValueError(f"{flag(option)} is not of {method}, which takes {', '.join(flag(name) for name in sorted(taken))}")
        found[option] = Given(value, "given")
    if "window" in own or "window_steps" in own:
        found.pop("window_steps" if "window" in own else "window", None)
    if "sampler" in own:  # the options of another one do not fit
        found = {name: given for name, given in found.items() if name not in of_sampler or name in own}
    return {name: found[name] for name in OPTIONS if name in found and found[name].value != ABSENT}


# ---- as a table


def table() -> str:
    """Markdown: a row for each rule."""
    rows = [("option", "value", "data", "format", "methods", "source")]
    rows += [(f"`{flag(r.option)}`", shown(r.value), r.data or "all", r.format or "all", _methods(r.methods), r.source)
             for r in RULES if r.value != ABSENT]
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def flag(option: str) -> str:
    return f"--{option.replace('_', '-')}"


def shown(value) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ",".join(f"{v:g}" for v in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _methods(methods) -> str:
    return {STEERING: "none and steering", GUIDANCE: "guidance", METHODS: "all"}.get(methods, ", ".join(methods))
