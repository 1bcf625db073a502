"""Concepts in the network of a diffusers pipeline, against networks that are edited by hand."""

import contextlib
import copy
import warnings
from types import SimpleNamespace

import pytest
import torch

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")

import fastdiff as fd
import fastdiff.integrations.diffusers
from fastdiff.steering import Injection, LatentVector, edited
from fastdiff.steering.concept import Concept, network_checksum
from integrations.test_pipelines import unet

fuse = fd.integrations.diffusers.fuse
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
BLOCK = "mid_block"
SCHEDULERS = {
    "ddim": lambda: diffusers.DDIMScheduler(num_train_timesteps=100),
    "ddpm": lambda: diffusers.DDPMScheduler(num_train_timesteps=100),
}


def directions(count=2):
    made = fd.randn((count, 8, 4, 4), seeds=5)
    return made / made.flatten(1).norm(dim=1).view(-1, 1, 1, 1)


def concept(i=0):
    return SimpleNamespace(direction=directions()[i], block=BLOCK)


def pipeline(name="ddim"):
    return (diffusers.DDIMPipeline if name == "ddim" else diffusers.DDPMPipeline)(unet(), SCHEDULERS[name]())


def pictures(pipe, batch=2, steps=6):
    pipe.set_progress_bar_config(disable=True)
    made = pipe(batch_size=batch, num_inference_steps=steps, generator=torch.Generator().manual_seed(0), output_type="np")
    return torch.as_tensor(made.images)


def level(scheduler, t):
    bar = float(scheduler.alphas_cumprod[int(t)])
    return ((1 - bar) / bar) ** 0.5


class ByHand(torch.nn.Module):
    """The network, edited in a window of noise levels: eps0 + s (eps1 - eps0)."""

    def __init__(self, inner, scheduler, weights, scale=1.0, window=(0.0, float("inf")), which=(0,)):
        super().__init__()
        self.inner, self.scheduler, self.weights, self.scale = inner, scheduler, weights, scale
        self.window, self.which = window, which
        self.config, self.dtype, self.device = inner.config, inner.dtype, inner.device

    def forward(self, x, t, **options):
        plain = self.inner(x, t, **options).sample
        if not self.window[0] <= level(self.scheduler, t) <= self.window[1]:
            return SimpleNamespace(sample=plain)
        with edited(self.inner, BLOCK, [directions()[i] for i in self.which], self.weights):
            moved = self.inner(x, t, **options).sample
        return SimpleNamespace(sample=plain + self.scale * (moved - plain) if self.scale != 1 else moved)


def by_hand(name="ddim", **options):
    pipe = pipeline(name)
    pipe.unet = ByHand(pipe.unet, pipe.scheduler, **options)
    return pictures(pipe)


@pytest.mark.parametrize("scale", [1.0, 2.5])
@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("window", [(0.0, float("inf")), (0.3, 2.0)], ids=str)
def test_concepts_act_in_the_network(name, scale, window):
    expected = by_hand(name, weights=[0.8], scale=scale, window=window)
    pipe = pipeline(name)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*the scheduler's own step is used.*")
        fuse(pipe, steering=[Injection(concept(), 0.8, scale, window)])
        got = pictures(pipe)
    plain = pictures(pipeline(name))
    assert float((got - expected).abs().max()) < 1e-4
    assert float((plain - expected).abs().max()) > 1e-2
    assert "forward" not in vars(pipe.unet)  # the run is over
    assert float((pictures(pipe) - expected).abs().max()) < 1e-4


def test_what_lies_before_the_block_is_computed_once(monkeypatch):
    counted, own = [0], torch.nn.functional.conv2d

    def conv2d(*args, **kwargs):
        counted[0] += 1
        return own(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "conv2d", conv2d)
    counts = []
    for steering in ([], [Injection(concept(), 0.8)], [Injection(concept(), 0.8, 2.0)]):
        counted[0] = 0
        pictures(fuse(pipeline(), steering=steering))
        counts.append(counted[0])
    assert counts[0] == counts[1] < counts[2] < 1.7 * counts[0]


def test_a_weight_of_zero_changes_no_bit():
    pipe = fuse(pipeline(), steering=[Injection(concept(), 0.0, 2.0), Injection(concept(1), [0.0, 0.0])])
    assert torch.equal(pictures(pipe), pictures(fuse(pipeline())))


