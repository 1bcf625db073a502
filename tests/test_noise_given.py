"""Noise that a caller gives: the pictures of the noise that is drawn inside of the rows, from every plan that draws any."""

import pytest
import torch

import fastdiff as fd
from fastdiff.given import Given, noise_given
from fastdiff.guidance.travel import time_travel
from fastdiff.torch_cuda import TorchCudaGenerator

SHAPE, SEEDS = (3, 2, 4, 4), [11, 12, 2**63]
CHURN = {"s_churn": 4.0, "s_noise": 1.01}
BROWNIAN = ("dpmpp_sde", "dpmpp_2m_sde", "dpmpp_3m_sde", "dpmpp_2s_ancestral", "euler_ancestral", "dpm_2_ancestral", "ddpm",
            "res_multistep_ancestral", "seeds_2", "seeds_3", "er_sde")
OPTIONS = {
    **{name: CHURN for name in ("euler", "heun", "dpm_2", "heunpp2")},
    "ddim": {"eta": 0.7}, "dpm_fast": {"eta": 0.6}, "tcd": {"eta": 0.4},
}
"""What makes a sampler draw that does not by default."""
CASES = [(name, OPTIONS.get(name, {})) for name in sorted(fd.SAMPLERS)]
CASES += [(name, {"noise": "brownian"}) for name in BROWNIAN] + [("sa_solver", {"pece": True, "predictor_order": 3})]
CASES += [("seeds_2", {"r": 1.0, "solver_type": "phi_2"}), ("dpmpp_2m_sde", {"solver_type": "heun", "eta": 0.5})]


def model(x, time):
    return 0.3 * torch.tanh(x.float() / (1 + time.view(-1, 1, 1, 1)))


def made(name, options, **more):
    if name.startswith("flow"):
        return fd.plan(name, schedule="flow", prediction="flow", steps=6, **options, **more)
    return fd.plan(name, schedule="edm", prediction="denoised", steps=6, **options, **more)


def philox(stream, draw):
    return fd.randn(SHAPE, seeds=SEEDS, stream=stream, draw=draw)


def alike(a, b):
    return float((a - b).abs().max() / b.abs().max()) < 2e-5


@pytest.mark.parametrize("name, options", CASES, ids=[f"{n}-{'-'.join(map(str, o.values()))}".rstrip("-") for n, o in CASES])
def test_given_normals_are_those_of_the_rows(name, options):
    plan, asked = made(name, options), []

    def noise(stream, draw):
        asked.append((stream, draw))
        return philox(stream, draw)

    inside = fd.sample(model, plan, SHAPE, seeds=SEEDS)
    given = fd.sample(model, plan, SHAPE, seeds=0, noise=noise)
    assert alike(given, inside)
    addresses = {(n.stream, n.draw) for row in plan.rows for y in row.y for n in y if not isinstance(n, str)}
    assert len(asked) == len(set(asked)) and set(asked) == addresses
    assert not alike(fd.sample(model, plan, SHAPE, seeds=0), inside)


@pytest.mark.parametrize("name", ["euler_ancestral", "seeds_3", "er_sde", "sa_solver", "lcm", "heun"])
@pytest.mark.parametrize("start", ["image", "latent"])
def test_from_an_image_and_in_half_precision(name, start):
    plan, init = made(name, OPTIONS.get(name, {}), start=start), torch.linspace(-1, 1, 96).view(SHAPE)
    for dtype in (torch.float32, torch.bfloat16):
        inside = fd.sample(model, plan, SHAPE, seeds=SEEDS, init=init, dtype=dtype)
        given = fd.sample(model, plan, SHAPE, seeds=0, init=init, noise=philox, dtype=dtype)
        assert float((given - inside).abs().max() / inside.abs().max()) < (2e-5 if dtype == torch.float32 else 2e-2)


def test_what_no_plan_draws_is_not_asked_for():
    plan = made("dpmpp_2m", {}, start="latent")
    run = fd.sample(model, plan, SHAPE, seeds=0, init=torch.ones(SHAPE), noise=None)
    assert torch.equal(fd.sample(model, plan, SHAPE, seeds=0, init=torch.ones(SHAPE), noise=pytest.fail), run)


def test_beside_steering_and_guidance():
    plan = made("euler_ancestral", {}).with_guidance(2.0)
    both = lambda x, time: (model(x, time), model(0.5 * x, time))
    inside = fd.sample(both, plan, SHAPE, seeds=SEEDS)
    assert alike(fd.sample(both, plan, SHAPE, seeds=SEEDS, noise=philox), inside)


