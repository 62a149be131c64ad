"""IP-Adapter against the processors and the projection of diffusers, and against the formula by hand."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_peft import IPAdapter, LoRA, SoftREPA, disabled, inject, set_active, unload
from lightning_peft.engine import AdapterError, TargetError, adapters_of
from tests.methods.backbones import assert_unchanged, moved, snapshot, trainable
from tests.papers.denoisers import NOISE, T, denoise_text, dit, unet

diffusers = pytest.importorskip("diffusers")
processors = pytest.importorskip("diffusers.models.attention_processor")
embeddings = pytest.importorskip("diffusers.models.embeddings")

METHOD = IPAdapter(image_embed_dim=7)
CLOSE = {"rtol": 1e-8, "atol": 1e-8}  # in float64 the order of the sums differs, and some of the UNet is in float32


def images(*shape: int, seed: int = 5) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


E = images(4, 7)


def denoise(model: Any, embeds: Any = E, **options: Any) -> Tensor:
    return denoise_text(model, added_cond_kwargs={"image_embeds": embeds}, **options)


def by_diffusers(model: nn.Module, base: Any, names: tuple[str, ...] = ("default",)) -> Any:
    """``base`` as diffusers adapts it, with the weights of the adapters ``names`` of ``model``."""
    sources = [model.adapters[name] for name in names]
    sizes = [len(source.proj_bias) // 6 for source in sources]
    made = {}
    for key in base.attn_processors:
        made[key] = processors.AttnProcessor2_0()
        if key.endswith("attn2.processor"):
            own = [model.get_submodule(key.removesuffix(".processor")).adapters[name] for name in names]
            made[key] = processors.IPAdapterAttnProcessor2_0(
                len(own[0].keys), 6, num_tokens=sizes, scale=[adapter.scaling.item() for adapter in own]
            ).double()
            for i, adapter in enumerate(own):
                made[key].to_k_ip[i].weight.data = adapter.keys.detach().clone()
                made[key].to_v_ip[i].weight.data = adapter.values.detach().clone()
    base.set_attn_processor(made)
    projections = []
    for source, n in zip(sources, sizes, strict=True):
        projection = embeddings.ImageProjection(source.d_image, 6, n).double()
        linear, norm = projection.image_embeds, projection.norm
        for theirs, ours in (
            (linear.weight, source.proj_weight),
            (linear.bias, source.proj_bias),
            (norm.weight, source.norm_weight),
            (norm.bias, source.norm_bias),
        ):
            theirs.data = ours.detach().clone()
        projections.append(projection)
    if base.encoder_hid_proj is not None:
        base.text_encoder_hid_proj = base.encoder_hid_proj
    base.encoder_hid_proj = embeddings.MultiIPAdapterImageProjection(projections)
    base.config.encoder_hid_dim_type = "ip_image_proj"
    return base


def pairs(model: Any, reference: Any) -> list[tuple[Tensor, Tensor]]:
    """Each parameter of ours beside that of diffusers."""
    source, projection = model.adapters["default"], reference.encoder_hid_proj.image_projection_layers[0]
    found = [
        (source.proj_weight, projection.image_embeds.weight),
        (source.proj_bias, projection.image_embeds.bias),
        (source.norm_weight, projection.norm.weight),
        (source.norm_bias, projection.norm.bias),
    ]
    for path, _, adapter in adapters_of(model)[1:]:
        theirs = reference.get_submodule(path).processor
        found += [(adapter.keys, theirs.to_k_ip[0].weight), (adapter.values, theirs.to_v_ip[0].weight)]
    return found


@pytest.mark.parametrize("embeds", [E, [E], images(4, 1, 7), images(4, 3, 7)], ids=["plain", "list", "one", "three"])
@pytest.mark.parametrize("processor", ["default", "plain", "sliced"])
def test_output_and_gradients_are_those_of_diffusers(embeds: Any, processor: str) -> None:
    model = moved(inject(unet(), IPAdapter(image_embed_dim=7, scale=0.6)))
    reference = by_diffusers(model, unet())
    if processor == "plain":
        model.set_attn_processor(processors.AttnProcessor())
    elif processor == "sliced":
        model.set_attention_slice(1)
    theirs = embeds[0] if isinstance(embeds, list) else embeds
    y, expected = denoise(model, embeds), denoise(reference, [theirs.reshape(4, -1, 7)])
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(y, denoise_text(unet()), atol=1e-2)
    y.square().sum().backward()
    expected.square().sum().backward()
    assert len(adapters_of(model)) == 5, "the denoiser and four cross-attentions"
    for ours, other in pairs(model, reference):
        assert ours.grad.any()
        torch.testing.assert_close(ours.grad, other.grad, rtol=1e-5, atol=1e-6)
    assert {n for n, _ in trainable(model).items() if ".adapters." not in f".{n}"} == set()


def test_diffusers_loads_what_was_trained_as_its_own_file() -> None:
    model = moved(inject(unet().float(), METHOD))
    source, attentions = adapters_of(model)[0][2], {path: adapter for path, _, adapter in adapters_of(model)[1:]}
    order = [key.removesuffix(".processor") for key in model.attn_processors if key.endswith("attn2.processor")]
    names = ("proj.weight", "proj.bias", "norm.weight", "norm.bias")
    values = (source.proj_weight, source.proj_bias, source.norm_weight, source.norm_bias)
    file: dict[str, dict[str, Tensor]] = {"image_proj": dict(zip(names, values, strict=True)), "ip_adapter": {}}
    for i, name in enumerate(order):
        file["ip_adapter"][f"{2 * i + 1}.to_k_ip.weight"] = attentions[name].keys
        file["ip_adapter"][f"{2 * i + 1}.to_v_ip.weight"] = attentions[name].values
    theirs = unet().float()
    theirs._load_ip_adapter_weights(file, low_cpu_mem_usage=False)

    def call(denoiser: Any, embeds: Any) -> Tensor:
        text = torch.linspace(-1, 1, 4 * 5 * 6).reshape(4, 5, 6)
        more = {"image_embeds": embeds}
        return denoiser(NOISE.float(), T, encoder_hidden_states=text, added_cond_kwargs=more).sample

    expected = call(theirs, [E.float()[:, None]])
    torch.testing.assert_close(call(model, [E.float()[:, None]]), expected, rtol=1e-4, atol=1e-5)  # float32
    assert not torch.allclose(expected, call(unet().float(), None), atol=1e-2)


def test_the_start_is_the_projections_of_the_text() -> None:
    model = inject(unet(), METHOD)
    source, *others = (adapter for _, _, adapter in adapters_of(model))
    bound = 7**-0.5
    for values in (source.proj_weight, source.proj_bias):
        assert 0.8 * bound < values.abs().max() <= bound
    assert source.norm_weight.eq(1).all()
    assert source.norm_bias.eq(0).all()
    for path, module, adapter in adapters_of(model)[1:]:
        assert path.endswith("attn2")
        assert torch.equal(adapter.keys, module.to_k.weight)
        assert torch.equal(adapter.values, module.to_v.weight)
        assert adapter.keys is not module.to_k.weight
    adapted = moved(inject(unet(), LoRA(r=2, target_modules="attn2.to_k")))
    inject(adapted, METHOD, name="image")
    for _, module, _ in [found for found in adapters_of(adapted, "image") if found[0].endswith("attn2")]:
        lora = module.to_k.adapters["default"]
        whole = module.to_k.weight + lora.scaling * lora.lora_B @ lora.lora_A
        torch.testing.assert_close(module.adapters["image"].keys, whole, **CLOSE)


def test_count_of_stable_diffusion() -> None:
    with torch.device("meta"):
        base = diffusers.UNet2DConditionModel(cross_attention_dim=768)
    method = IPAdapter()
    assert len(method.targets(base)) == 17
    assert method.total_trainable(method.targets(base)) == 19_169_280 + 3_150_336
    assert sum(p.numel() for p in trainable(inject(base, method)).values()) == 22_319_616


def test_the_scale_can_be_changed_and_at_zero_the_text_acts_alone() -> None:
    model = moved(inject(unet(), METHOD))
    for scale in (0.3, 0.0, 2.0):
        for _, _, adapter in adapters_of(model)[1:]:
            adapter.scaling.fill_(scale)
        if scale == 0:
            assert torch.equal(denoise(model), denoise_text(unet()))
        else:
            expected = denoise(by_diffusers(model, unet()), [E[:, None]])
            torch.testing.assert_close(denoise(model), expected, rtol=1e-6, atol=1e-6)


def test_without_the_adapter_no_image_is_asked_for_and_nothing_is_left_behind() -> None:
    base = unet()
    before, expected = snapshot(base), denoise_text(base)
    model = moved(inject(base, METHOD))
    with disabled(model):
        assert torch.equal(denoise_text(model), expected)
    set_active(model, ())
    assert torch.equal(denoise_text(model), expected)
    assert_unchanged(unload(model), before)
    assert torch.equal(denoise_text(model), expected)


def test_guidance_gives_each_half_what_it_gets_alone() -> None:
    model, embeds = moved(inject(unet(), METHOD)), torch.cat([torch.zeros(2, 7).double(), E[2:]])
    text = images(4, 5, 6, seed=7)

    def call(rows: slice) -> Tensor:
        more = {"image_embeds": embeds[rows]}
        return model(NOISE[rows], T[rows], encoder_hidden_states=text[rows], added_cond_kwargs=more).sample

    both = call(slice(None))
    torch.testing.assert_close(both, torch.cat([call(slice(0, 2)), call(slice(2, 4))]), **CLOSE)
    assert not torch.allclose(both[:2], denoise(model)[:2], atol=1e-3)


@pytest.mark.parametrize("kind", ["mask", "wide"])
def test_masks_of_the_text_and_texts_of_another_width(kind: str) -> None:
    wide = {"encoder_hid_dim": 9, "encoder_hid_dim_type": "text_proj"} if kind == "wide" else {}
    model = moved(inject(unet(**wide), METHOD))
    reference = by_diffusers(model, unet(**wide))
    text = images(4, 5, 9 if kind == "wide" else 6, seed=7)
    mask = (
        torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0], [1, 1, 0, 0, 0]]) if kind == "mask" else None
    )

    def call(denoiser: Any, embeds: Any, **masks: Any) -> Tensor:
        more = {"image_embeds": embeds}
        return denoiser(NOISE, T, encoder_hidden_states=text, added_cond_kwargs=more, **masks).sample

    expected = call(reference, [E[:, None]], encoder_attention_mask=mask)
    torch.testing.assert_close(call(model, E, encoder_attention_mask=mask), expected, rtol=1e-6, atol=1e-6)
    if mask is not None:
        assert not torch.allclose(expected, call(model, E), atol=1e-4), "the mask makes a difference"


def test_beside_lora_on_the_same_attentions() -> None:
    lora = LoRA(r=2, target_modules=("to_q", "to_k", "to_v", "to_out.0"))
    model = inject(unet(), METHOD)
    moved(inject(model, lora, name="lora"))
    base = unet()
    for path, _, adapter in adapters_of(model, "lora"):
        base.get_submodule(path).weight.data += (adapter.scaling * adapter.lora_B @ adapter.lora_A).detach()
    expected = denoise(by_diffusers(model, base), [E[:, None]])
    torch.testing.assert_close(denoise(model), expected, rtol=1e-6, atol=1e-6)
    denoise(model).square().sum().backward()
    assert all(p.grad.any() for p in trainable(model).values())
    assert_unchanged(unload(model), snapshot(unet()))


def test_two_of_them_act_side_by_side() -> None:
    model = inject(unet(), METHOD)
    inject(model, IPAdapter(image_embed_dim=7, num_tokens=2, scale=0.5), name="second")
    model = moved(model)
    expected = denoise(by_diffusers(model, unet(), ("default", "second")), [E[:, None], E[:, None]])
    torch.testing.assert_close(denoise(model), expected, rtol=1e-6, atol=1e-6)
    set_active(model, "second")
    expected = denoise(by_diffusers(model, unet(), ("second",)), [E[:, None]])
    torch.testing.assert_close(denoise(model), expected, rtol=1e-6, atol=1e-6)


def test_two_that_look_in_different_places_keep_their_tokens_apart() -> None:
    model = inject(unet(), IPAdapter(image_embed_dim=7, target_modules="down_blocks.*attn2"))
    inject(model, IPAdapter(image_embed_dim=7, num_tokens=2, target_modules="mid_block.*attn2"), name="second")
    model = moved(model)
    assert [path.partition(".")[0] for path, _, _ in adapters_of(model)] == ["", "", "down_blocks", "mid_block"]
    seen: dict[str, int] = {}
    for path, _, adapter in adapters_of(model)[2:]:
        inner, place = adapter.branch, path.partition(".")[0]
        adapter.branch = lambda x, tokens, attention, inner=inner, place=place: (
            seen.update({place: tokens.shape[1]}) or inner(x, tokens, attention)
        )
    denoise(model)
    assert seen == {"down_blocks": 4, "mid_block": 2}


def gradients(model: Any, checkpointing: bool) -> dict[str, Tensor]:
    """Of the sum over two calls with other images, made before the backward pass."""
    model = copy.deepcopy(model).train()
    if checkpointing:
        model.enable_gradient_checkpointing()
    first, second = denoise(model, E), denoise(model, images(4, 7, seed=8))
    (first.square().sum() + second.pow(3).sum()).backward()
    return {name: p.grad for name, p in trainable(model).items()}


def test_activation_checkpoints_see_the_image_of_their_own_call() -> None:
    model = moved(inject(unet(), METHOD))
    plain, again = gradients(model, False), gradients(model, True)
    for name, grad in plain.items():
        assert grad.any()
        torch.testing.assert_close(again[name], grad, rtol=1e-6, atol=1e-8)


def test_a_denoiser_is_traced_as_one_graph() -> None:
    torch._dynamo.reset()
    model = moved(inject(unet(), METHOD))
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(denoise(compiled), denoise(model))


def test_autocast_keeps_the_parameters_and_the_answer() -> None:
    model = moved(inject(unet().float(), METHOD))

    def call() -> Tensor:
        text = torch.linspace(-1, 1, 4 * 5 * 6).reshape(4, 5, 6)
        more = {"image_embeds": E.float()}
        return model(NOISE.float(), T, encoder_hidden_states=text, added_cond_kwargs=more).sample

    expected = call()
    with torch.autocast("cpu", torch.bfloat16):
        y = call()
    assert (y.float() - expected).norm() < 0.05 * expected.norm()  # bfloat16 keeps 8 bits
    y.float().square().sum().backward()
    assert {p.grad.dtype for p in trainable(model).values()} == {torch.float32}


class One(nn.Module):
    """One attention as a denoiser."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        settings = {"query_dim": 12, "cross_attention_dim": 6, "heads": 3, "dim_head": 4, **options}
        self.attn2 = processors.Attention(**settings)

    def forward(
        self,
        sample: Tensor,
        encoder_hidden_states: Any,
        added_cond_kwargs: Any = None,
        cross_attention_kwargs: Any = None,
    ) -> Tensor:
        more = cross_attention_kwargs or {}
        return self.attn2(sample, encoder_hidden_states=encoder_hidden_states, **more)


