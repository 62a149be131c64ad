"""Files go both ways between HF PEFT and here, and both compute the same; where HF PEFT is wrong, a test says how."""

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from lightning_peft import IA3, DoRA, LoRA, inject, load_adapter, merge, save_adapter
from lightning_peft.engine import AdapterFileError
from tests.methods.backbones import moved

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


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"peft_type": "LOHA"}, "type 'LOHA'; those read here: IA3, LORA"),
        ({"bias": "all"}, "bias='all', which is not read here"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
    ],
)
def test_a_setting_that_changes_the_meaning_is_refused(change: dict[str, Any], part: str, tmp_path: Path) -> None:
    hf_moved(net(), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(str(tmp_path))
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(AdapterFileError, match=part):
        load_adapter(net(), tmp_path)


def test_what_hf_peft_computes_otherwise_is_written_in_our_own_format(tmp_path: Path) -> None:
    base = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2))
    model = moved(inject(copy.deepcopy(base), LoRA(r=2, target_modules="all-layers")))
    with pytest.warns(UserWarning, match="our own format, not in HF PEFT's: .*a convolution with groups"):
        save_adapter(model, tmp_path)
    assert "peft_type" not in json.loads((tmp_path / "adapter_config.json").read_text())
    x = torch.randn(2, 4, 5, 5)
    assert torch.equal(load_adapter(base, tmp_path)(x), model(x))


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
