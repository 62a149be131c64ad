"""IP-Adapter: an image beside the text, to which every cross-attention looks by keys and values of its own.

Paper:    Ye et al., "IP-Adapter: Text Compatible Image Prompt Adapter for Text-to-Image Diffusion Models", 2023,
          arXiv:2308.06721.
Formula:  Z = Attn(Q, K, V) + scale * Attn(Q, c W'_k^T, c W'_v^T) in each cross-attention, before its output layer;
          c = LN(W_p e + b_p), N tokens made of the embedding e of an image
Shapes:   e (D,), c (N, C) as wide as the tokens of the text; W_p (N C, D), b_p (N C,), LN 2 C; W'_k, W'_v (d, C) for
          the d features of all keys
Init:     W'_k, W'_v = W_k, W_v of the text; W_p as ``nn.Linear``. The image acts from the start, so it is not the base
Merge:    none: what it adds depends on the image
Needs:    a denoiser with cross-attentions that is given embeddings of images
Cost:     one more product of attention, and the projections around it, in each cross-attention
Deviates from the paper: the tokens do not stand behind those of the text, but are handed to the attentions beside it,
          which computes the same, takes any number of images, and leaves masks of the text as they are. Where an
          attention normalises queries and keys, so does the branch.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Self

from torch import nn

from lightning_peft.adapters.image_prompt import ImageAttention, ImageTarget, ImageTokens, image_targets
from lightning_peft.engine import Adapter, Kind, MethodWithHead, Target, TargetError, register
from lightning_peft.engine.limits import Count, NonNegative, Patterns


@register("ipadapter")
@dataclass(frozen=True, kw_only=True)
class IPAdapter(MethodWithHead):
    """Cross-attention to an image beside that to the text, in a denoiser of diffusers or one of the same form.

    The denoiser is called as ever, with ``added_cond_kwargs={"image_embeds": e}``: e (B, D), or (B, n, D) for n images,
    or a list of one of these. For guidance e is zero in the half of the batch that has no condition; to learn that,
    drop images, texts, or both, in 5 % of the samples each.

    Args:
        image_embed_dim: D, features of the embedding of an image.
        num_tokens: N, tokens that are made of it.
        scale: factor of the image; later a tensor of each attention, ``adapters[name].scaling``. At 0 the text alone
            acts, as in the base.
        target_modules: patterns of cross-attentions; all of the denoiser by default.
        modules_to_save: see `LoRA`.

    Raises:
        TargetError: no denoiser with cross-attentions takes ``added_cond_kwargs``, or they are of another form: those
            of SD3 and Flux look at text and image at once.
        AdapterError: while running, there is no embedding of an image, or one of another shape.

    >>> import torch
    >>> from lightning_peft.adapters.image_prompt import ImageTarget, ImageTokens
    >>> from lightning_peft.engine import Site
    >>> unet = ImageTarget("", nn.Linear(2, 2), Site("module", "", None, width=2), "", context=2)
    >>> tokens = ImageTokens(unet, 3, 2, "IPAdapter")
    >>> for name, p in tokens.named_parameters():
    ...     p.data = torch.ones(p.shape) if "norm" in name else torch.arange(p.numel()).float().view(p.shape)
    >>> c = tokens.tokens(torch.tensor([[[1.0, 0.0, 1.0]]]))  # W_p e + b_p = [2, 9, 16, 23], two tokens
    >>> torch.allclose(c, torch.tensor([[[0.0, 2.0], [0.0, 2.0]]]), atol=1e-5)
    True
    """

    paper: ClassVar[str] = "arXiv:2308.06721"
    modalities: ClassVar = ("diffusion",)
    adapter_types: ClassVar[dict[Kind, type[Adapter]]] = {"module": ImageAttention}
    acts_on: ClassVar = "condition"
    identity_at_init: ClassVar[bool] = False
    mergeable: ClassVar[bool] = False

    image_embed_dim: Count = 1024
    num_tokens: Count = 4
    scale: NonNegative = 1.0
    target_modules: Patterns | None = None

    def targets(self, model: nn.Module) -> list[Target]:
        """The denoiser, and its cross-attentions."""
        return [*image_targets(model, self.target_modules, "IPAdapter")]

    def adapters(self, targets: list[Target]) -> list[Adapter]:
        """What makes the tokens, and what looks at them."""
        parts = [target for target in targets if isinstance(target, ImageTarget)]
        if parts and parts[0].keys:
            raise TargetError(
                "IPAdapter: cross-attentions were built after the denoiser was adapted. Build all of it in one place "
                "(configure_model), or unload the model first."
            )
        source: Any = ImageTokens(parts[0], self.image_embed_dim, self.num_tokens, "IPAdapter") if parts else None
        return [ImageAttention(t, source, self.scale) if t.keys else source for t in parts]

    def num_trainable(self, target: Target) -> int:
        """2 d C of an attention; N C (D + 1) + 2 C of the tokens."""
        if not isinstance(target, ImageTarget):
            return 0
        made = self.num_tokens * target.context * (self.image_embed_dim + 1) + 2 * target.context
        return 2 * target.keys * target.context if target.keys else made

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        """In all cross-attentions; and in one, with another scale."""
        one: dict[str, Any] = {"image_embed_dim": 7, "num_tokens": 2, "scale": 0.5, "target_modules": "blocks.1.attn2"}
        return cls(image_embed_dim=7), cls(**one)
