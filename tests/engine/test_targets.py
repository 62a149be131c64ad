"""Which weights are chosen, and what is said when none is."""

import random
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_peft import SSF, BitFit, LoRA, inject
from lightning_peft.engine import TargetError, adapters_of, select_parameters, select_targets
from lightning_peft.engine.slots import plain_name
from lightning_peft.engine.targets import candidates, output_head

LINEAR = ("linear",)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.v_proj, self.norm = nn.Linear(4, 4), nn.Linear(4, 4, bias=False), nn.LayerNorm(4)
        self.conv = nn.Conv1d(4, 4, 1)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(4, 2)


def names(target_modules: str | tuple[str, ...], **options: object) -> list[str]:
    return [t.name for t in select_targets(Net(), LINEAR, target_modules, **options)]  # type: ignore[arg-type]


def test_all_linear_leaves_out_the_head_and_everything_that_is_not_linear() -> None:
    assert names("all-linear") == [f"blocks.{i}.{part}_proj" for i in range(3) for part in "qv"]


def test_all_layers_takes_what_the_method_can_adapt() -> None:
    chosen = {t.name for t in select_targets(Net(), ("linear", "conv", "embedding"), "all-layers")}
    assert chosen == {"embed", *(f"blocks.{i}.{part}" for i in range(3) for part in ("q_proj", "v_proj", "conv"))}


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("q_proj", ["blocks.0.q_proj", "blocks.1.q_proj", "blocks.2.q_proj"]),
        ("1.q_proj", ["blocks.1.q_proj"]),
        ("blocks.2.v_proj", ["blocks.2.v_proj"]),
        (r"blocks\.[02]\.q_proj", ["blocks.0.q_proj", "blocks.2.q_proj"]),
        (("head", "2.q_proj"), ["blocks.2.q_proj", "head"]),
        ("output-head", ["head"]),
        ("Linear", ["blocks.0.q_proj", "blocks.0.v_proj", "blocks.1.q_proj", "blocks.1.v_proj", "blocks.2.q_proj",
                    "blocks.2.v_proj", "head"]),
    ],
)  # fmt: skip
def test_patterns_select_by_name_ending_expression_and_class(pattern: str, expected: list[str]) -> None:
    assert names(pattern) == expected


def test_exclusion_and_layer_indices_narrow_the_choice() -> None:
    assert names("all-linear", exclude_modules="v_proj", layers_to_transform=[0, 2]) == [
        "blocks.0.q_proj",
        "blocks.2.q_proj",
    ]


def test_part_of_a_word_selects_nothing() -> None:
    with pytest.raises(TargetError):
        names("proj")


PARTS = st.sampled_from(["q", "k", "proj", "q_proj", "0", "1", "block", "xq"])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    paths=st.lists(st.lists(PARTS, min_size=1, max_size=3), min_size=1, max_size=5), pattern=PARTS, seed=st.integers()
)
def test_chosen_names_are_those_of_an_independent_rule(paths: list[list[str]], pattern: str, seed: int) -> None:
    model = nn.Module()
    for path in paths:
        at = model
        for part in path[:-1]:
            if part not in at._modules:
                at.add_module(part, nn.Module())
            at = at.get_submodule(part)
        if path[-1] not in at._modules:
            linear = random.Random(f"{seed}{path}").random() < 0.7
            at.add_module(path[-1], nn.Linear(2, 2) if linear else nn.LayerNorm(2))
    there = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    expected = {name for name in there if name.split(".")[-len(pattern.split(".")) :] == pattern.split(".")}
    if expected:
        assert {t.name for t in select_targets(model, LINEAR, pattern)} == expected
    else:
        with pytest.raises(TargetError):
            select_targets(model, LINEAR, pattern)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(chosen=st.sets(st.integers(0, 5), min_size=1), left_out=st.sets(st.integers(0, 5)))
