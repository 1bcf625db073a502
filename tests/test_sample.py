"""The loop and the stepper: what a sample depends on, and what an interruption leaves."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch

import fastdiff as fd

SHAPE = (6, 3, 5, 5)
NAMES = sorted(fd.SAMPLERS)


def gaussian(x, sigma):
    """The exact denoiser of N(0.5, 0.3^2) in x = x0 + sigma n."""
    s2 = sigma.view(-1, *(1,) * (x.ndim - 1)) ** 2
    return (0.09 * x.float() + s2 * 0.5) / (0.09 + s2)


def make(name, steps=6, **options):
    if name.startswith("flow"):
        return fd.plan(name, schedule="flow", prediction="flow", steps=steps, **options)
    return fd.plan(name, schedule="edm", prediction="denoised", steps=steps, **options)


def model_for(name):
    if not name.startswith("flow"):
        return gaussian

    def velocity(x, t):
        t = t.view(-1, *(1,) * (x.ndim - 1))
        sigma = t / (1 - t).clamp_min(1e-6)
        denoised = gaussian(x / (1 - t).clamp_min(1e-6), sigma.flatten())
        return torch.where(t > 1 - 1e-6, x - 0.5, (x - denoised) / t)

    return velocity


@pytest.mark.parametrize("name", NAMES)
def test_a_sample_depends_on_its_own_seed_only(name):
    plan, model = make(name), model_for(name)
    whole = fd.sample(model, plan, SHAPE, seeds=[5, 6, 7, 8, 9, 10])
    assert torch.isfinite(whole).all()
    alone = fd.sample(model, plan, (1, *SHAPE[1:]), seeds=[8])
    assert torch.equal(alone[0], whole[3])
    turned = fd.sample(model, plan, SHAPE, seeds=[10, 9, 8, 7, 6, 5])
    assert torch.equal(turned.flip(0), whole)
    assert torch.equal(fd.sample(model, plan, SHAPE, seeds=5), whole)


@pytest.mark.parametrize("size", [1, 4, 6, 7])
def test_batch_size_is_what_the_model_sees(size):
    seen = []

    def model(x, sigma):
        seen.append((x.shape[0], sigma.shape[0]))
        return gaussian(x, sigma)

    plan = make("dpmpp_2m_sde")
    out = fd.sample(model, plan, SHAPE, seeds=0, batch_size=size)
    assert set(seen) == {(size, size)}
    assert torch.equal(out, fd.sample(gaussian, plan, SHAPE, seeds=0))


def test_no_samples():
    assert fd.sample(gaussian, make("euler"), (0, 3, 4, 4), seeds=[]).shape == (0, 3, 4, 4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_a_model_in_16_bits(name, dtype):
    """The latent is kept in float32: only the model's input and output are rounded."""
    model = model_for(name)
    seen = set()

    def half(x, t):
        seen.add(x.dtype)
        return model(x.float(), t).to(dtype)

    exact = fd.sample(model, make(name, 12), SHAPE, seeds=0)
    rounded = fd.sample(half, make(name, 12), SHAPE, seeds=0, dtype=dtype)
    assert seen == {dtype}
    assert (exact - rounded).abs().mean() < (0.02 if dtype == torch.bfloat16 else 0.003)


def test_callback_sees_every_step():
    events = []
    plan = make("heun", 5)
    out = fd.sample(gaussian, plan, SHAPE, seeds=0, batch_size=6,
                    callback=lambda p: events.append((p.step, p.sigma, p.x.clone(), p.denoised.clone())))
    assert [e[0] for e in events] == sorted(e[0] for e in events)
    assert len(events) == plan.evaluations
    assert torch.equal(events[-1][2], out)
    assert torch.allclose(events[-1][3], out, atol=1e-5)  # the last step of heun ends at d
    assert torch.equal(out, fd.sample(gaussian, plan, SHAPE, seeds=0))  # keeping d changes no bit
    first = events[0]
    start = fd.randn(SHAPE, seeds=0, stream="init") * first[1]
    assert torch.allclose(first[3], gaussian(start, torch.full((6,), first[1])), atol=1e-4)


