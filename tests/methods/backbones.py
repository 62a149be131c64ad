"""Small models of many kinds, and what the tests of all methods share."""

import copy
import dataclasses
import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lightning_peft.engine import AdapterError, HostedMethod, Method, inject


class Tiny(nn.Module):
    """Prime, unequal widths: a transposed weight cannot pass by accident. One bias was frozen by its owner."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(7, 11)
        self.v_proj = nn.Linear(11, 5, bias=False)
        self.norm = nn.LayerNorm(5)
        self.head = nn.Linear(5, 3)
        self.q_proj.bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(torch.tanh(self.v_proj(torch.tanh(self.q_proj(x))))))


class TinyAttention(nn.Module):
    """Attention with 3 heads of 4 features, all projections in one."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(12, 36), nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 3, 4)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class TinyBlock(nn.Module):
    """A transformer block that normalises first."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(12), TinyAttention()
        self.norm2, self.mlp = nn.LayerNorm(12), nn.Sequential(nn.Linear(12, 20), nn.GELU(), nn.Linear(20, 12))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class TinyBlocks(nn.Module):
    """Two transformer blocks over the tokens and a class token, from which each token is told its class."""

    checkpointed = False  # whether blocks are computed again in the backward pass

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(7, 12)
        self.cls_token = nn.Parameter(torch.randn(1, 1, 12))
        self.blocks = nn.ModuleList([TinyBlock(), TinyBlock()])
        self.norm = nn.LayerNorm(12)
        self.head = nn.Linear(12, 3)
        self.embed.bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), self.embed(x)], dim=1)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x)
        x = self.norm(x)
        return self.head(x[:, 1:] + x[:, :1])


class TinyCrossAttention(nn.Module):
    """Attention with 3 heads of 4 features, to another sequence if one is given; the names are those of diffusers."""

    heads = 3

    def __init__(self, d_context: int) -> None:
        super().__init__()
        self.to_q, self.to_k = nn.Linear(12, 12, bias=False), nn.Linear(d_context, 12, bias=False)
        self.to_v, self.to_out = nn.Linear(d_context, 12, bias=False), nn.ModuleList([nn.Linear(12, 12)])

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, **cross_attention_kwargs: Any
    ) -> Tensor:
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = self.to_q(hidden_states), self.to_k(context), self.to_v(context)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (q, k, v))
        return self.to_out[0](F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class TinyTextBlock(nn.Module):
    """A transformer block that looks at itself, and then at a text 10 features wide."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.attn1 = nn.LayerNorm(12), TinyCrossAttention(12)
        self.norm2, self.attn2 = nn.LayerNorm(12), TinyCrossAttention(10)
        self.norm3, self.ff = nn.LayerNorm(12), nn.Sequential(nn.Linear(12, 20), nn.GELU(), nn.Linear(20, 12))

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        cross_attention_kwargs: dict[str, Any] | None = None,
    ) -> Tensor:
        more = cross_attention_kwargs or {}
        x = hidden_states + temb[:, None]
        x = x + self.attn1(self.norm1(x), **more)
        x = x + self.attn2(self.norm2(x), encoder_hidden_states=encoder_hidden_states, **more)
        return x + self.ff(self.norm3(x))


