"""diffusers' pipelines with random components, saved, loaded, and run unchanged but for one line."""

import pytest
import torch

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")

import fastdiff as fd
import fastdiff.integrations.diffusers
from integrations.tiny_pipelines import one_by_one

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def unet(sample_size=8):
    torch.manual_seed(0)
    return diffusers.UNet2DModel(
        sample_size=sample_size,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    ).eval()


def ddpm():
    return diffusers.DDPMPipeline(unet(), diffusers.DDPMScheduler(num_train_timesteps=100))


def ddim():
    return diffusers.DDIMPipeline(unet(), diffusers.DDIMScheduler(num_train_timesteps=100))


def consistency():
    return diffusers.ConsistencyModelPipeline(unet(), diffusers.CMStochasticIterativeScheduler())


def dit(scheduler=None):
    torch.manual_seed(0)
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        sample_size=4,
        patch_size=2,
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_zero",
        activation_fn="gelu-approximate",
        norm_elementwise_affine=False,
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8,),
        latent_channels=4,
        norm_num_groups=4,
        sample_size=8,
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
    )
    return diffusers.DiTPipeline(transformer.eval(), vae.eval(), scheduler or diffusers.DPMSolverMultistepScheduler())


PIPELINES = {
    "ddpm": (ddpm, {"batch_size": 2, "num_inference_steps": 8}),
    "ddim": (ddim, {"batch_size": 2, "num_inference_steps": 8, "eta": 0.5}),
    "ddim without noise": (ddim, {"batch_size": 2, "num_inference_steps": 8}),
    "consistency": (consistency, {"batch_size": 2, "num_inference_steps": 4}),
    "dit": (dit, {"class_labels": [1, 2], "num_inference_steps": 6}),
    "dit, unipc": (lambda: dit(diffusers.UniPCMultistepScheduler()), {"class_labels": [1], "num_inference_steps": 6}),
    "dit, ddpm": (lambda: dit(diffusers.DDPMScheduler(clip_sample=False)), {"class_labels": [1], "num_inference_steps": 6}),
}


def pictures(pipe, options, generator=None):
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    torch.manual_seed(1)  # some pipelines do not hand the generator on
    images = pipe(**options, generator=generator, output_type="np").images
    return torch.as_tensor(images)


def loaded(build, folder):
    pipe = build()
    pipe.save_pretrained(folder)
    return type(pipe).from_pretrained(folder, low_cpu_mem_usage=False)


@pytest.mark.parametrize("name", PIPELINES)
def test_a_pipeline_draws_the_same_pictures(name, tmp_path, no_own_step):
    build, options = PIPELINES[name]
    pipe = loaded(build, tmp_path)
    expected, scheduler = pictures(pipe, options), pipe.scheduler
    assert fd.integrations.diffusers.fuse(pipe) is pipe
    got, again = pictures(pipe, options), pictures(pipe, options)
    assert pipe.scheduler is not scheduler and isinstance(pipe.scheduler, type(scheduler))
    assert float((got - expected).abs().max()) < 1e-4 * max(1.0, float(expected.abs().max()))
    assert torch.equal(got, again)


def test_a_fused_pipeline_is_saved_as_what_it_was(tmp_path):
    build, options = PIPELINES["ddim"]
    pipe = fd.integrations.diffusers.fuse(build())
    pipe.save_pretrained(tmp_path)
    loaded = diffusers.DDIMPipeline.from_pretrained(tmp_path)
    assert type(loaded.scheduler) is diffusers.DDIMScheduler
    expected = pictures(loaded, options)
    got = pictures(fd.integrations.diffusers.fuse(loaded), options)
    assert float((got - expected).abs().max()) < 1e-4


@pytest.mark.parametrize("noise", fd.integrations.diffusers.NOISES)
@pytest.mark.parametrize("name", ["ddpm", "ddim"])
def test_eight_at_once_are_eight_alone(name, noise, no_own_step):
    """In every bit where the network's own last bits do not depend on the batch."""
    build, options = PIPELINES[name]
    pipe = fd.integrations.diffusers.fuse(build(), noise=noise)
    one_by_one(pipe.unet)
    seeds = [4, 5, 6, 1, 10, 2**40, 0, 7]
    whole = pictures(pipe, {**options, "batch_size": 8}, [torch.Generator().manual_seed(s) for s in seeds])
    for i, seed in enumerate(seeds):
        alone = pictures(pipe, {**options, "batch_size": 1}, torch.Generator().manual_seed(seed))
        assert torch.equal(alone[0], whole[i])
        assert i == 0 or float((whole[0] - whole[i]).abs().max()) > 1e-2


def test_a_batch_through_a_network_that_mixes_nothing_but_its_last_bits():
    build, options = PIPELINES["ddpm"]
    pipe = fd.integrations.diffusers.fuse(build(), noise="philox")
    whole = pictures(pipe, {**options, "batch_size": 3}, [torch.Generator().manual_seed(s) for s in (4, 5, 6)])
    alone = pictures(pipe, {**options, "batch_size": 1}, [torch.Generator().manual_seed(5)])
    assert float((whole[1:2] - alone).abs().max()) < 1e-4


def test_a_pipeline_of_pipelines_is_refused():
    """As Kandinsky's and Würstchen's combined ones, which never step a scheduler of their own."""

    class Combined(diffusers.DiffusionPipeline):
        def __init__(self, first, second):
            super().__init__()
            self.register_modules(scheduler=second.scheduler)
            self.prior_pipe, self.decoder_pipe = first, second

    first, second = ddpm(), ddpm()
    with pytest.raises(ValueError, match="steps the schedulers of its own pipelines: fuse prior_pipe and decoder_pipe, one by one"):
        fd.integrations.diffusers.fuse(Combined(first, second))
    assert type(second.scheduler).__name__ == "DDPMScheduler" and not hasattr(second.scheduler, "_fastdiff_plain")