def test_ctrl_c_leaves_nothing_broken():
    plan = make("dpmpp_3m_sde", 8)
    expected = fd.sample(gaussian, plan, SHAPE, seeds=3)

    def interrupt(progress):
        if progress.step == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fd.sample(gaussian, plan, SHAPE, seeds=3, callback=interrupt, progress=True)
    assert torch.equal(fd.sample(gaussian, plan, SHAPE, seeds=3), expected)


def run_to_the_end(run, model=gaussian):
    while not run.done:
        run.step(model(run.model_input, run.time))
    return run.result()


@pytest.mark.parametrize("name", ["dpmpp_2m_sde", "heun", "dpmpp_sde"])
def test_a_saved_run_resumes(tmp_path, name):
    plan = make(name, 7)
    expected = fd.sample(gaussian, plan, SHAPE, seeds=1)
    run = fd.Stepper(plan, SHAPE, seeds=1)
    for _ in range(5):
        run.step(gaussian(run.model_input, run.time))
    run.save(tmp_path / "run.safetensors")
    copy = run.clone()
    assert torch.equal(run_to_the_end(run), expected)
    assert torch.equal(run_to_the_end(copy), expected)
    again = fd.Stepper(plan, SHAPE, seeds=1)
    again.load(tmp_path / "run.safetensors")
    assert torch.equal(run_to_the_end(again), expected)
    assert not list(tmp_path.glob("*.tmp"))


def test_a_saved_run_of_something_else_is_refused(tmp_path):
    path = tmp_path / "run.safetensors"
    fd.Stepper(make("euler"), SHAPE, seeds=1).save(path)
    for other, said in ((fd.Stepper(make("heun"), SHAPE, seeds=1), "another plan"),
                        (fd.Stepper(make("euler"), SHAPE, seeds=2), "seeds"),
                        (fd.Stepper(make("euler"), (6, 3, 5, 6), seeds=1), "(6, 3, 5, 6)")):
        before = other.x.clone()
        with pytest.raises(ValueError) as refused:
            other.load(path)
        assert said in str(refused.value)
        assert torch.equal(other.x, before)


def test_gather_takes_history_along_and_draws_anew():
    plan = make("dpmpp_2m_sde", 6)
    run = fd.Stepper(plan, (3, 4), seeds=[0, 1, 2])
    for _ in range(3):
        run.step(gaussian(run.model_input, run.time))
    run.gather(torch.tensor([1, 1, 2]))
    assert torch.equal(run.x[0], run.x[1])
    run.step(gaussian(run.model_input, run.time))
    assert not torch.equal(run.x[0], run.x[1])  # noise to come stays with the slot


def test_each_sample_at_its_own_row():
    """A staggered batch: rows as a tensor give what each sample alone gives."""
    plan = make("euler_ancestral", 6)
    seeds = [3, 4]
    alone = [fd.Stepper(plan, (1, 8), seeds=[s]) for s in seeds]
    both = fd.Stepper(plan, (2, 8), seeds=seeds)
    first = both.row
    for ahead in range(2):  # sample 1 starts two rows earlier
        alone[1].step(gaussian(alone[1].model_input, alone[1].time))
    both.x[1] = alone[1].x[0]
    for r in range(first, first + 4):
        rows = torch.tensor([r, r + 2])
        both.step(gaussian(both.x, both.time_at(rows)), row=rows)
        for run in alone:
            run.step(gaussian(run.model_input, run.time))
        assert torch.equal(both.x[0], alone[0].x[0]) and torch.equal(both.x[1], alone[1].x[0])


def test_inpainting_keeps_the_known_part():
    known = torch.linspace(-1, 1, 75).view(1, 3, 5, 5).expand(SHAPE)
    mask = torch.zeros(1, 1, 5, 5)
    mask[..., 2:] = 1
    plan = make("dpmpp_2m", 10, inpaint="d")
    out = fd.sample(gaussian, plan, SHAPE, seeds=0, known=known, mask=mask)
    assert torch.allclose(out[..., :2], known[..., :2], atol=1e-6)
    assert not torch.allclose(out[..., 2:], known[..., 2:], atol=0.1)


