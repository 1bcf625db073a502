"""Writes torch_func_random_2_14_1.json: what torch's own stateless generator draws, as an oracle not written here.

    python tests/data/make_torch_vectors.py            needs torch 2.14 (earlier versions import the API and raise)

``keys``: fold_in and split of (seed, offset) keys. ``words``: eight raw uint32 of each key, from ``fold_in`` (whose
result is one Philox block read as two uint64); ``triton`` holds the words of ``tl.randint4x``, computed by Triton's
interpreter. ``normals``: torch's map of a key to float32 normals, whose last bits come from a libm, as hex strings of
the float32 bits; ``batched`` the same from keys of shape (B, 1, 1, 2). All 64-bit values are decimal strings in uint64.
"""

import json
import os
import sys
from pathlib import Path

import torch
import torch.func._random as random

OUT = Path(__file__).with_name("torch_func_random_2_14_1.json")
TOP = 2**64

SEEDS = (0, 1, 42, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**63 - 1, 2**63, TOP - 1, 0x0123456789ABCDEF, 0xFEDCBA9876543210)
OFFSETS = (0, 1, 3, 2**32 - 2, 2**32 - 1, 2**32, 2**63 - 1, 2**63, TOP - 2, TOP - 1)
DATA = (0, 1, 2, 1000, 2**32 - 1, 2**32, 2**63 - 1, 2**63, TOP - 1)


def key_of(*pairs):
    return torch.tensor(pairs if len(pairs) > 1 else pairs[0], dtype=torch.uint64)


def text(values):
    return [str(v % TOP) for v in values.flatten().tolist()]


def bits(values):
    return [f"{v & 0xFFFFFFFF:08x}" for v in values.contiguous().view(torch.int32).flatten().tolist()]


def words_by_fold_in(pair, blocks):
    out = []
    for i in range(blocks):
        out += [half for v in random.fold_in(key_of(pair), i).tolist() for half in (v & 0xFFFFFFFF, v >> 32)]
    return out


def words_by_triton(pairs):
    """``tl.randint4x(seed, offset)`` of each pair, on the CPU."""
    os.environ["TRITON_INTERPRET"] = "1"
    import triton
    import triton.language as tl

    @triton.jit
    def kernel(seed, offsets, out, BLOCK: tl.constexpr):
        at = tl.arange(0, BLOCK)
        r0, r1, r2, r3 = tl.randint4x(tl.load(seed), tl.load(offsets + at))
        tl.store(out + at * 4, r0)
        tl.store(out + at * 4 + 1, r1)
        tl.store(out + at * 4 + 2, r2)
        tl.store(out + at * 4 + 3, r3)

    rows = []
    for seed, offset in pairs:
        signed = [v - TOP if v >= TOP // 2 else v for v in (seed, *((offset + i) % TOP for i in range(2)))]
        out = torch.zeros(8, dtype=torch.int32)
        kernel[(1,)](torch.tensor(signed[:1]), torch.tensor(signed[1:]), out, BLOCK=2)
        rows.append([v & 0xFFFFFFFF for v in out.tolist()])
    return rows


def main():
    pairs = [(s, o) for s in SEEDS for o in (OFFSETS if s in (0, 42, TOP - 1) else OFFSETS[::3])]
    keys = [{"key": [str(v) for v in pair], "data": str(i), "fold_in": text(random.fold_in(key_of(pair), i))}
            for pair in pairs for i in (DATA if pair[1] in (0, TOP - 1) else DATA[:2])]
    splits = [{"key": [str(v) for v in pair], "split": [text(k) for k in random.split(key_of(pair), 5)]} for pair in pairs[::4]]
    words = [{"key": [str(v) for v in pair], "words": words_by_fold_in(pair, 2)} for pair in pairs]
    triton = [{"key": [str(v) for v in pair], "words": row} for pair, row in zip(pairs, words_by_triton(pairs))]
    normals = [{"key": [str(v) for v in pair], "normals": bits(random.normal(key_of(pair), 19))} for pair in pairs]
    many = [pairs[i] for i in (0, 7, 13, 29)]
    batch = key_of(*many)
    batched = {"keys": [[str(v) for v in pair] for pair in many], "shape": [4, 3, 7],
               "normals": bits(random.normal(batch.reshape(4, 1, 1, 2), (4, 3, 7))),
               "fold_in": {str(i): [text(k) for k in random.fold_in(batch, i)] for i in (0, 5, TOP - 1)},
               "split": [[text(k) for k in part] for part in random.split(batch, 3)]}
    content = {"torch": torch.__version__.split("+")[0], "keys": keys, "splits": splits, "words": words, "triton": triton,
               "normals": normals, "batched": batched}
    parts = []
    for name, value in content.items():
        rows = isinstance(value, list)
        body = "[\n" + ",\n".join("  " + json.dumps(row) for row in value) + "\n ]" if rows else json.dumps(value)
        parts.append(f" {json.dumps(name)}: {body}")
    OUT.write_text("{\n" + ",\n".join(parts) + "\n}\n")
    print(f"{OUT.name}: {len(keys)} fold_in, {len(words)} streams, {OUT.stat().st_size} bytes", file=sys.stderr)


if __name__ == "__main__":
    main()
