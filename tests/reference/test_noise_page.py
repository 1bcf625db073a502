"""docs/noise.md says enough: the normals written down once more from the page, with the coefficients of its table, give the golden
vectors."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from fastdiff.reference import fma

ROOT = Path(__file__).parents[2]
PAGE, VECTORS = ROOT / "docs" / "noise.md", ROOT / "tests" / "golden" / "normals.json"
F, U = np.float32, np.uint32


def bits(f):
    return f.view(U)


def value(i):
    return i.view(F)


def box_muller(w0, w1, L, R, S, C):
    b = bits(w0.astype(F) + F(0.5))
    k = value((b >> U(23)) + U(0x4B000000)) - F(8388766)
    x = value((b & U(0x007FFFFF)) | U(0x3F000000)) - F(1)
    q = np.full_like(x, L[6])
    for c in L[5::-1]:
        q = fma(q, x, c)
    v = fma(k, F(-1.3862943611198906), x * q)

    a = w1.astype(F)
    h = fma(a, F(2.0**-30), F(25165824))
    t = fma(a, F(2.0**-30), F(25165824) - h)

    y = value(((U(0xBE620000) - bits(v)) >> U(1)) | (bits(h) << U(31)))
    g = v * y
    e = fma(-g, y, F(1))
    p = fma(fma(fma(R[3], e, R[2]), e, R[1]), e, R[0])
    r = fma(g * e, p, g)

    w = t * t
    s = fma(t, fma(fma(fma(S[3], w, S[2]), w, S[1]), w, S[0]), t)
    c = fma(fma(fma(C[3], w, C[2]), w, C[1]), w, C[0])
    return fma(-(r * s), s, r), fma(r * s, c, r * s)


def test_the_page_gives_the_golden_vectors():
    if not PAGE.is_file():
        pytest.skip("docs/noise.md is not here: an installed package is tested")
    rows = re.findall(r"^\| ([LRSC]) \|(.*)\|$", PAGE.read_text(), re.M)
    table = {name: [F(cell) for cell in cells.split("|") if cell.strip()] for name, cells in rows}
    assert {name: len(row) for name, row in table.items()} == {"L": 7, "R": 4, "S": 4, "C": 4}
    pairs = json.loads(VECTORS.read_text())["content"]["pairs"]
    words = np.array([[int(word, 16) for word in row] for row in pairs], U)
    assert len(words) > 300
    with np.errstate(over="ignore"):
        cosine, sine = box_muller(words[:, 0].copy(), words[:, 1].copy(), **table)
    assert (bits(cosine) == words[:, 2]).all() and (bits(sine) == words[:, 3]).all()
