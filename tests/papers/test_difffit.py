"""DiffFit against base models whose tables, vectors and branches are changed by hand."""

import copy
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_peft import DiffFit, inject, load_adapter, merge, save_adapter, unload
from lightning_peft.engine import TargetError, adapters_of
from tests.methods.backbones import backbone, moved, trainable
from tests.papers.denoisers import NOISE, T, denoise, denoise_text, dit, unet

diffusers = pytest.importorskip("diffusers")


def reference(model: nn.Module, base: nn.Module, branches: str) -> nn.Module:
    """``base`` with what ``model`` trains in place, and hooks that scale what the ``branches`` answer."""
    trained = {n: p for n, p in trainable(model).items() if ".adapters." not in n}
    base.load_state_dict(base.state_dict() | {n: p.detach() for n, p in trained.items()})
    scales = {
        re.sub(r"\.(to_out\.0|net\.2)$", "", path): a.scale for path, _, a in adapters_of(model) if hasattr(a, "scale")
    }
    assert scales.keys() == {n for n, _ in base.named_modules() if re.fullmatch(branches, n)}
    for path, scale in scales.items():
        base.get_submodule(path).register_forward_hook(lambda m, args, y, scale=scale: y * scale)
    return base


def test_a_dit_with_guidance_follows_the_formula() -> None:
    model = moved(inject(dit(), DiffFit()))
    base = reference(model, dit(), r"transformer_blocks\.\d\.(attn1|ff)")
    changes = [a for _, _, a in adapters_of(model) if hasattr(a, "table")]
    assert len(changes) == 2
    assert all(a.table is changes[0].change for a in changes)
    assert changes[0].change.any()
    for block in base.transformer_blocks:
        block.norm1.emb.class_embedder.embedding_table.weight.data += changes[0].change.detach()
    expected = denoise(base)
    torch.testing.assert_close(denoise(model), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(denoise(merge(model)), expected, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(denoise(model), denoise(dit()), atol=1e-2)


@pytest.mark.parametrize("processor", ["default", "sliced"])
def test_a_unet_with_text_follows_the_formula(processor: str) -> None:
    model = moved(inject(unet(), DiffFit()))
    base = reference(model, unet(), r".*\.transformer_blocks\.\d\.(attn1|attn2|ff)")
    assert len(adapters_of(model)) == 4 * 3
    if processor == "sliced":
        model.set_attention_slice(1)
        assert "Sliced" in type(next(iter(model.attn_processors.values()))).__name__
    expected = denoise_text(base)
    torch.testing.assert_close(denoise_text(model), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(denoise_text(merge(model)), expected, rtol=1e-6, atol=1e-6)


def test_attentions_that_add_the_residual_stream_are_scaled_before_it() -> None:
    model, base = moved(inject(backbone("unet"), DiffFit())), backbone("unet")
    trained = {n: p.detach() for n, p in trainable(model).items() if ".adapters." not in n}
    base.load_state_dict(base.state_dict() | trained)
    attentions = {n: m for n, m in base.named_modules() if type(m).__name__ == "Attention"}
    found = {path: a.scale for path, _, a in adapters_of(model)}
    assert found.keys() == {f"{name}.to_out.0" for name in attentions}
    for name, attention in attentions.items():
        # x + gamma * branch(x), from an attention that answers x + branch(x)
        assert attention.residual_connection
        scale = found[f"{name}.to_out.0"][:, None, None]
        attention.register_forward_hook(lambda m, args, y, s=scale: args[0] + s * (y - args[0]))
    out = [m(NOISE, T).sample for m in (model, base)]
    torch.testing.assert_close(*out, rtol=1e-6, atol=1e-6)


def test_the_start_is_the_base_bit_for_bit() -> None:
    assert torch.equal(denoise(inject(dit(), DiffFit())), denoise(dit()))
    assert torch.equal(denoise_text(inject(unet(), DiffFit())), denoise_text(unet()))


def test_what_trains_in_a_dit() -> None:
    names = set(trainable(inject(dit(), DiffFit())))
    in_place = {n for n in names if ".adapters." not in n}
    block = ["norm1.linear", "attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "ff.net.0.proj", "ff.net.2"]
    expected = {f"transformer_blocks.{i}.{layer}.bias" for i in (0, 1) for layer in block}
    assert in_place == expected | {"pos_embed.proj.bias", "proj_out_1.bias", "proj_out_2.bias"}
    ends = {
        f"transformer_blocks.{i}.{end}.adapters.default.scale" for i in (0, 1) for end in ("attn1.to_out.0", "ff.net.2")
    }
    table = "transformer_blocks.0.norm1.emb.class_embedder.embedding_table.adapters.default.change"
    assert names - in_place == ends | {table}


def test_what_trains_in_a_unet() -> None:
    model = inject(unet(num_class_embeds=5), DiffFit())
    in_place = {n for n in trainable(model) if ".adapters." not in n}
    biases = {n for n, _ in model.named_parameters() if n.endswith(".bias") and not n.startswith("time_embedding.")}
    kinds = (nn.LayerNorm, nn.GroupNorm)
    norms = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, kinds)}
    assert in_place == biases | norms | {"class_embedding.weight"}
    assert {n for n in in_place if "time_emb_proj" in n}  # it is of the residual block, not of the time
    assert not any(type(a).__name__ == "Table" for _, _, a in adapters_of(model))
    without = trainable(inject(unet(num_class_embeds=5), DiffFit(class_tables=(), train_norms=False)))
    assert {n for n in without if ".adapters." not in n} == biases | {n for n in biases if "norm" in n}


def test_arguments_name_what_time_and_classes_are() -> None:
    method = DiffFit(
        time_modules="resnets.0", class_tables="class_embedding", modules_to_save="time_embedding.linear_1"
    )
    names = set(trainable(inject(unet(num_class_embeds=5), method)))
    assert {"time_embedding.linear_1.weight", "time_embedding.linear_2.bias", "class_embedding.weight"} <= names
    assert not any(".resnets.0." in name for name in names)
    with pytest.raises(TargetError, match=r"DiffFit: 'clock' matched none"):
        inject(unet(), DiffFit(time_modules="clock"))
    with pytest.raises(TargetError, match=r"DiffFit: target_modules 'labels' matched none"):
        inject(unet(), DiffFit(class_tables="labels"))
    with_time = trainable(inject(unet(), DiffFit(modules_to_save="time_embedding.linear_1")))
    assert {n for n in with_time if n.startswith("time_")} == {
        f"time_embedding.linear_1.{n}" for n in ("weight", "bias")
    }
    whole = inject(dit(), DiffFit(modules_to_save="embedding_table"))
    assert not any(hasattr(a, "table") for _, _, a in adapters_of(whole))


def test_the_names_of_other_code_are_known() -> None:
    names = {"t_embedder": "y_embedder", "time_embed": "label_emb", "timestep_embedder": "class_embedding"}
    for time, table in names.items():
        net = nn.ModuleDict({time: nn.Sequential(nn.Linear(2, 3)), table: nn.Embedding(4, 3), "out": nn.Linear(3, 3)})
        trained = set(trainable(inject(net, DiffFit(target_modules="out"))))
        assert trained == {f"{table}.weight", "out.bias", "out.adapters.default.scale"}


def test_a_stable_diffusion_3_trains_but_for_its_embedding_of_time() -> None:
    options = {"num_layers": 2, "attention_head_dim": 4, "num_attention_heads": 3, "joint_attention_dim": 10}
    model = meta(
        diffusers.SD3Transformer2DModel,
        **options,
        sample_size=8,
        patch_size=2,
        in_channels=4,
        caption_projection_dim=12,
        pooled_projection_dim=9,
    )
    biases = {n for n, _ in model.named_parameters() if n.endswith("bias")}
    time = {f"time_text_embed.timestep_embedder.linear_{i}.bias" for i in (1, 2)}
    assert set(DiffFit().trained_in_place(model)) == biases - time
    # of the two streams, that of the samples
    ends = [f"transformer_blocks.{i}.{end}" for i in (0, 1) for end in ("attn.to_out.0", "ff.net.2")]
    assert [t.name for t in DiffFit().targets(model)] == ends


def test_the_scales_of_the_stable_diffusion_port() -> None:
    ports = ("to_q", "to_k", "to_v", "to_out.0")
    model = inject(unet(), DiffFit(target_modules=ports))
    assert len(adapters_of(model)) == 4 * 2 * 4


def test_only_blocks_that_are_named_get_scales() -> None:
    model = inject(dit(), DiffFit(layers_to_transform=(1,)))
    scaled = [path for path, _, a in adapters_of(model) if hasattr(a, "scale")]
    assert scaled == ["transformer_blocks.1.attn1.to_out.0", "transformer_blocks.1.ff.net.2"]


def meta(build: Any, **options: Any) -> nn.Module:
    with torch.device("meta"):
        return build(**options)


def count(model: nn.Module, names: list[str]) -> int:
    return sum(model.get_parameter(name).numel() for name in names)


def test_the_count_of_dit_xl_2_is_that_of_the_paper() -> None:
    """0.83 million of 674 million numbers without the table, which has 1.15 million for 1000 classes."""
    options = {"num_attention_heads": 16, "attention_head_dim": 72, "in_channels": 4, "num_layers": 28}
    model = meta(diffusers.DiTTransformer2DModel, **options, sample_size=32, out_channels=8)
    method = DiffFit(class_tables=())
    assert count(model, method.trained_in_place(model)) == 487_328
    assert method.total_trainable(method.targets(model)) == 2 * 1152 * 28
    assert DiffFit().total_trainable(DiffFit().targets(model)) == 2 * 1152 * 28 + 1001 * 1152


def test_the_count_of_stable_diffusion() -> None:
    model = meta(diffusers.UNet2DConditionModel, cross_attention_dim=768)
    method = DiffFit()
    names = method.trained_in_place(model)
    biases = [name for name in names if name.endswith("bias")]
    assert count(model, biases) == 343_684 - 2 * 1280  # without the two of the embedding of time
    assert count(model, [name for name in names if name not in biases]) == 200_320 // 2  # their biases are above
    assert method.total_trainable(method.targets(model)) == 37_440


def test_training_leaves_the_embedding_of_time_as_it_is() -> None:
    model, base = inject(dit().train(), DiffFit()), dict(dit().named_parameters())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        denoise(model).square().mean().backward()
        optimizer.step()
    for name, parameter in model.named_parameters():
        if "timestep_embedder" in name or name.endswith("norm1.linear.weight"):
            assert torch.equal(parameter, base[name])
    change = next(a.change for _, _, a in adapters_of(model) if hasattr(a, "table"))
    rows = change.any(1).nonzero().flatten().tolist()
    assert rows == [1, 2, 10]  # the classes that were there, and none
    assert torch.equal(denoise(unload(model).eval()), denoise(dit()))


def test_the_shared_change_gets_the_gradient_of_all_blocks() -> None:
    model = moved(inject(dit(), DiffFit()))
    denoise(model).square().sum().backward()
    shared = next(a.change for _, _, a in adapters_of(model) if hasattr(a, "table"))
    base = reference(model, dit(), r"transformer_blocks\.\d\.(attn1|ff)").requires_grad_(True)
    tables = [block.norm1.emb.class_embedder.embedding_table.weight for block in base.transformer_blocks]
    for table in tables:
        table.data += shared.detach()
    denoise(base).square().sum().backward()
    torch.testing.assert_close(shared.grad, tables[0].grad + tables[1].grad, rtol=1e-5, atol=1e-6)


def test_the_shared_change_stays_shared(tmp_path: Path) -> None:
    model = moved(inject(dit(), DiffFit()))
    assert [key for key in model.state_dict() if key.endswith(".change")] == [
        "transformer_blocks.0.norm1.emb.class_embedder.embedding_table.adapters.default.change"
    ]
    loaded = load_adapter(dit(), save_adapter(model, tmp_path))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded):
        assert torch.equal(denoise(other), denoise(model))
        first, second = [a for _, _, a in adapters_of(other) if hasattr(a, "table")]
        assert second.table is first.change


def test_tables_of_other_sizes_have_a_change_of_their_own() -> None:
    net = nn.ModuleDict(
        {f"class_embed{i}": nn.Embedding(n, 3) for i, n in enumerate((4, 5, 4))} | {"out": nn.Linear(3, 3)}
    )
    model = inject(net, DiffFit(target_modules="out"))
    changes = [a.table for _, _, a in adapters_of(model) if hasattr(a, "table")]
    assert [tuple(c.shape) for c in changes] == [(4, 3), (5, 3), (4, 3)]
    assert changes[0] is changes[2]
    assert DiffFit(target_modules="out").total_trainable(DiffFit(target_modules="out").targets(net)) == 3 + 9 * 3


def test_a_model_without_branches_is_refused() -> None:
    net = nn.Sequential(*[nn.Sequential(nn.Conv2d(2, 2, 3), nn.GroupNorm(1, 2)) for _ in range(2)])
    with pytest.raises(TargetError, match=r"DiffFit: none of 2 blocks .* has an attention\. Name other blocks"):
        inject(net, DiffFit())


def test_a_convolution_answers_in_the_precision_that_it_has() -> None:
    net = nn.Sequential(nn.Conv2d(3, 2, 1)).bfloat16()
    model = inject(net, DiffFit(target_modules="0"))
    assert model[0].adapters["default"].scale.dtype == torch.float32
    assert model(torch.ones(1, 3, 2, 2, dtype=torch.bfloat16)).dtype == torch.bfloat16
