"""Prompts and side networks find their places by themselves in models of many kinds, and all of them trains."""

import copy
import functools
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_peft import (
    LEVI,
    PYRA,
    VPT,
    AdaptFormer,
    HierarchicalSideTuning,
    HoulsbyAdapter,
    LadderSideTuning,
    PrefixTuning,
    PromptTuning,
    SideTuning,
    UniPT,
    inject,
)
from lightning_peft.engine import Method, TargetError, adapters_of
from tests.methods.backbones import TinyBlock, moved

SMALL: dict[str, Any] = {
    "hidden_size": 12,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "attn_implementation": "sdpa",
}
IMAGE: dict[str, Any] = {**SMALL, "image_size": 16, "patch_size": 4}


class Odd(nn.Module):
    """Blocks in an attribute that no library calls so, and beside them a longer stack that is none of theirs."""

    def __init__(self) -> None:
        super().__init__()
        self.entrance = nn.Linear(7, 12)
        self.wagons_ = nn.ModuleList([TinyBlock(), TinyBlock(), TinyBlock()])
        self.readers = nn.ModuleList([nn.Sequential(nn.Linear(12, 12), nn.ReLU()) for _ in range(2)])
        self.exit_norm = nn.LayerNorm(12)
        self.answer = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.entrance(x)
        for wagon in self.wagons_:
            x = wagon(x)
        x = self.exit_norm(x)
        for reader in self.readers:
            x = reader(x)
        return self.answer(x)


def _timm() -> nn.Module:
    import timm

    small = {"img_size": 16, "patch_size": 4, "embed_dim": 12, "depth": 2, "num_heads": 3, "num_classes": 5}
    return timm.create_model("deit_tiny_distilled_patch16_224", **small)


def _hf(kind: str, config: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import transformers

        return getattr(transformers, kind)(getattr(transformers, config)(**options))

    return build


def _clip() -> nn.Module:
    import transformers as t

    text = {**SMALL, "vocab_size": 31, "max_position_embeddings": 8, "eos_token_id": 30}
    return t.CLIPModel(t.CLIPConfig(text_config=text, vision_config=IMAGE, projection_dim=6, **SMALL))


def _noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


def _all_of(answer: Any) -> Tensor:
    return torch.cat([answer.last_hidden_state, answer.pooler_output[:, None]], dim=1)


IDS = torch.tensor([[3, 4, 5, 7, 30], [3, 4, 6, 8, 30]])
# name -> (build, call, answers of which a loss is made)
MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[Any], Tensor]]] = {
    "deit": (_timm, lambda model: model(_noise(2, 3, 16, 16))),
    "vit": (
        _hf("ViTModel", "ViTConfig", **IMAGE),
        lambda model: model(_noise(2, 3, 16, 16)).last_hidden_state,
    ),
    "vit-head": (
        _hf("ViTForImageClassification", "ViTConfig", **IMAGE, num_labels=5),
        lambda model: model(_noise(2, 3, 16, 16)).logits,
    ),
    "clip-vision": (
        _hf("CLIPVisionModel", "CLIPVisionConfig", **IMAGE),
        lambda model: _all_of(model(_noise(2, 3, 16, 16))),
    ),
    "llama": (
        _hf("LlamaForCausalLM", "LlamaConfig", **SMALL, vocab_size=31),
        lambda model: model(input_ids=IDS).logits,
    ),
    "odd": (Odd, lambda model: model(_noise(2, 9, 7))),
}


@functools.cache
def _built(name: str) -> nn.Module:
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(1)
        return (_clip() if name == "clip" else MODELS[name][0]()).eval()


def built(name: str) -> Any:
    return copy.deepcopy(_built(name))