def test_two_concepts_with_weights_of_each_sample():
    expected = by_hand(weights=[torch.tensor([0.8, 0.0]), torch.tensor([-0.5, 1.0])], which=(0, 1))
    pipe = fuse(pipeline(), steering=[Injection(concept(0), [0.8, 0.0]), Injection(concept(1), [-0.5, 1.0])])
    assert float((pictures(pipe) - expected).abs().max()) < 1e-4


def test_concepts_beside_a_latent_vector():
    vector = LatentVector(fd.randn((1, 3, 8, 8), seeds=6))
    pipe = fuse(pipeline(), steering=[vector.at(0.3), Injection(concept(), 0.8)])
    both = pictures(pipe)
    alone = [pictures(fuse(pipeline(), steering=[one])) for one in (vector.at(0.3), Injection(concept(), 0.8))]
    assert all(float((both - a).abs().max()) > 1e-2 for a in alone)
    hand = pipeline()
    hand.unet = ByHand(hand.unet, hand.scheduler, weights=[0.8])
    assert float((pictures(fuse(hand, steering=[vector.at(0.3)])) - both).abs().max()) < 1e-4


def test_a_network_that_is_called_for_the_condition_and_its_absence_at_once():
    """A batch of 2 with weights of its own, called as 4: unconditional ones first."""
    pipe = fuse(pipeline(), steering=[Injection(concept(), [0.8, 0.2])])
    scheduler, network = pipe.scheduler, pipe.unet
    scheduler.set_timesteps(5)
    x = fd.randn((2, 3, 8, 8), seeds=3)
    t = scheduler.timesteps[0]
    plain = unet()
    with torch.no_grad():
        both = network(torch.cat([x, x + 1]), t, return_dict=False)[0]
        with edited(plain, BLOCK, directions()[0], torch.tensor([0.8, 0.2, 0.8, 0.2])):
            expected = plain(torch.cat([x, x + 1]), t.expand(4)).sample
        torch.testing.assert_close(both, expected, rtol=1e-5, atol=1e-5)
        with pytest.raises(ValueError, match="weight has 2 entries, the network was called with 3 samples"):
            network(torch.cat([x, x[:1]]), t)
    assert "forward" not in vars(network)  # an error takes it away


def test_the_network_is_what_it_was():
    network = unet()
    x, t = fd.randn((1, 3, 8, 8), seeds=3), torch.tensor(40)
    before = network(x, t).sample
    pipe = fuse(diffusers.DDIMPipeline(network, SCHEDULERS["ddim"]()), steering=[Injection(concept(), 0.8)])
    assert torch.equal(network(x, t).sample, before)  # outside of a run
    pipe.scheduler.set_timesteps(10)
    first = pipe.scheduler.timesteps[0]
    assert not torch.equal(network(x, first).sample, type(network).forward(network, x, first).sample)
    again = fuse(pipe)  # without steering
    assert again is pipe and "forward" not in vars(network)
    pipe = fuse(pipe, steering=[Injection(concept(), 0.8)])
    pipe.scheduler.set_timesteps(10)
    del pipe.scheduler, again
    pipe = None
    assert torch.equal(network(x, t).sample, before)  # the scheduler is gone
    assert not list(network.mid_block._forward_hooks)


def test_concepts_of_another_network_and_blocks_that_are_not_there():
    network = unet()
    learnt = Concept(directions()[0], BLOCK, 0.5, network_checksum(network), "cat", "rfm", 0.9)
    pipe = diffusers.DDIMPipeline(network, SCHEDULERS["ddim"]())
    fuse(pipe, steering=[learnt.at(0.5, window=(0.1, 2.0))])
    with pytest.raises(ValueError, match="no call of the model falls into window"):
        fuse(pipe, steering=[learnt.at(0.5, window=(200.0, 300.0))]).scheduler.set_timesteps(5)
    other = pipeline()
    with torch.no_grad():
        next(other.unet.parameters()).add_(1)
    with pytest.raises(ValueError, match="its weights, names or dtypes differ"):
        fuse(other, steering=[learnt.at(0.5)])
    with pytest.raises(ValueError, match="block 'mid_blok' is not in UNet2DModel: did you mean 'mid_block'"):
        fuse(pipe, steering=[Injection(SimpleNamespace(direction=directions()[0], block="mid_blok"), 0.5)])
    with pytest.raises(TypeError, match="DDIMScheduler has no unet, transformer, prior or decoder"):
        fuse(SCHEDULERS["ddim"](), steering=[Injection(concept(), 0.5)])
    fuse(SCHEDULERS["ddim"](), steering=[Injection(concept(), 0.5, network=network)])
    with pytest.raises(ValueError, match="concepts for two networks"):
        fuse(pipe, steering=[Injection(concept(), 0.5, network=network), Injection(concept(), 0.5, network=unet())])