def test_expressions_select_what_the_re_module_says(chosen: set[int], left_out: set[int]) -> None:
    model = nn.Sequential(*(nn.Sequential(nn.Linear(2, 2), nn.ReLU()) for _ in range(6)))
    expression = rf"[{''.join(map(str, chosen))}]\.\d"
    excluded = tuple(rf"{i}\.0" for i in left_out)
    everything = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    expected = [n for n in everything if re.fullmatch(expression, n) and not any(re.fullmatch(e, n) for e in excluded)]
    if expected:
        assert [t.name for t in select_targets(model, LINEAR, expression, exclude_modules=excluded)] == expected
    else:
        with pytest.raises(TargetError, match="left nothing"):
            select_targets(model, LINEAR, expression, exclude_modules=excluded)


ATTENTION = nn.Sequential(nn.TransformerEncoderLayer(4, 2, 6))


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"target_modules": "q_porj"}, ["'q_porj' matched none of", "Did you mean 'q_proj'"]),
        ({"target_modules": "zzz"}, ["'zzz' matched none of", "end in: head, q_proj, v_proj"]),
        ({"target_modules": ("q_proj", "nothing")}, ["'nothing' matched none of"]),
        ({"target_modules": "norm"}, ["matched 'blocks.0.norm', a LayerNorm", "adapts linear layers"]),
        ({"target_modules": "blocks.0"}, ["a Block", "Inside it can be adapted: blocks.0.q_proj, blocks.0.v_proj"]),
        ({"target_modules": "q_proj["}, ["'q_proj['", "neither a name in the model nor a regular expression"]),
        ({"target_modules": "q_proj", "exclude_modules": "q_porj"}, ["exclude_modules 'q_porj'", "mean 'q_proj'"]),
        ({"target_modules": "q_proj", "exclude_modules": "blocks.*"}, ["exclude_modules 'blocks.*' left nothing"]),
        ({"target_modules": "q_proj", "layers_to_transform": (7,)}, ["layers_to_transform [7]", "blocks 0 to 2"]),
        ({"target_modules": "head", "layers_to_transform": (0,)}, ["The layers to adapt are in blocks none"]),
    ],
)  # fmt: skip
def test_a_choice_that_selects_nothing_says_what_there_is(options: dict[str, object], parts: list[str]) -> None:
    with pytest.raises(TargetError) as error:
        select_targets(Net(), LINEAR, who="LoRA", **options)  # type: ignore[arg-type]
    assert str(error.value).startswith(("LoRA: ", "'q_proj['"))
    for part in parts:
        assert part in str(error.value)


def test_a_model_without_suitable_layers_is_named_with_what_it_has() -> None:
    with pytest.raises(TargetError, match=r"none of 0 layers of Sequential.*a method that adapts conv layers"):
        select_targets(nn.Sequential(nn.Conv1d(1, 1, 1)), LINEAR, "all-linear", who="LoRA")


def test_naming_an_attention_means_its_output_projection_too() -> None:
    chosen = {t.name for t in select_targets(ATTENTION, LINEAR, "self_attn")}
    assert chosen == {"0.self_attn.in_proj_weight", "0.self_attn.out_proj"}


def test_class_name_selects_the_class_and_its_subclasses() -> None:
    chosen = {t.name for t in select_targets(ATTENTION, LINEAR, "MultiheadAttention")}
    assert chosen == {"0.self_attn.in_proj_weight", "0.self_attn.out_proj"}
    assert {t.name for t in select_targets(ATTENTION, LINEAR, "Linear")} >= {"0.linear1", "0.self_attn.out_proj"}


def test_parameters_of_chosen_modules_are_those_below_them() -> None:
    assert select_parameters(Net(), "blocks.1", who="LoRA") == [
        f"blocks.1.{name}" for name, _ in Net().blocks[1].named_parameters()
    ]
    assert select_parameters(Net(), "all-layers", who="LoRA") == [name for name, _ in Net().named_parameters()]


def test_a_parameter_may_be_named_alone_and_its_layer_be_adapted_all_the_same() -> None:
    biases = [f"blocks.{i}.q_proj.bias" for i in range(3)]
    assert select_parameters(Net(), "q_proj.bias", who="LoRA") == biases
    assert select_parameters(Net(), (r"blocks\.1\..*bias", "head"), who="LoRA") == [
        "blocks.1.q_proj.bias",
        "blocks.1.norm.bias",
        "blocks.1.conv.bias",
        "head.weight",
        "head.bias",
    ]
    model = inject(Net(), LoRA(r=2, target_modules="q_proj", modules_to_save=("q_proj.bias", "norm.bias")))
    assert [name for name, _, _ in adapters_of(model)] == [f"blocks.{i}.q_proj" for i in range(3)]
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name for name in trained if "adapters" not in name} == {
        *biases,
        *(f"blocks.{i}.norm.bias" for i in range(3)),
    }
    with pytest.raises(TargetError, match=re.escape("'q_proj.bais' matched none")):
        select_parameters(Net(), "q_proj.bais", who="LoRA")