def test_in_a_loop_of_ones_own():
    plan, given = made("seeds_2", {}), Given(philox)
    with fd.Actions([given], plan, SHAPE, model) as actions:
        run = fd.Stepper(actions.plan, SHAPE, 0, init=given.start(None), **actions.bank)
        while not run.done:
            run.step(*actions.outputs(run))
    assert torch.equal(run.result(), fd.sample(model, plan, SHAPE, seeds=0, noise=philox))


def test_noise_of_recurrences_stays_that_of_the_seeds():
    plan = time_travel(made("ddim", {"eta": 0.5}), 2)
    asked = []
    inside = fd.sample(model, plan, SHAPE, seeds=SEEDS)
    given = fd.sample(model, plan, SHAPE, seeds=SEEDS, noise=lambda *address: asked.append(address) or philox(*address))
    assert alike(given, inside) and {stream for stream, _ in asked} == {"init", "step"}


def test_draws_of_a_gpu():
    """One draw after the other, in the order of the loop of k-diffusion: the start, then each step."""
    plan, generator = made("euler_ancestral", {}), TorchCudaGenerator(4, "A100")
    image = fd.sample(model, plan, SHAPE, seeds=0, noise=TorchCudaGenerator(4, "A100"))
    drawn = {("init", 0): generator.randn(SHAPE), **{("step", i): generator.randn(SHAPE) for i in range(5)}}
    assert torch.equal(fd.sample(model, plan, SHAPE, seeds=0, noise=lambda *address: drawn[address]), image)


def test_inputs_are_shared_and_scaled():
    """The base and the next model input read one input; its weights are those of the normals together."""
    plan = made("dpmpp_2m_sde", {"noise": "brownian"})
    changed, first, taken = noise_given(plan)
    assert changed.inputs == (*plan.inputs, "noise0") and changed.noises == 0 and list(first)
    for row, before, sums in zip(changed.rows, plan.rows, taken):
        for y, y_before in zip(row.y, before.y):
            weight = sum(c**2 for n, c in y_before.items() if not isinstance(n, str))
            assert not before.calls_model or y.get("noise0", 0.0) ** 2 == pytest.approx(weight)
        assert all(sum(c**2 for c in terms.values()) == pytest.approx(1) for terms in sums)


def test_wrong_use_is_refused():
    plan = made("euler_ancestral", {})

    def sampled(plan=plan, **more):
        return fd.sample(pytest.fail, plan, SHAPE, seeds=0, **more)

    with pytest.raises(TypeError, match=r"noise is Generator: a function of \(stream, draw\), or something with randn_like"):
        sampled(noise=torch.Generator())
    with pytest.raises(ValueError, match="noise was given with batch_size"):
        sampled(noise=philox, batch_size=2)
    with pytest.raises(ValueError, match=r"noise returned shape \(3,\): \(3, 2, 4, 4\) is taken"):
        sampled(noise=lambda *address: torch.zeros(3))
    with pytest.raises(TypeError, match="noise returned NoneType: a tensor is taken"):
        sampled(noise=lambda *address: None)
    with pytest.raises(TypeError, match="noise returned torch.int64: torch.float32, .* is taken"):
        sampled(noise=lambda *address: torch.zeros(SHAPE, dtype=torch.int64))
    inpaint = fd.plan("euler_ancestral", schedule="edm", prediction="denoised", steps=3, inpaint="x")
    with pytest.raises(ValueError, match="noises the known part of an image from its seeds"):
        sampled(inpaint, noise=philox, known=torch.zeros(SHAPE), mask=torch.ones(1, 1, 4, 4))
    with pytest.raises(TypeError, match="steering is int"):
        sampled(noise=philox, steering=3)


def test_a_function_may_fill_one_tensor_again_and_a_run_may_end_early():
    plan, shape = fd.plan("seeds_3", schedule="edm", prediction="denoised", steps=4), (2, 1, 4, 4)
    model = lambda x, sigma: x / (1 + sigma.view(-1, 1, 1, 1) ** 2)
    drawn, buffer = {}, torch.empty(shape)

    def kept(stream, draw):
        return drawn.setdefault((stream, draw), torch.randn(shape))

    expected = fd.sample(model, plan, shape, 0, noise=kept)
    assert torch.equal(fd.sample(model, plan, shape, 0, noise=lambda *at: buffer.copy_(kept(*at))), expected)
    with pytest.raises(TypeError, match="layout"):
        fd.sample(model, plan, shape, 0, noise=lambda *at: kept(*at).to_sparse())