class Flow(torch.nn.Module):
    """A transformer as pipelines of flows call it: with timesteps as a share of all, or in half precision."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.mid, self.last = (torch.nn.Linear(6, 6) for _ in range(3))

    def forward(self, hidden_states, timestep=None, return_dict=False):
        return (self.last(torch.tanh(self.mid(torch.tanh(self.first(hidden_states))) + timestep.view(-1, 1, 1).float())),)


@pytest.mark.parametrize("begin", [True, False], ids=["begin index", "none"])
@pytest.mark.parametrize(
    "form", [lambda t, x: t.expand(len(x)) / 1000, lambda t, x: t.expand(len(x)).to(torch.bfloat16), lambda t, x: t[None]]
)
def test_timesteps_in_the_forms_that_networks_are_given(begin, form):
    v = fd.randn((1, 5, 6), seeds=2)[0]
    results = []
    window = (0.5, 4.0)
    for steered in (True, False):
        network, scheduler = Flow(), diffusers.FlowMatchEulerDiscreteScheduler(shift=2.0)
        if steered:
            concept = SimpleNamespace(direction=v / v.norm(), block="mid")
            scheduler = fuse(scheduler, steering=[Injection(concept, 0.7, window=window, network=network)])
        scheduler.set_timesteps(12)
        if begin:
            scheduler.set_begin_index(4)
        x = fd.randn((2, 5, 6), seeds=1)
        with torch.no_grad():
            for t, sigma in zip(scheduler.timesteps[4:], scheduler.sigmas[4:].tolist()):
                inside = window[0] <= sigma / (1 - sigma) <= window[1]
                with edited(network, "mid", v / v.norm(), 0.7) if inside and not steered else contextlib.nullcontext():
                    output = network(x, timestep=form(t, x))[0]
                x = scheduler.step(output, t, x)[0]
        results.append(x)
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-5)


def test_a_timestep_that_is_not_of_the_schedule():
    network, scheduler = Flow(), diffusers.FlowMatchEulerDiscreteScheduler()
    v = fd.randn((1, 5, 6), seeds=2)[0]
    fused = fuse(scheduler, steering=[Injection(SimpleNamespace(direction=v / v.norm(), block="mid"), 0.7, network=network)])
    fused.set_timesteps(5)
    with pytest.raises(ValueError, match="timestep 33.0 is none of scheduler.timesteps"):
        network(torch.ones(2, 5, 6), timestep=torch.full((2,), 33.0))


def test_two_pipelines_with_concepts_share_a_network():
    """One of them was left in the middle of its run."""
    net = unet()
    alone = [pictures(fuse(diffusers.DDIMPipeline(unet(), SCHEDULERS["ddim"]()), steering=[Injection(concept(i), 0.5)])) for i in (0, 1)]
    first, second = (fuse(diffusers.DDIMPipeline(net, SCHEDULERS["ddim"]()), steering=[Injection(concept(i), 0.5)]) for i in (0, 1))
    first.scheduler.set_timesteps(6)
    assert torch.equal(pictures(second), alone[1]) and torch.equal(pictures(first), alone[0])
    assert "forward" not in net.__dict__ and not torch.equal(*alone)


def test_a_run_that_goes_on_without_its_concepts_is_refused():
    pipe = fuse(pipeline(), steering=[Injection(concept(), 0.5)])
    expected = pictures(pipe)
    pipe.unet = unet()
    with pytest.raises(RuntimeError, match="the network of the concepts was not called"):
        pictures(pipe)

    pipe, x = fuse(pipeline(), steering=[Injection(concept(), 0.5)]), torch.randn(2, 3, 8, 8)
    pipe.scheduler.set_timesteps(6)
    t = pipe.scheduler.timesteps[0]
    with pytest.raises(TypeError):
        pipe.unet()
    assert "forward" not in pipe.unet.__dict__
    with pytest.raises(RuntimeError, match="set_timesteps begins another run"):
        pipe.scheduler.step(pipe.unet(x, t).sample, t, x)
    assert torch.equal(pictures(pipe), expected)


def test_a_copied_pipeline_has_its_concepts_in_the_copied_network():
    pipe = fuse(pipeline(), steering=[Injection(concept(), 0.5)])
    twin = copy.deepcopy(pipe)
    assert twin.unet is not pipe.unet and torch.equal(pictures(twin), pictures(pipe))
    assert not torch.equal(pictures(twin), pictures(pipeline()))