HST: dict[str, Any] = {"dims": (4, 6), "num_heads": (2, 3), "mlp_ratio": 2}
# each as it is, and where `Odd` needs to be told the place
METHODS: dict[str, tuple[Callable[..., Method], dict[str, Any]]] = {
    "vpt": (functools.partial(VPT, num_virtual_tokens=3), {"blocks": "wagons_"}),
    "vpt-shallow": (functools.partial(VPT, num_virtual_tokens=3, deep=False), {"blocks": "wagons_"}),
    "prefix": (functools.partial(PrefixTuning, num_virtual_tokens=3), {}),
    "prompt": (functools.partial(PromptTuning, num_virtual_tokens=3), {"blocks": "wagons_"}),
    "ladder": (functools.partial(LadderSideTuning, r=2), {"taps": "wagons_"}),
    "unipt": (functools.partial(UniPT, r=2, modules_to_save=()), {"taps": "wagons_"}),
    "side": (functools.partial(SideTuning, width=4, depth=2, modules_to_save=()), {"taps": ("wagons_.2",)}),
    "levi": (functools.partial(LEVI, width=4, depth=2, modules_to_save=()), {"taps": "wagons_"}),
    "hst": (functools.partial(HierarchicalSideTuning, **HST, modules_to_save=()), {"taps": "wagons_"}),
    "hst-detached": (
        functools.partial(HierarchicalSideTuning, **HST, detach_taps=True, modules_to_save=()),
        {"taps": "wagons_"},
    ),
    "pyra": (
        functools.partial(PYRA, r=3, modules_to_save=()),
        {"blocks": "wagons_", "num_patches": 9, "num_prefix_tokens": 0, "num_heads": 3},
    ),
    "adaptformer": (functools.partial(AdaptFormer, r=6, dropout=0.0), {"blocks": "wagons_"}),
    "houlsby": (functools.partial(HoulsbyAdapter, r=2), {"blocks": "wagons_"}),
}


# what each says where it does not fit
REFUSED = {
    ("vpt", "llama"): "VPT: 'model.layers.0' is given a table of positions",
    ("vpt-shallow", "llama"): "VPT: 'model.layers.0' is given a table of positions",
    ("hst", "llama"): "HierarchicalSideTuning: LlamaForCausalLM begins with an embedding of words",
    ("hst-detached", "llama"): "HierarchicalSideTuning: LlamaForCausalLM begins with an embedding of words",
    ("pyra", "llama"): "PYRA: LlamaForCausalLM does not tell its num_patches",
    ("pyra", "vit"): "PYRA: 'layers.0' does not begin with a norm",
    ("pyra", "vit-head"): "PYRA: 'vit.layers.0' does not begin with a norm",
    ("pyra", "clip-vision"): "PYRA: 'encoder.layers.0' has no part 'attn'",
}
PLACES = [(method, name) for method in METHODS for name in MODELS if (method, name) not in REFUSED]
FITTED = [f"{method}-{name}" for method, name in PLACES]


def check_all_of_it_trains(model: nn.Module, y: Tensor) -> None:
    y.sin().sum().backward()
    trains = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert trains
    assert [n for n, p in trains.items() if p.grad is None or not p.grad.any()] == []
    assert [n for n, p in model.named_parameters() if not p.requires_grad and p.grad is not None] == []


@pytest.mark.parametrize(("method", "name"), PLACES, ids=FITTED)
def test_it_finds_its_place_and_all_of_it_trains(method: str, name: str) -> None:
    make, told = METHODS[method]
    model, call = built(name), MODELS[name][1]
    expected = call(model)
    torch.manual_seed(0)
    inject(model, make(**(told if name == "odd" else {})))
    y = call(moved(model))
    assert y.shape == expected.shape
    assert not torch.allclose(y, expected)
    check_all_of_it_trains(model, y)


@pytest.mark.parametrize(("method", "name"), REFUSED, ids=map("-".join, REFUSED))
def test_where_it_does_not_fit_it_says_so(method: str, name: str) -> None:
    with pytest.raises(TargetError, match=re.escape(REFUSED[method, name])):
        inject(built(name), METHODS[method][0]())


def test_blocks_that_are_named_are_the_ones() -> None:
    for method, (make, told) in METHODS.items():
        paths = {path for path, _, _ in adapters_of(inject(built("odd"), make(**told)))}
        assert not any(path.startswith("readers") for path in paths), method
        wagons = {path.split(".")[1] for path in paths if path.startswith("wagons_")}
        assert wagons == ({"2"} if method == "side" else {"0", "1", "2"}), method


# ---- models of two towers

TOWERS = ("text_model.encoder.layers", "vision_model.encoder.layers")
ONE_STACK = [
    method for method in METHODS if method not in ("prefix", "adaptformer", "houlsby")
]  # which suit both towers


def both(model: Any) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model(input_ids=IDS, pixel_values=_noise(2, 3, 16, 16)).logits_per_image


@pytest.mark.parametrize("method", ONE_STACK)
def test_a_model_of_two_towers_is_refused_and_both_are_named(method: str) -> None:
    with pytest.raises(TargetError, match=rf"{TOWERS[0]}.*{TOWERS[1]}.*\. Name") as refusal:
        inject(built("clip"), METHODS[method][0]())
    argument = "blocks" if method.partition("-")[0] in ("vpt", "prompt", "pyra") else "taps"
    assert re.search(rf"\b{argument}(=|\.$)", str(refusal.value))


