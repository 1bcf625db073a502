"""k-diffusion's functions, fused: the op's own noise, installing, layouts, launches, wrong use."""

import builtins
import importlib
import sys
from functools import partial

import pytest
import torch

from counter.emulated import Counts, Gpu
from fastdiff.integrations import k_diffusion as fused
from integrations.k_functions import FIRST, LAST, OPTIONS, SAMPLED, denoise, k_diffusion, karras, latent, loaded, relative, sample

pytestmark = pytest.mark.filterwarnings("ignore:Should have t")  # torchsde, of levels that are an ulp outside of the tree
CHURNED = {"euler": {"s_churn": 10.0}, "heun": {"s_churn": 10.0}, "dpm_2": {"s_churn": 10.0}}
NOISY = [*CHURNED, *SAMPLED]
SDE = ["dpmpp_sde", "dpmpp_2m_sde", "dpmpp_3m_sde"]


def options_of(name):
    return CHURNED.get(name, {"eta": 0.8} if name == "dpm_fast" else {})


def linear(x, sigma):
    """The denoiser of N(0, 1/4), in operations whose bits do not hang on the batch."""
    variance = (sigma * sigma).view(-1, *[1] * (x.ndim - 1))
    return x * (0.25 / (variance + 0.25))


# ---- noise of the op


@pytest.mark.parametrize("name", NOISY)
def test_a_batch_is_its_samples_bit_by_bit(name):
    x, seeds = latent((4, 3, 5, 5)), [7, 2**63, -1, 12]
    run = partial(sample, fused, name, model=linear, noise="philox", **options_of(name))
    whole = run(x, 7, seeds=seeds)
    assert torch.equal(whole, torch.cat([run(x[i : i + 1], 7, seeds=[seeds[i]]) for i in range(4)]))
    assert torch.equal(run(x[[2, 0]], 7, seeds=torch.tensor([-1, 7])), whole[[2, 0]])
    assert torch.equal(run(x, 7, seeds=5), run(x, 7, seeds=[5, 6, 7, 8]))
    assert not torch.equal(run(x[:1], 7, seeds=[8]), whole[:1])


def test_without_seeds_torchs_generator_gives_them():
    x, ends = latent(), []
    for seed in (0, 1, 0):
        torch.manual_seed(seed)
        ends.append(fused.sample_euler_ancestral(linear, x, karras(6), disable=True, noise="philox"))
    assert torch.equal(ends[0], ends[2]) and not torch.equal(ends[0], ends[1])
    state = torch.get_rng_state()
    fused.sample_dpmpp_2m(linear, x, karras(6), disable=True, noise="philox")
    assert torch.equal(state, torch.get_rng_state())  # nothing to draw


@pytest.mark.parametrize("name", NOISY)
def test_its_law_is_k_diffusions(name):
    """Mean and deviation of a linear model's pictures."""
    x = torch.zeros(1, 1, 100, 100)
    theirs, ours = (sample(m, name, x, 8, model=linear, sigmas=karras(8)[:-1], **options_of(name), **more)
                    for m, more in ((k_diffusion(), {}), (fused, {"noise": "philox", "seeds": 3})))
    assert abs(float(ours.mean() - theirs.mean())) < 5 * float(theirs.std()) * (2 / x.numel()) ** 0.5
    assert float(ours.std() / theirs.std()) == pytest.approx(1, abs=5 / x.numel() ** 0.5)


@pytest.mark.parametrize("name", SDE)
def test_a_seed_is_one_path_whatever_the_steps(name):
    """With many calls, where the error of the steps is small beside the noise."""
    x = latent()
    coarse, fine, other = (sample(fused, name, x, n, model=linear, sigmas=karras(n)[:-1], noise="philox", seeds=seed)
                           for n, seed in ((30, 1), (60, 1), (60, 5)))
    assert (coarse - fine).std() < 0.5 * (coarse - other).std()


def test_eta_over_one_goes_to_zero_without_noise_as_there():
    """dpm_2_ancestral, where all of a step's level is noise: k-diffusion takes an Euler step and adds none."""
    sigmas = torch.tensor([10.0, 1.0, 0.1])
    ends = [sample(m, "dpm_2_ancestral", latent(), sigmas=sigmas, eta=2.0, **more)
            for m, more in ((k_diffusion(), {}), (fused, {}), (fused, {"noise": "philox", "seeds": 0}))]
    assert relative(ends[1], ends[0]) < 1e-5 and relative(ends[2], ends[0]) < 1e-5


# ---- installed


def test_install_and_uninstall(monkeypatch):
    k_loaded = loaded(monkeypatch)
    before = dict(vars(k_loaded))
    with fused.install() as installed:
        for name in OPTIONS:
            assert getattr(k_loaded, f"sample_{name}") is getattr(fused, f"sample_{name}")
        assert k_loaded.sample_dpm_adaptive is before["sample_dpm_adaptive"] is fused.sample_dpm_adaptive
        with fused.install():  # again
            pass
        assert installed is not None
    assert vars(k_loaded) == before
    fused.install()
    k_loaded.sample_euler = patched = lambda *args: None  # by somebody else, since
    try:
        fused.uninstall()
        assert k_loaded.sample_euler is patched and k_loaded.sample_heun is before["sample_heun"]
        fused.uninstall()  # again
    finally:
        k_loaded.sample_euler = before["sample_euler"]
    assert vars(k_loaded) == before


