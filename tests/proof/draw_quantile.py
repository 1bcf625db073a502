"""Cases of ``quantile_`` for every backend and target: the same case for the same number; three in a row are samples of whole
vectors, of any layout, and of more than one program. ``clamped``: rows outside the table."""

import random
from unittest import mock

import cases
import quantile_cases

WHOLE = (8, 24, 264, 512, 1032)
LONG = (2056, 4104, 2049, 4097)  # a program takes 2048 elements


def case(i, clamped=False):
    rng, sizes, options = random.Random(f"quantile_ {i}"), quantile_cases.SIZES, dict(max_numel=700, max_batch=3)
    if i % 3 == 0:
        sizes, options["layouts"] = WHOLE, ("contiguous",)
    if i % 3 == 2:
        sizes, options = LONG, dict(max_numel=5000, max_batch=2)
    with mock.patch.multiple(quantile_cases, SIZES=sizes), mock.patch.object(
            quantile_cases, "_shape", cases._shape if i % 3 == 1 else lambda c, options: (c.pick(sizes),)):
        while True:
            drawn = quantile_cases.random_quantile_case(rng, empty=False, **options)
            if len(drawn.arguments["inputs"]) <= 3 and (not clamped or drawn.arguments["row"] is not None):
                break
    if clamped:
        drawn.arguments["row"] += rng.choice([-7, 100])
    return drawn


def dtype_of(drawn):
    """As proof.draw names it: that of the inputs, or "mixed"."""
    names = {cases.NAMES[t.dtype] for t in drawn.arguments["inputs"]}
    return names.pop() if len(names) == 1 else "mixed"
