"""Pipelines of diffusers with tiny random components: text to image, image to image, inpainting, ControlNet, SDXL, SD3, Flux.

SD and SDXL read words, by CLIP's own classes; SD3 and Flux are given embeddings, as where the text encoders are elsewhere.
"""

import string
from dataclasses import dataclass, field

import pytest
import torch

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")

SIZE = 16  # of a picture, in pixels; latents are half of it
WORDS = 16  # width of an embedding


def autoencoder(latent_channels=4, **options):
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 8), latent_channels=latent_channels, norm_num_groups=4, sample_size=SIZE,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, **options).eval()  # fmt: skip


def unet(in_channels=4, cross_attention_dim=WORDS, **options):
    return diffusers.UNet2DConditionModel(
        sample_size=SIZE // 2, in_channels=in_channels, out_channels=4, layers_per_block=1, block_out_channels=(8, 16),
        norm_num_groups=4, cross_attention_dim=cross_attention_dim, attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        **options).eval()  # fmt: skip


def reader(projection=False):
    """A tokenizer of letters, and a text encoder."""
    import transformers

    vocabulary = ["<|startoftext|>", "<|endoftext|>", *string.ascii_lowercase, *(c + "</w>" for c in string.ascii_lowercase)]
    tokenizer = transformers.CLIPTokenizer({token: i for i, token in enumerate(vocabulary)}, [], model_max_length=12)
    config = transformers.CLIPTextConfig(
        hidden_size=WORDS, intermediate_size=16, num_attention_heads=2, num_hidden_layers=2, vocab_size=len(vocabulary),
        max_position_embeddings=12, bos_token_id=0, eos_token_id=1, pad_token_id=1, projection_dim=WORDS)  # fmt: skip
    cls = transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel
    return tokenizer, cls(config).eval()


def sd_components(scheduler, **more):
    tokenizer, text_encoder = reader()
    return {"unet": unet(), "vae": autoencoder(), "text_encoder": text_encoder, "tokenizer": tokenizer, "scheduler": scheduler,
            "safety_checker": None, "feature_extractor": None, "requires_safety_checker": False, **more}  # fmt: skip


def controlnet():
    net = diffusers.ControlNetModel.from_unet(unet(), conditioning_embedding_out_channels=(4, 8))
    for block in (*net.controlnet_down_blocks, net.controlnet_mid_block, net.controlnet_cond_embedding.conv_out):
        torch.nn.init.normal_(block.weight, std=0.1)  # they begin at zero: then the control would change nothing
    return net.eval()


def sdxl_components(scheduler):
    (tokenizer, text_encoder), (tokenizer_2, text_encoder_2) = reader(), reader(projection=True)
    denoiser = unet(
        cross_attention_dim=2 * WORDS, addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + WORDS)  # fmt: skip
    return {"unet": denoiser, "vae": autoencoder(), "text_encoder": text_encoder, "tokenizer": tokenizer,
            "text_encoder_2": text_encoder_2, "tokenizer_2": tokenizer_2, "scheduler": scheduler,
            "add_watermarker": False}  # fmt: skip


def sd3_components(scheduler):
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=SIZE // 2, patch_size=1, in_channels=4, out_channels=4, num_layers=1, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=WORDS, caption_projection_dim=16, pooled_projection_dim=WORDS,
        pos_embed_max_size=16)  # fmt: skip
    vae = autoencoder(shift_factor=0.06, scaling_factor=1.5, use_quant_conv=False, use_post_quant_conv=False)
    return {"transformer": transformer.eval(), "vae": vae, "scheduler": scheduler}


def flux_components(scheduler):
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=WORDS, pooled_projection_dim=WORDS, axes_dims_rope=(4, 4, 8))  # fmt: skip
    vae = autoencoder(1, shift_factor=0.06, scaling_factor=1.5, use_quant_conv=False, use_post_quant_conv=False)
    return {"transformer": transformer.eval(), "vae": vae, "scheduler": scheduler}


def embeddings(negative=True):
    words, whole = torch.linspace(-1, 1, 4 * WORDS).view(1, 4, WORDS), torch.linspace(1, -1, WORDS).view(1, WORDS)
    given = {"prompt_embeds": words, "pooled_prompt_embeds": whole}
    return {**given, "negative_prompt_embeds": -words, "negative_pooled_prompt_embeds": -whole} if negative else given


def picture(channels=3):
    across = torch.linspace(0, 1, SIZE)
    return torch.stack([across[:, None] * across**k for k in range(1, channels + 1)])[None]


