"""StableDiffusion, SDXL, ControlNet, SD3 and Flux with random components, saved, loaded, and run unchanged but for one line."""

import json

import pytest
import torch

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
pytest.importorskip("transformers", reason="transformers is not installed: pipelines that read text need it")

import fastdiff as fd
import fastdiff.integrations.diffusers
from integrations.schedulers import FLOW_SIGMAS, SD, relative
from integrations.tiny_pipelines import KINDS, build, load, one_by_one, run

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
fuse = fd.integrations.diffusers.fuse

SD_SCHEDULERS = {
    "ddim": ("DDIMScheduler", {"clip_sample": False}),
    "ddpm": ("DDPMScheduler", {"clip_sample": False}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "lms": ("LMSDiscreteScheduler", {}),
    "dpm++ 2m karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "dpm++ 2m sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "lcm": ("LCMScheduler", {}),
}
FLOW_SCHEDULERS = {
    "flow euler": ("FlowMatchEulerDiscreteScheduler", {}),
    "flow euler stochastic": ("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}),
    "flow heun": ("FlowMatchHeunDiscreteScheduler", {}),
    "flow dpm++": ("DPMSolverMultistepScheduler", FLOW_SIGMAS),
    "flow unipc": ("UniPCMultistepScheduler", FLOW_SIGMAS),
}
FEW = ["ddim", "euler ancestral", "dpm++ 2m sde"]
NAMES = {
    "text": list(SD_SCHEDULERS),
    "image": ["ddim", "pndm", "euler ancestral", "heun", "dpm++ 2m sde", "unipc", "lcm"],
    "inpaint": ["ddim", "pndm", "euler ancestral", "dpm++ 2m sde", "unipc"],
    "controlnet": FEW,
    "sdxl text": ["euler", *FEW],
    "sdxl image": FEW,
    "sdxl inpaint": FEW,
    "sd3 text": list(FLOW_SCHEDULERS),
    "sd3 image": ["flow euler", "flow heun"],
    "flux text": ["flow euler", "flow euler stochastic"],
    "flux image": ["flow euler"],
}


def first_scheduler(kind):
    if NAMES[kind][0] in FLOW_SCHEDULERS:
        return diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=kind.startswith("flux"))
    return diffusers.PNDMScheduler(**SD, skip_prk_steps=True, steps_offset=1)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folder of a pipeline, by kind."""
    folders = {}

    def folder(kind):
        if kind not in folders:
            folders[kind] = tmp_path_factory.mktemp(kind.replace(" ", "_"))
            build(kind, first_scheduler(kind)).save_pretrained(folders[kind])
        return folders[kind]

    return folder


def loaded(kind, scheduler, saved):
    """As people change schedulers: from the configuration of the one that was saved."""
    pipe = load(kind, saved(kind))
    name, options = {**SD_SCHEDULERS, **FLOW_SCHEDULERS}[scheduler]
    pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config, **options)
    return pipe


@pytest.mark.parametrize("kind, scheduler", [(kind, name) for kind in KINDS for name in NAMES[kind]])
def test_the_same_latents_and_pictures(kind, scheduler, saved, no_own_step):
    pipe = loaded(kind, scheduler, saved)
    expected, pictures = run(kind, pipe)
    assert fuse(pipe) is pipe
    got, images = run(kind, pipe)
    assert len(got) == len(expected) > 1 and torch.isfinite(expected[-1]).all() and pictures.std() > 1e-3
    assert float((expected[-1] - expected[0]).abs().max()) > 1e-2
    assert max(relative(a, b) for a, b in zip(got, expected)) < 1e-4
    assert float((images - pictures).abs().max()) < 1e-4
    again, _ = run(kind, pipe)
    assert torch.equal(again[-1], got[-1])


@pytest.mark.parametrize("kind", ["text", "sdxl text", "sd3 text"])
def test_a_fused_pipeline_is_saved_as_what_it_was(kind, saved, tmp_path):
    pipe = fuse(load(kind, saved(kind)))
    run(kind, pipe, steps=2)  # what a run leaves behind is not saved
    pipe.save_pretrained(tmp_path)
    for name in ("model_index.json", "scheduler/scheduler_config.json"):
        now, before = (json.loads((folder / name).read_text()) for folder in (tmp_path, saved(kind)))
        now.pop("_name_or_path", None)  # where it was loaded from
        assert now == before
    assert type(load(kind, tmp_path).scheduler) is type(first_scheduler(kind))


def test_components_are_shared_with_another_pipeline(saved, no_own_step):
    """One fused scheduler in two pipelines, as `from_pipe` and `components` have it."""
    text = fuse(loaded("text", "dpm++ 2m karras", saved))
    image = diffusers.StableDiffusionImg2ImgPipeline.from_pipe(text)
    image.set_progress_bar_config(disable=True)
    assert image.scheduler is text.scheduler
    first, _ = run("text", text)
    between, _ = run("image", image)
    again, _ = run("text", text)
    expected, _ = run("image", loaded("image", "dpm++ 2m karras", saved))
    assert torch.equal(first[-1], again[-1]) and relative(between[-1], expected[-1]) < 1e-4


def test_an_interrupted_run_does_not_touch_the_next(saved, no_own_step):
    pipe = fuse(loaded("text", "unipc", saved))
    expected, _ = run("text", pipe)

    def stop(pipe, i, t, values):
        pipe._interrupt = i >= 3
        return values

    options = KINDS["text"].options_of_call()
    early = pipe(**options, num_inference_steps=8, generator=torch.Generator().manual_seed(0), callback_on_step_end=stop,
                 output_type="latent").images  # fmt: skip
    assert torch.equal(early, expected[3])
    assert torch.equal(run("text", pipe)[0][-1], expected[-1])


def test_a_callback_that_changes_the_latents(saved, no_own_step):
    """The history stays: only what is handed on is another tensor, of another dtype even."""
    results = []
    for prepare in (lambda pipe: pipe, fuse):
        pipe = prepare(loaded("text", "dpm++ 2m karras", saved))

        def change(pipe, i, t, values):
            return {"latents": torch.flip(values["latents"], (-1,)) * 0.9} if i % 2 else values

        options = {**KINDS["text"].options_of_call(), "num_inference_steps": 8, "output_type": "latent"}
        results.append(pipe(**options, generator=torch.Generator().manual_seed(0), callback_on_step_end=change).images)
    assert relative(results[1], results[0]) < 1e-4


# ---- each sample by itself


@pytest.mark.parametrize("noise", fd.integrations.diffusers.NOISES)
@pytest.mark.parametrize("scheduler", ["ddpm", "euler ancestral", "dpm++ 2m sde"])
def test_eight_at_once_are_eight_alone(scheduler, noise, saved, no_own_step):
    pipe = fuse(loaded("text", scheduler, saved), noise=noise)
    one_by_one(pipe.unet)
    seeds = [3, 1, 4, 15, 92, 65, 35, 89]

    def generators():
        return [torch.Generator().manual_seed(s) for s in seeds]

    whole, _ = run("text", pipe, steps=5, generator=generators(), num_images_per_prompt=8, output_type="latent")
    for i, generator in enumerate(generators()):
        alone, _ = run("text", pipe, steps=5, generator=generator, output_type="latent")
        assert all(torch.equal(a, b[i : i + 1]) for a, b in zip(alone, whole)), f"sample {i}"
    assert len({float(x.sum()) for x in whole[-1]}) == 8