FORMS: dict[str, dict[str, Any]] = {
    "scaled": {"rescale_output_factor": 2.5, "residual_connection": True, "bias": True},
    "unscaled": {"scale_qk": False},
    "layer_norm": {"qk_norm": "layer_norm"},
    "rms_norm": {"qk_norm": "rms_norm", "out_bias": False},
    "wider": {"dim_head": 8, "out_dim": 24, "cross_attention_norm": "layer_norm"},
}


@pytest.mark.parametrize("options", FORMS.values(), ids=FORMS)
def test_attentions_of_other_forms_by_hand(options: dict[str, Any]) -> None:
    base = moved(One(**options).double().eval())
    x, text, attention = images(2, 9, 12), images(2, 5, 6, seed=7), base.attn2
    y = base(x, text)
    model = moved(inject(base, IPAdapter(image_embed_dim=7, num_tokens=3, scale=0.7)))
    source, adapter = (adapter for _, _, adapter in adapters_of(model))
    c = F.linear(E[:2], source.proj_weight, source.proj_bias).reshape(2, 3, 6)
    c = (c - c.mean(-1, keepdim=True)) / (c.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    c = c * source.norm_weight + source.norm_bias

    def heads(part: Tensor, norm: Any = None) -> Tensor:
        part = part.unflatten(-1, (attention.heads, -1)).transpose(1, 2)
        return part if norm is None else norm(part)

    q = heads(x @ attention.to_q.weight.T + (attention.to_q.bias if options.get("bias") else 0), attention.norm_q)
    k, v = heads(c @ adapter.keys.T, attention.norm_k), heads(c @ adapter.values.T)
    factor = 1.0 if options.get("scale_qk") is False else q.shape[-1] ** -0.5
    seen = ((q @ k.transpose(-1, -2) * factor).softmax(-1) @ v).transpose(1, 2).flatten(2)
    expected = y + 0.7 * seen @ attention.to_out[0].weight.T / options.get("rescale_output_factor", 1.0)
    torch.testing.assert_close(model(x, text, added_cond_kwargs={"image_embeds": E[:2]}), expected, **CLOSE)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"added_kv_proj_dim": 6}, "has a layer add_k_proj besides"),
        ({"norm_num_groups": 4}, "has a layer group_norm besides"),
        ({"spatial_norm_dim": 4, "query_dim": 32}, "has a layer spatial_norm besides"),
        ({"kv_heads": 1}, "shares keys between heads"),
        ({"qk_norm": "layer_norm_across_heads", "kv_heads": 3}, "normalises its queries over all heads"),
    ],
)
def test_attentions_that_the_branch_would_not_suit_are_refused(options: dict[str, Any], message: str) -> None:
    base = One(**options)
    before = snapshot(base)
    with pytest.raises(TargetError, match=rf"IPAdapter: the attention 'attn2' {message}. Leave it out"):
        inject(base, METHOD)
    assert_unchanged(base, before)


