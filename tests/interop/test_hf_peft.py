"""Files go both ways between HF PEFT and here, and both compute the same; where HF PEFT is wrong, a test says how."""

import copy
import dataclasses
import json
import re
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import AdaLoraConfig, IA3Config, LoHaConfig, LoKrConfig, LoraConfig, MissConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lightning_peft import (
    IA3,
    AdaLoRA,
    Bone,
    DoRA,
    LoHa,
    LoKr,
    LoRA,
    MiSS,
    PiSSA,
    PrefixTuning,
    PromptTuning,
    RandLoRA,
    VeRA,
    inject,
    load_adapter,
    merge,
    save_adapter,
)
from lightning_peft.engine import AdapterError, AdapterFileError, adapters_of
from lightning_peft.interop import hf_peft
from tests.methods.backbones import assert_unchanged, moved, snapshot

# HF PEFT asks transformers by a name that is on its way out
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


class Net(nn.Module):
    """Every kind of layer that both can adapt."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.conv = nn.Conv1d(6, 7, 3, padding=1)
        self.q_proj = nn.Linear(7, 5)
        self.fc2 = nn.Linear(5, 4, bias=False)
        self.head = nn.Linear(4, 3)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.conv(self.embed(ids).transpose(1, 2)).transpose(1, 2).tanh()
        return self.head(self.fc2(self.q_proj(h).tanh()))


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(0, 11, (2, 5))


def net() -> Net:
    torch.manual_seed(1)
    return Net().eval()


def hf_moved(base: nn.Module, config: Any) -> PeftModel:
    model = get_peft_model(base, config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


LAYERS = ("embed", "conv", "q_proj", "fc2")
PAIRS: list[tuple[Any, Any]] = [
    (LoRA(r=2, alpha=6.0, target_modules=LAYERS), LoraConfig(r=2, lora_alpha=6, target_modules=list(LAYERS))),
    (
        LoRA(r=3, use_rslora=True, rank_pattern={"fc2": 1}, alpha_pattern={"fc2": 2.0}, target_modules=LAYERS[2:]),
        LoraConfig(
            r=3,
            lora_alpha=16,
            use_rslora=True,
            rank_pattern={"fc2": 1},
            alpha_pattern={"fc2": 2.0},
            target_modules=["q_proj", "fc2"],
        ),
    ),
    (DoRA(r=2, target_modules=LAYERS), LoraConfig(r=2, lora_alpha=16, use_dora=True, target_modules=list(LAYERS))),
    (
        LoRA(r=2, target_modules="q_proj", modules_to_save="head"),
        LoraConfig(r=2, lora_alpha=16, target_modules=["q_proj"], modules_to_save=["head"]),
    ),
    (
        IA3(target_modules=("q_proj", "fc2"), feedforward_modules="fc2"),
        IA3Config(target_modules=["q_proj", "fc2"], feedforward_modules=["fc2"]),
    ),
    (
        AdaLoRA(r=3, alpha=5.0, target_modules=LAYERS[2:]),
        AdaLoraConfig(init_r=3, lora_alpha=5, total_step=9, target_modules=["q_proj", "fc2"]),
    ),
    (
        LoHa(r=2, alpha=6.0, rank_pattern={"fc2": 1}, target_modules=LAYERS[1:], modules_to_save="head"),
        LoHaConfig(
            r=2,
            alpha=6,
            rank_pattern={"fc2": 1},
            alpha_pattern={"conv": 3},
            target_modules=list(LAYERS[1:]),
            modules_to_save=["head"],
        ),
    ),
    (
        LoKr(r=1, decompose_both=True, decompose_factor=3, target_modules=LAYERS[1:]),
        LoKrConfig(r=1, decompose_both=True, decompose_factor=3, target_modules=list(LAYERS[1:])),
    ),
    (MiSS(r=3, target_modules=LAYERS[2:]), MissConfig(r=3, target_modules=["q_proj", "fc2"])),
    (Bone(r=1, target_modules=LAYERS[2:]), MissConfig(r=1, init_weights="bat", target_modules=["q_proj", "fc2"])),
]
each_pair = pytest.mark.parametrize(("ours", "theirs"), PAIRS, ids=lambda m: type(m).__name__)


@each_pair
def test_hf_peft_reads_what_we_write(ours: Any, theirs: Any, ids: Tensor, tmp_path: Path) -> None:
    model = moved(inject(net(), ours))
    save_adapter(model, tmp_path)
    loaded = PeftModel.from_pretrained(net(), str(tmp_path)).eval()
    torch.testing.assert_close(loaded(ids), model(ids))


@each_pair
def test_we_read_what_hf_peft_writes(ours: Any, theirs: Any, ids: Tensor, tmp_path: Path) -> None:
    model = hf_moved(net(), copy.deepcopy(theirs))
    model.save_pretrained(str(tmp_path))
    loaded = load_adapter(net(), tmp_path)
    torch.testing.assert_close(loaded(ids), model(ids))
    torch.testing.assert_close(merge(loaded)(ids), model(ids))


@each_pair
def test_what_trains_is_the_same(ours: Any, theirs: Any) -> None:
    model, reference = inject(net(), ours), get_peft_model(net(), copy.deepcopy(theirs))
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert count == sum(p.numel() for p in reference.parameters() if p.requires_grad)


@each_pair
def test_gradients_are_the_same(ours: Any, theirs: Any, ids: Tensor, tmp_path: Path) -> None:
    reference = hf_moved(net(), copy.deepcopy(theirs))
    reference.save_pretrained(str(tmp_path))
    model = load_adapter(net(), tmp_path)
    for one in (model, reference):
        one(ids).square().sum().backward()
    mine = sorted(p.grad.norm().item() for p in model.parameters() if p.grad is not None)
    other = sorted(p.grad.norm().item() for p in reference.parameters() if p.grad is not None)
    torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)  # another order of sums, in float32


@pytest.mark.parametrize("wrap", [lambda model: model, lambda model: nn.ModuleDict({"inner": model})])
def test_a_model_in_a_wrapper_of_hf_peft_is_refused(wrap: Any, tmp_path: Path) -> None:
    theirs = hf_moved(net(), LoraConfig(r=2, target_modules=["q_proj"]))
    theirs.save_pretrained(str(tmp_path))
    before = snapshot(theirs)
    for verb in (lambda: inject(wrap(theirs), LoRA(r=1)), lambda: load_adapter(wrap(theirs), tmp_path)):
        with pytest.raises(AdapterError, match=r"^(the model|inner) is a PeftModel of HF PEFT.*merge_and_unload\(\)"):
            verb()
    assert_unchanged(theirs, before)
    inject(theirs.unload(), LoRA(r=1))


def test_an_ordinary_transformer_goes_both_ways(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    def llama() -> nn.Module:
        torch.manual_seed(1)
        sizes = {"hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 3}
        return LlamaForCausalLM(LlamaConfig(vocab_size=31, **sizes)).eval()

    tokens = torch.randint(0, 31, (2, 6))
    model = moved(inject(llama(), LoRA(r=2, target_modules=("q_proj", "v_proj"))))
    save_adapter(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == ["q_proj", "v_proj"]
    loaded = PeftModel.from_pretrained(llama(), str(tmp_path)).eval()
    torch.testing.assert_close(loaded(input_ids=tokens).logits, model(input_ids=tokens).logits)


@pytest.mark.parametrize("alpha", [1e-7, 0.1, 1 / 3, 16.0])
@pytest.mark.parametrize("method", [LoRA, LoHa, AdaLoRA], ids=lambda method: method.__name__)
def test_a_scaling_of_any_size_is_written(method: Any, alpha: float, ids: Tensor, tmp_path: Path) -> None:
    own = {} if method is AdaLoRA else {"alpha_pattern": {"fc2": 1.001 * alpha}}
    model = moved(inject(net(), method(r=3, alpha=alpha, target_modules=("q_proj", "fc2"), **own)))
    save_adapter(model, tmp_path)
    theirs = PeftModel.from_pretrained(net(), str(tmp_path))
    for name in ("q_proj", "fc2"):
        scaling = float(model.get_submodule(name).adapters["default"].scaling)
        there = theirs.base_model.model.get_submodule(name).scaling["default"]
        there /= 3 if method is AdaLoRA else 1  # which divides by the rank when it is called
        assert there == pytest.approx(scaling, rel=1e-6)


def changed(folder: Path, change: dict[str, Any], drop: str = "") -> dict[str, Any]:
    """The config of the file in ``folder`` after it was edited."""
    file = folder / "adapter_config.json"
    config = {key: value for key, value in (json.loads(file.read_text()) | change).items() if key != drop}
    file.write_text(json.dumps(config))
    return config


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"peft_type": "LOHA"}, "the config has no number 'alpha', but None"),
    ({"peft_type": "ADALORA", "init_r": "8"}, "the config has no number 'init_r', but '8'"),
    ({"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 2}, "the config has no number 'num_layers', but None"),
    ({"r": True}, "the config has no number 'r', but True"),
    ({"r": None}, "the config has no number 'r', but None: it is damaged, or of another kind"),
    ({"init_lora_weights": "pissa_niter_4"}, "'pissa_niter_4': .*Convert it: .*path_initial_model_for_weight_conv"),
    ({"init_lora_weights": "corda"}, "'corda': .*path_initial_model_for_weight_conversion"),
    ({"init_lora_weights": "loftq"}, "init_lora_weights='loftq', which is not read here"),
    ({"init_lora_weights": "pissa", "use_dora": True}, "'pissa' and use_dora=True, which is not read here"),
]
LEFT_TO_HF_PEFT: list[tuple[dict[str, Any], str]] = [
    (
        {"peft_type": "OFT"},
        "type 'OFT'; those read here: ADALORA, CARTRIDGE, IA3, LOHA, LOKR, LORA, MISS, PREFIX_TUNING, ",
    ),
    ({"peft_type": "VERA"}, "'VERA' are not read here: its matrices that all layers share are in the file"),
    ({"peft_type": "POLY"}, "type 'POLY'; those read here"),
    ({"peft_type": "RANDLORA"}, "'RANDLORA' are not read here: its columns and rows"),
    ({"lora_bias": True}, "lora_bias=True, which is not read here"),
    ({"peft_type": "LOKR", "alpha": 8, "rank_pattern": {"q_proj": 1}}, "rank_pattern=.'q_proj': 1., which is not"),
    ({"peft_type": "MISS", "init_weights": "new"}, "init_weights='new', which is not read here"),
    ({"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 2}, "task_type=None, which is not read here"),
]


@pytest.mark.parametrize(("change", "part"), REFUSED)
def test_a_setting_that_changes_the_meaning_is_refused(change: dict[str, Any], part: str, tmp_path: Path) -> None:
    hf_moved(net(), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(str(tmp_path))
    assert hf_peft.reads(changed(tmp_path, {})) is None
    config = changed(tmp_path, change)
    model = net()
    with pytest.raises(AdapterFileError, match=part) as error:
        load_adapter(model, tmp_path)
    assert hf_peft.reads(config) == str(error.value)
    assert not hasattr(model, "_peft")


@pytest.mark.parametrize(("change", "part"), LEFT_TO_HF_PEFT)
@pytest.mark.filterwarnings("ignore:settings of the file .* are passed over:UserWarning")
def test_what_no_method_of_ours_computes_is_left_to_hf_peft(change: dict[str, Any], part: str, tmp_path: Path) -> None:
    hf_moved(net(), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(str(tmp_path))
    because = hf_peft.reads(changed(tmp_path, change))
    assert because is not None
    assert re.search(part, because)
    model = net()
    with pytest.raises(AdapterFileError):  # for the tensors are those of plain LoRA
        load_adapter(model, tmp_path)
    assert not hasattr(model, "_peft")


def test_a_setting_of_a_later_version_is_named(ids: Tensor, tmp_path: Path) -> None:
    model = hf_moved(net(), LoraConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(str(tmp_path))
    changed(tmp_path, {"use_new": False, "new_pattern": {}})
    load_adapter(net(), tmp_path)
    changed(tmp_path, {"use_new": 3})
    with pytest.warns(UserWarning, match="the setting use_new=3 of the file is not known here"):
        loaded = load_adapter(net(), tmp_path)
    torch.testing.assert_close(loaded(ids), model(ids))


@pytest.mark.parametrize("config", [LoHaConfig, LoKrConfig])
def test_a_setting_of_training_is_named(config: Any, tmp_path: Path) -> None:
    hf_moved(net(), config(r=1, rank_dropout=0.5, target_modules=["q_proj"])).save_pretrained(str(tmp_path))
    with pytest.warns(UserWarning, match="rank_dropout=0.5 acts in training alone"):
        load_adapter(net(), tmp_path)


@pytest.mark.parametrize(
    ("config", "lost", "part"),
    [
        (LoraConfig(r=2, target_modules=["q_proj"]), "lora_A.weight", "the file has no 'lora_A.weight' of a layer"),
        (LoraConfig(r=2, target_modules=["q_proj"]), "lora_B.weight", "missing: q_proj.adapters.lora_B"),
        (LoHaConfig(r=2, target_modules=["q_proj"]), "hada_w1_b", "the file has no 'hada_w1_b' of a layer"),
        (AdaLoraConfig(total_step=9, target_modules=["q_proj"]), "lora_E", "the file has no 'lora_E' of a layer"),
    ],
)
def test_a_torn_file_is_refused(config: Any, lost: str, part: str, tmp_path: Path) -> None:
    hf_moved(net(), copy.deepcopy(config)).save_pretrained(str(tmp_path))
    file = tmp_path / "adapter_model.safetensors"
    save_file({key: t for key, t in load_file(file).items() if not key.endswith(lost)}, file, {"format": "pt"})
    with pytest.raises(AdapterFileError, match=part):
        load_adapter(net(), tmp_path)


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=2, bias="all", target_modules=["q_proj", "fc2"]),
        LoraConfig(r=2, bias="lora_only", target_modules=["q_proj", "conv"], modules_to_save=["head"]),
        AdaLoraConfig(init_r=2, total_step=9, bias="all", target_modules=["q_proj"]),
        MissConfig(r=2, bias="all", target_modules=["q_proj"]),
    ],
    ids=lambda config: f"{type(config).__name__}-{config.bias}",
)
def test_biases_that_were_trained_go_both_ways(config: Any, ids: Tensor, tmp_path: Path) -> None:
    model = hf_moved(net(), copy.deepcopy(config))
    model.save_pretrained(str(tmp_path / "theirs"))
    loaded = load_adapter(net(), tmp_path / "theirs")
    torch.testing.assert_close(loaded(ids), model(ids))
    trained = {name for name, parameter in loaded.named_parameters() if parameter.requires_grad}
    expected = sum(parameter.requires_grad for parameter in model.parameters())
    assert len(trained) == expected
    assert {"q_proj.bias"} <= trained - {"q_proj.weight"} == trained

    save_adapter(loaded, tmp_path / "ours")
    again = PeftModel.from_pretrained(net(), str(tmp_path / "ours")).eval()
    torch.testing.assert_close(again(ids), model(ids))
    assert again.peft_config["default"].bias == "all"
    assert torch.equal(load_adapter(net(), tmp_path / "ours")(ids), loaded(ids))


def test_biases_of_a_module_that_is_trained_whole_are_in_the_file_three_times(ids: Tensor, tmp_path: Path) -> None:
    config = LoraConfig(r=2, bias="all", target_modules=["q_proj"], modules_to_save=["head"])
    model = hf_moved(net(), config)
    model.save_pretrained(str(tmp_path))
    assert "base_model.model.head.original_module.bias" in load_file(tmp_path / "adapter_model.safetensors")
    torch.testing.assert_close(load_adapter(net(), tmp_path)(ids), model(ids))


class Images(nn.Module):
    """Layers where HF PEFT computes something that no method of ours does."""

    def __init__(self) -> None:
        super().__init__()
        self.signal = nn.Conv1d(6, 6, 3, padding=1)
        self.grouped = nn.Conv2d(6, 4, 1, groups=2)
        self.gate, self.out = nn.Linear(4, 3), nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.gate(self.grouped(self.signal(x)[..., None].tanh()).flatten(2).sum(2)).tanh())


def images() -> nn.Module:
    torch.manual_seed(1)
    return Images().eval()


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=2, target_modules=["grouped"]),
        LoraConfig(r=4, target_modules=["gate"], use_rslora=True),  # of which three can be used
        LoKrConfig(r=2, target_modules=["signal"]),
        IA3Config(target_modules=["grouped"], feedforward_modules=[]),
        IA3Config(target_modules=["grouped"], feedforward_modules=["grouped"]),
    ],
    ids=["groups", "rank", "lokr", "ia3", "ia3 of the input"],
)
@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups")
def test_what_hf_peft_alone_computes_is_run_by_its_code(config: Any, tmp_path: Path) -> None:
    model, x = hf_moved(images(), copy.deepcopy(config)), torch.randn(2, 6, 5)
    model.save_pretrained(str(tmp_path / "theirs"))
    loaded = load_adapter(images(), tmp_path / "theirs")
    assert type(next(iter(adapters_of(loaded)))[2]).__name__ == "HFPEFTAdapter"
    torch.testing.assert_close(loaded(x), model(x))
    assert not torch.allclose(images()(x), model(x), atol=1e-3)
    save_adapter(loaded, tmp_path / "ours")
    torch.testing.assert_close(PeftModel.from_pretrained(images(), str(tmp_path / "ours")).eval()(x), model(x))


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=2, target_modules="q_proj", alpha_pattern={"^q_proj": 3}),  # one string is for the whole name
        LoHaConfig(r=2, target_modules="q_proj"),
        IA3Config(target_modules="q_proj", feedforward_modules=[]),
    ],
    ids=lambda config: type(config).__name__,
)
def test_a_layer_whose_name_ends_that_of_another_is_adapted_alone(config: Any, tmp_path: Path) -> None:
    def build() -> nn.Module:
        torch.manual_seed(1)
        inner = nn.Sequential(nn.Linear(4, 4))
        inner.add_module("q_proj", nn.Linear(4, 3))
        model = nn.Sequential()
        model.add_module("q_proj", nn.Linear(5, 4))
        model.add_module("block", inner)
        return model.eval()

    model, x = hf_moved(build(), config), torch.randn(2, 5)
    model.save_pretrained(str(tmp_path / "theirs"))
    loaded = load_adapter(build(), tmp_path / "theirs")
    torch.testing.assert_close(loaded(x), model(x))
    assert [path for path, _, _ in adapters_of(loaded)] == ["q_proj"]
    save_adapter(loaded, tmp_path / "ours")
    assert torch.equal(load_adapter(build(), tmp_path / "ours")(x), loaded(x))


def test_one_output_is_no_input(tmp_path: Path) -> None:
    model = hf_moved(images(), IA3Config(target_modules=["out"], feedforward_modules=[]))
    model.save_pretrained(str(tmp_path))
    x = torch.randn(2, 6, 5)
    torch.testing.assert_close(load_adapter(images(), tmp_path)(x), model(x))


def test_where_hf_peft_folds_otherwise_lokr_is_written_in_our_own_format(tmp_path: Path) -> None:
    model, x = moved(inject(images(), LoKr(r=2, target_modules="signal"))), torch.randn(2, 6, 5)
    with pytest.warns(UserWarning, match=r"own format.* HF PEFT makes another change .* for a Conv1d \(signal\)"):
        save_adapter(model, tmp_path)
    assert torch.equal(load_adapter(images(), tmp_path)(x), model(x))


def tied_llama(tie: bool = True) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    sizes = {"hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 1, "num_attention_heads": 3}
    return LlamaForCausalLM(LlamaConfig(vocab_size=31, tie_word_embeddings=tie, **sizes)).eval()


BOTH_ENDS = ["embed_tokens", "lm_head"]


@pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings")  # what HF PEFT says of a tie
def test_ends_of_a_tie_that_are_trained_whole_go_both_ways(ids: Tensor, tmp_path: Path) -> None:
    ours = moved(inject(tied_llama(), LoRA(r=2, target_modules="q_proj", modules_to_save=tuple(BOTH_ENDS))))
    save_adapter(ours, tmp_path / "ours")
    theirs = PeftModel.from_pretrained(tied_llama(), str(tmp_path / "ours")).eval()
    torch.testing.assert_close(theirs(ids).logits, ours(ids).logits)
    assert theirs.peft_config["default"].ensure_weight_tying
    assert torch.equal(load_adapter(tied_llama(), tmp_path / "ours")(ids).logits, ours(ids).logits)

    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], ensure_weight_tying=True)
    theirs = hf_moved(tied_llama(), config)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    torch.testing.assert_close(load_adapter(tied_llama(), tmp_path / "theirs")(ids).logits, theirs(ids).logits)


@pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings")
def test_two_values_of_one_parameter_are_refused(ids: Tensor, tmp_path: Path) -> None:
    theirs = hf_moved(tied_llama(), LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=BOTH_ENDS))
    theirs.save_pretrained(str(tmp_path))
    model = tied_llama()
    before = snapshot(model)
    with pytest.raises(AdapterFileError, match="two values, as 'model.embed_tokens.weight' and as 'lm_head.weight'"):
        load_adapter(model, tmp_path)
    assert_unchanged(model, before)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())  # as the error says
    torch.testing.assert_close(load_adapter(model, tmp_path)(ids).logits, theirs(ids).logits)


def larger(seed: int) -> Any:
    """With rows for two tokens more, which begin at random."""
    model = tied_llama(tie=False)
    torch.manual_seed(seed)
    model.resize_token_embeddings(33, mean_resizing=False)
    return model.eval()


@pytest.mark.filterwarnings("ignore:Setting .save_embedding_layers. to .True.")
def test_rows_of_an_embedding_that_the_file_brings_along_have_to_be_there(ids: Tensor, tmp_path: Path) -> None:
    ids = ids + 22
    theirs = hf_moved(larger(2), LoraConfig(r=2, target_modules=["q_proj", *BOTH_ENDS]))
    theirs.save_pretrained(str(tmp_path))
    torch.testing.assert_close(load_adapter(larger(2), tmp_path)(ids).logits, theirs(ids).logits)
    load_adapter(larger(2).bfloat16(), tmp_path)  # the same, cast
    model = larger(3)
    before = snapshot(model)
    with pytest.raises(AdapterFileError, match=r"beside a '(lm_head|model.embed_tokens).weight' \(33, 12\) of other"):
        load_adapter(model, tmp_path)
    assert_unchanged(model, before)
    load_adapter(model, tmp_path, allow_other_base=True)
    assert not torch.allclose(model(ids).logits, theirs(ids).logits, atol=1e-2)


def test_triplets_that_adalora_dropped_stay_dropped(ids: Tensor, tmp_path: Path) -> None:
    # as after a run: of the layers, one has lost all and one some of its triplets
    kept = {"q_proj": [True, False, True], "fc2": [False, False, False], "head": [True, True, True]}
    config = AdaLoraConfig(init_r=3, target_r=2, lora_alpha=5, total_step=9, target_modules=list(kept))
    model = hf_moved(net(), config)
    model.peft_config["default"].rank_pattern = {f"{name}.lora_E.default": mask for name, mask in kept.items()}
    with torch.no_grad():
        for name, mask in kept.items():
            model.base_model.model.get_submodule(name).lora_E["default"][~torch.tensor(mask)] = 0
    expected = model(ids)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # HF PEFT takes a layer of no triplets for a sign of shards
        model.save_pretrained(str(tmp_path))
    loaded = load_adapter(net(), tmp_path)
    torch.testing.assert_close(loaded(ids), expected)
    for name, mask in kept.items():
        assert loaded.get_submodule(name).adapters["default"].kept.bool().tolist() == mask
    masks = {f"{name}.lora_E": mask for name, mask in kept.items()}
    changed(tmp_path, {"rank_pattern": masks | {"q_proj.lora_E": [True, True, True]}})
    with pytest.raises(AdapterFileError, match="'q_proj' has 2 triplets in the file, and its config says 3 of 3"):
        load_adapter(net(), tmp_path)


def test_the_schedule_of_adalora_goes_both_ways(tmp_path: Path) -> None:
    # HF PEFT takes alpha <= 0 for a scaling of one
    schedule = {
        "target_r": 2,
        "tinit": 3,
        "tfinal": 1,
        "deltaT": 2,
        "beta1": 0.5,
        "beta2": 0.75,
        "orth_reg_weight": 0.0,
    }
    config = AdaLoraConfig(init_r=3, lora_alpha=-1, total_step=9, target_modules=["q_proj"], **schedule)
    model = hf_moved(net(), config)
    model.save_pretrained(str(tmp_path / "theirs"))
    loaded = load_adapter(net(), tmp_path / "theirs")
    ids = torch.arange(6)[None]
    torch.testing.assert_close(loaded(ids), model(ids))
    method = loaded._peft.injections["default"].method
    assert method == AdaLoRA(r=3, alpha=3, total_steps=9, target_modules=("q_proj",), **schedule)
    save_adapter(loaded, tmp_path / "ours")
    written = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert {key: written[key] for key in schedule} == schedule
    assert written["total_step"] == 9


def test_a_file_that_began_at_pissa_trains_on_as_pissa(ids: Tensor, tmp_path: Path) -> None:
    config = LoraConfig(r=2, lora_alpha=6, init_lora_weights="pissa", target_modules=["q_proj", "fc2"], use_rslora=True)
    model = hf_moved(net(), config)
    model.save_pretrained(str(tmp_path))
    loaded = load_adapter(net(), tmp_path)
    assert isinstance(loaded._peft.injections["default"].method, PiSSA)
    torch.testing.assert_close(loaded(ids), model(ids), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(merge(loaded)(ids), model(ids), rtol=1e-5, atol=1e-5)

    class Inside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def training_step(self) -> None: ...

    torch.testing.assert_close(load_adapter(Inside(), tmp_path).net(ids), model(ids), rtol=1e-5, atol=1e-5)


def test_what_hf_peft_knows_is_what_is_known_here() -> None:
    """So that a file of this version of HF PEFT makes no warning."""
    for kind, row in hf_peft.ROWS.items():
        cls = peft.PEFT_TYPE_TO_CONFIG_MAPPING[kind]
        unset = {field.name: 7 for field in dataclasses.fields(cls) if field.name not in row.training}
        if row.read:
            row.warn(unset)


@pytest.mark.parametrize(
    ("base", "method", "part"),
    [
        (nn.Conv2d(4, 6, 3, groups=2), LoRA(r=2, target_modules="all-layers"), "a convolution with groups"),
        (nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), LoHa(r=2, target_modules="all-layers"), "with zeros"),
        (nn.Conv2d(4, 6, 3), VeRA(r=2, target_modules="all-layers"), "does not adapt a Conv2d"),
        (nn.Conv1d(4, 6, 3), AdaLoRA(r=2, target_modules="all-layers"), "does not adapt a Conv1d"),
        (nn.Linear(4, 6), AdaLoRA(target_modules="0", modules_to_save="0"), "no file in which nothing is adapted"),
        (
            nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 5)),
            AdaLoRA(r=2, rank_pattern={"0.1": 1}, target_modules=("0.0", "0.1")),
            "begins with one rank and one alpha for all layers",
        ),
        (nn.Linear(4, 6), LoKr(r=1, dropout=0.5), "has no dropout of the input, here is dropout=0.5"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_hf_peft_computes_otherwise_is_written_in_our_own_format(
    base: nn.Module, method: Any, part: str, tmp_path: Path
) -> None:
    model = moved(inject(nn.Sequential(copy.deepcopy(base)).eval(), method))
    with pytest.warns(UserWarning, match=f"our own format, not in HF PEFT's: .*{part}"):
        save_adapter(model, tmp_path)
    assert "peft_type" not in json.loads((tmp_path / "adapter_config.json").read_text())
    x = torch.randn(2, 4, 5, 5)[:, :, :, : 5 if isinstance(base, nn.Conv2d) else 4]
    x = x[..., 0] if isinstance(base, nn.Conv1d) else x
    assert torch.equal(load_adapter(nn.Sequential(base).eval(), tmp_path)(x), model(x))


@pytest.mark.parametrize("method", [RandLoRA(r=2), PrefixTuning(num_virtual_tokens=2), PromptTuning()], ids=repr)
def test_what_hf_peft_has_no_place_for_is_written_in_our_own_format(method: Any, tmp_path: Path) -> None:
    base = nn.TransformerEncoder(nn.TransformerEncoderLayer(6, 2, 8, batch_first=True), 2, enable_nested_tensor=False)
    save_adapter(inject(base, method), tmp_path)  # which nobody is warned of
    assert "peft_type" not in json.loads((tmp_path / "adapter_config.json").read_text())


# What follows holds HF PEFT to its own results, right or wrong: a test that fails here says that it was mended, and
# that the page which compares both must change.


def test_hf_peft_has_no_effect_in_the_fused_path_of_an_encoder() -> None:
    layer = nn.TransformerEncoderLayer(6, 2, 10, dropout=0.0, batch_first=True).eval()
    base, x = nn.Sequential(layer), torch.randn(3, 5, 6)
    theirs = hf_moved(copy.deepcopy(base), LoraConfig(r=2, target_modules=["linear1", "linear2"]))
    ours = moved(inject(copy.deepcopy(base), LoRA(r=2, target_modules=("linear1", "linear2"))))
    with torch.no_grad():
        assert torch.equal(theirs(x), base(x)), f"mended in peft {peft.__version__}"
        assert not torch.allclose(theirs.train()(x), base(x), atol=1e-2)
        assert not torch.allclose(ours(x), base(x), atol=1e-2)
        torch.testing.assert_close(ours(x), ours.train()(x))


def test_hf_peft_adds_the_update_of_out_proj_twice() -> None:
    base = nn.ModuleDict({"attention": nn.MultiheadAttention(6, 2, batch_first=True)}).double().eval()
    x = torch.randn(3, 5, 6, dtype=torch.float64)
    config = LoraConfig(r=2, lora_alpha=6, target_modules=["attention"], init_lora_weights=False)
    theirs = get_peft_model(copy.deepcopy(base), config).double().eval()
    layers = [module for module in theirs.modules() if hasattr(module, "lora_A")]
    into, out = (3.0 * m.lora_B["default"].weight @ m.lora_A["default"].weight for m in layers)

    def by_hand(times: int) -> Tensor:
        dense = copy.deepcopy(base)["attention"]
        with torch.no_grad():
            dense.in_proj_weight += into
            dense.out_proj.weight += times * out
        return dense(x, x, x)[0]

    y = theirs.base_model.model["attention"](x, x, x)[0]
    torch.testing.assert_close(y, by_hand(2), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(y, by_hand(1), atol=1e-2)

    ours = inject(copy.deepcopy(base), LoRA(r=2, alpha=6.0))
    slots = (ours["attention"].adapters["default:in_proj_weight"], ours["attention"].out_proj.adapters["default"])
    with torch.no_grad():
        for adapter, layer in zip(slots, layers, strict=True):
            adapter.lora_A.copy_(layer.lora_A["default"].weight)
            adapter.lora_B.copy_(layer.lora_B["default"].weight)
    torch.testing.assert_close(ours["attention"](x, x, x)[0], by_hand(1))


def test_files_of_hf_peft_for_attention_are_refused(tmp_path: Path) -> None:
    base = nn.ModuleDict({"attention": nn.MultiheadAttention(6, 2, batch_first=True)})
    hf_moved(copy.deepcopy(base), LoraConfig(r=2, target_modules=["attention"])).save_pretrained(str(tmp_path))
    with pytest.raises(AdapterFileError, match="HF PEFT adds the update of out_proj twice"):
        load_adapter(base, tmp_path)


def test_hf_peft_merges_a_tied_head_into_the_embedding() -> None:
    def tied() -> nn.Module:
        torch.manual_seed(1)
        model = nn.ModuleDict({"embed": nn.Embedding(7, 5), "head": nn.Linear(5, 7, bias=False)})
        model["head"].weight = model["embed"].weight
        return model

    ids = torch.tensor([1, 4])
    embedded = tied()["embed"](ids)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = hf_moved(tied(), LoraConfig(r=2, target_modules=["head"])).merge_and_unload()
    assert not torch.allclose(theirs["embed"](ids), embedded, atol=1e-2), f"mended in peft {peft.__version__}"

    ours = moved(inject(tied(), LoRA(r=2, target_modules="head")))
    with pytest.warns(UserWarning, match="head.weight was tied to embed.weight; it is untied now"):
        merge(ours)
    assert torch.equal(ours["embed"](ids), embedded)


SMALL = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 16, "intermediate_size": 24}
TRANSFORMERS = {
    "llama": {"vocab_size": 31, **SMALL},
    "bert": {"vocab_size": 31, **SMALL},
    "gpt2": {"vocab_size": 31, "n_layer": 2, "n_head": 4, "n_embd": 16, "bos_token_id": 0, "eos_token_id": 0},
    "t5": {"vocab_size": 31, "num_layers": 2, "num_heads": 4, "d_model": 16, "d_ff": 24, "d_kv": 4},
}


@pytest.mark.parametrize("model_type", TRANSFORMERS)
@pytest.mark.parametrize("method", [LoRA(r=2), DoRA(r=2), IA3()], ids=lambda method: type(method).__name__)
def test_with_its_defaults_a_folder_of_each_architecture_is_read_by_hf_peft(
    method: Any, model_type: str, tmp_path: Path
) -> None:
    from transformers import AutoConfig, AutoModel

    def base() -> Any:
        torch.manual_seed(1)
        return AutoModel.from_config(AutoConfig.for_model(model_type, **TRANSFORMERS[model_type])).eval()

    ids = torch.randint(0, 31, (2, 6))
    inputs = {"input_ids": ids} | ({"decoder_input_ids": ids} if model_type == "t5" else {})
    model = moved(inject(base(), method))
    save_adapter(model, tmp_path)
    expected = model(**inputs).last_hidden_state
    theirs = PeftModel.from_pretrained(base(), str(tmp_path)).eval()
    torch.testing.assert_close(theirs(**inputs).last_hidden_state, expected)
    assert not torch.allclose(base()(**inputs).last_hidden_state, expected, atol=1e-3)
