"""An op in C++ on a case, against the case's expected result, bit by bit."""

from cases import assert_same


def run(ops, case, flush=None):
    expected = case.expected()  # before the mode changes: NumPy would flush too
    if flush is not None:
        flush(True)
    try:
        case.run(ops)
    finally:
        if flush is not None:
            flush(False)
    assert_same(case, expected)
    return case.arguments["out"]
