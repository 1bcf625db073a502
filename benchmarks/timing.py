"""Times as ratios: all sides in one process, interleaved, medians."""

import statistics
import time

__all__ = ["interleaved"]


def interleaved(functions, *, seconds=2.0, least=7, warmup=2):
    """Median seconds of one call of each function, called in turn until ``seconds`` have passed for all together.

    functions: mapping of name to a function without arguments. Returns {name: (median, first quartile, third quartile)}.
    """
    for f in functions.values():
        for _ in range(warmup):
            f()
    taken = {name: [] for name in functions}
    start = time.perf_counter()
    while time.perf_counter() - start < seconds or len(next(iter(taken.values()))) < least:
        for name, f in functions.items():
            before = time.perf_counter()
            f()
            taken[name].append(time.perf_counter() - before)
    return {name: (statistics.median(t), *statistics.quantiles(t, n=4)[::2]) for name, t in taken.items()}
