"""PYRA: merge tokens between attention and feed-forward net, and re-activate those that are merged.

Paper:    Xiong et al., "PYRA: Parallel Yielding Re-Activation for Training-Inference Efficient Task Adaptation", 2024,
          arXiv:2403.09192.
Formula:  s the r tokens that go into others t, the nearest by keys;  q = LN(s + t);  w_1 = 2 sigmoid(W_r^T q),
          w_2 = 2 sigmoid(q W_D) - 1;  s <- s + (s * w_1) * w_2;  then each t becomes the mean of its group, and a
          token that stands for n of them counts n times in the attentions behind
Shapes:   s, t, q (B, r, D); W_r (r,), w_1 (B, 1, D); W_D (D,), w_2 (B, r, 1)
Init:     W_r ~ U(-1, 1), W_D = 0, so w_2 = 0: plain token merging (ToMe), which is not the base
Merge:    impossible, it changes tokens, not weights
Deviates from the paper: behind the last block every token gets what its group has, so that heads over all tokens work.
          It trains the modulation alone: put it behind another method, ``callbacks=[PEFT(LoRA()), PEFT(PYRA(),
          name="pyra")]``.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from torch import nn

from lightning_peft.adapters.token_merging import Branch, Merge, Merged, Merging
from lightning_peft.engine import Adapter, Kind, MethodWithHead, Target, TargetError, check_range, register
from lightning_peft.engine.limits import Count, WholeNumber
from lightning_peft.engine.targets import module_target
from lightning_peft.parts.layout import width_of
from lightning_peft.parts.taps import blocks_to_tap, takes_any_number

_ATTENTIONS, _KEYS, _MLPS = ("attn", "attention"), ("qkv", "k_proj", "key", "to_k"), ("mlp", "ffn")


@register("pyra")
@dataclass(frozen=True, kw_only=True)
class PYRA(MethodWithHead):
    """Fewer tokens from block to block of a plain vision transformer, by merging with trained modulation.

    Args:
        r: tokens merged in each block but the last, whose answer a class token does not see any more; or a number for
            each. At most half of those that there are.
        num_patches: tokens of the image; asked from the model (``num_patches`` of its patch embedding) by default.
        num_prefix_tokens: those before them, which are never merged; asked from the model, else 1.
        num_heads: heads of the attention, over which keys are averaged; asked from it by default.
        blocks: path of the list of blocks; found by default.
        modules_to_save: modules trained whole.

    Raises:
        TargetError: the model has no such blocks, does not tell what was asked, or all ``r`` are 0.
        AdapterError: while running, there is another number of tokens; or an attention behind merged ones does not call
            ``F.scaled_dot_product_attention``.

    >>> PYRA(r=2).schedule(n_blocks=4, tokens=9, prefix=1)  # 9, 7, 5, 3 tokens before the blocks
    [2, 2, 2, 0]
    >>> PYRA(r=8).schedule(n_blocks=4, tokens=9, prefix=1)  # at most half of them: 9, 5, 3, 2
    [4, 2, 1, 0]
    """

    paper: ClassVar[str] = "arXiv:2403.09192"
    modalities: ClassVar = ("vision",)
    adapter_types: ClassVar[dict[Kind, type[Adapter]]] = {"module": Merge}
    acts_on: ClassVar = "blocks"
    identity_at_init: ClassVar[bool] = False
    mergeable: ClassVar[bool] = False

    r: WholeNumber | tuple[int, ...] = 8
    num_patches: Count | None = None
    num_prefix_tokens: WholeNumber | None = None
    num_heads: Count | None = None
    blocks: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.r, tuple):
            check_range("PYRA", "r", self.r, all(isinstance(n, int) and n >= 0 for n in self.r), "integers >= 0")

    def schedule(self, n_blocks: int, tokens: int, prefix: int) -> list[int]:
        """How many tokens each block merges."""
        found, wanted = [], self.r if isinstance(self.r, tuple) else (self.r,) * (n_blocks - 1) + (0,)
        check_range("PYRA", "r", self.r, len(wanted) == n_blocks, f"one number, or one for each of {n_blocks} blocks")
        for r in wanted:
            found.append(min(r, (tokens - prefix) // 2))
            tokens -= found[-1]
        return found

    def targets(self, model: nn.Module) -> list[Target]:
        """The blocks, their attentions, projections of keys, and feed-forward nets."""
        names = blocks_to_tap(model, self.blocks, "PYRA", "blocks")
        patches = self.num_patches or _told(model, ("num_patches",), "num_patches")
        given = self.num_prefix_tokens
        prefix = _told(model, ("num_prefix_tokens",), "", 1) if given is None else given
        found, tokens = list[Target](), patches + prefix
        for i, (name, r) in enumerate(zip(names, self.schedule(len(names), tokens, prefix), strict=True)):
            block = model.get_submodule(name)
            attention, mlp = (_child(block, name, keys) for keys in (_ATTENTIONS, _MLPS))
            inner = block.get_submodule(attention)
            keys = _child(inner, name, _KEYS)
            if not takes_any_number(block) or "norm" not in next(key for key, _ in block.named_children()):
                raise TargetError(
                    f"PYRA: {name!r} does not begin with a norm of its own before an attention that looks at all "
                    "tokens, as far as is known here. Choose a plain ViT of timm, where it does."
                )
            heads = self.num_heads or _told(inner, ("num_heads", "num_attention_heads"), "num_heads")
            parts = {"block": name, "attention": attention, "keys": f"{attention}.{keys}", "mlp": mlp}
            for role, part in parts.items():
                path = name if role == "block" else f"{name}.{part}"
                target = module_target(model, path, width_of(model.get_submodule(path), path, "PYRA"))
                facts = (role, i, r, tokens, prefix, heads, i == len(names) - 1)
                found.append(Merged(target.name, target.module, target.site, path, *facts))  # type: ignore[arg-type]
            tokens -= r
        if not any(isinstance(t, Merged) and t.r for t in found):
            raise TargetError(f"PYRA: r={self.r} merges none of {tokens} tokens. Raise r, or leave this method out.")
        return found

    def adapters(self, targets: list[Target]) -> list[Adapter]:
        """What merges at each block; what lets it run in halves at its parts."""
        taps, merging = [t for t in targets if isinstance(t, Merged)], Merging()
        return [Merge(t, merging, "PYRA") if t.role == "block" else Branch(t, merging, "PYRA") for t in taps]

    def num_trainable(self, target: Target) -> int:
        """r + 3 D of a block that merges."""
        merges = isinstance(target, Merged) and target.role == "block" and target.r
        return target.r + 3 * target.d_out if merges else 0  # type: ignore[attr-defined]

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        """For 13 tokens and one before them."""
        told: dict[str, Any] = {"num_patches": 13, "num_prefix_tokens": 1, "num_heads": 3, "modules_to_save": "head"}
        return cls(r=3, **told), cls(r=(1, 2), **told)


def _told(model: nn.Module, attributes: Sequence[str], argument: str, default: int | None = None) -> int:
    for module in model.modules():
        for attribute in attributes:
            if isinstance(value := getattr(module, attribute, None), int):
                return value
    if default is None:
        raise TargetError(f"PYRA: {type(model).__name__} does not tell its {argument}. Give PYRA({argument}=...)")
    return default


def _child(module: nn.Module, name: str, keys: Sequence[str]) -> str:
    for key, _ in module.named_children():
        if key in keys:
            return key
    raise TargetError(
        f"PYRA: {name!r} has no part {' or '.join(map(repr, keys))}, as blocks of a plain ViT have. Choose such "
        "a model, or name its blocks."
    )
