"""Every tuner of HF PEFT runs in our slots and computes what HF PEFT's own model does, or says why not."""

import copy
import functools
from pathlib import Path
from typing import Any

import lightning as L
import peft
import pytest
import torch
from peft import PeftModel, get_peft_model, set_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as CONFIGS
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_peft import HFPEFT, PEFT, LoRA, inject, load_adapter, merge, save_adapter, set_trainable, unload, unmerge
from lightning_peft.engine import AdapterError, AdapterFileError, MergeError, TargetError, adapters_of
from lightning_peft.interop import task_ids
from tests.methods.backbones import assert_unchanged, moved, snapshot, trainable

# HF PEFT tells of its own plans, and of a CUDA that is not here
pytestmark = pytest.mark.filterwarnings("ignore")

SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
# what a model this small needs beside target_modules
SETTINGS: dict[str, dict[str, Any]] = {
    "ADAPTION_PROMPT": {"adapter_layers": 1, "adapter_len": 3, "target_modules": None},
    "ADAMSS": {"r": 4},
    "BOFT": {"boft_block_size": 4},
    "C3A": {"block_size": 4},
    "FOURIERFT": {"n_frequency": 5},
    "GRALORA": {"r": 4, "gralora_k": 2},
    "HIRA": {"r": 2},
    "IA3": {"feedforward_modules": []},
    "LN_TUNING": {"target_modules": ["input_layernorm"]},
    "LORA": {"r": 2, "modules_to_save": ["lm_head"]},
    "MISS": {"r": 4},
    "OFT": {"oft_block_size": 4},
    "POLY": {"r": 2, "n_tasks": 3, "n_skills": 2, "n_splits": 2},
    "PSOFT": {"r": 4},
    "RANDLORA": {"r": 2},
    "ROAD": {"group_size": 4},
    "SHIRA": {"r": 2},
    "TRAINABLE_TOKENS": {"token_indices": [1, 2], "target_modules": ["embed_tokens"]},
    "UNILORA": {"r": 2, "theta_d_length": 16},
    "VBLORA": {"r": 2, "num_vectors": 4, "vector_length": 8, "topk": 2},
    "WAVEFT": {"n_frequency": 5},
}
REFUSED = {
    "ADALORA": "AdaLoRA of lightning_peft",
    "CARTRIDGE": "PrefixTuning",
    "CPT": "PromptTuning",
    "MULTITASK_PROMPT_TUNING": "PromptTuning",
    "PREFIX_TUNING": "PrefixTuning",
    "PROMPT_TUNING": "PromptTuning",
    "P_TUNING": "PTuning",
    "SHADOW": "LadderSideTuning",
    "XLORA": "calls the model twice",
}
# BEFT merges into biases, of which there are none here; that norm is none of torch
NO_MERGE = {"ADAPTION_PROMPT", "BEFT", "LILY", "LN_TUNING", "POLY"}
TYPES = sorted(kind.value for kind in CONFIGS)
every_type = pytest.mark.parametrize("kind", [kind for kind in TYPES if kind not in REFUSED])


@functools.cache
def original() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    return LlamaForCausalLM(LlamaConfig(vocab_size=31, **SMALL)).eval()


def llama() -> Any:
    return copy.deepcopy(original())


def config(kind: str) -> Any:
    settings = {"target_modules": ["q_proj", "v_proj"]} | SETTINGS.get(kind, {})
    return CONFIGS[kind](**{name: value for name, value in settings.items() if value is not None})


@pytest.fixture
def ids() -> Tensor:
    return torch.tensor([[1, 2, 5, 8, 30, 0], [4, 2, 1, 1, 9, 17]])


def bridged(kind: str) -> Any:
    return inject(llama(), HFPEFT(config=config(kind)))


def logits(model: Any, ids: Tensor) -> Tensor:
    """The answer; where an adapter looks at tasks, of two of them."""
    if any(getattr(adapter, "_by_task", False) for _, _, adapter in adapters_of(model)):
        with task_ids(model, [2, 0]):
            return model(input_ids=ids).logits
    if isinstance(model, PeftModel) and model.peft_type == "POLY":
        return model.base_model(input_ids=ids, task_ids=torch.tensor([2, 0])).logits
    return model(input_ids=ids).logits


