"""A tiny Stable Diffusion of diffusers' and transformers' own classes, in float32."""

import warnings
from typing import Any

import diffusers
import torch
import transformers
from torch import Tensor, nn

from tests.papers.denoisers import unet as exact_unet

LETTERS = "abcdefghij"


def seeded(build: Any) -> Any:
    """The same weights at each call; without what other libraries say while they build."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(1)
        return build().eval()


def unet(**options: Any) -> Any:
    """For latents (B, 3, 8, 8) and text (B, n, 6)."""
    return exact_unet(**options).float()


def text_encoder() -> Any:
    """31 ids, 7 positions, 6 features."""
    config = transformers.CLIPTextConfig(
        vocab_size=31,
        hidden_size=6,
        intermediate_size=10,
        num_hidden_layers=2,
        num_attention_heads=3,
        max_position_embeddings=7,
        bos_token_id=0,
        eos_token_id=1,
    )
    return seeded(lambda: transformers.CLIPTextModel(config))


def vae() -> Any:
    """Latents as large as the picture, 3 channels."""
    blocks = {"down_block_types": ("DownEncoderBlock2D",), "up_block_types": ("UpDecoderBlock2D",)}
    sizes = {"block_out_channels": (4,), "norm_num_groups": 2, "latent_channels": 3, "sample_size": 8}
    return seeded(lambda: diffusers.AutoencoderKL(**blocks, **sizes))


def pipeline() -> Any:
    """All together; a word is a letter."""
    words = {"<|startoftext|>": 0, "<|endoftext|>": 1}
    words |= {f"{c}</w>": 2 + i for i, c in enumerate(LETTERS)} | {c: 12 + i for i, c in enumerate(LETTERS)}
    pipe = diffusers.StableDiffusionPipeline(
        unet=unet(),
        vae=vae(),
        text_encoder=text_encoder(),
        tokenizer=transformers.CLIPTokenizer(vocab=words, merges=[], model_max_length=7),
        scheduler=diffusers.DDIMScheduler(num_train_timesteps=10, steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def picture(pipe: Any) -> Tensor:
    """(1, 3, 8, 8), made in three steps with guidance."""
    noise = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    made = pipe("a b", negative_prompt="c", num_inference_steps=3, output_type="pt", latents=noise, height=8, width=8)
    return made.images


class Parts(nn.Module):
    """What a LightningModule holds of a pipeline."""

    def __init__(self, pipe: Any) -> None:
        super().__init__()
        self.vae, self.unet, self.text_encoder = pipe.vae, pipe.unet, pipe.text_encoder

    def training_step(self) -> None: ...
