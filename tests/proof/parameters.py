"""Faults in what a launch passes: every field of the recorded parameter bytes is changed in turn, and the cases run until one
sees it.

    PYTHONPATH=tests python -m proof.parameters         writes tests/proof/parameters.json

A field that may hold anything (a random number in each case) without a case seeing it is one that none of these launches reads.
"""

import argparse
import ctypes
import json
import random
import re
import sys
from pathlib import Path

import cuda_args
from proof import draw
from proof.bits import label
from proof.mutate import Trial, keep, trials

RESULT = Path(__file__).with_name("parameters.json")
CHANGES = ("one more", "one less", "sign", "zero", "swapped with the next", "anything")


class StepLaunch(ctypes.Structure):
    _fields_ = [("args", cuda_args.StepArgs), ("inner", ctypes.c_int64), ("token_numel", ctypes.c_int64),
                ("aligned", ctypes.c_uint32)]


def _flat(kind, name, at):
    """(name, offset, bytes) of every number in a ctypes type."""
    if issubclass(kind, ctypes.Structure):
        for field, of, *_ in kind._fields_:
            yield from _flat(of, f"{name}.{field}" if name else field, at + getattr(kind, field).offset)
    elif issubclass(kind, ctypes.Array):
        for i in range(kind._length_):
            yield from _flat(kind._type_, f"{name}[{i}]", at + i * ctypes.sizeof(kind._type_))
    else:
        yield name.removeprefix("args."), at, ctypes.sizeof(kind)


def fields(name, kernel):
    """(name, offset, bytes) of the numbers in a step's parameters."""
    if name == "cuda":
        assert ctypes.sizeof(StepLaunch) == kernel.param_bytes
        return list(_flat(StepLaunch, "", 0))
    return [(f"parameter {n}", at, size) for n, (_, at, size, _) in enumerate(kernel.params)]


def changed(data, found, n, how, rng):
    """The parameter bytes with field n changed, or None where that leaves them as they are."""
    _, at, size = found[n]
    old = int.from_bytes(data[at : at + size], "little")
    new = {"one more": old + 1, "one less": old - 1, "sign": -old, "zero": 0, "anything": rng.getrandbits(8 * size)}.get(how)
    out = bytearray(data)
    if how.startswith("swapped"):
        if n + 1 == len(found) or found[n + 1][2] != size:
            return None
        after = found[n + 1][1]
        out[at : at + size], out[after : after + size] = data[after : after + size], data[at : at + size]
    else:
        out[at : at + size] = (new % 2 ** (8 * size)).to_bytes(size, "little")
    return None if out == data else bytes(out)


def subjects(name, count=None):
    """Trials of one kernel whose launches read every field between them."""
    if name == "triton":
        return trials(name, count=count)
    found = [Trial(draw.full_case(i), (), name, 90) for i in range(count or 24)]
    return [trial for trial in found if label(trial.kernel) == "step<4, everything, 3>"]


# Why a change of a field that is read changes nothing: pattern of "field: change".
REASONS = [
    (r"^aligned: ", "a vector or its elements one by one: the same bytes"),
    (r"_is_64: (one more|sign|one less)$", "a condition: every number but 0 holds"),
]


def survey(name, sample=None, seed=0, count=None):
    """Changes every field, or a sample of them, in every way. What was caught, the fields that are not read, and every survivor."""
    cases, rng = subjects(name, count), random.Random(seed)
    found = fields(name, cases[0].kernel)
    order = list(range(len(cases)))

    def seen(n, how):
        """Does a case notice the change? None where it changes nothing."""
        possible = False
        for i in list(order):
            data = changed(cases[i].launch.params, found, n, how, rng)
            possible |= data is not None
            if data is not None and cases[i].with_parameters(data):
                order.remove(i)
                order.insert(0, i)  # the next field is tried on it first
                return True
        return False if possible else None

    tried, caught, survivors, unread = 0, 0, [], []
    for n in range(len(found)) if sample is None else rng.sample(range(len(found)), sample):
        if not seen(n, "anything"):
            unread.append(found[n][0])
            continue
        outcomes = {"anything": True} | {how: seen(n, how) for how in CHANGES[:-1]}
        tried += sum(o is not None for o in outcomes.values())
        caught += sum(o is True for o in outcomes.values())
        for how in (how for how, o in outcomes.items() if o is False):
            reason = next((why for pattern, why in REASONS if re.search(pattern, f"{found[n][0]}: {how}")), "")
            survivors.append({"field": found[n][0], "change": how, "reason": reason})
    return {"backend": name, "kernel": label(cases[0].kernel), "fields": len(found), "cases": len(cases), "changes": tried,
            "caught": caught, "not read": unread, "survivors": survivors}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backends", nargs="+", default=["cuda", "triton"])
    given = parser.parse_args()
    found = [survey(name) for name in given.backends]
    keep(RESULT, found)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    sys.exit(main())
