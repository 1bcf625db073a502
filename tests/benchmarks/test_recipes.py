"""The recipes end to end: tiny checkpoints of every format, written to disk with random weights, and images beside them."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import fastdiff as fd
from benchmarks.recipes import checkpoints, edm, openai, settings, steer
from benchmarks.recipes.__main__ import main
from benchmarks.recipes.images import open_images
from fastdiff import guidance

SIZE, SHAPE = 8, (3, 8, 8)
CLASSES = ("bird", "cat", "dog")
FILES = {"diffusers": "diffusers", "openai": "openai.pt", "edm": "edm.safetensors"}

CLASSIFIERS = '''
import torch

class Colours(torch.nn.Module):
    """Which colour is brightest: one class for each."""
    def forward(self, x, sigma=None):
        return 4 * x.mean((2, 3))

class Bright(torch.nn.Module):
    def forward(self, x):
        return 8 * x.mean((1, 2, 3))[:, None] * torch.tensor([-1.0, 1.0])

def wide():
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 7))

def colours():
    return Colours()

def red():
    return lambda x: torch.stack([-8 * x[:, 0].mean((1, 2)), 8 * x[:, 0].mean((1, 2))], 1)

def bright():
    return Bright()
'''


@pytest.fixture(scope="module")
def pixels():
    """(36, 8, 8, 3) uint8, twelve of each class: noise, with one colour brighter by class."""
    generator = torch.Generator().manual_seed(0)
    found = torch.randint(0, 180, (36, SIZE, SIZE, 3), generator=generator, dtype=torch.uint8)
    for i, picture in enumerate(found):
        picture[..., i // 12] += 75
    return found.numpy()


@pytest.fixture(scope="module")
def places(tmp_path_factory, pixels):
    """A folder with checkpoints, images and classifiers."""
    root = tmp_path_factory.mktemp("recipes")
    (root / "classifiers.py").write_text(CLASSIFIERS)
    for i, picture in enumerate(pixels):
        folder = root / "images" / CLASSES[i // 12]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(folder / f"{i:03}.png")
    save_checkpoints(root)
    return root


def random_weights(network, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for p in network.parameters():
        scale = 0.7 * p[0].numel() ** -0.5 if p.ndim > 1 else 0.1
        p.data = torch.randn(p.shape, generator=generator) * scale + (p.ndim == 1) * p.data
    return network.eval().requires_grad_(False)


def save_checkpoints(root):
    torch.manual_seed(0)
    torch.save(random_weights(openai.OpenAIUNet(openai.Config(3, 6, 32, (1, 1), 1, (1,)))).state_dict(), root / "openai.pt")
    state = random_weights(edm.EDMUNet(edm.Config(SIZE, 3, 8, (1, 2), 1, (4,), "ddpmpp", augment=9))).state_dict()
    save_file({f"model.{name}": t for name, t in state.items()}, root / "edm.safetensors",
              metadata={"precond": "EDMPrecond", "sigma_data": "0.5"})
    try:
        import diffusers
    except ImportError:
        return
    network = random_weights(diffusers.UNet2DModel(
        sample_size=SIZE, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8, attention_head_dim=None,
        freq_shift=1, flip_sin_to_cos=False, down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D")))
    diffusers.DDPMPipeline(network, diffusers.DDPMScheduler()).save_pretrained(root / "diffusers")


def run(places, data, checkpoint, method, out, *more):
    """Runs the command. Returns its code and the samples."""
    if checkpoint == "diffusers":
        pytest.importorskip("diffusers", reason="the checkpoint is one of diffusers")
    size = ["--size", "8"] if checkpoint == "openai" else []
    code = main([data, "--checkpoint", str(places / FILES[checkpoint]), "--images", str(places / "images"), "--method", method,
                 "--out", str(out), "--count", "3", "--batch-size", "2", "--device", "cpu", *size, *more])
    return code, load_file(out / "samples.safetensors")["samples"] if code == 0 else None


STEPS = {  # few, with a level in each window
    "diffusers": ("--steps", "4"),
    "openai": ("--steps", "4", "--window", "1,inf", "--concept-window", "0.3,4", "--block", "input_blocks.3"),
    "edm": ("--steps", "4", "--window", "5,inf", "--concept-window", "0.3,20"),
}


def without(options, *names):
    pairs = list(zip(options[::2], options[1::2]))
    return [text for pair in pairs if pair[0] not in names for text in pair]


def unsteered(format):
    return without(STEPS[format], "--window", "--concept-window", "--block")


# ---- steering


@pytest.mark.parametrize("format", STEPS)
def test_steering_from_each_format(format, places, tmp_path):
    code, plain = run(places, "cifar10", format, "none", tmp_path / "none", *unsteered(format))
    assert code == 0 and plain.shape == (3, *SHAPE)
    code, both = run(places, "cifar10", format, "na-rfm", tmp_path / "both", "--target", "cat", *STEPS[format])
    _, aligned = run(places, "cifar10", format, "na", tmp_path / "na", "--target", "cat",
                     *without(STEPS[format], "--concept-window", "--block"))
    assert code == 0 and both.isfinite().all()
    assert not torch.equal(both, plain) and not torch.equal(both, aligned) and not torch.equal(aligned, plain)
    names = {path.name for path in (tmp_path / "both").iterdir()}
    assert names == {"samples.safetensors", "samples.png", "report.json", "alignment.safetensors", "concept-0.safetensors"}
    report = json.loads((tmp_path / "both" / "report.json").read_text())
    assert report["checkpoint"]["format"] == format and report["targets"] == ["cat"] and len(report["fits"]) == 2
    assert report["settings"]["weight"] == {"value": "3", "source": settings.settings("cifar10", format, "na")["weight"].source}

    # The fits of that run, in place of new ones: the same bits.
    fits = ("--target", "cat", "--fits", str(tmp_path / "both"), *STEPS[format])
    _, again = run(places, "cifar10", format, "na-rfm", tmp_path / "again", *fits)
    assert torch.equal(again, both)

    # Weights of zero: the bits of what is not steered.
    _, still = run(places, "cifar10", format, "na-rfm", tmp_path / "zero", *fits, "--weight", "0", "--concept-weight", "0")
    assert torch.equal(still, plain)


def test_alignment_leads_to_the_class(places, tmp_path):
    """With no network to speak of, that of N(0, 1), noise alignment alone makes the class's colour the brightest."""
    path = tmp_path / "zero.safetensors"
    state = load_file(places / "edm.safetensors")
    save_file({name: torch.zeros_like(t) if "aux_conv" in name else t for name, t in state.items()}, path)
    shares = []
    for method, target in (("none", "cat"), ("na", "cat"), ("na", "dog"), ("latent", "dog")):
        window = ["--window", "0.05,inf"] if method != "none" else []
        out = tmp_path / f"{method}-{target}"
        assert main(["cifar10", "--checkpoint", str(path), "--images", str(places / "images"), "--method", method,
                     "--target", target, "--out", str(out), "--count", "6", "--steps", "6", "--device", "cpu", *window,
                     "--judge", f"{places / 'classifiers.py'}:colours"]) == 0
        shares.append(json.loads((out / "report.json").read_text())["judged right"])
    assert shares[0] < 0.7 and shares[1:] == [1, 1, 1]