class TinyDenoiser(nn.Module):
    """Two such blocks, and a table of time steps."""

    checkpointed = False  # whether blocks are computed again in the backward pass

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Embedding(10, 12)
        self.blocks = nn.ModuleList([TinyTextBlock(), TinyTextBlock()])

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        cross_attention_kwargs: dict[str, Any] | None = None,
        added_cond_kwargs: dict[str, Any] | None = None,
    ) -> Tensor:
        given = (encoder_hidden_states, self.time(timestep // 100), cross_attention_kwargs)
        for block in self.blocks:
            sample = (
                checkpoint(block, sample, *given, use_reentrant=False) if self.checkpointed else block(sample, *given)
            )
        return sample


class TinyConditioned(nn.Module):
    """A denoiser that is told a text, a time step and an image, all made of the tokens that it denoises."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.text = nn.Linear(7, 12), nn.Linear(7, 10)
        self.denoiser = TinyDenoiser()
        self.head = nn.Linear(12, 3)
        self.embed.bias.requires_grad_(False)

    @property
    def checkpointed(self) -> bool:
        return self.denoiser.checkpointed

    @checkpointed.setter
    def checkpointed(self, value: bool) -> None:
        self.denoiser.checkpointed = value

    def forward(self, x: Tensor) -> Tensor:
        steps = torch.arange(len(x), device=x.device) * 333 % 1000
        text = self.text(x[:, :5].contiguous())  # of a view, torch computes another sum where a gradient is wanted
        image = {"image_embeds": x.mean(1)}
        return self.head(self.denoiser(self.embed(x), steps, encoder_hidden_states=text, added_cond_kwargs=image))


_NETS: dict[str, type[nn.Module]] = {"layers": Tiny, "blocks": TinyBlocks, "condition": TinyConditioned}


def tiny(method: Method | None = None) -> nn.Module:
    """The net that the examples of ``method`` are for; the same weights at each call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return _NETS["layers" if method is None else method.acts_on]().eval()


def moved(model: nn.Module, seed: int = 2) -> nn.Module:
    """Leave the initial point: with B = 0 most tests would prove nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
                parameter.add_(0.2 * noise.to(parameter.dtype))
    return model


def kept(base: nn.Module, method: Method) -> nn.Module:
    """``base`` with its weights in the form in which the method keeps them; as it is if it ``changes_base`` not."""
    for target in method.targets(base):
        weight = target.module._parameters.get(target.site.weight)
        stored = weight if weight is None else method.stored(weight, target)
        if stored is not weight:
            assert method.changes_base
            target.module._parameters[target.site.weight] = nn.Parameter(stored, requires_grad=False)
    return base


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> parameter of all that train."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def snapshot(model: nn.Module) -> dict[str, Any]:
    """All that a change of ``model`` would show in: tensors, flags, classes."""
    return {
        "tensors": {key: value.detach().clone() for key, value in model.state_dict().items()},
        "flags": {name: p.requires_grad for name, p in model.named_parameters()},
        "classes": {name: type(module) for name, module in model.named_modules()},
    }


def assert_unchanged(model: nn.Module, before: dict[str, Any]) -> None:
    """Bit for bit, and key for key, as at the time of ``before``."""
    after = snapshot(model)
    assert list(after["tensors"]) == list(before["tensors"])
    assert [key for key, value in before["tensors"].items() if not torch.equal(value, after["tensors"][key])] == []
    assert after["flags"] == before["flags"]
    assert after["classes"] == before["classes"]


class ConvNet(nn.Module):
    """Groups, dilation, stride, a depthwise layer, batch statistics, and a convolution of sequences."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, stride=2, padding=1, padding_mode="circular", bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.grouped = nn.Conv2d(6, 10, 3, groups=2, dilation=2, padding=2)
        self.depthwise = nn.Conv2d(10, 10, 3, groups=10, padding="same")
        self.sequence = nn.Conv1d(10, 7, 5, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        h = torch.relu(self.norm(self.stem(image)))
        h = torch.relu(self.depthwise(self.grouped(h)))
        return self.sequence(h.flatten(2))


def _encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(12, 3, 20, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def _timm(name: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import timm

        return timm.create_model(name, num_classes=5, **options)

    return build


def _mixer() -> nn.Module:
    from timm.models.mlp_mixer import MlpMixer

    return MlpMixer(num_classes=5, img_size=16, patch_size=8, num_blocks=2, embed_dim=12)


def _transformers(kind: str, config: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import transformers

        return getattr(transformers, kind)(getattr(transformers, config)(**options))

    return build


def _diffusers(kind: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import diffusers

        return getattr(diffusers, kind)(**options)

    return build


def _image(size: int, channels: int = 3, batch: int = 2) -> Callable[[nn.Module], Tensor]:
    def call(model: nn.Module) -> Tensor:
        return model(_noise(batch, channels, size, size))

    return call


def _noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def _tokens(model: nn.Module) -> Tensor:
    ids = torch.randint(0, 31, (2, 6), generator=torch.Generator().manual_seed(3))
    return model(input_ids=ids).logits


def _mmdit(model: Any) -> Tensor:
    return model(
        _noise(2, 3, 8, 8),
        encoder_hidden_states=_noise(2, 4, 6),
        pooled_projections=_noise(2, 5),
        timestep=torch.tensor([3, 5]),
    ).sample


def _flux(model: Any) -> Tensor:
    place = torch.arange(9)
    return model(
        _noise(2, 9, 4),
        encoder_hidden_states=_noise(2, 4, 6),
        pooled_projections=_noise(2, 5),
        timestep=torch.tensor([0.3, 0.5], dtype=torch.float64),
        img_ids=torch.stack([torch.zeros(9), place // 3, place % 3], dim=1),
        txt_ids=torch.zeros(4, 3),
    ).sample


_TEXT: dict[str, Any] = {"vocab_size": 31, "attn_implementation": "sdpa"}
_VIT: dict[str, Any] = {"img_size": 16, "patch_size": 8, "embed_dim": 12, "num_heads": 3}
_LLAMA: dict[str, Any] = {"hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 3}

# name -> (build, call); built without dropout, so that training and evaluation compute the same
BACKBONES: dict[str, tuple[Callable[[], nn.Module], Callable[[Any], Tensor]]] = {
    "convnet": (ConvNet, _image(16)),
    "encoder": (_encoder, lambda model: model(_noise(2, 5, 12))),
    "vit": (_timm("vit_tiny_patch16_224", depth=2, **_VIT), _image(16)),
    "swin": (
        _timm("swin_tiny_patch4_window7_224", img_size=16, window_size=2, embed_dim=8, depths=(1, 1), num_heads=(2, 2)),
        _image(16),
    ),
    "convnext": (_timm("convnext_atto", depths=(1, 1, 1, 1), dims=(6, 8, 10, 12)), _image(32)),
    "resnet": (_timm("resnet18", layers=(1, 1, 1, 1), channels=(6, 8, 10, 12)), _image(32)),
    "mixer": (_mixer, _image(16)),
    "llama": (_transformers("LlamaForCausalLM", "LlamaConfig", **_TEXT, **_LLAMA), _tokens),
    "bert": (
        _transformers(
            "BertForSequenceClassification",
            "BertConfig",
            **_TEXT,
            **_LLAMA,
            num_labels=5,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        ),
        _tokens,
    ),
    "gpt2": (
        _transformers(
            "GPT2LMHeadModel",
            "GPT2Config",
            **_TEXT,
            n_embd=12,
            n_layer=2,
            n_head=3,
            n_inner=20,
            n_positions=8,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=0,
            eos_token_id=0,
        ),
        _tokens,
    ),
    "unet": (
        _diffusers(
            "UNet2DModel",
            sample_size=8,
            block_out_channels=(8, 12),
            layers_per_block=1,
            norm_num_groups=4,
            attention_head_dim=4,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        ),
        lambda model: model(_noise(2, 3, 8, 8), torch.tensor([3, 5])).sample,
    ),
    "unet_text": (
        _diffusers(
            "UNet2DConditionModel",
            sample_size=8,
            in_channels=3,
            out_channels=3,
            block_out_channels=(8, 12),
            layers_per_block=1,
            norm_num_groups=4,
            attention_head_dim=4,
            cross_attention_dim=6,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        ),
        lambda model: (
            model(
                _noise(2, 3, 8, 8),
                torch.tensor([3, 505]),
                encoder_hidden_states=_noise(2, 5, 6),
                added_cond_kwargs={"image_embeds": _noise(2, 1024)},
            ).sample
        ),
    ),
    "dit": (
        _diffusers(
            "DiTTransformer2DModel",
            num_attention_heads=3,
            attention_head_dim=4,
            in_channels=3,
            num_layers=2,
            sample_size=8,
            patch_size=2,
            num_embeds_ada_norm=10,
            norm_num_groups=1,
        ),
        lambda model: (
            model(_noise(2, 3, 8, 8), timestep=torch.tensor([3, 5]), class_labels=torch.tensor([1, 2])).sample
        ),
    ),
    "sd3": (
        _diffusers(
            "SD3Transformer2DModel",
            sample_size=8,
            patch_size=2,
            in_channels=3,
            out_channels=3,
            num_layers=2,
            num_attention_heads=3,
            attention_head_dim=4,
            joint_attention_dim=6,
            caption_projection_dim=12,
            pooled_projection_dim=5,
            pos_embed_max_size=8,
        ),
        _mmdit,
    ),
    "flux": (
        _diffusers(
            "FluxTransformer2DModel",
            patch_size=1,
            in_channels=4,
            num_layers=2,
            num_single_layers=2,
            num_attention_heads=2,
            attention_head_dim=8,
            joint_attention_dim=6,
            pooled_projection_dim=5,
            axes_dims_rope=(2, 2, 4),
        ),
        _flux,
    ),
}


@functools.cache
def _built(name: str) -> nn.Module:
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what other libraries say while they build
        torch.manual_seed(1)
        model = BACKBONES[name][0]().double().eval()
        with torch.no_grad():  # layers that start at zero would hide what happens below them
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def backbone(name: str) -> nn.Module:
    """A fresh copy, in float64 and for evaluation, the same weights at each call."""
    return copy.deepcopy(_built(name))


def call(name: str, model: nn.Module) -> Tensor:
    """The output of backbone ``name`` for its input."""
    return BACKBONES[name][1](model)


# what errors advise where the defaults do not suit a backbone: adapt more than linear layers, leave the head frozen
_ADVICE: tuple[dict[str, Any], ...] = (
    {},
    {"target_modules": "all-layers"},
    {"modules_to_save": ()},
    {"target_modules": "all-layers", "modules_to_save": ()},
)


@functools.cache
def _fields(cls: type[Method]) -> set[str]:
    return {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]


def suited(cls: type[Method], name: str) -> Method | AdapterError:
    """``cls`` as a user would write it for backbone ``name``; the error it gives if nothing there can be adapted."""
    hosted = issubclass(cls, HostedMethod)
    own = _fields(cls)
    fields = own | (_fields(type(cls().host)) if hosted else set())
    narrow = {"r": 2, "n_layers": 1}  # the layers here are, and there are few
    refusals = []
    for advice in _ADVICE:
        if advice.keys() <= fields:
            given = {key: value for key, value in {**narrow, **advice}.items() if key in fields}
            arguments = {key: value for key, value in given.items() if key in own}
            if hosted:
                others = {key: value for key, value in given.items() if key not in own}
                arguments["method"] = dataclasses.replace(cls().host, **others)
            method = cls(**arguments)
            try:
                inject(backbone(name), method)
            except AdapterError as refusal:
                refusals.append(refusal)
            else:
                return method
    return refusals[0]
