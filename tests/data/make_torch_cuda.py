"""Writes torch_cuda_NAME.json: what torch.randn and x.random_() draw on the GPU that is here, for tests/test_torch_cuda.py.

    python tests/data/make_torch_cuda.py NAME            needs a GPU

Draws follow each other in one generator for each seed. ``randn``: some elements, as hexadecimal floats. ``words``: SHA-256 of
x.random_() of int32, which is the generator's 32-bit words modulo 2^31. ``offset``: before and after. largest_difference: of all
elements of all draws, from ``TorchCudaGenerator``.
"""

import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import torch

from fastdiff.torch_cuda import TorchCudaGenerator

SEEDS = (0, 1234, 2**63 - 1)
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def generators(seed, card):
    return torch.Generator("cuda").manual_seed(seed), TorchCudaGenerator(seed, **card)


def recorded(values, most, rng):
    """Elements at the ends, where the threads begin again, and anywhere."""
    n = len(values)
    places = {0, 1, n // 2, n - 1, *(k * most - end for k in (1, 2, 3, 4) for end in (0, 1)), *rng.integers(0, n, 5).tolist()}
    index = sorted(place for place in places if place < n)
    return {"index": index, "values": [float(v).hex() for v in values[index].double()]}


def main():
    about = torch.cuda.get_device_properties(0)
    card = {"sms": about.multi_processor_count, "threads_per_sm": about.max_threads_per_multi_processor}
    most = 256 * card["sms"] * (card["threads_per_sm"] // 256)
    numels = (1, 3, 1000, 40960, 65536, 262144, most, most + 1, 1 << 20, 3_000_001)
    cases, rng, worst = [], np.random.default_rng(0), {}
    for seed in SEEDS:
        for dtype in DTYPES:
            theirs, ours = generators(seed, card)
            for n in numels:
                offset = theirs.get_offset()
                drawn = torch.randn(n, generator=theirs, device="cuda", dtype=dtype).cpu()
                name = str(dtype).removeprefix("torch.")
                worst[name] = max(worst.get(name, 0.0), float((drawn.double() - ours.randn(n, dtype=dtype).double()).abs().max()))
                if seed == 1234 or (dtype == torch.float32 and n > most):
                    cases.append({"what": "randn", "seed": seed, "dtype": name, "numel": n, "offset": offset,
                                  "offset_after": theirs.get_offset(), **recorded(drawn, most, rng)})
        theirs, _ = generators(seed, card)
        for n in numels:
            offset = theirs.get_offset()
            words = torch.empty(n, dtype=torch.int32, device="cuda").random_(generator=theirs).cpu().numpy()
            cases.append({"what": "words", "seed": seed, "numel": n, "offset": offset, "offset_after": theirs.get_offset(),
                          "sha256": hashlib.sha256(words.astype("<i4").tobytes()).hexdigest()})
    content = {"torch": torch.__version__, "gpu": about.name, **card, "largest_difference": worst}
    head = "".join(f" {json.dumps(k)}: {json.dumps(v)},\n" for k, v in content.items())
    rows = ",\n".join("  " + json.dumps(case) for case in cases)
    Path(__file__).with_name(f"torch_cuda_{sys.argv[1]}.json").write_text("{\n" + head + ' "cases": [\n' + rows + "\n ]\n}\n")


if __name__ == "__main__":
    main()