def test_two_attributes_at_once(places, pixels, tmp_path):
    """CelebA's own table; a concept for each attribute, alignment with the images that have both, guidance by two classifiers."""
    pytest.importorskip("diffusers", reason="the checkpoint is one of diffusers")
    folder = tmp_path / "faces"
    folder.mkdir()
    lines = ["36", "Red Bright"]
    for i, picture in enumerate(pixels):
        Image.fromarray(picture).resize((20, 18), Image.Resampling.NEAREST).save(folder / f"{i}.jpg")
        lines.append(f"{i}.jpg  {1 if i < 12 else -1} {1 if i % 2 else -1}")
    (tmp_path / "anno.txt").write_text("\n".join(lines) + "\n")
    common = ("--images", str(folder), "--attributes", str(tmp_path / "anno.txt"), "--crop", "--target", "Red",
              "--target", "not Bright")
    code, samples = run(places, "celebahq", "diffusers", "na-rfm", tmp_path / "a", *common, "--steps", "4")
    assert code == 0 and samples.isfinite().all()
    alignment = fd.steering.NoiseAlignment.load(tmp_path / "a" / "alignment.safetensors")
    assert alignment.targets["Red and not Bright"].about["count"] == 6 and alignment.full.about["count"] == 36
    concepts = [fd.steering.Concept.load(tmp_path / "a" / f"concept-{i}.safetensors") for i in (0, 1)]
    assert [c.label for c in concepts] == ["Red", "not Bright"] and concepts[0].block == "network.down_blocks.1"

    guides = [text for name in ("red", "bright") for text in ("--classifier", f"{places / 'classifiers.py'}:{name}")]
    judges = [text.replace("--classifier", "--judge") for text in guides]
    strength = ("--steps", "3", "--strength", "30")
    code, guided = run(places, "celebahq", "diffusers", "mpgd", tmp_path / "b", *common, *guides, *judges, *strength)
    assert code == 0 and guided.clamp(-1, 1)[:, 0].mean() > 0 > guided.clamp(-1, 1).mean()
    assert json.loads((tmp_path / "b" / "report.json").read_text())["judged right"] == 1


