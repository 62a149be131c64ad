"""DiffuseKronA against denoisers whose weights hold the Kronecker products, and against its authors' arithmetic."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_peft import AdapterError, DiffuseKronA, inject, merge
from lightning_peft.engine import TargetError, adapters_of
from tests.methods.backbones import backbone, moved, trainable
from tests.papers.denoisers import denoise, denoise_text, dit, unet

pytest.importorskip("diffusers")

PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")


def written_out(A: Tensor, B: Tensor) -> Tensor:
    """Block (i, j) of the Kronecker product is A[i, j] * B."""
    return torch.cat([torch.cat([a * B for a in row], dim=1) for row in A])


@pytest.mark.parametrize("processor", ["default", "sliced"])
@pytest.mark.parametrize(("build", "ask"), [(unet, denoise_text), (dit, denoise)])
def test_denoisers_follow_the_formula(build: Any, ask: Any, processor: str) -> None:
    model, base = moved(inject(build(), DiffuseKronA(a1=4, a2=3))), build()
    for path, _, adapter in adapters_of(model):
        A, B = adapter.lokr_w1, adapter.lokr_w2
        assert A.shape == (4, 3)
        base.get_submodule(path).weight.data += written_out(A, B).detach()
    if processor == "sliced":
        from diffusers.models.attention_processor import Attention, SlicedAttnProcessor

        for attention in (m for m in model.modules() if isinstance(m, Attention)):
            attention.set_processor(SlicedAttnProcessor(1))
    expected = ask(base)
    assert not torch.allclose(expected, ask(build()), atol=1e-3)
    torch.testing.assert_close(ask(model), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ask(merge(model)), expected, rtol=1e-6, atol=1e-6)


def test_all_projections_of_attentions_are_adapted_and_nothing_else() -> None:
    for model in (unet(), dit(), backbone("unet")):
        attentions = [n for n, m in model.named_modules() if type(m).__name__ == "Attention"]
        expected = {f"{attention}.{projection}" for attention in attentions for projection in PROJECTIONS}
        assert {t.name for t in DiffuseKronA().targets(model)} == expected
        assert all(".adapters." in name for name in trainable(inject(model, DiffuseKronA())))


def test_the_streams_of_text_in_stable_diffusion_3_are_adapted_too() -> None:
    import diffusers

    options = {"num_layers": 2, "attention_head_dim": 4, "num_attention_heads": 3, "joint_attention_dim": 10}
    with torch.device("meta"):
        model = diffusers.SD3Transformer2DModel(
            sample_size=8, patch_size=2, in_channels=4, caption_projection_dim=12, pooled_projection_dim=9, **options
        )
    found = {t.name.removeprefix("transformer_blocks.0.attn.") for t in DiffuseKronA().targets(model)}
    assert {*PROJECTIONS, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"} <= found
    assert len(DiffuseKronA().targets(model)) == 8 + 7  # the last block has no output of text


def test_names_in_other_models_are_known() -> None:
    found = {
        name: {t.name for t in DiffuseKronA().targets(backbone(name))} for name in ("vit", "llama", "bert", "encoder")
    }
    assert found["vit"] == {f"blocks.{i}.attn.{layer}" for i in (0, 1) for layer in ("qkv", "proj")}
    assert {n for n in found["llama"] if ".0." in n} == {f"model.layers.0.self_attn.{x}_proj" for x in "qkvo"}
    attention = "bert.encoder.layer.0.attention"
    parts = ("self.query", "self.key", "self.value", "output.dense")
    assert {n for n in found["bert"] if ".0." in n} == {f"{attention}.{part}" for part in parts}
    assert {n for n in found["encoder"] if ".0." in n} == {
        f"layers.0.self_attn.{x}" for x in ("in_proj_weight", "out_proj")
    }


@pytest.mark.parametrize(
    ("d_out", "d_in", "count"),
    [
        (640, 640, 32 * 16 + 20 * 40),  # SDXL, where LoRA of rank 4 has 5120
        (1280, 2048, 32 * 16 + 40 * 128),  # keys of its text
        (12, 100, 3 * 10 + 4 * 10),  # 32 and 16 do not divide these
        (127, 48, 1 * 16 + 127 * 3),
    ],
)
def test_shapes_and_counts(d_out: int, d_in: int, count: int) -> None:
    method = DiffuseKronA(target_modules="0")
    model = inject(nn.Sequential(nn.Linear(d_in, d_out)), method)
    adapter = model[0].adapters["default"]
    assert sum(p.numel() for p in adapter.parameters()) == count
    assert method.num_trainable(method.targets(model)[0]) == count
    assert adapter.delta().shape == (d_out, d_in)


def test_the_start() -> None:
    model = inject(nn.Sequential(nn.Linear(6400, 3200)), DiffuseKronA(a1=40, a2=80, target_modules="0"))
    adapter = model[0].adapters["default"]
    assert not adapter.lokr_w2.any()
    assert adapter.lokr_w1.shape == (40, 80)
    assert adapter.lokr_w1.std().item() == pytest.approx(1 / 40, rel=0.05)
    assert adapter.lokr_w1.mean().item() == pytest.approx(0, abs=0.002)
    assert adapter.scaling == 1


def test_the_rank_is_the_product_of_the_ranks() -> None:
    model = moved(inject(nn.Sequential(nn.Linear(20, 15)).double(), DiffuseKronA(a1=5, a2=2, target_modules="0")))
    adapter = model[0].adapters["default"]
    ranks = [torch.linalg.matrix_rank(m) for m in (adapter.lokr_w1, adapter.lokr_w2)]
    assert torch.linalg.matrix_rank(adapter.delta()) == ranks[0] * ranks[1] == 2 * 3


def test_the_authors_answer_with_the_same_features_in_another_order() -> None:
    """Their layer reshapes x to (a2, b2) and answers with (b1, a1) in place of (a1, b1)."""
    layer = nn.Sequential(nn.Linear(20, 15, bias=False)).double()
    nn.init.zeros_(layer[0].weight)
    model = moved(inject(layer, DiffuseKronA(a1=5, a2=2, target_modules="0")))
    adapter, x = model[0].adapters["default"], torch.randn(4, 20).double()
    theirs = torch.einsum("bn,tmn,am->tba", adapter.lokr_w2, x.view(4, 2, 10), adapter.lokr_w1).flatten(1)
    torch.testing.assert_close(model(x).view(4, 5, 3).transpose(1, 2).flatten(1), theirs)


def test_mistakes_are_named() -> None:
    for name in ("a1", "a2"):
        with pytest.raises(AdapterError, match=f"DiffuseKronA: {name} must be an integer >= 1, got 0"):
            DiffuseKronA(**{name: 0})
    with pytest.raises(TargetError, match="DiffuseKronA: target_modules .* matched none"):
        inject(nn.Sequential(nn.Linear(2, 2)), DiffuseKronA())
