"""StableDiffusion with random components: text to image, image to image, inpainting."""

import warnings

import pytest
import torch

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed: StableDiffusion's pipelines need it")

import fastdiff as fd
import fastdiff.integrations.diffusers

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
SCHEDULERS = {
    "ddim": lambda: diffusers.DDIMScheduler(clip_sample=False, steps_offset=1),
    "pndm": lambda: diffusers.PNDMScheduler(skip_prk_steps=True, steps_offset=1),
    "euler ancestral": lambda: diffusers.EulerAncestralDiscreteScheduler(steps_offset=1),
    "dpm++ 2m sde": lambda: diffusers.DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++", steps_offset=1),
    "unipc": lambda: diffusers.UniPCMultistepScheduler(steps_offset=1),
}
PIPELINES = {
    "text": ("StableDiffusionPipeline", {"height": 16, "width": 16}),
    "image": ("StableDiffusionImg2ImgPipeline", {"image": 0.5, "strength": 0.6}),
    "inpaint": ("StableDiffusionInpaintPipeline", {"image": 0.5, "mask_image": 1.0, "height": 16, "width": 16, "strength": 0.8}),
}


def components(scheduler):
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4,
        cross_attention_dim=16, attention_head_dim=4, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"))  # fmt: skip
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8), latent_channels=4, norm_num_groups=4, sample_size=16,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)  # fmt: skip
    text = transformers.CLIPTextConfig(
        hidden_size=16, intermediate_size=16, num_attention_heads=2, num_hidden_layers=1, vocab_size=100)  # fmt: skip
    return {"unet": unet.eval(), "vae": vae.eval(), "text_encoder": transformers.CLIPTextModel(text).eval(), "tokenizer": None,
            "scheduler": scheduler, "safety_checker": None, "feature_extractor": None}  # fmt: skip


def pictures(pipe, options):
    pipe.set_progress_bar_config(disable=True)
    options = dict(options)
    for name, channels in (("image", 3), ("mask_image", 1)):
        if name in options:
            options[name] = torch.full((1, channels, 16, 16), options[name])
    if "mask_image" in options:
        options["mask_image"][..., :8] = 0
    words = torch.linspace(-1, 1, 2 * 16).view(1, 2, 16)
    return torch.as_tensor(pipe(prompt_embeds=words, negative_prompt_embeds=-words, num_inference_steps=10, guidance_scale=3.0,
                                generator=torch.Generator().manual_seed(0), output_type="np", **options).images)  # fmt: skip


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("kind", PIPELINES)
def test_the_same_pictures(kind, scheduler):
    name, options = PIPELINES[kind]
    cls = getattr(diffusers, name)
    expected = pictures(cls(**components(SCHEDULERS[scheduler]()), requires_safety_checker=False), options)
    pipe = cls(**components(SCHEDULERS[scheduler]()), requires_safety_checker=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*the scheduler's own step is used.*")
        got = pictures(fd.integrations.diffusers.fuse(pipe), options)
    assert torch.isfinite(expected).all() and expected.std() > 1e-3
    assert float((got - expected).abs().max()) < 1e-4