# ---- guidance

STRENGTHS = {"cg": 20, "dps": 30, "lgd": 100, "freedom": 30, "mpgd": 30, "ugd": 20}


@pytest.fixture(scope="module")
def plain(places, tmp_path_factory):
    """Samples with the sampler of the methods of guidance, and without any."""
    more = ("--sampler", "ddim", "--eta", "1", "--clip", "yes", "--steps", "3")
    return run(places, "cifar10", "edm", "none", tmp_path_factory.mktemp("plain"), *more)[1]


@pytest.mark.parametrize("method", settings.GUIDANCE)
def test_guidance_raises_the_probability_of_the_class(method, places, plain, tmp_path):
    common = ("--target", "dog", "--classifier", f"{places / 'classifiers.py'}:colours", "--steps", "3")
    strength = ("--rho", "20", "--mu", "5") if method == "tfg" else ("--strength", str(STRENGTHS[method]))
    code, guided = run(places, "cifar10", "edm", method, tmp_path / "a", *common, *strength)
    log_p = guidance.labels(lambda x: 4 * x.mean((2, 3)), 3)
    label = torch.full((3,), CLASSES.index("dog"))
    assert code == 0 and (log_p(guided, label) > log_p(plain, label)).all()
    counts = json.loads((tmp_path / "a" / "report.json").read_text())["evaluations of guidance"]
    backward = 0 if method in ("cg", "mpgd") else 6
    assert (counts["network_forward"], counts["network_backward"]) == (6, backward)  # three steps, two batches

    strength = ("--rho", "0", "--mu", "0") if method == "tfg" else ("--strength", "0")
    _, still = run(places, "cifar10", "edm", method, tmp_path / "c", *common, *strength)
    assert torch.equal(still, plain)


# ---- loading