@every_type
def test_hf_peft_reads_the_file_and_computes_the_same(kind: str, ids: Tensor, tmp_path: Path) -> None:
    model = moved(bridged(kind))
    save_adapter(model, tmp_path)
    expected = logits(model, ids)
    theirs = PeftModel.from_pretrained(llama(), str(tmp_path)).eval()
    torch.testing.assert_close(logits(theirs, ids), expected, rtol=2e-5, atol=2e-5)
    assert not torch.allclose(original()(input_ids=ids).logits, expected, atol=1e-4)
    again = load_adapter(llama(), tmp_path)
    assert torch.equal(logits(again, ids), expected)


@every_type
def test_a_file_of_hf_peft_is_read(kind: str, ids: Tensor, tmp_path: Path) -> None:
    theirs = get_peft_model(llama(), config(kind))
    moved(theirs).eval().save_pretrained(str(tmp_path))
    expected = logits(theirs, ids)
    loaded = load_adapter(llama(), tmp_path)
    torch.testing.assert_close(logits(loaded, ids), expected, rtol=2e-5, atol=2e-5)


@every_type
def test_what_trains_is_what_trains_there_and_gets_the_same_gradients(kind: str, ids: Tensor) -> None:
    theirs = moved(get_peft_model(llama(), config(kind)))
    model = bridged(kind)
    ours = next(adapter for _, _, adapter in adapters_of(model)).__dict__["tuned"]
    set_peft_model_state_dict(ours, peft.get_peft_model_state_dict(theirs))
    assert ours is not theirs
    for one in (model, theirs):
        one.eval()
        logits(one, ids).square().mean().backward()
    mine = sorted(p.grad.norm().item() for p in trainable(model).values() if p.grad is not None)
    other = sorted(p.grad.norm().item() for p in trainable(theirs).values() if p.grad is not None)
    assert sum(p.numel() for p in trainable(model).values()) == sum(p.numel() for p in trainable(theirs).values())
    torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)  # another order of sums, in float32
    assert any(mine)


@every_type
def test_the_base_comes_back(kind: str, ids: Tensor) -> None:
    before = snapshot(llama())
    model = moved(bridged(kind))
    assert not torch.allclose(logits(model, ids), original()(input_ids=ids).logits, atol=1e-4)
    assert_unchanged(unload(model), before)
    assert torch.equal(logits(model, ids), original()(input_ids=ids).logits)


