"""Hierarchical Side-Tuning: a pyramid of small stages beside the model, fed by its blocks through meta tokens.

Paper:    Lin et al., "Hierarchical Side-Tuning for Vision Transformers", 2023, arXiv:2310.05393.
Formula:  a meta token e_i goes through block i with the tokens: [t_i; h_i] = Block_i([e_i; h_{i-1}]);
          v_i = bridge(h_i) at the size of the stage;  x <- x + CrossAttention(LN x; [LN bridge(t_i); mean v_i]);  x <- x + v_i;
          x <- x + FFN(LN x);  between stages x <- LN(conv x), by half;  y = U LN(x)
Shapes:   x (B, h, w, d_s), d_s of ``dims`` for stage s, the first at a quarter of the image; bridge (d_s, D);
          U (D, d_s)
Init:     e_i ~ U(-sqrt(3/D), sqrt(3/D)); the rest as torch's own layers do
Merge:    impossible, a second network
Deviates from the paper: y goes through U back to the model's own last norm and head, and tokens in front of the grid
          get its mean, which is the paper's pooling; the stem is normalised over channels, not over the batch, in whose
          place a batch norm stood before the head as well. Where a block takes no meta token (windows, maps, mixers, or
          ``detach_taps``), the class token stands for it, or the maximum of v_i where there is none.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_peft.adapters.side import Affine, Exit, Kept, Norm, Quiet, SideMethod, Stash, Tap, axes_of, taps_of
from lightning_peft.engine import Adapter, AdapterError, Kind, Layer, Target, TargetError, check_range, register
from lightning_peft.engine.limits import Count
from lightning_peft.parts.blocks import find_blocks, stage_modules, stages_of
from lightning_peft.parts.layout import as_map, from_map, grid_of, layers_of, resample


class MetaToken(Quiet):
    """A tap that lets a token of its own go through its block, and reads it behind."""

    meta: nn.Parameter | None

    def __init__(self, target: Tap, stash: Stash, method: "HierarchicalSideTuning", *rest: Any) -> None:
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
        features = y[0] if isinstance(y, tuple) else y
        self.stash.extra[f"meta {self.index}"] = features[:, :1]
        return (features[:, 1:], *y[1:]) if isinstance(y, tuple) else features[:, 1:]


class SideBlock(nn.Module):
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

    def __init__(
        self, target: Tap, stash: Stash, method: "HierarchicalSideTuning", targets: list[Tap], stage: int
    ) -> None:
        super().__init__(target, stash, method, targets)
        blocks = method.blocks(targets)[stage]
        d, before, axes = method.dims[stage], method.dims[stage - 1], axes_of(targets[0])
        self.fed_by, self.stage, self.answers = [b.index for b in blocks], stage, method.answers(stage)
        if stage == 0:
            self.stem = Affine(target, targets[0].width_in, d, *(3,) * axes, stride=2)
            self.stem_norm = Norm(target, d, of_maps=True)
        self.step = Affine(target, before if stage else d, d, *(3 if stage else 2,) * axes, stride=2)
        self.step_norm, self.norm = Norm(target, d), Norm(target, d)
        self.bridge = Affine(target, blocks[0].d_out, d)
        self.meta_norms = nn.ModuleList(Norm(target, d) for _ in blocks)
        self.blocks = nn.ModuleList(SideBlock(target, d, method.num_heads[stage], method.mlp_ratio) for _ in blocks)
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


@register("hierarchicalsidetuning")
@dataclass(frozen=True, kw_only=True)
class HierarchicalSideTuning(SideMethod):
    """A side network in stages for images; layer norms of the blocks and the output head train with it.

    Args:
        dims: features of each stage, which share the blocks out evenly, or as the model's own stages do.
        num_heads: attention heads of each stage.
        mlp_ratio: inner features of a feed-forward net for each of its outer ones.
        detach_taps: run the blocks without gradients, which leaves out meta tokens and layer norms: little memory.
        pyramid: every stage answers, not the last alone: for nets that answer with the features of their stages. One
            that is plain, as a ViT, has to be asked for those of the last blocks of the side stages.
        entry: name of the layer whose input the side network gets; the first by default.
        taps: see `SideMethod`.
        modules_to_save: modules trained whole, by default the output head.

    Raises:
        AdapterError: ``num_heads`` do not divide ``dims``.
        TargetError: no blocks are found, less than there are stages, or the model is one of text.
    """

    paper: ClassVar[str] = "arXiv:2310.05393"
    modalities: ClassVar = ("vision", "diffusion")
    adapter_types: ClassVar[dict[Kind, type[Adapter]]] = {"module": Stage}
    tap_type: ClassVar[type[Quiet]] = MetaToken
    identity_at_init: ClassVar[bool] = False

    dims: tuple[int, ...] = (32, 48, 64, 72)
    num_heads: tuple[int, ...] = (2, 4, 8, 12)
    mlp_ratio: Count = 4
    detach_taps: bool = False
    pyramid: bool = False
    entry: str | None = None

    def __post_init__(self) -> None:
        for name in ("dims", "num_heads"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        fits = len(self.dims) == len(self.num_heads) and all(
            h >= 1 and d >= h and d % h == 0 for d, h in zip(self.dims, self.num_heads, strict=True)
        )
        check_range(type(self).__name__, "num_heads", self.num_heads, fits, f"divisors of each of dims {self.dims}")
        super().__post_init__()

    def targets(self, model: nn.Module) -> list[Target]:
        """The first layer, the blocks, and where every stage answers, the modules of the stages."""
        who = type(self).__name__
        taps = taps_of(model, self.taps, who, entry=self.entry)
        names = [t.owner for t in taps if t.index >= 0]
        if any(isinstance(t.module, nn.Embedding) for t in taps) or self.causal:
            raise TargetError(
                f"{who}: {type(model).__name__} begins with an embedding of words, and this is for images. Choose "
                "another method for text, such as LadderSideTuning."
            )
        stages = stages_of(names)
        if self.pyramid and len(stages) == len(self.dims):
            exits = stage_modules(model, stages)
            names = [name for stage, whole in zip(stages, exits, strict=True) for name in (*stage, whole)]
        else:
            exits = [stage[-1] for stage in self.shared_out(names)]
        return [*taps_of(model, names, who, exits=exits, entry=self.entry)]

    def shared_out(self, names: list[str]) -> list[list[str]]:
        """The blocks of each stage."""
        stages, n = stages_of(names), len(self.dims)
        if len(names) < n:
            raise TargetError(
                f"{type(self).__name__}: {len(names)} blocks cannot feed {n} stages. Give fewer of dims and num_heads."
            )
        return (
            stages if len(stages) == n else [names[i * len(names) // n : (i + 1) * len(names) // n] for i in range(n)]
        )

    def blocks(self, targets: list[Tap]) -> list[list[Tap]]:
        """The blocks that feed each stage."""
        whole = {t.name for t in targets if any(o.name.startswith(t.name + ".") for o in targets)}
        taps = {t.name: t for t in targets if t.index >= 0 and t.name not in whole}
        return [[taps[name] for name in stage] for stage in self.shared_out([*taps])]

    def exit(self, target: Tap, stash: Stash, targets: list[Tap]) -> Adapter:  # noqa: D102
        return Stage(target, stash, self, targets, [t for t in targets if t.role == "exit"].index(target))

    def answers(self, stage: int) -> bool:
        """Whether the map of a stage goes back to the model."""
        return self.pyramid or stage == len(self.dims) - 1

    def takes_meta(self, target: Tap) -> bool:
        """Whether a token may be added: to blocks of tokens with an attention that looks at all of them."""
        parts = [(name.rpartition(".")[2], part) for name, part in target.module.named_modules()]
        attends = any("attn" in name or "attention" in name for name, _ in parts)
        windows = any(hasattr(part, "window_size") for _, part in parts)
        return not (self.detach_taps or target.first or target.role == "entry" or windows) and attends

    def trained_in_place(self, model: nn.Module) -> list[str]:
        """``modules_to_save``, and the layer norms of the blocks."""
        found = super().trained_in_place(model)
        for block in () if self.detach_taps else find_blocks(model, self.taps, type(self).__name__):
            for name, layer, _ in layers_of(model.get_submodule(block)):
                if isinstance(layer, nn.LayerNorm):
                    found += [f"{block}.{name}.{key}" for key, _ in layer.named_parameters(recurse=False)]
        return found

    def total_trainable(self, targets: list[Target]) -> int:
        """Of each stage d wide: stem or step, bridge (D + 1) d, U (d + 1) D; of each of its blocks 4 d (d + 1) + 4 d
        + 2 ratio d^2 + (ratio + 1) d, the norm 2 d of its token, and a meta token D."""
        taps = [t for t in targets if isinstance(t, Tap)]
        k, total = axes_of(taps[0]), 0
        exits = [t for t in taps if t.role == "exit"]
        for i, (end, d, blocks) in enumerate(zip(exits, self.dims, self.blocks(taps), strict=True)):
            before = self.dims[i - 1]
            total += before * d * 3**k + d if i else (taps[0].width_in * 3**k + 3) * d + d * d * 2**k + d
            total += 4 * d + (blocks[0].d_out + 1) * d + ((d + 1) * end.d_out if self.answers(i) else 0)
            total += len(blocks) * (4 * d * (d + 1) + 4 * d + 2 * self.mlp_ratio * d * d + (self.mlp_ratio + 1) * d)
            total += sum(b.d_out for b in blocks if self.takes_meta(b)) + 2 * d * len(blocks)
        return total

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        """With meta tokens, and without gradients in the blocks."""
        return (
            cls(dims=(4, 6), num_heads=(2, 3), mlp_ratio=2, modules_to_save="head"),
            cls(dims=(4,), num_heads=(1,), mlp_ratio=1, detach_taps=True, modules_to_save=()),
        )