def test_a_diffusers_network_is_loaded_as_it_was_saved(places, tmp_path):
    diffusers = pytest.importorskip("diffusers", reason="it makes the checkpoint")
    saved = diffusers.UNet2DModel.from_pretrained(places / "diffusers" / "unet", low_cpu_mem_usage=False).eval()
    x, t = fd.randn((2, *SHAPE), seeds=0), torch.tensor([3.0, 700.0])
    expected = saved(x, t).sample.detach()

    # As google/ddpm-cifar10-32 is laid out: all files in one folder, .bin, and attention by its old names.
    flat = tmp_path / "flat"
    flat.mkdir()
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = saved.state_dict()
    for new, name in old.items():
        state = {k.replace(f"attentions.0.{new}.", f"attentions.0.{name}."): v for k, v in state.items()}
    torch.save(state, flat / "diffusion_pytorch_model.bin")
    (flat / "config.json").write_text((places / "diffusers" / "unet" / "config.json").read_text())
    (flat / "scheduler_config.json").write_text(json.dumps({
        "_class_name": "DDPMScheduler", "beta_start": 0.0002, "beta_end": 0.03, "beta_schedule": "linear",
        "num_train_timesteps": 500}))
    for path in (places / "diffusers", places / "diffusers" / "unet", flat):
        checkpoint = checkpoints.load(path)
        assert torch.equal(checkpoint.model(x, t), expected) and checkpoint.shape == SHAPE and checkpoint.block == "down_blocks.1"
    betas = np.linspace(0.0002, 0.03, 500)
    assert np.allclose(checkpoint.how["schedule"].alphas_cumprod, np.cumprod(1 - betas), rtol=1e-4)

    lacking = {k: v for k, v in state.items() if "conv_out" not in k}
    torch.save(lacking, flat / "diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match="weights and configuration differ, in conv_out"):
        checkpoints.load(flat)


@pytest.mark.parametrize("format", STEPS)
def test_a_second_evaluation_shares_the_encoder(format, places):
    if format == "diffusers":
        pytest.importorskip("diffusers", reason="the checkpoint is one of diffusers")
    checkpoint = checkpoints.load(places / FILES[format], usual_size=SIZE)
    branch = fd.steering.Branch(checkpoint.model, [f"network.{checkpoint.block}"])
    x, time = fd.randn((2, *SHAPE), seeds=0), torch.ones(2)
    with torch.no_grad(), branch.first():
        first = checkpoint.model(x, time)
    with torch.no_grad(), branch.second():
        assert torch.equal(checkpoint.model(x, time), first)
    assert f"network.{checkpoint.block}" in branch.shared and not branch.computed


def test_learnt_variance_is_left_out_and_time_is_scaled(places):
    checkpoint = checkpoints.load(places / "openai.pt", size=SIZE)
    network = openai.OpenAIUNet(openai.Config(3, 6, 32, (1.0, 1.0), 1, (1,))).eval()
    network.load_state_dict(torch.load(places / "openai.pt", weights_only=True))
    x = fd.randn((2, *SHAPE), seeds=0)
    assert torch.equal(checkpoint.model(x, torch.tensor([1200.0, 4.0])), network(x, torch.tensor([300.0, 1.0]))[:, :3])
    schedule = checkpoint.how["schedule"]  # improved DDPM: 4000 steps of a cosine, to which 1000 of ADM's are scaled
    middle = math.cos((0.5 + 0.008) / 1.008 * math.pi / 2) ** 2
    assert schedule.timesteps == 4000 and schedule.alphas_cumprod[1999] == pytest.approx(middle, rel=1e-3)
    linear = checkpoints.load(places / "openai.pt", size=SIZE, schedule="linear", timesteps=1000)
    assert torch.equal(linear.model(x, torch.tensor([300.0, 1.0])), checkpoint.model(x, torch.tensor([1200.0, 4.0])))
    with pytest.raises(ValueError, match="5 heads do not divide 32 channels"):
        checkpoints.load(places / "openai.pt", size=SIZE, heads=5)


def test_half_precision_is_widened(places, tmp_path):
    state = load_file(places / "edm.safetensors")
    torch.save({name: t.half() for name, t in state.items()}, tmp_path / "half.pt")
    checkpoint = checkpoints.load(tmp_path / "half.pt")
    weight = state["model.map_layer0.weight"].half().float()
    assert torch.equal(checkpoint.model.network.map_layer0.weight, weight)
    assert "sigma_data is not in the file" in checkpoint.notes[0]


def test_images_of_every_kind_are_the_same(places, pixels, tmp_path):
    labels = np.arange(36) // 12
    np.savez(tmp_path / "all.npz", images=pixels, labels=labels, classes=np.array(CLASSES))
    save_file({"images": torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), "labels": torch.from_numpy(labels)},
              tmp_path / "all.safetensors", metadata={"classes": json.dumps(CLASSES)})
    kinds = [open_images(path, SHAPE) for path in (places / "images", tmp_path / "all.npz", tmp_path / "all.safetensors")]
    expected = torch.from_numpy(pixels).permute(0, 3, 1, 2)[12:24] / 127.5 - 1
    for images in kinds:
        assert images.classes == CLASSES and images.exclusive
        assert torch.equal(images.read(images.all_of(["cat"])), expected)
        assert images.spread(torch.arange(36), 4).tolist() == [0, 9, 18, 27]
    (tmp_path / "both" / "Male+Old").mkdir(parents=True)
    (tmp_path / "both" / "Male").mkdir()
    for folder in ("Male+Old", "Male"):
        for i in range(2):
            Image.fromarray(pixels[i]).save(tmp_path / "both" / folder / f"{i}.png")
    both = open_images(tmp_path / "both", SHAPE)
    assert both.classes == ("Male", "Old") and both.all_of(["Male", "not Old"]).tolist() == [0, 1] and not both.exclusive


# ---- settings


@pytest.mark.parametrize("format", STEPS)
def test_the_published_windows_hold_calls_of_the_published_plans(format, places):
    if format == "diffusers":
        pytest.importorskip("diffusers", reason="the checkpoint is one of diffusers")
    checkpoint = checkpoints.load(places / FILES[format], usual_size=SIZE)
    for data in settings.DATA:
        for method in settings.METHODS:
            s = {name: given.value for name, given in settings.settings(data, format, method).items()}
            plan = steer.make_plan(checkpoint, s)
            steer.check(checkpoint, plan, {**s, "block": None})  # this network has other blocks
            assert plan.steps.max() == s["steps"] - 1
            acting = plan.window(*s["concept_window"]).sum() if "concept_window" in s else 2
            assert acting >= 2


