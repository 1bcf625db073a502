"""Vectors for people who write the map from words to normals elsewhere: words and bits of what they give."""

import numpy as np

from .. import reference
from .inputs import EDGES, Draw

__all__ = ["normal_vectors"]

# First words of a pair, which make the radius: both ends of u, the border of rounding to u = 1, and each binade.
_RADIUS = [0, 1, 2, 3, 0x7FFFFFFF, 0x80000000, 0x80000001, 0xFFFFFF7F, 0xFFFFFF80, 0xFFFFFFFE, 0xFFFFFFFF, 0xB504F333, 0xB504F334,
           *(1 << k for k in range(2, 32, 3))]
# Second words, which make the angle: the quadrants' borders (multiples of a quarter), where sine and cosine swap (odd eighths).
_ANGLE = sorted({(k * 2**29 + d) % 2**32 for k in range(8) for d in (-128, -1, 0, 1, 128)})


def _hex(values) -> list[str]:
    return [f"0x{v:08x}" for v in np.ascontiguousarray(values).view(np.uint32).tolist()]


def normal_vectors() -> dict:
    """"pairs": [w0, w1, z0, z1] in bits, edge words first, then words at random; "keys": [seed, offset, 6 words, 6 normals]."""
    radius, angle = np.array(_RADIUS, np.uint32), np.array(_ANGLE, np.uint32)
    edges = [(w0, w1) for w0 in radius for w1 in angle[::5]] + [(np.uint32(0x40000000), w1) for w1 in angle]
    random = Draw("normals.json").words(512).reshape(-1, 2)
    pairs = np.concatenate([np.array(edges, np.uint32), random])
    blocks = np.pad(pairs, ((0, len(pairs) % 2), (0, 0)))  # box_muller takes whole Philox blocks
    normals = reference.box_muller(blocks.reshape(-1)).reshape(-1, 2)[: len(pairs)]
    keys = [(a, b) for a in EDGES[::3] for b in EDGES]
    words = reference.raw_words(np.array(keys, np.int64), 0, 6)
    values = reference.normal(np.array(keys, np.int64), 6)
    return {
        "columns": {"pairs": ["w0", "w1", "z0", "z1"], "keys": ["seed", "offset", "6 words", "6 normals"]},
        "pairs": [[*_hex(w), *_hex(z)] for w, z in zip(pairs, normals)],
        "keys": [[str(a % 2**64), str(b % 2**64), _hex(w), _hex(z)] for (a, b), w, z in zip(keys, words, values)],
    }