@every_type
def test_merged_equals_unmerged(kind: str, ids: Tensor) -> None:
    model = moved(bridged(kind))
    expected, before = logits(model, ids), snapshot(model)
    if kind in NO_MERGE:
        with pytest.raises(MergeError):
            merge(model)
    else:
        torch.testing.assert_close(merge(model)(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)
        assert [type(m) for m in model.modules()] == [type(m) for m in llama().modules()]
        unmerge(model)
    assert_unchanged(model, before)
    assert torch.equal(logits(model, ids), expected)


def test_each_sample_is_answered_as_its_task_wants_it(ids: Tensor) -> None:
    model = moved(bridged("POLY"))
    with task_ids(model, [2, 0]):
        both = model(input_ids=ids).logits
        with pytest.raises(AdapterError, match="a batch of 3, and task_ids has 2 numbers"):
            model(input_ids=ids[[0, 1, 0]])
        beams = model(input_ids=ids[[0, 0, 1, 1]]).logits
        made = model.generate(ids, num_beams=2, max_new_tokens=2, do_sample=False, pad_token_id=0)
        assert made.shape == (2, 8)
    torch.testing.assert_close(beams, both.repeat_interleave(2, dim=0))
    for row, task in enumerate([2, 0]):
        with task_ids(model, torch.tensor([task])):
            torch.testing.assert_close(model(input_ids=ids[row : row + 1]).logits[0], both[row])
    with task_ids(model, [0, 1]):
        assert not torch.allclose(model(input_ids=ids).logits, both, atol=1e-4)
    with pytest.raises(AdapterError, match="Call the model inside of `with lightning_peft.interop.task_ids"):
        model(input_ids=ids)
    with pytest.raises(AdapterError, match=r"got \[0\] and 0 such adapters"), task_ids(bridged("LORA"), [0]):
        pass


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_run_here_says_why(kind: str) -> None:
    with pytest.raises(AdapterError, match=REFUSED[kind]):
        HFPEFT(config={"peft_type": kind})


def test_every_type_of_the_installed_version_is_here() -> None:
    assert len(TYPES) >= 44


class Mixed(nn.Module):
    """Layers of several kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.conv = nn.Embedding(11, 6), nn.Conv1d(6, 7, 3, padding=1)
        self.norm, self.q_proj, self.head = nn.LayerNorm(7), nn.Linear(7, 5), nn.Linear(5, 3)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.conv(self.embed(ids).transpose(1, 2)).transpose(1, 2)
        return self.head(self.q_proj(self.norm(h)).tanh())


def mixed() -> nn.Module:
    torch.manual_seed(1)
    return Mixed().eval()


@pytest.mark.parametrize(
    "config",
    [
        peft.LoraConfig(r=2, target_modules=["embed", "conv", "q_proj"], modules_to_save=["head"]),
        peft.LoraConfig(r=2, target_modules=["q_proj"], bias="all"),
        peft.LoraConfig(r=2, target_modules=["q_proj"], lora_bias=True),
        peft.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices={"embed": [1, 4]}),
        peft.LNTuningConfig(target_modules=["norm"]),
        peft.LoHaConfig(r=2, target_modules=["conv", "q_proj"]),
    ],
    ids=["lora", "bias", "lora_bias", "tokens", "norm", "loha"],
)
def test_layers_of_every_kind(config: Any, tmp_path: Path) -> None:
    ids = torch.tensor([[1, 4, 9, 0, 2], [3, 3, 1, 7, 10]])
    model = moved(inject(mixed(), HFPEFT(config=copy.deepcopy(config))))
    theirs = get_peft_model(mixed(), copy.deepcopy(config))
    assert sum(p.numel() for p in trainable(model).values()) == sum(p.numel() for p in trainable(theirs).values())
    save_adapter(model, tmp_path)
    theirs = PeftModel.from_pretrained(mixed(), str(tmp_path)).eval()
    expected = model(ids)
    torch.testing.assert_close(theirs(ids), expected, rtol=2e-5, atol=2e-5)
    assert torch.equal(load_adapter(mixed(), tmp_path)(ids), expected)
    assert_unchanged(unload(copy.deepcopy(model)), snapshot(mixed()))
    torch.testing.assert_close(merge(model)(ids), expected, rtol=1e-5, atol=1e-5)


def test_a_rotated_convolution_is_not_merged() -> None:
    # HF PEFT rotates the channels of the input, and merges a rotation of channels and places
    def image() -> nn.Module:
        torch.manual_seed(1)
        return nn.Sequential(nn.Conv2d(4, 6, 3)).eval()

    config = peft.OFTConfig(oft_block_size=4, target_modules=["0"])
    theirs, x = moved(get_peft_model(image(), config)).eval(), torch.randn(2, 4, 5, 5)
    expected = theirs(x)
    theirs.merge_adapter()
    assert not torch.allclose(theirs(x), expected, atol=1e-2), f"mended in peft {peft.__version__}"
    with pytest.raises(MergeError, match="HF PEFT merges peft.tuners.oft.Conv2d into another function"):
        merge(moved(inject(image(), HFPEFT(config=config))))


def test_a_base_that_a_file_brings_along_is_not_written_into_the_model(ids: Tensor, tmp_path: Path) -> None:
    # HF PEFT puts embeddings that are in the file into the base
    theirs = moved(get_peft_model(llama(), peft.OFTConfig(oft_block_size=4, target_modules=["q_proj"]))).eval()
    theirs.save_pretrained(str(tmp_path), save_embedding_layers=True)
    loaded = load_adapter(llama(), tmp_path)
    torch.testing.assert_close(logits(loaded, ids), logits(theirs, ids), rtol=2e-5, atol=2e-5)

    model = llama()
    with torch.no_grad():
        model.model.embed_tokens.weight[3] += 0.1
    before = snapshot(model)
    with pytest.raises(AdapterFileError, match=r"beside a 'model.embed_tokens.weight' \(31, 16\) of other values than"):
        load_adapter(model, tmp_path)
    assert_unchanged(model, before)
    other = load_adapter(model, tmp_path, allow_other_base=True)
    assert_unchanged(unload(other), before)


class Experts(nn.Module):
    """A parameter of three axes, as mixtures of experts have."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Parameter(0.3 * torch.randn(2, 6, 8))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bi,eio->bo", x, self.weights)


def experts() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 6), Experts(), nn.Linear(8, 3)).eval()


def test_parameters_that_no_layer_has_are_adapted(tmp_path: Path) -> None:
    x = torch.randn(5, 4)
    config = peft.LoraConfig(r=2, target_modules=["2"], target_parameters=["1.weights"])
    model = moved(inject(experts(), HFPEFT(config=config)))
    save_adapter(model, tmp_path)
    expected = model(x)
    assert not torch.allclose(expected, experts()(x), atol=1e-3)
    torch.testing.assert_close(PeftModel.from_pretrained(experts(), str(tmp_path)).eval()(x), expected)
    assert torch.equal(load_adapter(experts(), tmp_path)(x), expected)
    expected.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in trainable(model).values())
    assert_unchanged(unload(model), snapshot(experts()))


