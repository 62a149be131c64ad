"""(IA)^3: rescale keys, values and the inner features of each feed-forward block.

Paper:    Liu et al., "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning", 2022,
          arXiv:2205.05638.
Formula:  k = l_k * (W_k x + b),  v = l_v * (W_v x + b),  ffn = W_2 (l_ff * act(W_1 x))
Shapes:   l_k, l_v (d_out,); l_ff (d_in,) of the second feed-forward layer
Init:     all ones; y starts as the base
Merge:    rows of W_k, W_v and their biases times l; columns of W_2 times l_ff
"""

from dataclasses import dataclass
from typing import ClassVar, Self

from torch import nn

from lightning_peft.adapters.rescaling import Rescaling
from lightning_peft.engine import Adapter, Kind, Target, TargetedMethod, TargetError, matches, register
from lightning_peft.engine.errors import nearest
from lightning_peft.engine.limits import Patterns
from lightning_peft.engine.targets import as_patterns

# customary names of key, value (or fused query-key-value) projections, and of second feed-forward layers
_KEYS_VALUES = r".*\b(k|v|k_proj|v_proj|to_k|to_v|key|value|qkv|c_attn|query_key_value|in_proj_weight)"
_FEEDFORWARD = r".*\b(down_proj|wo|fc2|w2|linear2|mlp\.c_proj|dense_4h_to_h|ff\.net\.2|\d+\.output\.dense)"


@register("ia3")
@dataclass(frozen=True, kw_only=True)
class IA3(TargetedMethod):
    """Rescaling of keys, values and inner feed-forward features.

    Args:
        target_modules: layers to rescale. By default they are found by the customary names of key, value, fused
            query-key-value and second feed-forward layers; of a fused layer all features are rescaled.
        feedforward_modules: those of them whose input is rescaled in place of their output.
        exclude_modules: see `LoRA`; so for the arguments that follow it.

    Raises:
        TargetError: a pattern matches nothing; name the layers if the customary names do not occur.

    >>> from torch import nn, tensor, ones, allclose
    >>> from lightning_peft import inject
    >>> base = nn.ModuleDict({"v_proj": nn.Linear(3, 2)})
    >>> x, y = ones(1, 3), base["v_proj"](ones(1, 3))
    >>> base = inject(base, IA3())
    >>> base["v_proj"].adapters["default"].scale.data = tensor([2.0, 3.0])
    >>> allclose(base["v_proj"](x), y * tensor([2.0, 3.0]))
    True
    """

    paper: ClassVar[str] = "arXiv:2205.05638"
    adapter_types: ClassVar[dict[Kind, type[Adapter]]] = {"linear": Rescaling}

    target_modules: Patterns = rf"{_KEYS_VALUES}|{_FEEDFORWARD}"
    feedforward_modules: Patterns = _FEEDFORWARD

    def is_feedforward(self, target: Target) -> bool:
        """Whether the input of ``target`` is rescaled."""
        return any(matches(pattern, target.name) for pattern in as_patterns(self.feedforward_modules))

    def targets(self, model: nn.Module) -> list[Target]:
        """The layers to rescale, among which all that ``feedforward_modules`` names is found."""
        found = super().targets(model)
        for pattern in as_patterns(self.feedforward_modules) if self.feedforward_modules != _FEEDFORWARD else ():
            if not any(matches(pattern, target.name) for target in found):
                raise TargetError(
                    f"IA3: feedforward_modules {pattern!r} matched none of {len(found)} layers to rescale."
                    f"{nearest(pattern, [target.name for target in found])} Name those of target_modules whose input "
                    "is rescaled, or give () for none."
                )
        return found

    def adapter(self, target: Target) -> Adapter:
        """On the input or on the output."""
        return Rescaling(target, self.is_feedforward(target))

    def num_trainable(self, target: Target) -> int:
        """d_in for feed-forward layers, else d_out."""
        return target.d_in if self.is_feedforward(target) else target.d_out

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        """On outputs, and on an input."""
        return cls(target_modules="v_proj"), cls(target_modules=("q_proj", "v_proj"), feedforward_modules="v_proj")
