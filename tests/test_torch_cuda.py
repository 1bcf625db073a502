"""torch's generator on a GPU, computed here: against a thread-by-thread transcription, and against what a GPU drew."""

import hashlib
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from fastdiff.torch_cuda import GPUS, TorchCudaGenerator

SMALL = {"sms": 3, "threads_per_sm": 600}  # 6 blocks, 1536 threads: several rounds with little work
RECORDED = [Path(__file__).parent / "data" / "torch_cuda_h100.json"]


def philox(key, counter):
    """Philox4x32-10 with Python's integers."""
    (k0, k1), (c0, c1, c2, c3) = key, counter
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = p1 >> 32 ^ c1 ^ k0, p1 & 0xFFFFFFFF, p0 >> 32 ^ c3 ^ k1, p0 & 0xFFFFFFFF
        k0, k1 = k0 + 0x9E3779B9 & 0xFFFFFFFF, k1 + 0xBB67AE85 & 0xFFFFFFFF
    return c0, c1, c2, c3


def transcribed(n, seed, offset, sms, threads_per_sm, unroll, of_words):
    """The grid-stride loop of DistributionTemplates.h, thread by thread. of_words: four words to `unroll` values."""
    blocks = min(-(-n // 256), sms * (threads_per_sm // 256))
    stride, out = 256 * blocks, [None] * n
    for thread in range(stride):
        counter, start = offset // 4, thread
        while start < -(-n // (stride * unroll)) * stride * unroll:
            four = philox((seed & 0xFFFFFFFF, seed >> 32), (counter & 0xFFFFFFFF, counter >> 32, thread, 0))
            for ii, value in enumerate(of_words(*four)):
                if start + stride * ii < n:
                    out[start + stride * ii] = value
            counter, start = counter + 1, start + stride * unroll
    return out, offset + ((n - 1) // (stride * unroll) + 1) * 4


def normal4(*words):
    values = []
    for first, second in (words[:2], words[2:]):
        u, v = ((float(np.float32(w)) + 0.5) * 2.0**-32 for w in (first, second))
        s = math.sqrt(-2 * math.log(min(u, 1.0)))
        values += [s * math.sin(2 * math.pi * v), s * math.cos(2 * math.pi * v)]
    return values


def normal2_double(x0, x1, y0, y1):
    u, v = ((low ^ high << 21) * 2.0**-53 + 2.0**-54 for low, high in ((x0, x1), (y0, y1)))
    s = math.sqrt(-2 * math.log(u))
    return s * math.sin(2 * math.pi * v), s * math.cos(2 * math.pi * v)


@pytest.mark.parametrize("n", [1, 255, 257, 1536, 1537, 6144, 6145, 13000])
@pytest.mark.parametrize("seed, offset", [(0, 0), (2**63 - 1, 8), (2**64 - 1, 2**34 - 4)])
def test_the_map_is_that_of_the_kernel(n, seed, offset):
    words, after = transcribed(n, seed, offset, **SMALL, unroll=4, of_words=lambda *four: four)
    generator = TorchCudaGenerator(seed, **SMALL, offset=offset)
    assert generator.words(n).tolist() == words and generator.get_offset() == after
    generator.set_offset(offset)
    z = generator.randn(n)
    values, _ = transcribed(n, seed, offset, **SMALL, unroll=4, of_words=normal4)
    assert float((z.double() - torch.tensor(values, dtype=torch.float64)).abs().max()) < 5e-6
    assert generator.get_offset() == after
    generator.set_offset(offset)
    assert torch.equal(generator.randn(n, dtype=torch.bfloat16), z.bfloat16())
    generator.set_offset(offset)
    assert torch.equal(generator.randn(n, dtype=torch.float16), z.half())
    generator.set_offset(offset)
    values, after = transcribed(n, seed, offset, **SMALL, unroll=2, of_words=normal2_double)
    z = generator.randn(n, dtype=torch.float64)
    assert float((z - torch.tensor(values, dtype=torch.float64)).abs().max()) < 1e-13 and generator.get_offset() == after


@pytest.mark.parametrize("file", RECORDED, ids=lambda path: path.stem)
def test_what_a_gpu_drew(file):
    """Words exactly (a digest of x.random_(), the words modulo 2^31), values to 2e-6, and where the generator stood."""
    recorded = json.loads(file.read_text())
    card = {name: recorded[name] for name in ("sms", "threads_per_sm")}
    assert tuple(card.values()) in GPUS.values()
    for case in recorded["cases"]:
        generator = TorchCudaGenerator(case["seed"], **card, offset=case["offset"])
        if case["what"] == "words":
            words = generator.words(case["numel"]) & np.uint32(2**31 - 1)
            assert hashlib.sha256(words.astype("<i4").tobytes()).hexdigest() == case["sha256"]
        else:
            dtype = getattr(torch, case["dtype"])
            drawn = generator.randn(case["numel"], dtype=dtype)[case["index"]].double()
            theirs = torch.tensor([float.fromhex(value) for value in case["values"]], dtype=torch.float64)
            rounding = theirs.abs() * (torch.finfo(dtype).eps if dtype in (torch.float16, torch.bfloat16) else 0.0)
            limit = 1e-13 if dtype == torch.float64 else 2e-6
            assert bool(((drawn - theirs).abs() <= limit + rounding).all())
        assert generator.get_offset() == case["offset_after"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here: what one drew is in tests/data")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_what_the_gpu_here_draws(dtype):
    about = torch.cuda.get_device_properties(0)
    ours = TorchCudaGenerator(9, sms=about.multi_processor_count, threads_per_sm=about.max_threads_per_multi_processor)
    theirs = torch.Generator("cuda").manual_seed(9)
    for n in (1, 65536, 262144, 700_001, 3_000_001):
        drawn = torch.randn(n, generator=theirs, device="cuda", dtype=dtype).cpu().double()
        rounding = drawn.abs() * (torch.finfo(dtype).eps if dtype in (torch.float16, torch.bfloat16) else 0.0)
        limit = 1e-13 if dtype == torch.float64 else 2e-6
        assert bool(((ours.randn(n, dtype=dtype).double() - drawn).abs() <= limit + rounding).all())
        assert ours.get_offset() == theirs.get_offset()


def test_draws_follow_each_other():
    generator = TorchCudaGenerator(3, "A100")
    first, second = generator.randn(2, 5), generator.randn((2, 5), dtype=torch.float64)
    assert generator.get_offset() == 8 and generator.initial_seed() == 3
    assert generator.randn(0, 4).shape == (0, 4) and generator.get_offset() == 8
    assert generator.randn(()).shape == () and generator.get_offset() == 12
    generator.manual_seed(3)
    assert generator.get_offset() == 0 and torch.equal(generator.randn(2, 5), first)
    assert torch.equal(generator.randn(2, 5, dtype=torch.float64), second)
    assert generator.manual_seed(-1).initial_seed() == 2**64 - 1


def test_small_draws_are_the_same_on_every_gpu_and_large_ones_are_not():
    small, large = (1, 4, 64, 64), (1, 4, 128, 128)
    t4, h100 = (TorchCudaGenerator(0, name) for name in ("T4", "H100 SXM"))
    assert torch.equal(t4.randn(small), h100.randn(small))
    assert not torch.equal(t4.randn(large), h100.randn(large))


def test_a_draw_fills_memory_in_its_order():
    generator = TorchCudaGenerator(0, "A100")
    x = torch.empty(2, 4, 3, 5).to(memory_format=torch.channels_last)
    plain, like = generator.randn(2, 3, 5, 4), generator.manual_seed(0).randn_like(x)
    assert like.is_contiguous(memory_format=torch.channels_last) and torch.equal(like.permute(0, 2, 3, 1), plain)
    column = torch.zeros(6, 4)
    generator.manual_seed(0).normal_(column[:, 1], 1.0, 2.0)
    assert torch.equal(column[:, 1], 2 * generator.manual_seed(0).randn(6) + 1) and not column[:, 0].any()


def test_everywhere():
    generator, same = TorchCudaGenerator(3, "A100"), TorchCudaGenerator(3, "A100")
    own = torch.Generator().manual_seed(1)
    with generator.everywhere():
        a, b = torch.randn(2, 3), torch.randn((4,), dtype=torch.float16, device="cpu", generator=None)
        c, d = torch.randn_like(a, dtype=torch.float64), torch.empty(3).normal_(1, std=2)
        theirs = torch.randn(5, generator=own)
    assert torch.equal(a, same.randn(2, 3)) and torch.equal(b, same.randn(4, dtype=torch.float16))
    assert torch.equal(c, same.randn(2, 3, dtype=torch.float64)) and torch.equal(d, 2 * same.randn(3) + 1)
    assert torch.equal(theirs, torch.randn(5, generator=own.manual_seed(1)))
    assert not torch.equal(torch.randn(3), same.randn(3))


def test_k_diffusion_draws_from_it():
    """The fused functions hand over what torch draws, so the block gives them a GPU's noise as it does to the originals."""
    from fastdiff.integrations.k_diffusion import sample_euler_ancestral

    sigmas, x = torch.tensor([10.0, 3.0, 1.0, 0.0]), torch.ones(1, 4, 8, 8)
    with TorchCudaGenerator(3, "A100").everywhere():
        inside = sample_euler_ancestral(lambda x, s: 0.3 * x, x, sigmas, disable=True)
    generator = TorchCudaGenerator(3, "A100")
    given = sample_euler_ancestral(lambda x, s: 0.3 * x, x, sigmas, disable=True, noise_sampler=lambda *_: generator.randn_like(x))
    assert torch.equal(inside, given)


@pytest.mark.parametrize("name", ["EulerAncestralDiscreteScheduler", "DDPMScheduler"])
@pytest.mark.filterwarnings("ignore")
def test_diffusers_draws_from_it(name):
    """diffusers' own loop and the fused one, with the noise of a T4, on which this latent is drawn in several rounds."""
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    from fastdiff.integrations.diffusers import fuse

    def looped(scheduler):
        scheduler.set_timesteps(4)
        with TorchCudaGenerator(5, "T4").everywhere() as generator:
            x = torch.randn(1, 4, 128, 128) * scheduler.init_noise_sigma
            for t in scheduler.timesteps:
                x = scheduler.step(scheduler.scale_model_input(x, t) / 2, t, x).prev_sample
        return x, generator.get_offset()

    scheduler = getattr(diffusers, name)
    (theirs, there), (ours, here) = looped(scheduler()), looped(fuse(scheduler()))
    assert float((ours - theirs).abs().max() / theirs.abs().max()) < 1e-5 and here == there >= 16


@pytest.mark.parametrize("arguments, message", [
    ({}, "a gpu .* or sms and threads_per_sm, are taken"),
    ({"gpu": "A100", "sms": 3, "threads_per_sm": 2048}, "a gpu .* or sms and threads_per_sm, are taken"),
    ({"sms": 3}, "a gpu .* or sms and threads_per_sm, are taken"),
    ({"gpu": "H100"}, "gpu 'H100' is not known: did you mean"),
    ({"sms": 0, "threads_per_sm": 2048}, "sms is 0"),
    ({"sms": 3, "threads_per_sm": 255}, "threads_per_sm is 255"),
    ({"sms": 3.0, "threads_per_sm": 2048}, "sms is 3.0: an int is taken"),
    ({"gpu": "A100", "offset": 2}, "offset is 2: a multiple of 4"),
    ({"gpu": "A100", "offset": -4}, "offset is -4: a multiple of 4"),
])
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises((TypeError, ValueError), match=message):
        TorchCudaGenerator(0, **arguments)


def test_wrong_draws_are_refused():
    generator = TorchCudaGenerator(0, "A100")
    with pytest.raises(TypeError, match=r"dtype is torch.int32: torch.float32, .* is taken"):
        generator.randn(3, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"shape is \(2, -1\): \(B, ...\) of sizes of 0 or more, is taken"):
        generator.randn(2, -1)
    with pytest.raises(ValueError, match="std is -1.0: a number of 0 or more is taken"):
        generator.normal_(torch.empty(3), 0.0, -1.0)
    with pytest.raises(TypeError, match="x is list: a tensor is taken"):
        generator.randn_like([1.0])
    with pytest.raises(ValueError, match="more than torch draws at once"):
        generator.normal_(torch.empty(1, device="meta").expand(2**29))
    with pytest.raises(ValueError, match="seeds holds 18446744073709551616"):
        TorchCudaGenerator(2**64, "A100")
    assert generator.get_offset() == 0


def test_a_refused_draw_leaves_the_generator_as_it_was():
    generator, fresh = TorchCudaGenerator(0, "A100"), TorchCudaGenerator(0, "A100")
    for count in (2.5, -1):
        with pytest.raises((TypeError, ValueError), match="count"):
            generator.words(count)
    generator.normal_(torch.empty(7, device="meta"))
    assert torch.equal(generator.randn(9), fresh.randn(9)) and generator.get_offset() == fresh.get_offset()


def test_everywhere_in_initialisations_and_transforms():
    with TorchCudaGenerator(0, "A100").everywhere():
        made = torch.nn.init.normal_(torch.empty(9), std=2.0)
        with pytest.raises(RuntimeError):
            torch.vmap(lambda x: x + torch.randn(3), randomness="different")(torch.zeros(4, 3))
    assert torch.allclose(made, 2 * TorchCudaGenerator(0, "A100").randn(9))