def test_it_lies_above_an_adapter_of_ours() -> None:
    ids = torch.tensor([[1, 4, 9, 0, 2]])
    lower = moved(inject(mixed(), LoRA(r=2, target_modules="q_proj")))
    merged = merge(copy.deepcopy(lower), keep_base=False)
    config = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"]}
    inject(lower, HFPEFT(config=config), name="above")
    set_trainable(lower, "above")
    above = moved(lower, seed=7)
    reference = moved(inject(merged, HFPEFT(config=config), name="above"), seed=7)
    torch.testing.assert_close(above(ids), reference(ids))


def test_hooks_of_the_model_run_once() -> None:
    model, calls = mixed(), []
    model.q_proj.register_forward_hook(lambda *_: calls.append(1))
    inject(model, HFPEFT(config={"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"]}))
    model(torch.tensor([[1, 4]]))
    assert calls == [1]
    x = torch.randn(2, 7)
    assert torch.equal(model.q_proj(input=x), model.q_proj(x))


@pytest.mark.parametrize(
    ("config", "part"),
    [
        (
            peft.LoraConfig(target_modules=["q_proj"], init_lora_weights="pissa"),
            "LORA .* changes the base .'q_proj.weigh",
        ),
        (peft.LoraConfig(target_modules=["nothing"]), "peft cannot put LORA here: Target modules .*nothing"),
    ],
    ids=["pissa", "nothing"],
)
def test_what_does_not_fit_the_model_changes_nothing(config: Any, part: str) -> None:
    model = mixed()
    with pytest.raises(TargetError, match=part):
        inject(model, HFPEFT(config=config))
    assert_unchanged(model, snapshot(mixed()))


def test_attention_that_hf_peft_computes_wrongly_is_refused() -> None:
    base = nn.ModuleDict({"attention": nn.MultiheadAttention(6, 2, batch_first=True)})
    with pytest.raises(TargetError, match="MultiheadAttention rebuilds 'attention'"):
        inject(base, HFPEFT(config={"peft_type": "LORA", "target_modules": ["attention"]}))