def test_starting_from_an_image():
    image = torch.full(SHAPE, 0.25)
    plan = make("euler", 10, start="image", sigma_max=0.05)
    out = fd.sample(gaussian, plan, SHAPE, seeds=0, init=image)
    assert (out - image).abs().mean() < 0.1
    with pytest.raises(ValueError, match="init"):
        fd.sample(gaussian, plan, SHAPE, seeds=0)


def test_many_samples_have_the_models_mean_and_spread():
    out = fd.sample(gaussian, make("heun", 60), (4000, 4), seeds=0)
    assert math.isclose(float(out.mean()), 0.5, abs_tol=5 * 0.3 / math.sqrt(16000))
    assert math.isclose(float(out.std()), 0.3, abs_tol=0.01)


def test_one_image_in_a_larger_batch():
    plan = make("euler", 10, start="image", sigma_max=0.05)
    image = torch.full((1, 3, 5, 5), 0.25)
    alone = fd.sample(gaussian, plan, image.shape, seeds=0, init=image)
    assert torch.equal(fd.sample(gaussian, plan, image.shape, seeds=0, init=image, batch_size=4), alone)


@pytest.mark.parametrize("shaped", [
    lambda y: torch.nn.functional.pad(y, (2, 2, 2, 2))[..., 2:-2, 2:-2],  # a crop, as padded U-Nets return
    lambda y: y.contiguous(memory_format=torch.channels_last),
    lambda y: y.transpose(2, 3).contiguous().transpose(2, 3),
    lambda y: y.requires_grad_(),
], ids=["crop", "channels_last", "transposed", "requires_grad"])
@pytest.mark.parametrize("grad", [False, True])
def test_the_models_output_in_any_layout(shaped, grad):
    plan = make("dpmpp_2m_sde", 4)
    run = fd.Stepper(plan, SHAPE, seeds=0)
    with torch.set_grad_enabled(grad):
        while not run.done:
            run.step(shaped(gaussian(run.model_input, run.time)))
    assert torch.equal(run.result(), fd.sample(gaussian, plan, SHAPE, seeds=0))


def test_a_broadcast_output():
    plan = make("euler", 3)
    out = fd.sample(lambda x, t: torch.full((1, 1, 1, 1), 0.5).expand(x.shape), plan, SHAPE, seeds=0)
    assert torch.allclose(out, torch.full(SHAPE, 0.5))


def test_autograd_hears_of_the_step():
    """What autograd saved of a buffer is gone after the step: it must complain, not return a wrong gradient."""
    run = fd.Stepper(make("euler", 4), SHAPE, seeds=0)
    w = torch.ones(SHAPE, requires_grad=True)
    d = run.model_input * w
    run.step(d.detach())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        d.sum().backward()


def test_seeds_of_every_kind():
    plan = make("euler_ancestral", 3)
    expected = fd.sample(gaussian, plan, SHAPE, seeds=range(6))
    for seeds in (np.arange(6), list(np.arange(6)), np.int64(0), torch.arange(6), torch.arange(6, dtype=torch.int32), (0, 1, 2, 3, 4, 5)):
        assert torch.equal(fd.sample(gaussian, plan, SHAPE, seeds=seeds), expected)
    last = 2**64 - 1
    assert torch.equal(fd.randn((2, 5), seeds=last), fd.randn((2, 5), seeds=[last, 0]))
    mine = torch.arange(6)
    run = fd.Stepper(plan, SHAPE, mine)
    mine += 1
    assert run.seeds.tolist() == [0, 1, 2, 3, 4, 5]