def mask():
    return (torch.arange(SIZE) >= SIZE // 2).float().expand(1, 1, SIZE, SIZE)


@dataclass(frozen=True)
class Kind:
    """pipeline: name of the class; components: makes them of a scheduler; options: makes those of the call that are tensors;
    fixed: the others."""

    pipeline: str
    components: object
    options: object
    fixed: dict = field(default_factory=dict)
    absent: tuple = ()  # components that stay elsewhere

    def options_of_call(self):
        return {**self.fixed, **self.options()}


def _prompt(**more):
    return lambda: {"prompt": "a cat", "negative_prompt": "dog", "guidance_scale": 3.0, **{k: v() for k, v in more.items()}}


def _embedded(negative=True, **more):
    return lambda: {**embeddings(negative=negative), **{k: v() for k, v in more.items()}}


_IMAGES = ("image_encoder", "feature_extractor")
_FLUX = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", *_IMAGES)
_SD3 = (*_FLUX, "text_encoder_3", "tokenizer_3")
_SIZES = {"height": SIZE, "width": SIZE}
KINDS = {
    "text": Kind("StableDiffusionPipeline", sd_components, _prompt(), _SIZES),
    "image": Kind("StableDiffusionImg2ImgPipeline", sd_components, _prompt(image=picture), {"strength": 0.6}),
    "inpaint": Kind(
        "StableDiffusionInpaintPipeline", sd_components, _prompt(image=picture, mask_image=mask), {**_SIZES, "strength": 0.8}
    ),
    "controlnet": Kind(
        "StableDiffusionControlNetPipeline",
        lambda scheduler: sd_components(scheduler, controlnet=controlnet()),
        _prompt(image=picture),
        _SIZES,
    ),
    "sdxl text": Kind("StableDiffusionXLPipeline", sdxl_components, _prompt(), _SIZES),
    "sdxl image": Kind("StableDiffusionXLImg2ImgPipeline", sdxl_components, _prompt(image=picture), {"strength": 0.6}),
    "sdxl inpaint": Kind(
        "StableDiffusionXLInpaintPipeline", sdxl_components, _prompt(image=picture, mask_image=mask), {**_SIZES, "strength": 0.8}
    ),
    "sd3 text": Kind("StableDiffusion3Pipeline", sd3_components, _embedded(), {**_SIZES, "guidance_scale": 3.0}, _SD3),
    "sd3 image": Kind(
        "StableDiffusion3Img2ImgPipeline", sd3_components, _embedded(image=picture), {**_SIZES, "strength": 0.6}, _SD3
    ),
    "flux text": Kind("FluxPipeline", flux_components, _embedded(negative=False), _SIZES, _FLUX),
    "flux image": Kind(
        "FluxImg2ImgPipeline", flux_components, _embedded(negative=False, image=picture), {**_SIZES, "strength": 0.6}, _FLUX
    ),
}


def build(kind: str, scheduler):
    """The pipeline, with the same weights each time."""
    torch.manual_seed(0)
    cls = getattr(diffusers, KINDS[kind].pipeline)
    pipe = cls(**dict.fromkeys(KINDS[kind].absent), **KINDS[kind].components(scheduler))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def load(kind: str, folder):
    cls = getattr(diffusers, KINDS[kind].pipeline)
    pipe = cls.from_pretrained(folder, **dict.fromkeys(KINDS[kind].absent), low_cpu_mem_usage=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(kind: str, pipe, steps=8, generator=None, **more):
    """The latents after each step, and the pictures."""
    seen = []

    def keep(pipe, i, t, values):
        seen.append(values["latents"].clone())
        return values

    generator = torch.Generator().manual_seed(0) if generator is None else generator
    options = {**KINDS[kind].options_of_call(), "output_type": "np", **more}
    torch.manual_seed(1)  # some schedulers draw without the generator
    out = pipe(num_inference_steps=steps, generator=generator, callback_on_step_end=keep, **options)
    return seen, torch.as_tensor(out.images)


def one_by_one(net):
    """Evaluates the network sample by sample, so that its last bits do not depend on the batch."""
    forward = net.forward

    def each(sample, timestep, *words, **options):
        batch = len(sample)

        def part(v, i):
            return v[i : i + 1] if isinstance(v, torch.Tensor) and v.ndim and len(v) == batch else v

        outs = [
            forward(part(sample, i), timestep, *(part(w, i) for w in words), **{k: part(v, i) for k, v in options.items()})
            for i in range(batch)
        ]
        whole = torch.cat([out[0] for out in outs])
        return (whole,) if isinstance(outs[0], tuple) else type(outs[0])(sample=whole)

    net.forward = each
