"""Parts of small networks: layers that start from a generator, a block of them, a network on the input of a model."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_peft.engine import Target
from lightning_peft.parts.layout import CONVOLUTIONS, Entered, from_map, grid_of, resample
from lightning_peft.parts.taps import Tap, axes_of


class Part(nn.Module):
    """A part of a side network, whose values come from a generator."""

    def fill(self, generator: torch.Generator) -> None:
        """Fill the parameters."""
        raise NotImplementedError


class Affine(Part):
    """A linear layer, or with a ``kernel`` a convolution of (B, C, ...), in the precision of its input.

    It starts as torch's own do, the bias at zero; or all at zero.
    """

    def __init__(
        self, target: Target, d_in: int, d_out: int, *kernel: int, stride: int = 1, groups: int = 1, zero: bool = False
    ) -> None:
        super().__init__()
        self.weight = target.new_parameter(d_out, d_in // groups, *kernel)
        self.bias = target.new_parameter(d_out)
        self.stride, self.groups, self.zero = stride, groups, zero
        self.padding = tuple((k - stride + 1) // 2 for k in kernel)

    def fill(self, generator: torch.Generator) -> None:
        """U(-1/sqrt(fan in), 1/sqrt(fan in)), or zero."""
        random = torch.empty(self.weight.shape, dtype=self.weight.dtype)
        self.weight.copy_(nn.init.kaiming_uniform_(random, a=math.sqrt(5), generator=generator))
        if self.zero:
            self.weight.zero_()
        self.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """(..., d_out) for x (..., d_in); (B, d_out, ...) for a convolution."""
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        if not self.padding:
            return F.linear(x, weight, bias)
        conv: Any = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[len(self.padding)]
        return conv(x, weight, bias, self.stride, self.padding, 1, self.groups)


class Norm(Part):
    """Normalisation of the last axis, with weight and bias; of all channels of a map (B, C, ...) if ``of_maps``."""

    def __init__(self, target: Target, d: int, of_maps: bool = False) -> None:
        super().__init__()
        self.weight, self.bias, self.of_maps = target.new_parameter(d), target.new_parameter(d), of_maps

    def fill(self, generator: torch.Generator) -> None:
        """Ones and zeros."""
        self.weight.fill_(1)
        self.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """x, normalised."""
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        return F.group_norm(x, 1, weight, bias) if self.of_maps else F.layer_norm(x, weight.shape, weight, bias)


class InputNet(nn.Module):
    """A small network on what the model was given: convolutions for images, layers of each token alone for the rest.

    Args:
        target: where its parameters are.
        entry: the first layer of the model.
        width: features inside.
        depth: layers before the last.
        d_out: features out.
    """

    def __init__(self, target: Target, entry: Tap, width: int, depth: int, d_out: int) -> None:
        super().__init__()
        is_map, d_in = isinstance(entry.module, CONVOLUTIONS), entry.width_in
        axes = axes_of(entry) if is_map else 0
        # as the reference: the first steps by 4, the second by 2
        shapes = [((8,) * axes, 4), ((3,) * axes, 2)] + [((3,) * axes, 1)] * depth
        widths = [d_in] + [width] * depth
        self.layers = nn.ModuleList(
            Affine(target, before, after, *kernel, stride=stride)
            for before, after, (kernel, stride) in zip(widths, widths[1:], shapes, strict=False)
        )
        self.norms = nn.ModuleList(Norm(target, width, of_maps=is_map) for _ in range(depth))
        self.out = Affine(target, width, d_out)

    def forward(self, given: Entered, y: Tensor, first: bool, causal: bool, who: str) -> Tensor:
        """(B, ..., d_out) that lies as ``y`` does, channels last; tokens in front of the grid get its mean.

        Where tokens look back alone, a mean would show them what follows: there the tokens in front get zeros.
        """
        x = given.x.to(y.dtype)
        size, prefix = grid_of(y, first, given.size, who)
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = F.relu(norm(layer(x)))
        if given.is_map or size != given.size:
            x = x if given.is_map else x.movedim(-1, 1)
            x = from_map(resample(x, size), tokens=y.dim() == 3)
        x = self.out(x.flatten(1, -2) if y.dim() == 3 else x)
        if prefix:
            front = x.new_zeros(len(x), 1, x.shape[-1]) if causal else x.mean(1, keepdim=True)
            x = torch.cat([front.expand(-1, prefix, -1), x], dim=1)
        return x


def num_of_input_net(entry: Tap, width: int, depth: int, d_out: int) -> int:
    """Numbers in an `InputNet`."""
    axes = axes_of(entry) if isinstance(entry.module, CONVOLUTIONS) else 0
    widths, kernels = [entry.width_in] + [width] * depth, [8**axes] + [3**axes] * depth
    layers = sum(b * a * k + 3 * a for b, a, k in zip(widths, widths[1:], kernels, strict=False))
    return layers + (width + 1) * d_out


class MixingBlock(nn.Module):
    """A block that normalises first: attention, or a depthwise convolution of maps, and a feed-forward net."""

    def __init__(self, target: Target, d: int, heads: int, ratio: int, on_maps: bool) -> None:
        super().__init__()
        self.heads, self.on_maps = heads, on_maps
        self.norm1, self.norm2 = Norm(target, d), Norm(target, d)
        if on_maps:
            self.mix = Affine(target, d, d, 3, 3, groups=d)
        else:
            self.qkv, self.proj = Affine(target, d, 3 * d), Affine(target, d, d)
        self.fc1, self.fc2 = Affine(target, d, ratio * d), Affine(target, ratio * d, d)

    def forward(self, s: Tensor, seen: Tensor | None) -> Tensor:
        """(B, ..., d) for s (B, ..., d)."""
        h = self.norm1(s)
        if self.on_maps:
            s = s + self.mix(h.movedim(-1, 1)).movedim(1, -1)
        else:
            q, k, v = self.qkv(h).flatten(1, -2).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
            s = s + self.proj(F.scaled_dot_product_attention(q, k, v, seen).transpose(1, 2).flatten(2)).view(s.shape)
        return s + self.fc2(F.relu(self.fc1(self.norm2(s))))
