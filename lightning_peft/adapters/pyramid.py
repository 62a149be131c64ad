"""A side network in stages: each at the end of the blocks that feed it, the last or all of them answering."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_peft.adapters.side import Exit, Kept, Quiet, Stash
from lightning_peft.adapters.small_nets import Affine, Norm
from lightning_peft.engine import AdapterError, Layer, Target, TargetError
from lightning_peft.parts.blocks import stages_of
from lightning_peft.parts.layout import as_map, from_map, grid_of, own_of, resample, with_own
from lightning_peft.parts.taps import Tap, axes_of


class MetaToken(Quiet):
    """A tap that lets a token of its own go through its block, and reads it behind."""

    meta: nn.Parameter | None

    def __init__(self, target: Tap, stash: Stash, method: Any, *rest: Any) -> None:
        super().__init__(target, stash, method, *rest)
        self.register_parameter("meta", target.new_parameter(target.d_out) if method.takes_meta(target) else None)

    def reset_parameters(self, layer: Layer, generator: torch.Generator) -> None:
        """The token as the paper has it."""
        super().reset_parameters(layer, generator)
        if self.meta is not None:
            random = torch.rand(self.meta.shape, dtype=self.meta.dtype, generator=generator)
            self.meta.copy_((2 * random - 1) * (3 / len(random)) ** 0.5)

    def run(self, x: Any, layer: Layer) -> Any:
        """Call the block with one token more."""
        if self.meta is None:
            return super().run(x, layer)
        for name, value in layer.arguments().items():
            if isinstance(value, Tensor) and any(part in name for part in ("mask", "rope", "position", "freq")):
                raise AdapterError(
                    f"{self.who}: {self.name!r} is given {name!r}, which has no place for a meta token. Leave the meta "
                    "tokens out with detach_taps=True."
                )
        y = layer(torch.cat([self.meta.to(x.dtype).expand(len(x), 1, -1), x], dim=1))
        features = own_of(y, self.place)
        self.stash.extra[f"meta {self.index}"] = features[:, :1]
        return with_own(y, self.place, features[:, 1:])


class CrossBlock(nn.Module):
    """One block of a stage."""

    def __init__(self, target: Target, d: int, heads: int, ratio: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = Norm(target, d), Norm(target, d)
        self.q, self.kv, self.proj = Affine(target, d, d), Affine(target, d, 2 * d), Affine(target, d, d)
        self.fc1, self.fc2 = Affine(target, d, ratio * d), Affine(target, ratio * d, d)

    def forward(self, x: Tensor, tokens: Tensor, v: Tensor) -> Tensor:
        """(B, ..., d) for x and v (B, ..., d) and tokens (B, 2, d)."""
        q = self.q(self.norm1(x)).flatten(1, -2).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        key, value = self.kv(tokens).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.proj(F.scaled_dot_product_attention(q, key, value).transpose(1, 2).flatten(2)).view(x.shape)
        x = x + v
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class Stage(MetaToken, Exit):
    """One stage of the pyramid, at the end of the blocks that feed it."""

    def __init__(self, target: Tap, stash: Stash, method: Any, targets: list[Tap], stage: int) -> None:
        super().__init__(target, stash, method, targets)
        blocks = method.blocks(targets)[stage]
        widths = sorted({block.d_out for block in blocks})
        if len(widths) > 1:  # there is one bridge
            own = stages_of([block.name for each in method.blocks(targets) for block in each])
            raise TargetError(
                f"{self.who}: the blocks {blocks[0].name!r} to {blocks[-1].name!r} feed one of {len(method.dims)} "
                f"stages, and answer with {' and '.join(map(str, widths))} features. Give as many dims and num_heads "
                f"as the model has stages ({len(own)}), or name blocks of one width in taps."
            )
        d, before, axes = method.dims[stage], method.dims[stage - 1], axes_of(targets[0])
        self.fed_by, self.stage, self.answers = [b.index for b in blocks], stage, method.answers(stage)
        if stage == 0:
            self.stem = Affine(target, targets[0].width_in, d, *(3,) * axes, stride=2)
            self.stem_norm = Norm(target, d, of_maps=True)
        self.step = Affine(target, before if stage else d, d, *(3 if stage else 2,) * axes, stride=2)
        self.step_norm, self.norm = Norm(target, d), Norm(target, d)
        self.bridge = Affine(target, blocks[0].d_out, d)
        self.meta_norms = nn.ModuleList(Norm(target, d) for _ in blocks)
        self.blocks = nn.ModuleList(CrossBlock(target, d, method.num_heads[stage], method.mlp_ratio) for _ in blocks)
        if self.answers:
            self.up = Affine(target, d, target.d_out)

    def side(self, y: Tensor, kept: Kept, layer: Layer) -> Tensor:
        """The map of this stage; ``y`` where it is only handed to the next."""
        x = kept.extra["side"] if self.stage else self.begin(kept, y.dtype)
        x = self.step_norm(self.step(x).movedim(1, -1))
        for index, norm, block in zip(self.fed_by, self.meta_norms, self.blocks, strict=True):
            h = self.tap(kept, index, y)
            places, prefix = as_map(h, *grid_of(h, self.first, kept.entered.size, self.who))
            v = self.bridge(resample(places, tuple(x.shape[1:-1])).movedim(1, -1))
            mean = v.flatten(1, -2).mean(1, keepdim=True)
            token = kept.extra.get(f"meta {index}", None if prefix is None else prefix[:, :1])
            token = v.flatten(1, -2).amax(1, keepdim=True) if token is None else self.bridge(token)
            x = block(x, torch.cat([norm(token), mean], dim=1), v)
        x = self.norm(x)
        self.stash.extra["side"] = x.movedim(-1, 1)
        if not self.answers:
            return y
        size, n = grid_of(y, self.first, kept.entered.size, self.who)
        answer = self.up(resample(x.movedim(-1, 1), size).movedim(1, -1)).movedim(-1, 1)
        front = answer.flatten(2).mean(-1)[:, None].expand(-1, n, -1) if n else None
        return from_map(answer, y.dim() == 3, front)

    def begin(self, kept: Kept, dtype: torch.dtype) -> Tensor:
        """The input at half its size."""
        x = kept.entered.x.to(dtype)
        return F.relu(self.stem_norm(self.stem(x if kept.entered.is_map else x.movedim(-1, 1))))


def num_of_stage(method: Any, entry: Tap, stage: int, blocks: list[Tap], end: Tap) -> int:
    """Numbers in a `Stage`, but its meta tokens.

    d wide: stem or step, two norms, bridge (D + 1) d, U (d + 1) D; for each block of the model 4 d (d + 1) + 4 d
    + 2 ratio d^2 + (ratio + 1) d, and 2 d for the norm of its token.
    """
    k, d, before, ratio = axes_of(entry), method.dims[stage], method.dims[stage - 1], method.mlp_ratio
    step = before * d * 3**k + d if stage else (entry.width_in * 3**k + 3) * d + d * d * 2**k + d
    block = 4 * d * (d + 1) + 4 * d + 2 * ratio * d * d + (ratio + 1) * d + 2 * d
    up = (d + 1) * end.d_out if method.answers(stage) else 0
    return step + 4 * d + (blocks[0].d_out + 1) * d + up + len(blocks) * block
