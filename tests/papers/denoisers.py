"""Tiny denoisers of diffusers, in float64, and what they are asked."""

from typing import Any

import torch
from torch import Tensor, nn

from tests.methods.backbones import backbone

T = torch.tensor([3, 5, 3, 5])
NOISE = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def dit() -> nn.Module:
    """Two blocks, 12 features, 10 classes, without dropout of classes."""
    from diffusers.models.embeddings import LabelEmbedding

    model = backbone("dit")
    for module in model.modules():
        if isinstance(module, LabelEmbedding):
            module.dropout_prob = 0.0
    return model


def denoise(model: Any, labels: tuple[int, ...] = (1, 2, 10, 10)) -> Tensor:
    """With guidance: the second half of the batch is of no class, number 10."""
    return model(NOISE, timestep=T, class_labels=torch.tensor(labels)).sample


def unet(**options: Any) -> nn.Module:
    """Two levels, the lower with attention to text; options of its class change it."""
    like: Any = backbone("unet_text")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = like.from_config(like.config, **options)
    return model.double().eval()


def denoise_text(model: Any, **options: Any) -> Tensor:
    """For five tokens of text."""
    text = torch.linspace(-1, 1, 4 * 5 * 6, dtype=torch.float64).reshape(4, 5, 6)
    return model(NOISE, T, encoder_hidden_states=text, **options).sample