def test_an_attention_without_those_layers_is_refused() -> None:
    base = One()
    del base.attn2.to_out
    with pytest.raises(TargetError, match=r"'attn2' has no layers to_q, to_k, to_v and to_out.0 with a number"):
        inject(base, METHOD)


def test_models_without_a_place_for_an_image_are_refused() -> None:
    with pytest.raises(TargetError, match=r"DiTTransformer2DModel holds no module with cross-attentions .*\. Choose"):
        inject(dit(), METHOD)
    down, up = ("CrossAttnDownBlock2D",) * 2, ("CrossAttnUpBlock2D",) * 2
    settings = {"cross_attention_dim": (6, 5), "down_block_types": down, "up_block_types": up}
    two = diffusers.UNet2DConditionModel.from_config({**unet().config, **settings})
    with pytest.raises(TargetError, match=r"of 6 features, and 'down_blocks.1.* at 5. Name attentions"):
        inject(two, METHOD)
    with pytest.raises(TargetError, match=r"'attn1' matched none of 4 cross-attentions.*names are like 'down_blocks"):
        inject(unet(), IPAdapter(image_embed_dim=7, target_modules="attn1"))


def test_an_attention_that_looks_at_itself_alone_is_left_out() -> None:
    # by the name of its place it would look at the text
    base = unet()
    block = base.mid_block.attentions[0].transformer_blocks[0]
    block.attn2 = processors.Attention(query_dim=12, heads=3, dim_head=4).double()
    found = [target.name for target in METHOD.targets(base)]
    assert len(found) == 4
    assert not any(name.startswith("mid_block") for name in found)