def test_installed_while_the_module_is_loaded_anew(monkeypatch):
    """As notebooks do that follow changes in files: k-diffusion's own functions are not forgotten."""
    k_loaded = loaded(monkeypatch)
    before = dict(vars(k_loaded))
    fused.install()
    importlib.reload(fused)
    try:
        assert k_loaded.sample_euler is not fused.sample_euler
        fused.install()
        assert k_loaded.sample_euler is fused.sample_euler
    finally:
        fused.uninstall()
    assert vars(k_loaded) == before


def test_dpm_adaptive_is_k_diffusions_own(monkeypatch):
    k_loaded = loaded(monkeypatch)
    torch.manual_seed(0)
    end = fused.sample_dpm_adaptive(denoise, latent(), LAST, FIRST, disable=True)
    assert relative(end, sample(k_loaded, "heun", latent(), 40)) < 0.5
    with pytest.raises(AttributeError, match="sample_nothing"):
        fused.sample_nothing  # noqa: B018


def test_what_a_front_end_put_into_the_module_is_used(monkeypatch):
    """Noise of its own by a replaced torch, and its own bar."""
    k_loaded = loaded(monkeypatch)

    class Torch:
        drawn = 0

        def __getattr__(self, name):
            return getattr(torch, name)

        def randn_like(self, x):
            self.drawn += 1
            return torch.full_like(x, 0.5)

    shown = []
    monkeypatch.setattr(k_loaded, "torch", Torch())
    monkeypatch.setattr(k_loaded, "trange", lambda n, disable: shown.append(disable) or range(n))
    for name in ("euler", "euler_ancestral"):
        theirs = sample(k_loaded, name, latent(), 6, **options_of(name))
        drawn = k_loaded.torch.drawn
        assert relative(sample(fused, name, latent(), 6, **options_of(name)), theirs) < 1e-5
        assert k_loaded.torch.drawn == 2 * drawn > 0 and shown == [True, True]
        k_loaded.torch.drawn = 0
        shown.clear()