@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("method", [method for method in METHODS if method not in ("prefix", "pyra")])
def test_one_of_two_towers_is_named(method: str, tower: str) -> None:
    if method.startswith("hst") and tower == TOWERS[0]:
        return  # of text
    make, told = METHODS[method]
    place: Any = {key: (f"{tower}.1",) if method == "side" else tower for key in told if key in ("blocks", "taps")}
    model = built("clip")
    expected = both(model)
    torch.manual_seed(0)
    inject(model, make(**place))
    assert {path.partition(".")[0] for path, _, _ in adapters_of(model)} == {tower.partition(".")[0]}
    y = both(moved(model))
    assert y.shape == expected.shape
    assert not torch.allclose(y, expected)
    check_all_of_it_trains(model, y)


ENCODER_DECODER: dict[str, Any] = {
    "vocab_size": 31,
    "d_model": 12,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 3,
    "decoder_attention_heads": 3,
    "encoder_ffn_dim": 20,
    "decoder_ffn_dim": 20,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
BART = {**ENCODER_DECODER, "max_position_embeddings": 8}
WHISPER = {**ENCODER_DECODER, "num_mel_bins": 4, "max_source_positions": 8, "max_target_positions": 8}
T5 = {"vocab_size": 31, "d_model": 12, "d_kv": 4, "d_ff": 20, "num_layers": 2, "num_heads": 3}
PAIRS: dict[str, tuple[Callable[[], nn.Module], Callable[[Any], Tensor]]] = {
    "clip": (_clip, both),
    "bart": (
        _hf("BartForConditionalGeneration", "BartConfig", **BART),
        lambda model: model(input_ids=IDS, decoder_input_ids=IDS[:, :3], use_cache=False).logits,
    ),
    "t5": (
        _hf("T5ForConditionalGeneration", "T5Config", **T5, decoder_start_token_id=0),
        lambda model: model(input_ids=IDS, decoder_input_ids=IDS[:, :3], use_cache=False).logits,
    ),
    "whisper": (
        _hf("WhisperForConditionalGeneration", "WhisperConfig", **WHISPER),
        lambda model: model(input_features=_noise(2, 4, 16), decoder_input_ids=IDS[:, :3], use_cache=False).logits,
    ),
}


@pytest.mark.parametrize("make", [METHODS["side"][0], METHODS["levi"][0]], ids=["side", "levi"])
@pytest.mark.parametrize(
    ("name", "tap", "entry"),
    [
        ("clip", "text_model.encoder.layers.1", "text_model.embeddings.token_embedding"),
        ("clip", "vision_model.encoder.layers.1", "vision_model.embeddings.patch_embedding"),
        ("bart", "model.encoder.layers.1", "model.encoder.embed_tokens"),
        ("bart", "model.decoder.layers.1", "model.decoder.embed_tokens"),
        ("t5", "encoder.block.1", "encoder.embed_tokens"),
        ("t5", "decoder.block.1", "decoder.embed_tokens"),
        ("whisper", "model.encoder.layers.1", "model.encoder.conv1"),
        ("whisper", "model.decoder.layers.1", "model.decoder.embed_tokens"),
    ],
)
def test_a_side_network_reads_what_its_own_tower_is_given(make: Any, name: str, tap: str, entry: str) -> None:
    build, call = PAIRS[name]
    torch.manual_seed(1)
    model = inject(build().eval(), make(taps=(tap,)))
    first = adapters_of(model)[0][0]
    assert model.get_submodule(first) is model.get_submodule(entry)
    check_all_of_it_trains(model, call(moved(model)))


@pytest.mark.parametrize("tap", ["stages.1.1", "stages.1", "stages.1.1.0"])
def test_stages_are_no_towers(tap: str) -> None:
    """The first of several stages is where the model begins, whichever of its modules is tapped."""

    def stage() -> nn.Module:
        return nn.Sequential(*(nn.Sequential(nn.Linear(12, 12)) for _ in range(2)))

    model = nn.ModuleDict({"stages": nn.Sequential(stage(), stage()), "head": nn.Linear(12, 3)})
    inject(model, SideTuning(taps=(tap,), modules_to_save=()))
    assert adapters_of(model)[0][0] == "stages.0.0.0"