@pytest.mark.parametrize(
    ("config", "part"),
    [
        ({"peft_type": "NEW"}, "peft has no type 'NEW'"),
        ({"peft_type": "LORA", "rank": 2}, "LORA of peft has no setting 'rank'"),
        ({"peft_type": "LORA", "r": 2, "use_rslora": True, "loftq_config": 3, "init_lora_weights": "loftq"}, "LORA"),
        ({"peft_type": "LORA", "alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
        (3, "expected a peft.PeftConfig"),
    ],
)
def test_settings_that_peft_does_not_know_are_refused(config: Any, part: str) -> None:
    with pytest.raises(AdapterError, match=part):
        inject(mixed(), HFPEFT(config=config))


def test_a_torn_file_changes_nothing(tmp_path: Path) -> None:
    theirs = get_peft_model(mixed(), peft.OFTConfig(oft_block_size=0, r=1, target_modules=["q_proj", "head"]))
    theirs.save_pretrained(str(tmp_path))
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    tensors.pop(sorted(tensors)[0])
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    model = mixed()
    with pytest.raises(AdapterFileError, match="1 tensors are missing"):
        load_adapter(model, tmp_path)
    assert_unchanged(model, snapshot(mixed()))


class Module(L.LightningModule):
    """One network in a LightningModule, whose name is not in the names of HF PEFT."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mixed()

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        return self.net(batch[0]).square().mean()

    def train_dataloader(self) -> DataLoader[Any]:
        torch.manual_seed(0)
        return DataLoader(TensorDataset(torch.randint(0, 11, (12, 5))), batch_size=4)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], lr=0.05)


def fit(tmp_path: Path, epochs: int, ckpt_path: str | None = None) -> tuple[Module, L.Trainer]:
    config = peft.LoHaConfig(r=2, target_modules=["q_proj", "conv"])
    trainer = L.Trainer(
        max_epochs=epochs,
        default_root_dir=tmp_path,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        callbacks=[PEFT(config, save_to=str(tmp_path / "adapter"), summary=False)],
    )
    module = Module()
    trainer.fit(module, ckpt_path=ckpt_path)
    return module, trainer


def test_a_config_runs_in_the_callback_and_resumes(tmp_path: Path) -> None:
    ids = torch.tensor([[1, 4, 9, 0, 2]])
    through, _ = fit(tmp_path / "through", 3)
    _, first = fit(tmp_path / "first", 1)
    resumed, _ = fit(tmp_path / "first", 3, first.checkpoint_callback.best_model_path)  # type: ignore[union-attr]
    assert torch.equal(resumed.net(ids), through.net(ids))
    theirs = PeftModel.from_pretrained(mixed(), str(tmp_path / "through" / "adapter")).eval()
    torch.testing.assert_close(theirs(ids), through.net.eval()(ids), rtol=2e-5, atol=2e-5)
    assert not torch.allclose(theirs(ids), mixed()(ids), atol=1e-3)


class Beside(Module):
    """The same with a layer beside the network."""

    def __init__(self) -> None:
        super().__init__()
        self.loss = nn.Linear(3, 2)


@pytest.mark.parametrize("cls", [Module, Beside])
@pytest.mark.parametrize(
    "config",
    [
        peft.OFTConfig(oft_block_size=0, r=1, target_modules=["q_proj"], modules_to_save=["head"]),
        peft.VeraConfig(r=2, target_modules=["q_proj"]),
        peft.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices={"embed": [1, 4]}),
    ],
    ids=["oft", "vera", "tokens"],
)
def test_files_go_between_a_lightning_module_and_the_network_in_it(config: Any, cls: Any, tmp_path: Path) -> None:
    ids = torch.tensor([[1, 4, 9, 0, 2]])
    theirs = moved(get_peft_model(mixed(), copy.deepcopy(config))).eval()
    theirs.save_pretrained(str(tmp_path / "theirs"))
    module = load_adapter(cls(), tmp_path / "theirs")
    torch.testing.assert_close(module.net(ids), theirs(ids), rtol=2e-5, atol=2e-5)
    save_adapter(module, tmp_path / "ours")
    again = PeftModel.from_pretrained(mixed(), str(tmp_path / "ours")).eval()
    torch.testing.assert_close(again(ids), theirs(ids), rtol=2e-5, atol=2e-5)
    assert torch.equal(load_adapter(mixed(), tmp_path / "ours")(ids), module.net(ids))
    assert torch.equal(load_adapter(cls(), tmp_path / "ours").net(ids), module.net(ids))


@pytest.mark.parametrize("part", ["", "q_proj"])
def test_a_model_that_is_compiled_is_one_too(part: str, tmp_path: Path) -> None:
    ids = torch.tensor([[1, 4, 9, 0, 2]])

    def compiled() -> Any:
        if not part:
            return torch.compile(mixed(), backend="eager")
        model: Any = mixed()
        model.q_proj = torch.compile(model.q_proj, backend="eager")
        return model

    config = peft.OFTConfig(oft_block_size=0, r=1, target_modules=["q_proj", "head"])
    model = moved(inject(compiled(), HFPEFT(config=config)))
    save_adapter(model, tmp_path)
    theirs = PeftModel.from_pretrained(mixed(), str(tmp_path)).eval()
    torch.testing.assert_close(theirs(ids), model(ids), rtol=2e-5, atol=2e-5)
    assert not torch.allclose(theirs(ids), mixed()(ids), atol=1e-3)
    assert torch.equal(load_adapter(compiled(), tmp_path)(ids), model(ids))
    assert_unchanged(unload(model), snapshot(compiled()))


class Two(L.LightningModule):
    """Two networks in one LightningModule."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), mixed()

    def training_step(self, batch: Any, _: int) -> None: ...


def test_of_a_lightning_module_no_trainer_is_copied() -> None:
    module = Two()
    module._trainer = L.Trainer(logger=False, accelerator="cpu")  # type: ignore[assignment]
    inject(module, HFPEFT(config={"peft_type": "LORA", "r": 2, "target_modules": ["first", "q_proj"]}))
    copied = copy.deepcopy(module)
    assert copied._trainer is None
    assert [path for path, _, _ in adapters_of(copied)] == ["first", "second.q_proj"]
    shadows = adapters_of(copied)[0][2].__dict__["tuned"].modules()
    assert not [part for part in shadows if "_trainer" in part.__dict__]


def test_what_hf_peft_freezes_stays_frozen() -> None:
    mica = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"], "init_lora_weights": "mica"}
    model = inject(mixed(), HFPEFT(config=mica))
    before = trainable(model).keys()
    assert [name for name in before if "lora_B" in name] == []
    set_trainable(model, ())
    assert not trainable(model)
    set_trainable(model, "default")
    assert trainable(model).keys() == before