def test_copies():
    plan = make("dpmpp_2m", 4)
    for other in (copy.copy(plan), copy.deepcopy(plan), pickle.loads(pickle.dumps(plan))):
        assert other == plan
        with pytest.raises(ValueError, match="read-only"):
            other.coef[0, 0] = 1
    run = fd.Stepper(plan, SHAPE, seeds=0)
    for other in (copy.copy(run), copy.deepcopy(run)):
        run_to_the_end(other)
    assert torch.equal(run_to_the_end(run), fd.sample(gaussian, plan, SHAPE, seeds=0))


def test_files_that_are_not_whole(tmp_path):
    path = tmp_path / "run.safetensors"
    run = fd.Stepper(make("euler"), SHAPE, seeds=1)
    run.save(path)
    whole = path.read_bytes()
    for content in (b"", whole[:100], whole[:-4], b"{}" * 50):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="run.safetensors"):
            run.load(path)
    with pytest.raises(ValueError, match="not a plain file"):
        run.save(tmp_path)
    with pytest.raises(ValueError, match="not a folder"):
        run.save(tmp_path / "nowhere" / "run.safetensors")
    assert not list(tmp_path.glob("*.tmp"))


def test_under_another_default_device():
    expected = fd.sample(gaussian, make("dpmpp_2m_sde"), SHAPE, seeds=0, device="cpu")
    with torch.device("meta"):
        assert torch.equal(fd.sample(gaussian, make("dpmpp_2m_sde"), SHAPE, seeds=0, device="cpu"), expected)


@pytest.mark.parametrize("name", ["dpmpp_2m_sde", "heun", "ddpm"])
def test_a_run_can_start_again(name):
    plan = make(name)
    run = fd.Stepper(plan, SHAPE, seeds=0)
    addresses = {key: t.data_ptr() for key, t in run._tensors().items() if key != "seeds"}
    for _ in range(3):
        run.step(gaussian(run.model_input, run.time))
    copy = run.clone()
    run.restart(seeds=7)
    assert torch.equal(run_to_the_end(run), fd.sample(gaussian, plan, SHAPE, seeds=7))
    assert {key: t.data_ptr() for key, t in run._tensors().items() if key != "seeds"} == addresses
    assert torch.equal(run_to_the_end(copy), fd.sample(gaussian, plan, SHAPE, seeds=0))  # keys and all are its own


def test_a_run_that_met_nan_can_start_again():
    run = fd.Stepper(make("euler"), SHAPE, seeds=0)
    with pytest.raises(FloatingPointError):
        run_to_the_end(run, lambda x, t: x * float("nan"))
    run.restart(seeds=0)
    assert torch.equal(run_to_the_end(run), fd.sample(gaussian, make("euler"), SHAPE, seeds=0))


def test_a_start_that_does_not_fit_is_refused():
    image = torch.zeros(SHAPE)
    from_image = fd.Stepper(make("euler", start="image"), SHAPE, seeds=0, init=image)
    from_noise = fd.Stepper(make("euler"), SHAPE, seeds=0)
    from_noise.step(gaussian(from_noise.model_input, from_noise.time))
    before = from_noise.x.clone()
    for run, given, error, said in (
        (from_noise, {"seeds": 0, "init": image}, ValueError, "starts from noise"),
        (from_noise, {"seeds": [1, 2]}, ValueError, "2 entries, the batch has 6"),
        (from_image, {"seeds": 0}, ValueError, "starts from an image"),
        (from_image, {"seeds": 0, "init": image[1:]}, ValueError, r"init has shape \(5, 3, 5, 5\)"),
        (from_image, {"seeds": 0, "init": 3}, TypeError, "init is int"),
        (from_image, {"seeds": 0, "init": image.to(torch.complex64)}, TypeError, "init is torch.complex64: real numbers"),
        (from_image, {"seeds": 0, "init": image.bool()}, TypeError, "init is torch.bool: real numbers"),
        (from_image, {"seeds": 0, "init": image.to_sparse()}, TypeError, "init has layout torch.sparse_coo"),
        (from_image, {"seeds": 0, "init": image.to("meta")}, ValueError, "init is on meta"),
    ):
        with pytest.raises(error, match=said):
            run.restart(**given)
    assert torch.equal(from_noise.x, before)
    from_image.restart(0, init=image + 1)
    assert torch.equal(run_to_the_end(from_image), fd.sample(gaussian, make("euler", start="image"), SHAPE, seeds=0, init=image + 1))