def test_of_several_denoisers_one_is_named() -> None:
    both = nn.ModuleDict({"unet": unet(), "control": unet(), "vae": nn.Linear(2, 2)})
    with pytest.raises(TargetError, match=r"2 modules that are given text and image \('unet', 'control'\). Name"):
        inject(both, METHOD)
    model = moved(inject(both, IPAdapter(image_embed_dim=7, target_modules="unet.*attn2")))
    expected = denoise(by_diffusers(model["unet"], unet()), [E[:, None]])
    torch.testing.assert_close(denoise(model["unet"]), expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(denoise_text(model["control"]), denoise_text(unet()))


@pytest.mark.parametrize(
    ("embeds", "message"),
    [
        (None, "without the embedding of an image"),
        (E[:2], r"image_embeds is \(2, 1, 7\); expected \(4, 7\)"),
        (images(4, 8), r"image_embeds is \(4, 1, 8\); expected \(4, 7\)"),
        (images(4, 1, 9, 7), r"image_embeds is \(4, 1, 9, 7\)"),
        ([E, E], "image_embeds is a list"),
        ("none", "image_embeds is a str"),
    ],
    ids=["none", "batch", "width", "sequence", "two", "text"],
)
def test_images_that_do_not_fit_are_refused(embeds: Any, message: str) -> None:
    model = inject(unet(), METHOD)
    with pytest.raises(AdapterError, match=rf"IPAdapter: .*{message}.*\. [A-Z]"):
        denoise(model, embeds)
    if embeds is None:
        with pytest.raises(AdapterError, match=message):
            denoise_text(model)


def test_calls_that_would_go_past_the_image_are_refused() -> None:
    model, x = inject(One().double(), METHOD), images(2, 9, 12)
    with pytest.raises(AdapterError, match=r"'attn2' was given no image.* Call the whole denoiser"):
        model.attn2(x, encoder_hidden_states=images(2, 5, 6))
    with pytest.raises(AdapterError, match="'attn2' was given no text"):
        model(x, None, added_cond_kwargs={"image_embeds": E[:2]})
    with pytest.raises(AdapterError, match=r"'attn2' was given a map \(2, 12, 3, 3\)"):
        model(images(2, 12, 3, 3), images(2, 5, 6), added_cond_kwargs={"image_embeds": E[:2]})
    more = {"ip_adapter_masks": [torch.ones(1, 1, 3, 3)]}
    with pytest.raises(AdapterError, match="ip_adapter_masks say which pixels"):
        model(x, images(2, 5, 6), added_cond_kwargs={"image_embeds": E[:2]}, cross_attention_kwargs=more)


def test_beside_soft_tokens_of_the_text() -> None:
    model = moved(inject(inject(unet(), METHOD), SoftREPA(stages=("down", "mid", "up")), name="soft"))
    soft = model.adapters["soft"]
    tokens = soft.table + soft.times[T // 10][:, None]
    text = torch.linspace(-1, 1, 4 * 5 * 6, dtype=torch.float64).reshape(4, 5, 6)
    longer = torch.cat([text[:, :1], tokens, text[:, 1:]], dim=1)
    more = {"image_embeds": [E[:, None]]}
    reference = by_diffusers(model, unet())
    expected = reference(NOISE, T, encoder_hidden_states=longer, added_cond_kwargs=more).sample
    torch.testing.assert_close(denoise(model), expected, rtol=1e-6, atol=1e-6)
