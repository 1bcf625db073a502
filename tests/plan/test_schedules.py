"""Schedules and grids against diffusers and k-diffusion, and what they promise about themselves."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from plan.harness import k_diffusion

from fastdiff.grids import GRIDS
from fastdiff.schedules import EDM, VP, Flow, schedule

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
SCHEDULES = {
    "linear": VP.linear(),
    "scaled_linear": VP.scaled_linear(),
    "cosine": VP.cosine(),
    "edm": EDM(),
    "flow": Flow(3.0),
}


@pytest.mark.parametrize(
    "name, theirs", [("linear", "linear"), ("scaled_linear", "scaled_linear"), ("cosine", "squaredcos_cap_v2")]
)
def test_vp_tables_are_those_of_diffusers(name, theirs):
    diffusers = pytest.importorskip("diffusers")
    options = {"beta_start": 0.00085, "beta_end": 0.012} if name == "scaled_linear" else {}
    peer = diffusers.DDPMScheduler(beta_schedule=theirs, **options)
    np.testing.assert_allclose(schedule(name).alphas_cumprod, peer.alphas_cumprod.numpy(), rtol=2e-5)


def test_zero_terminal_snr_is_that_of_diffusers():
    diffusers = pytest.importorskip("diffusers")
    peer = diffusers.DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, rescale_betas_zero_snr=True
    )
    ours = VP.scaled_linear().zero_terminal_snr()
    np.testing.assert_allclose(ours.alphas_cumprod, peer.alphas_cumprod.numpy(), rtol=1e-4, atol=1e-9)
    assert ours.alpha(999) < 1e-11 and abs(ours.sigma(999) - 1) < 1e-12


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("steps", [1, 7, 20, 50, 999, 1000])
def test_spacings_are_those_of_diffusers(spacing, steps):
    diffusers = pytest.importorskip("diffusers")
    peer = diffusers.DDIMScheduler(timestep_spacing=spacing)
    peer.set_timesteps(steps)
    ours = VP.linear().grid(spacing, steps, **({"rounded": True} if spacing == "linspace" else {}))
    theirs = peer.timesteps.numpy()
    if steps == 1 and spacing == "linspace":
        assert theirs == [0]  # NumPy's linspace of one point is its start; sampling has to start at the end
        theirs = [999]
    np.testing.assert_array_equal(VP.linear().t(ours[:-1]), theirs)
    assert ours[-1] == 0


def test_ends_at_the_least_level_as_set_alpha_to_one_does():
    grid = VP.linear().grid("leading", 10, offset=1, final="sigma_min")
    assert grid[-1] == VP.linear().sigma_min and VP.linear().t(grid[-2]) == 1


@pytest.mark.parametrize(
    "name, options", [("karras", {}), ("karras", {"rho": 3.0}), ("exponential", {}), ("polyexponential", {"rho": 0.7})]
)
def test_grids_are_those_of_k_diffusion(name, options):
    theirs = getattr(k_diffusion(), f"get_sigmas_{name}")(20, 0.002, 80.0, **options).numpy()
    np.testing.assert_allclose(EDM().grid(name, 20, **options), theirs, rtol=2e-5)


def test_flow_grids_are_those_of_diffusers():
    diffusers = pytest.importorskip("diffusers")
    peer = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    peer.set_timesteps(sigmas=np.linspace(1.0, 1 / 20, 20))  # as FLUX's pipeline does
    ours = Flow(3.0)
    np.testing.assert_allclose(ours.t(ours.grid("uniform", 20)), peer.sigmas.numpy(), atol=1e-6)
    dynamic = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    dynamic.set_timesteps(sigmas=np.linspace(1.0, 1 / 20, 20), mu=1.15)
    ours = Flow.dynamic(4096)
    np.testing.assert_allclose(ours.t(ours.grid("uniform", 20)), dynamic.sigmas.numpy(), atol=1e-6)


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("kind", SCHEDULES)
def test_every_grid_falls_from_noise_to_nothing(name, kind):
    made = SCHEDULES[kind]
    if (name == "uniform") != (kind == "flow") and name == "uniform":
        return
    options = {"sigma_max": 100.0} if kind == "flow" and name in ("karras", "exponential", "polyexponential") else {}
    for steps in (1, 2, 10, 33):
        grid = made.grid(name, steps, **options)
        assert (np.diff(grid) < 0).all() and grid[-1] == 0 and grid.dtype == np.float64
        assert len(grid) == steps + 1 or name == "ddim_uniform"


@given(st.sampled_from(sorted(SCHEDULES)), st.floats(0, 1))
def test_t_and_sigma_are_inverse(kind, u):
    made = SCHEDULES[kind]
    t = {"ve": 0.002 + 79 * u, "vp": 999 * u, "flow": 0.999 * u}[made.kind]
    sigma = made.sigma_ve(t)
    assert abs(made.t(sigma) - t) < 2e-6 * max(1, t)
    alpha, level = made.alpha(t), made.sigma(t)
    assert abs(level - alpha * sigma) <= 1e-12 * level
    total = {"ve": alpha, "vp": alpha**2 + level**2, "flow": alpha + level}[made.kind]
    assert abs(total - 1) < 1e-12


def test_whole_timesteps_come_back_whole():
    for kind in ("linear", "scaled_linear", "cosine"):
        t = np.arange(1000.0)
        assert (SCHEDULES[kind].t(SCHEDULES[kind].sigma_ve(t)) == t).all()


def test_model_times():
    vp, edm, flow = SCHEDULES["linear"], SCHEDULES["edm"], SCHEDULES["flow"]
    assert (
        vp.time(vp.sigma_ve(321), "timestep") == 321 and edm.time(1.0, "c_noise") == 0 and edm.time(2.5, "sigma") == 2.5
    )
    assert flow.time(flow.sigma_ve(0.25), "t") == 0.25 and flow.time(flow.sigma_ve(0.25), "timestep") == 250
    assert (
        np.float32(flow.time(flow.sigma_ve(1.0), "t")) == 1
        and np.float32(flow.time(flow.sigma_ve(1.0), "timestep")) == 1000
    )
