"""Prefix tuning against dense attention, a cache that is filled with the prefix, and HF PEFT."""

import copy
import functools
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_peft import PrefixTuning, inject, load_adapter, save_adapter
from lightning_peft.engine import TargetError, adapters_of
from tests.methods.backbones import TinyAttention, backbone, moved, tiny

P = 3
SIZES: dict[str, Any] = {"hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 3}
OPTIONS: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@functools.cache
def built(kv_heads: int) -> nn.Module:
    import transformers as t

    torch.manual_seed(1)
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = t.LlamaConfig(vocab_size=31, **SIZES, num_key_value_heads=kv_heads, **special)
    model = t.LlamaForCausalLM(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def base(kv_heads: int = 3) -> Any:
    return copy.deepcopy(built(kv_heads))


def adapted(model: Any, **options: Any) -> Any:
    return moved(inject(model, PrefixTuning(num_virtual_tokens=P, **options)))


def prefixes(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    return [a.prefix() for _, _, a in adapters_of(model)]


def ids(*shape: int) -> Tensor:
    return torch.randint(3, 31, shape)


def test_it_is_attention_beside_attention_with_a_gate() -> None:
    """He et al., "Towards a Unified View": (1 - l) attention(K, V) + l attention(P_k, P_v)."""
    attention = TinyAttention().double()
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    q, k, v = attention.qkv(x).unflatten(-1, (3, 3, 4)).permute(2, 0, 3, 1, 4)
    model = adapted(nn.Sequential(attention))
    ((keys, values),) = prefixes(model)
    own = q @ keys.unflatten(1, (3, 4)).permute(1, 2, 0) / 2  # (batch, heads, n, p)
    others = q @ k.transpose(-1, -2) / 2
    gate = own.exp().sum(-1) / (own.exp().sum(-1) + others.exp().sum(-1))
    beside = own.softmax(-1) @ values.unflatten(1, (3, 4)).transpose(0, 1)
    both = gate[..., None] * beside + (1 - gate[..., None]) * (others.softmax(-1) @ v)
    torch.testing.assert_close(model(x), attention.proj(both.transpose(1, 2).flatten(2)))


def filled_cache(model: Any, kv_heads: int, batch: int) -> Any:
    """A cache of transformers that holds the prefix."""
    from transformers import DynamicCache

    cache = DynamicCache()
    for layer, (keys, values) in enumerate(prefixes(model)):
        k, v = (t.unflatten(1, (kv_heads, 4)).transpose(0, 1).expand(batch, -1, -1, -1) for t in (keys, values))
        cache.update(k, v, layer)
    return cache


def cached(cache: Any) -> dict[str, Any]:
    import inspect

    from transformers import LlamaForCausalLM

    names = inspect.signature(LlamaForCausalLM.forward).parameters
    return {"cache" if "cache" in names else "past_key_values": cache}


@pytest.mark.parametrize("kv_heads", [3, 1])
@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_llama_answers_as_with_a_cache_that_holds_the_prefix(kv_heads: int, side: str) -> None:
    model = adapted(base(kv_heads))
    assert {tuple(t.shape) for pair in prefixes(model) for t in pair} == {(P, 4 * kv_heads)}
    tokens, mask = ids(2, 6), torch.ones(2, 6, dtype=torch.long)
    if side != "none":
        mask[1, slice(0, 2) if side == "left" else slice(4, 6)] = 0
    positions = torch.arange(6)[None]  # a filled cache would count from p on
    long_mask = torch.cat([torch.ones(2, P, dtype=torch.long), mask], dim=1)
    cache = filled_cache(model, kv_heads, 2)
    expected = base(kv_heads)(tokens, attention_mask=long_mask, position_ids=positions, **cached(cache)).logits
    seen = model(tokens, attention_mask=None if side == "none" else mask).logits
    torch.testing.assert_close(seen[mask.bool()], expected[mask.bool()])


@pytest.mark.parametrize("kv_heads", [3, 1])
def test_generation_with_and_without_a_cache_agree(kv_heads: int) -> None:
    model = adapted(base(kv_heads))
    tokens, mask = ids(2, 5), torch.tensor([[1] * 5, [0, 0, 1, 1, 1]])
    made = model.generate(tokens, attention_mask=mask, **OPTIONS)
    for row in range(2):
        alone = tokens[row : row + 1, mask[row].bool()]
        for _ in range(4):
            alone = torch.cat([alone, model(alone, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
        assert made[row, -4:].tolist() == alone[0, -4:].tolist()
    beams = [model.generate(tokens, num_beams=3, use_cache=use, **OPTIONS) for use in (True, False)]
    assert torch.equal(*beams)
    static = model.generate(tokens, attention_mask=mask, cache_implementation="static", **OPTIONS)
    assert torch.equal(static, made)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # what PEFT asks of transformers
@pytest.mark.parametrize("kv_heads", [3, 1])
def test_hf_peft_answers_the_same_at_its_positions(kv_heads: int) -> None:
    import peft

    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P)
    theirs = peft.get_peft_model(base(kv_heads), config).double()
    model = adapted(base(kv_heads))
    theirs.prompt_encoder["default"].embedding.weight.data = torch.cat(
        [t for pair in prefixes(model) for t in pair], dim=1
    ).detach()
    tokens = ids(2, 6)
    expected = theirs(input_ids=tokens).logits
    torch.testing.assert_close(model(tokens, position_ids=torch.arange(P, P + 6)[None]).logits, expected)
    assert not torch.allclose(model(tokens).logits, expected)
    assert config.num_virtual_tokens * 2 * 2 * 4 * kv_heads == PrefixTuning(num_virtual_tokens=P).total_trainable(
        PrefixTuning().targets(base(kv_heads))
    )


def dense(pairs: list[tuple[Tensor, Tensor]]) -> Any:
    """``F.scaled_dot_product_attention``, written out, with the next of ``pairs`` before keys and values."""
    left = list(pairs)

    def product(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attn_mask: Any = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: Any = None,
    ) -> Tensor:
        keys, values = left.pop(0)
        heads = lambda t, d: t.unflatten(1, (-1, d)).transpose(0, 1)  # noqa: E731
        scores = q @ k.transpose(-1, -2)
        if is_causal:
            scores = scores.masked_fill(~torch.ones(scores.shape[-2:]).tril().bool(), -torch.inf)
        scores = scores * (scale or q.shape[-1] ** -0.5)
        if attn_mask is not None:
            scores = scores.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
        own = q @ heads(keys, q.shape[-1]).transpose(-1, -2) * (scale or q.shape[-1] ** -0.5)
        shares = torch.cat([scores, own], dim=-1).softmax(-1)
        n = k.shape[-2]
        return shares[..., :n] @ v + shares[..., n:] @ heads(values, v.shape[-1])

    return product


def sdpa(kind: str) -> tuple[Any, Any]:
    """A model, and a call of it."""
    import transformers as t

    torch.manual_seed(1)
    padding = torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    tokens = ids(2, 6)
    if kind == "bert":
        model: Any = t.BertForSequenceClassification(t.BertConfig(vocab_size=31, **SIZES, num_labels=4))
        return model.double().eval(), lambda m: m(tokens, attention_mask=padding).logits
    if kind == "gpt2":
        few = {"n_embd": 12, "n_layer": 2, "n_head": 3, "n_positions": 8}
        model = t.GPT2LMHeadModel(t.GPT2Config(vocab_size=31, **few, bos_token_id=1, eos_token_id=2))
        return model.double().eval(), lambda m: m(tokens).logits
    image = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    if kind == "timm":
        return backbone("vit"), lambda m: m(image)
    steps, latent = torch.tensor([3, 5]), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    if kind == "dit":
        classes = torch.tensor([1, 2])
        return backbone("dit"), lambda m: m(latent, timestep=steps, class_labels=classes).sample
    if kind == "unet":
        return backbone("unet"), lambda m: m(latent, steps).sample
    model = t.ViTModel(t.ViTConfig(**SIZES, image_size=16, patch_size=8))
    return model.double().eval(), lambda m: m(image).last_hidden_state


@pytest.mark.parametrize("kind", ["bert", "gpt2", "timm", "dit", "unet", "vit"])
def test_models_of_many_kinds_follow_the_formula(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, call = sdpa(kind)
    model = adapted(copy.deepcopy(plain))
    seen = call(model)
    assert not torch.allclose(seen, call(plain))
    called = sorted(adapters_of(model), key=lambda found: "up_blocks" in found[0])  # the middle of a UNet is named last
    monkeypatch.setattr(F, "scaled_dot_product_attention", dense([a.prefix() for _, _, a in called]))
    torch.testing.assert_close(seen, call(plain), rtol=1e-6, atol=1e-8)  # parts of diffusers compute in float32


def multihead(
    q: Tensor, k: Tensor, v: Tensor, module: Any, keys: Tensor, values: Tensor, closed: Any
) -> tuple[Any, Any]:
    """``nn.MultiheadAttention`` of (batch, n, width), written out; ``closed`` is added to the scores of the tokens."""
    w = [module.q_proj_weight, module.k_proj_weight, module.v_proj_weight]
    w = w if module.in_proj_weight is None else list(module.in_proj_weight.chunk(3))
    parts = zip((q, k, v), w, module.in_proj_bias.chunk(3), strict=True)
    q, k, v = (F.linear(x, weight, bias).unflatten(-1, (3, 4)).transpose(1, 2) for x, weight, bias in parts)
    k = torch.cat([keys.unflatten(1, (3, 4)).transpose(0, 1).expand(len(k), -1, -1, -1), k], dim=2)
    v = torch.cat([values.unflatten(1, (3, 4)).transpose(0, 1).expand(len(v), -1, -1, -1), v], dim=2)
    scores = q @ k.transpose(-1, -2) / 2
    scores[..., P:] += closed
    shares = scores.softmax(-1)
    return module.out_proj((shares @ v).transpose(1, 2).flatten(2)), shares


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("widths", [{}, {"kdim": 5, "vdim": 7}])
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("masks", ["none", "bool", "float", "causal", "per_head"])
@pytest.mark.parametrize("grad", [True, False])
def test_multihead_attention(batch_first: bool, widths: Any, need_weights: bool, masks: str, grad: bool) -> None:
    module = nn.MultiheadAttention(12, 3, batch_first=batch_first, **widths).double().eval()
    nn.init.normal_(module.in_proj_bias)
    k, v = (torch.randn(2, 5, widths.get(n, 12), dtype=torch.float64) for n in ("kdim", "vdim"))
    q = torch.randn(2, 5, 12, dtype=torch.float64)
    model = adapted(nn.ModuleList([module]))[0]
    (pair,) = prefixes(model)
    mask, padding = None, None
    closed: Any = torch.zeros(2, 1, 5, 5, dtype=torch.float64)
    if masks == "causal":
        mask = torch.ones(5, 5).triu(1).bool()
        closed = closed.masked_fill(mask, -torch.inf)
    elif masks == "per_head":
        mask = torch.rand(6, 5, 5) < 0.4
        closed = closed.expand(2, 3, 5, 5).masked_fill(mask.unflatten(0, (2, 3)), -torch.inf)
    elif masks != "none":
        mask, padding = torch.rand(5, 5) < 0.3, torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
        closed = closed.masked_fill(mask, -torch.inf).masked_fill(padding[:, None, None], -torch.inf)
    if masks == "float":
        mask, padding = (torch.zeros(m.shape, dtype=torch.float64).masked_fill(m, -torch.inf) for m in (mask, padding))
    expected, shares = multihead(q, k, v, module, *pair, closed)
    given = (q, k, v) if batch_first else tuple(t.transpose(0, 1) for t in (q, k, v))
    with torch.set_grad_enabled(grad):
        seen, weights = model(
            *given, attn_mask=mask, key_padding_mask=padding, need_weights=need_weights, is_causal=masks == "causal"
        )
    torch.testing.assert_close(seen if batch_first else seen.transpose(0, 1), expected)
    if need_weights:
        torch.testing.assert_close(weights, shares[..., P:].mean(1))
    if not widths:  # no batch
        alone, _ = model(q[0], q[0], q[0])
        torch.testing.assert_close(alone, multihead(q[:1], q[:1], q[:1], module, *pair, 0)[0][0])


def test_multihead_attention_compiles() -> None:
    torch._dynamo.reset()
    model = adapted(nn.ModuleList([nn.MultiheadAttention(12, 3, batch_first=True)]).eval())[0]
    x, padding = torch.randn(2, 4, 12), torch.tensor([[False] * 4, [False] * 3 + [True]])
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for need_weights in (True, False):
        options = {"key_padding_mask": padding, "need_weights": need_weights}
        torch.testing.assert_close(compiled(x, x, x, **options), model(x, x, x, **options))


def test_one_network_makes_the_prefixes_of_all_layers() -> None:
    model = adapted(base(), reparameterize=5)
    (_, _, first), (_, _, second) = adapters_of(model)
    trunk = first.trunk
    assert "trunk" not in dict(second.named_modules())
    h = torch.tanh(trunk.table @ trunk.weight.T + trunk.bias)
    for adapter in (first, second):
        keys, values = adapter.prefix()
        torch.testing.assert_close(torch.cat([keys, values], dim=1), h @ adapter.weight.T + adapter.bias)
        assert keys.shape == values.shape == (P, 12)
    direct = adapted(base())
    for (_, _, adapter), (keys, values) in zip(adapters_of(direct), prefixes(model), strict=True):
        adapter.keys.data, adapter.values.data = keys.detach(), values.detach()
    tokens = ids(2, 5)
    torch.testing.assert_close(model.train()(tokens).logits, direct(tokens).logits)
    torch.testing.assert_close(model.eval()(tokens).logits, direct(tokens).logits)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_network_is_that_of_hf_peft() -> None:
    import peft

    options = {"num_virtual_tokens": P, "encoder_hidden_size": 5, "prefix_projection": True}
    theirs = peft.get_peft_model(base(), peft.PrefixTuningConfig(task_type="CAUSAL_LM", **options)).double()
    encoder = theirs.prompt_encoder["default"]
    model = adapted(base(), reparameterize=5)
    adapters = [a for _, _, a in adapters_of(model)]
    assert sum(p.numel() for p in encoder.parameters()) == sum(p.numel() for a in adapters for p in a.parameters())
    trunk = adapters[0].trunk
    encoder.embedding.weight.data = trunk.table.detach()
    encoder.transform[0].weight.data, encoder.transform[0].bias.data = trunk.weight.detach(), trunk.bias.detach()
    encoder.transform[2].weight.data = torch.cat([a.weight for a in adapters]).detach()
    encoder.transform[2].bias.data = torch.cat([a.bias for a in adapters]).detach()
    tokens = ids(2, 6)
    seen = model(tokens, position_ids=torch.arange(P, P + 6)[None]).logits
    torch.testing.assert_close(seen, theirs(input_ids=tokens).logits)


def test_copies_share_their_own_network(tmp_path: Any) -> None:
    method, x = PrefixTuning(num_virtual_tokens=2, reparameterize=5), torch.randn(2, 4, 7)
    model = moved(inject(tiny(method), method))
    loaded = load_adapter(tiny(method), save_adapter(model, tmp_path))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded):
        first, second = (a for _, _, a in adapters_of(other))
        assert second.known[0] is first.trunk is not adapters_of(model)[0][2].trunk
        assert torch.equal(other(x), model(x))
        first.trunk.table.data += 1
        assert not torch.equal(other(x), model(x))


def test_attentions_to_another_sequence_are_left_alone_unless_named() -> None:
    decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(12, 3, 20, dropout=0.0, batch_first=True), 2).eval()
    both = inject(copy.deepcopy(decoder), PrefixTuning(target_modules=("multihead_attn", "self_attn")))
    assert len(adapters_of(both)) == 4
    inject(decoder, PrefixTuning())
    assert [path for path, _, _ in adapters_of(decoder)] == ["layers.0.self_attn", "layers.1.self_attn"]
    cross = nn.ModuleDict({"cross_attn": nn.MultiheadAttention(4, 2)})
    with pytest.raises(TargetError, match="every attention of ModuleDict looks at another sequence. Name in"):
        inject(cross, PrefixTuning())
    t5 = inject(backbone_t5(), PrefixTuning(num_virtual_tokens=2))
    assert {path.rpartition(".")[2] for path, _, _ in adapters_of(t5)} == {"SelfAttention"}


def backbone_t5() -> Any:
    import transformers as t

    few = {"d_model": 12, "d_kv": 4, "d_ff": 20, "num_layers": 2, "num_heads": 3, "dropout_rate": 0.0}
    torch.manual_seed(1)
    return t.T5ForConditionalGeneration(t.T5Config(vocab_size=31, **few, decoder_start_token_id=0)).double().eval()


def test_t5_generates_the_same_with_and_without_a_cache() -> None:
    model = adapted(backbone_t5())
    tokens, mask = ids(2, 6), torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    made = [model.generate(tokens, attention_mask=mask, use_cache=use, **OPTIONS) for use in (True, False)]
    assert torch.equal(*made)


def test_eager_attentions_are_refused() -> None:
    model = base()
    model.set_attn_implementation("eager")
    with pytest.raises(TargetError, match=r"'model.layers.0.self_attn' computes its attention by 'eager'.*\. Call"):
        inject(model, PrefixTuning())
    with pytest.raises(TargetError, match="ResNet holds no attention"):
        inject(backbone("resnet"), PrefixTuning())
    with pytest.raises(TargetError, match="matched none of 2 attentions. Did you mean 'self_attn'"):
        inject(base(), PrefixTuning(target_modules="self_atn"))
    with pytest.raises(TargetError, match="add_bias_kv"):
        inject(nn.ModuleList([nn.MultiheadAttention(4, 2, add_bias_kv=True)]), PrefixTuning())


def test_the_start_has_the_deviation_that_was_asked_for() -> None:
    for init_std, options in ((0.02, {}), (0.5, {"init_std": 0.5}), (0.0, {"init_std": 0.0})):
        for pair in prefixes(inject(base(), PrefixTuning(num_virtual_tokens=200, **options))):
            for table in pair:
                assert table.std().item() == pytest.approx(init_std, rel=0.06)