def test_times_of_rows_on_the_device():
    plan = make("heun")
    run = fd.Stepper(plan, (2, 3, 4), seeds=0)
    times = plan.times.astype(np.float32)
    assert run.time_at(torch.tensor(3)).tolist() == [times[3]] * 2
    assert run.time_at(torch.tensor([1, 4], dtype=torch.int32)).tolist() == times[[1, 4]].tolist()
    assert run.time_at(torch.tensor([[1, 2, 3], [4, 5, 6]])).tolist() == times[[[1, 2, 3], [4, 5, 6]]].tolist()
    assert run.time_at(torch.tensor([-5, 99])).tolist() == times[[0, -1]].tolist()
    assert torch.equal(run.time_at(torch.tensor(run.row)), run.time)
    for row, error, said in ((2, TypeError, "row is 2"), (torch.tensor(2.0), ValueError, "float32"),
                             (torch.tensor(True), ValueError, "torch.bool: int32 or int64 is taken"),
                             *((torch.zeros(shape, dtype=torch.int64), ValueError, r"row has shape .*\(B, T\) = \(2, 3\) is")
                               for shape in ((1,), (3,), (2, 1), (2, 4), (2, 3, 1)))):
        with pytest.raises(error, match=said):
            run.time_at(row)


def test_a_sparse_model_output_is_refused():
    with pytest.raises(TypeError, match="the model returned a tensor of layout torch.sparse_coo"):
        fd.sample(lambda x, t: x.to_sparse(), make("euler"), SHAPE, seeds=0)


def test_a_run_of_inference_mode_stays_there():
    with torch.inference_mode():
        run = fd.Stepper(make("euler"), SHAPE, seeds=0)
    with pytest.raises(RuntimeError, match="inference_mode"):
        run.restart(1)
    with torch.inference_mode():
        run.restart(1)
        result = run_to_the_end(run)
    assert torch.equal(result, fd.sample(gaussian, make("euler"), SHAPE, seeds=1))


@pytest.mark.parametrize("device, said", [
    ("cuda", None), ("mps", "device is mps: cpu, cuda is taken"), ("cudaa", "device is cudaa: ")])
def test_a_device_that_is_not_there_is_refused_before_the_model_is_called(device, said):
    if said is None:
        if torch.cuda.is_available():
            pytest.skip("there is a GPU")
        said = f"device is cuda: {fd.ops.no_gpu()}"
    calls = []
    for made in (lambda: fd.sample(lambda x, t: calls.append(1), make("euler"), SHAPE, seeds=0, device=device),
                 lambda: fd.sample(lambda x, t: calls.append(1), make("euler"), SHAPE, seeds=0, device=device, cuda_graph=True),
                 lambda: fd.Stepper(make("euler"), SHAPE, seeds=0, device=device)):
        with pytest.raises(ValueError) as error:
            made()
        assert str(error.value).startswith(said)
    assert not calls


def test_the_result_of_one_batch_is_the_callers():
    plan = make("euler")
    first = fd.sample(gaussian, plan, SHAPE, seeds=0)
    kept = first.clone()
    fd.sample(gaussian, plan, SHAPE, seeds=9)
    assert torch.equal(first, kept) and first.is_contiguous()


def test_default_seeds():
    """One seed from torch's generator on the CPU, for a run that draws; else that generator is left alone."""
    torch.manual_seed(7)
    state = torch.get_rng_state()
    assert fd.noise.default_seeds(None, draws=False) == 0 and fd.noise.default_seeds([3, 4], draws=True) == [3, 4]
    assert torch.equal(torch.get_rng_state(), state)
    first, second = (fd.noise.default_seeds(None, draws=True) for _ in range(2))
    assert first != second and 0 <= first < 2**63
    torch.manual_seed(7)
    with torch.device("meta"):
        assert fd.noise.default_seeds(None, draws=True) == first