def test_adapters_are_no_candidates_themselves() -> None:
    model = Net()
    before = [t.name for t in candidates(model)]
    inject(model, LoRA(r=2, target_modules="all-layers"))
    assert [t.name for t in candidates(model)] == before


def test_layers_whose_weight_is_computed_are_no_candidates() -> None:
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)), nn.Linear(2, 2))
    assert [t.name for t in candidates(model)] == ["1"]


def test_a_compiled_part_goes_by_its_plain_names() -> None:
    plain, partly = Net(), Net()
    partly.blocks[1], partly.head = torch.compile(partly.blocks[1]), torch.compile(partly.head)
    method = LoRA(r=2, target_modules=("blocks.1.q_proj", r"blocks\.[12]\.v_proj"), modules_to_save="blocks.1.norm")
    for model in (partly, torch.compile(Net())):
        for pattern in ("all-linear", *method.target_modules):
            assert [t.name for t in select_targets(model, LINEAR, pattern)] == names(pattern)
        chosen = [plain_name(name) for name in select_parameters(model, ("blocks.1.norm", "output-head"), who="test")]
        assert chosen == select_parameters(plain, ("blocks.1.norm", "head"), who="test")
    inject(plain, method)
    inject(partly, method)
    assert [name for name, _, _ in adapters_of(partly)] == [name for name, _, _ in adapters_of(plain)]
    for (_, _, one), (_, _, other) in zip(adapters_of(plain), adapters_of(partly), strict=True):
        assert torch.equal(one.lora_A, other.lora_A), "the start depends on the name"


def test_output_head_is_asked_of_models_that_know_it() -> None:
    import timm
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        assert output_head(timm.create_model("vit_tiny_patch16_224")) == "head"
        assert output_head(timm.create_model("swin_tiny_patch4_window7_224")) == "head.fc"
        small_network = timm.create_model("caformer_s18")  # its head has two layers
        assert output_head(small_network) == "head.fc"
        assert not [t for t in LoRA().targets(small_network) if t.name.startswith("head.fc.")]
        small = LlamaConfig(
            hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=9
        )
        assert output_head(nn.ModuleDict({"inner": LlamaForCausalLM(small)})) == "inner.lm_head"
    assert output_head(nn.Sequential(nn.Linear(2, 2))) is None


def counted(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(("name", "expected"), [("vit_base_patch16_224", 205_824), ("vit_tiny_patch16_224", 51_456)])
def test_ssf_trains_as_many_numbers_as_the_paper_says(name: str, expected: int) -> None:
    import timm

    with torch.device("meta"):
        model = timm.create_model(name)
    assert counted(inject(model, SSF(modules_to_save=()))) == expected


def test_bitfit_trains_every_bias_of_a_vit() -> None:
    import timm

    with torch.device("meta"):
        model = timm.create_model("vit_base_patch16_224", num_classes=0)
    inject(model, BitFit(modules_to_save=()))
    assert counted(model) == 102_912 == sum(p.numel() for n, p in model.named_parameters() if n.endswith(".bias"))


def test_lora_on_llama_trains_what_the_formula_says() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(hidden_size=12, intermediate_size=20, num_hidden_layers=2, num_attention_heads=3,
                         num_key_value_heads=1, vocab_size=31)  # fmt: skip
    with torch.device("meta"):
        model = inject(LlamaForCausalLM(config), LoRA(r=2))
    # per block: q, o 12 -> 12; k, v 12 -> 4; gate, up 12 -> 20; down 20 -> 12
    assert counted(model) == 2 * 2 * (2 * (12 + 12) + 2 * (12 + 4) + 3 * (12 + 20))
    assert len(adapters_of(model)) == 14