def test_default_noise_of_the_sde_samplers_needs_torchsde_only_where_used(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.split(".")[0] == "torchsde":
            raise ImportError("No module named 'torchsde'")
        return real(name, *args, **kwargs)

    for name in [n for n in sys.modules if n.split(".")[0] == "torchsde"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match="pip install torchsde"):
        sample(fused, "dpmpp_sde", latent(), 4)
    assert torch.isfinite(sample(fused, "dpmpp_sde", latent(), 4, noise="philox")).all()
    assert torch.isfinite(sample(fused, "dpmpp_sde", latent(), 4, noise_sampler=lambda s, s_next: latent() / FIRST)).all()


def test_nothing_is_changed_by_an_exception(monkeypatch):
    k_loaded = loaded(monkeypatch)
    class Interrupted(Exception):
        pass

    def stop(about):
        if about["i"] == 2:
            raise Interrupted

    before, grad = dict(vars(k_loaded)), torch.is_grad_enabled()
    x = latent()
    expected = sample(fused, "dpmpp_2m_sde", x, 6)
    with pytest.raises(Interrupted), fused.install():
        sample(k_loaded, "dpmpp_2m_sde", x, 6, callback=stop)
    assert vars(k_loaded) == before and torch.is_grad_enabled() == grad and torch.equal(x, latent())
    assert torch.equal(sample(fused, "dpmpp_2m_sde", x, 6), expected)


# ---- tensors


@pytest.mark.parametrize("name", ["euler", "heun", "dpmpp_3m_sde", "lms"])
def test_layouts(name):
    wide = latent((2, 4, 6, 12))
    for x in (
        wide.to(memory_format=torch.channels_last),
        wide[..., ::2],
        wide.transpose(2, 3),
        wide[:1].expand(3, -1, -1, -1),
        latent((2, 4, 2, 3, 4)).to(memory_format=torch.channels_last_3d),
        latent((3, 40)),
        latent((2, 8, 10)),
        latent((0, 4, 6, 6)),
    ):
        layouts = set()

        def model(x, sigma, layouts=layouts):
            layouts.add(x.stride())
            return denoise(x, sigma)

        theirs = sample(k_diffusion(), name, x, 5, **options_of(name))
        ours = sample(fused, name, x, 5, model=model, **options_of(name))
        assert ours.shape == theirs.shape and (not x.numel() or relative(ours, theirs) < 1e-5)
        if x.is_contiguous(memory_format=torch.channels_last if x.ndim == 4 else torch.contiguous_format):
            assert layouts == {x.stride()} and ours.stride() == x.stride()


def test_gradients_are_the_models_own_affair():
    """k-diffusion samples under no_grad; a model may differentiate inside, and may forget to detach."""
    weight = torch.tensor(0.9, requires_grad=True)

    def guided(x, sigma):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            denoised = denoise(x, sigma) * weight
            return denoised - 0.1 * torch.autograd.grad(denoised.square().sum(), x, retain_graph=True)[0]

    for name in ("euler", "dpmpp_2m", "dpmpp_sde"):
        x = latent().requires_grad_()
        theirs, ours = (sample(m, name, x, 6, model=guided) for m in (k_diffusion(), fused))
        assert not ours.requires_grad and relative(ours, theirs) < 1e-5


@pytest.mark.parametrize("name", OPTIONS)
def test_what_a_model_writes_into_the_base_counts_as_it_does_there(name):
    """At the first call of a run. At calls inside of a step it is refused: test_wrong_use.py."""
    ends = []
    for module, dtype in ((k_diffusion(), torch.float32), (fused, torch.float32), (fused, torch.float16)):
        calls = []

        def model(x, sigma, calls=calls):
            calls.append(1)
            return denoise(x.mul_(0.8) if len(calls) == 1 else x, sigma)

        drawn = {"noise_sampler": lambda *levels: torch.ones(2, 3, 6, 6)} if name in SAMPLED else {}
        ends.append(sample(module, name, latent().to(dtype), 6, model=model, **drawn))
    assert relative(ends[1], ends[0]) < 1e-4 and relative(ends[2].float(), ends[0]) < 2e-2
    assert relative(sample(fused, name, latent(), 6, **drawn), ends[1]) > 1e-3


@pytest.mark.parametrize("name", [name for name in OPTIONS if name not in SDE])
def test_torchs_default_device_plays_no_part(name):
    """meta, of which nothing can be read, in the place of a GPU."""
    sigmas, x = karras(4), latent()
    expected = [sample(fused, name, x, 4, sigmas=sigmas, noise=noise) for noise in ("torch", "philox")]
    with torch.device("meta"):
        for noise, end in zip(("torch", "philox"), expected):
            assert torch.equal(sample(fused, name, x, 4, sigmas=sigmas, noise=noise), end)


def test_a_model_may_return_its_input_and_tensors_of_other_layouts():
    for change in (lambda x: x, lambda x: x.flip(-1), lambda x: x.transpose(-1, -2) * 0.5, lambda x: x[:, :1].expand_as(x)):
        def model(x, sigma, change=change):
            return change(x)

        for name in ("euler", "dpmpp_2m", "dpmpp_2s_ancestral"):
            theirs, ours = (sample(m, name, latent(), 5, model=model) for m in (k_diffusion(), fused))
            assert relative(ours, theirs) < 1e-5


# ---- launches


@pytest.mark.parametrize("noise", ["philox", "torch"])
@pytest.mark.parametrize("name", OPTIONS)
def test_one_launch_a_model_call_and_no_wait(name, noise):
    """On emulated CUDA tensors: after the first call, a row and what torch draws for it; sigmas are read once."""
    counts = []
    with Gpu(2 * 3 * 8 * 8) as gpu:

        def model(x, sigma):
            counts.append(gpu.take())
            out = x * 0.5
            gpu.take()
            return out

        x, sigmas = latent((2, 3, 8, 8)).to("cuda"), karras(6).to("cuda")
        options = {**options_of(name), "noise": noise}
        gpu.take()
        if noise == "torch" and name in SDE:  # torchsde's tree is not what is counted
            options["noise_sampler"] = lambda s, s_next: torch.randn_like(x)
        end = sample(fused, name, x, 6, model=model, sigmas=sigmas, **options)
        counts.append(gpu.take())
        end = end.cpu()
    if noise == "philox":
        here = sample(fused, name, latent((2, 3, 8, 8)), 6, model=lambda x, sigma: x * 0.5, sigmas=karras(6), **options)
        assert relative(end, here) < 1e-6
    first, *rest = counts
    assert first.reads == 0 and first.d2h <= 1  # sigmas; dpm_fast has numbers
    assert first.h2d <= 2 and first.waits <= 3, first  # its table; numbers that torch turns into a tensor
    for c in rest[:-1]:
        draws = sum(number for op, number in c.ops.items() if "randn" in op)
        levels = c.small if name in ("dpmpp_sde", "dpm_fast") and noise == "torch" else 0  # between which noise is asked for
        assert draws <= (noise == "torch") and c.numbers() == {**Counts().numbers(), "big": 1 + draws, "small": levels}, c
    assert len(rest) >= 6 and rest[-1].waits == 0


# ---- what is returned (wrong arguments: test_wrong_use.py)


def test_what_noise_samplers_return_is_checked():
    with pytest.raises(ValueError, match=r"the noise sampler returned shape \(2, 3, 6\)"):
        sample(fused, "euler_ancestral", latent(), 4, noise_sampler=lambda s, s_next: torch.zeros(2, 3, 6))


def test_without_k_diffusion_only_its_own_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "k_diffusion", None)
    monkeypatch.setitem(sys.modules, "k_diffusion.sampling", None)
    for call in (fused.install, lambda: fused.sample_dpm_adaptive):
        with pytest.raises(ImportError):
            call()
    assert torch.isfinite(sample(fused, "dpmpp_2m_sde", latent(), 4, sigmas=torch.tensor([FIRST, 3.0, LAST, 0.0]))).all()