def test_show_names_the_sources_and_needs_the_checkpoint_alone(places, capsys):
    assert main(["cifar10", "--checkpoint", str(places / "edm.safetensors"), "--method", "na", "--show"]) == 0
    out = capsys.readouterr().out
    assert "--window-steps     0,7" in out and settings.NOTES in out and "last block of the encoder enc.4x4_block0" in out


# ---- what is refused, before any work

REFUSED = {
    "a missing checkpoint": (["--checkpoint", "nowhere.pt"], "nowhere.pt is not there"),
    "a missing folder": (["--images", "nowhere"], "nowhere is not there"),
    "a class that is not there": (["--target", "cart"], "target 'cart' is not known: did you mean 'cat'?"),
    "two classes at once": (["--target", "dog"], "0 of 36 images are cat and dog"),
    "a block that is not there": (["--block", "enc.4x4_blok0"], "did you mean 'enc.4x4_block0'"),
    "a window without a level": (["--concept-window", "0.021,0.022"], "no call of the model falls into window (0.021, 0.022)"),
    "an option of another method": (["--rho", "1"], "--rho is not of na-rfm"),
    "two windows": (["--window-steps", "0,1"], "--window and --window-steps"),
    "another size": (["--size", "32"], "is for images of 8 x 8, size is 32"),
    "a classifier without guidance": (["--classifier", "x.py:f"], "the method is na-rfm"),
    "guidance without a classifier": (["--method", "tfg"], "--classifier was not given"),
    "a missing classifier": (["--judge", "nowhere.py:f"], "--judge: nowhere.py is not there"),
    "a classifier of other classes": (["--judge", "CLASSIFIERS:wide"], "--judge has 7 classes, the images have 3"),
    "a sampler": (["--sampler", "hoin"], "did you mean 'heun'?"),
    "fits that are not there": (["--fits", "nowhere"], "No such file"),
    "no samples": (["--count", "0"], "--count is 0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case, places, tmp_path, capsys):
    more, message = REFUSED[case]
    more = [text.replace("CLASSIFIERS", str(places / "classifiers.py")) for text in more]
    code, _ = run(places, "cifar10", "edm", "na-rfm", tmp_path / "out", "--target", "cat", *STEPS["edm"], *more)
    assert code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_wrong_files_are_refused_by_name(places, pixels, tmp_path):
    state = load_file(places / "edm.safetensors")
    save_file(state, tmp_path / "vp.safetensors", metadata={"precond": "VPPrecond"})
    save_file({**state, "model.extra": torch.zeros(1)}, tmp_path / "extra.safetensors")
    save_file({"conv.weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    (tmp_path / "net.pkl").write_bytes(b"")
    (tmp_path / "text.pt").write_text("hello")
    torch.save({"ema": state, "step": 3}, tmp_path / "nested.pt")
    torch.save(CallsCode(), tmp_path / "code.pt")
    (tmp_path / "empty").mkdir()
    messages = {
        "vp.safetensors": "trained with VPPrecond", "extra.safetensors": "extra", "other.safetensors": "holds conv.weight",
        "net.pkl": "is a pickle, which may run any code", "text.pt": "no file of tensors alone", "nested.pt": "holds ema, step",
        "code.pt": "no file of tensors alone", "empty": "config.json is not there"}
    for name, message in messages.items():
        with pytest.raises((ValueError, OSError), match=message) as caught:
            checkpoints.load(tmp_path / name)
        assert name in str(caught.value)

    Image.fromarray(pixels[0]).resize((10, 8)).save(places / "images" / "cat" / "wide.png")
    try:
        images = open_images(places / "images", SHAPE)
        with pytest.raises(ValueError, match=r"wide\.png is 10 x 8, the network takes 8 x 8: --crop"):
            images.store.check(images.all_of(["cat"]))
        assert open_images(places / "images", SHAPE, crop=True).read(images.all_of(["cat"])).shape == (13, *SHAPE)
    finally:
        (places / "images" / "cat" / "wide.png").unlink()
    np.savez(tmp_path / "float.npz", images=pixels / 255, labels=np.zeros(36, int))
    with pytest.raises(ValueError, match=r"images are float64 \(36, 8, 8, 3\): uint8 \(N, 8, 8, 3\)"):
        open_images(tmp_path / "float.npz", SHAPE)
    (tmp_path / "table.csv").write_text("file,Male\nnobody.png,1\n")
    with pytest.raises(FileNotFoundError, match="nobody.png"):
        open_images(places / "images", SHAPE, attributes=tmp_path / "table.csv")


class CallsCode:
    """A pickle that would call something."""

    def __reduce__(self):
        return (print, ("opened",))
