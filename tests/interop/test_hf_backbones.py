"""Files go both ways between HF PEFT and here on real architectures, for every type that both can express.

HF PEFT's own reload of the file is the reference. In float64, so that an answer that is nearly right does not pass; the
starts that HF PEFT decomposes in float32 alone are compared in that.
"""

import copy
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from lightning import LightningModule
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn

from lightning_peft import (
    EVA,
    IA3,
    IST,
    PEGO,
    AdaLoRA,
    Bone,
    DoRA,
    FFALoRA,
    LoHa,
    LoKr,
    LoRA,
    LoRAGGPO,
    LoRAPro,
    MiSS,
    PrefixTuning,
    PromptTuning,
    PTuning,
    VeRA,
    inject,
    load_adapter,
    save_adapter,
)
from lightning_peft.engine import AdapterFileError, Method, TargetError
from tests.methods.backbones import backbone, moved
from tests.papers.denoisers import denoise_text

pytestmark = [
    # HF PEFT asks transformers by a name that is on its way out
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    # and sets this itself, layer by layer
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False but the target module is `Conv1D`"),
    # a targeted embedding is saved whole beside its update
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`"),
    pytest.mark.filterwarnings("ignore:Could not identify embedding layer"),
    # the name by which HF PEFT hands over a prefix
    pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:lora with eva initialization used with low_cpu_mem_usage=False"),
]

SMALL = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 16, "intermediate_size": 24}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"vocab_size": 31, "num_key_value_heads": 2, **SMALL},
    "bert": {"vocab_size": 31, **SMALL},
    "t5": {"vocab_size": 31, "num_layers": 2, "num_heads": 4, "d_model": 16, "d_ff": 24, "d_kv": 4},
    "gpt2": {"vocab_size": 31, "n_layer": 2, "n_head": 4, "n_embd": 16, "bos_token_id": 0, "eos_token_id": 0},
    "vit": {"image_size": 8, "patch_size": 4, **SMALL},
}
# an attention and a feed-forward layer of each, and of some an embedding or a convolution
LAYERS: dict[str, list[str]] = {
    "llama": ["q_proj", "k_proj", "down_proj"],
    "bert": ["query", "output.dense"],
    "t5": ["q", "wo"],
    "gpt2": ["c_attn", "c_proj"],
    "vit": ["v_proj", "fc2"],
    "unet": ["to_q", "to_k", "ff.net.2"],
}
OTHERS: dict[str, list[str]] = {"llama": ["embed_tokens"], "vit": ["projection"], "unet": ["conv1", "conv_shortcut"]}
IDS = torch.randint(0, 31, (2, 6), generator=torch.Generator().manual_seed(0))
IMAGE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@functools.cache
def _built(name: str, kind: str = "AutoModel") -> Any:
    if name == "unet":
        return backbone("unet_text")
    import transformers

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        config = transformers.AutoConfig.for_model(name, **CONFIGS[name])
        return getattr(transformers, kind).from_config(config).double().eval()


def base(name: str, kind: str = "AutoModel", dtype: torch.dtype = torch.float64) -> Any:
    return copy.deepcopy(_built(name, kind)).to(dtype)


@torch.no_grad()
def answer(name: str, model: Any) -> Tensor:
    """Its features; of a language model with a head, its logits."""
    if name == "unet":
        return denoise_text(model)
    if name == "vit":
        return model(pixel_values=IMAGE.to(next(model.parameters()).dtype)).last_hidden_state
    out = model(input_ids=IDS, **({"decoder_input_ids": IDS} if name == "t5" else {}))
    return out["last_hidden_state"] if "last_hidden_state" in out else out["logits"]


def hf_moved(model: nn.Module, config: Any) -> PeftModel:
    return moved(get_peft_model(model, config)).eval()  # type: ignore[return-value]


def assert_same(name: str, ours: Any, theirs: Any, base_answer: Tensor) -> None:
    found, expected = answer(name, ours), answer(name, theirs)
    tolerance = 1e-9 if found.dtype == torch.float64 else 2e-5
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    assert not torch.allclose(found, base_answer.to(found.dtype), atol=1e-3), "the adapter does nothing"


FIRST, LAST = "q|query|to_q|v_proj|q_proj|c_attn", "wo|output.dense|fc2|down_proj|ff.net.2"

Make = Callable[[list[str]], Any]  # names of layers -> config


def config(kind: str, **given: Any) -> Make:
    return lambda layers: getattr(peft, kind)(**{"target_modules": layers, **given})


EVERYWHERE = tuple(LAYERS)
# HF PEFT's LoHa, LoKr and MiSS do not adapt the Conv1D of GPT-2
LINEAR = tuple(name for name in LAYERS if name != "gpt2")
MIXED = tuple(OTHERS)
SOME = ("bert", "gpt2")  # where a case differs from another in its numbers alone

# name -> what HF PEFT is to write, on which backbones, and whether on layers that are not linear too
FROM_THEM: dict[str, tuple[Make, tuple[str, ...], bool]] = {
    "lora": (config("LoraConfig", r=2, lora_alpha=6), EVERYWHERE, False),
    "lora on all kinds": (config("LoraConfig", r=2, lora_alpha=6), MIXED, True),
    "rslora with patterns": (
        config("LoraConfig", r=3, use_rslora=True, rank_pattern={FIRST: 1}),
        EVERYWHERE,
        False,
    ),
    "alphas": (
        config("LoraConfig", r=2, alpha_pattern={FIRST: 3}, init_lora_weights="gaussian"),
        SOME,
        False,
    ),
    # HF PEFT finds no blocks at the top of a model, and none in T5 and the UNet
    "one layer": (config("LoraConfig", r=2, layers_to_transform=[1]), ("bert",), False),
    "a head": (
        lambda layers: peft.LoraConfig(
            r=2,
            target_modules=layers,
            modules_to_save=["norm", "layernorm", "ln_f", "final_layer_norm", "pooler", "conv_out"],
        ),
        EVERYWHERE,
        False,
    ),
    "dora": (config("LoraConfig", r=2, use_dora=True), EVERYWHERE, False),
    "dora on all kinds": (config("LoraConfig", r=2, use_dora=True), MIXED, True),
    "orthogonal": (config("LoraConfig", r=2, init_lora_weights="orthogonal"), SOME, False),
    "eva": (config("LoraConfig", r=2, init_lora_weights="eva", eva_config=peft.EvaConfig()), SOME, False),
    "ia3": (
        lambda layers: peft.IA3Config(target_modules=layers, feedforward_modules=layers[-1:]),
        EVERYWHERE,
        False,
    ),
    "adalora": (config("AdaLoraConfig", init_r=3, target_r=2, lora_alpha=5, total_step=9), EVERYWHERE, False),
    # of the UNet; HF PEFT's AdaLoRA adapts no embedding
    "adalora on convolutions": (config("AdaLoraConfig", init_r=3, total_step=9), ("vit", "unet"), True),
    "loha": (config("LoHaConfig", r=2, alpha=3), LINEAR, False),
    "loha on convolutions": (config("LoHaConfig", r=2, alpha=3), ("vit", "unet"), True),
    "loha with cores": (config("LoHaConfig", r=2, use_effective_conv2d=True), ("vit", "unet"), True),
    "loha with patterns": (
        config("LoHaConfig", r=2, rank_pattern={LAST: 4}, alpha_pattern={FIRST: 5}),
        LINEAR,
        False,
    ),
    "lokr": (config("LoKrConfig", r=2, alpha=3), LINEAR, False),
    "lokr of two": (config("LoKrConfig", r=1, decompose_both=True, decompose_factor=4), LINEAR, False),
    "lokr on convolutions": (config("LoKrConfig", r=1, alpha=3), ("vit", "unet"), True),
    "lokr with cores": (config("LoKrConfig", r=1, use_effective_conv2d=True), ("vit", "unet"), True),
    "miss": (config("MissConfig", r=3), LINEAR, False),
    "miss mini": (config("MissConfig", r=3, mini_r=2, init_weights="mini"), LINEAR, False),
    "bone": (config("MissConfig", r=2, init_weights="bat"), LINEAR, False),
}


@pytest.mark.parametrize(
    ("case", "name"), [(case, name) for case, (_, names, _) in FROM_THEM.items() for name in names]
)
def test_we_read_what_hf_peft_writes(case: str, name: str, tmp_path: Path) -> None:
    make, _, mixed = FROM_THEM[case]
    layers = LAYERS[name] + (OTHERS[name] if mixed else [])
    hf_moved(base(name), make(layers)).save_pretrained(str(tmp_path))
    theirs = PeftModel.from_pretrained(base(name), str(tmp_path)).eval()
    ours = load_adapter(base(name), tmp_path)
    assert_same(name, ours, theirs, answer(name, base(name)))


@pytest.mark.parametrize("name", [name for name in LAYERS if name != "unet"])  # its time embeddings are in float64 here
@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_a_start_at_a_part_of_the_weight_is_taken_out_of_it(start: str, name: str, tmp_path: Path) -> None:
    # HF PEFT decomposes a Conv1D as it is stored, which fits only where it is square
    layers = ["attn.c_proj"] if (name, start) == ("gpt2", "olora") else LAYERS[name]
    exact = {"dtype": torch.float32}
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=layers, init_lora_weights=start)
    trained = hf_moved(base(name, **exact), config)
    trained.save_pretrained(str(tmp_path))
    ours = load_adapter(base(name, **exact), tmp_path)
    theirs = PeftModel.from_pretrained(base(name, **exact), str(tmp_path)).eval()
    assert_same(name, ours, theirs, answer(name, base(name, **exact)))
    torch.testing.assert_close(answer(name, ours), answer(name, trained), rtol=2e-5, atol=2e-5)


FROM_US: dict[str, tuple[Callable[[Any], Method], tuple[str, ...], bool]] = {
    "lora": (lambda layers: LoRA(r=2, alpha=6.0, target_modules=layers), MIXED, True),
    "dora": (lambda layers: DoRA(r=2, target_modules=layers), EVERYWHERE, False),
    "ffalora": (lambda layers: FFALoRA(r=2, target_modules=layers), SOME, False),
    "loraggpo": (lambda layers: LoRAGGPO(r=2, target_modules=layers), SOME, False),
    "lorapro": (lambda layers: LoRAPro(r=2, target_modules=layers), SOME, False),
    "pego": (lambda layers: PEGO(n=2, r=2, target_modules=layers), SOME, False),
    "eva": (lambda layers: EVA(r=2, target_modules=layers), SOME, False),
    "ist of lora": (lambda layers: IST(method=LoRA(r=2, target_modules=layers)), SOME, False),
    "ia3": (lambda layers: IA3(target_modules=layers, feedforward_modules=layers[-1]), EVERYWHERE, False),
    "adalora": (lambda layers: AdaLoRA(r=3, target_modules=layers), EVERYWHERE, False),
    "adalora on convolutions": (
        lambda layers: AdaLoRA(r=3, alpha=5.0, target_modules=layers, use_rslora=True),
        ("vit", "unet"),
        True,
    ),
    "loha": (
        lambda layers: LoHa(r=2, rank_pattern={layers[0]: 1}, alpha_pattern={layers[-1]: 5.0}, target_modules=layers),
        LINEAR,
        False,
    ),
    "loha on convolutions": (lambda layers: LoHa(r=2, target_modules=layers), ("vit", "unet"), True),
    "lokr": (lambda layers: LoKr(r=2, decompose_both=True, target_modules=layers), LINEAR, False),
    "lokr on convolutions": (
        lambda layers: LoKr(r=1, decompose_factor=2, target_modules=layers),
        ("vit", "unet"),
        True,
    ),
    "vera": (lambda layers: VeRA(r=5, target_modules=layers), EVERYWHERE, False),
    "miss": (lambda layers: MiSS(r=3, target_modules=layers), LINEAR, False),
    "bone": (lambda layers: Bone(r=2, target_modules=layers), LINEAR, False),
}


@pytest.mark.parametrize(("case", "name"), [(case, name) for case, (_, names, _) in FROM_US.items() for name in names])
def test_hf_peft_reads_what_we_write(case: str, name: str, tmp_path: Path) -> None:
    make, _, mixed = FROM_US[case]
    layers = tuple(LAYERS[name] + (OTHERS[name] if mixed else []))
    ours = moved(inject(base(name), make(layers)))
    save_adapter(ours, tmp_path)
    theirs = PeftModel.from_pretrained(base(name), str(tmp_path)).eval()
    assert_same(name, ours, theirs, answer(name, base(name)))
    again = load_adapter(base(name), tmp_path)
    assert torch.equal(answer(name, again), answer(name, ours))


# task -> class of model, and of which backbones; a prompt needs the embedding of a vocabulary, so no ViT and no UNet
TASKS: dict[str, tuple[str, str]] = {
    "llama": ("CAUSAL_LM", "AutoModelForCausalLM"),
    "gpt2": ("CAUSAL_LM", "AutoModelForCausalLM"),
    "bert": ("FEATURE_EXTRACTION", "AutoModel"),
    "t5": ("SEQ_2_SEQ_LM", "AutoModelForSeq2SeqLM"),
}
PROMPTS: dict[str, dict[str, Any]] = {
    "PromptTuningConfig": {},
    "PromptEncoderConfig": {"encoder_hidden_size": 5},
}
each_task = pytest.mark.parametrize("name", TASKS)


def own_tokens(name: str, model: Any) -> Tensor:
    """The answers at the tokens of the text: HF PEFT answers at those of the prompt too, but for a decoder."""
    return answer(name, model)[:, -IDS.shape[1] :]


@each_task
@pytest.mark.parametrize("kind", PROMPTS)
def test_a_prompt_of_hf_peft_is_read(kind: str, name: str, tmp_path: Path) -> None:
    task, cls = TASKS[name]
    config = getattr(peft, kind)(num_virtual_tokens=3, task_type=task, **PROMPTS[kind])
    hf_moved(base(name, cls), config).save_pretrained(str(tmp_path))
    theirs = PeftModel.from_pretrained(base(name, cls), str(tmp_path)).eval()
    ours = load_adapter(base(name, cls), tmp_path)
    torch.testing.assert_close(answer(name, ours), own_tokens(name, theirs), rtol=1e-9, atol=1e-9)
    assert not torch.allclose(answer(name, ours), answer(name, base(name, cls)), atol=1e-3)


@each_task
@pytest.mark.parametrize(
    "method",
    [
        PromptTuning(num_virtual_tokens=3, class_tokens=0),
        PTuning(num_virtual_tokens=3, class_tokens=0, encoder_hidden_size=5),
        PTuning(num_virtual_tokens=3, class_tokens=0, encoder="lstm", num_layers=1, encoder_hidden_size=5),
    ],
    ids=["prompt", "mlp", "lstm"],
)
def test_a_prompt_of_ours_is_read_by_hf_peft(method: Method, name: str, tmp_path: Path) -> None:
    task, cls = TASKS[name]
    ours = moved(inject(base(name, cls), method))
    save_adapter(ours, tmp_path)
    theirs = PeftModel.from_pretrained(base(name, cls), str(tmp_path)).eval()
    assert theirs.peft_config["default"].task_type == task
    # HF PEFT keeps a prompt in float32
    torch.testing.assert_close(answer(name, ours), own_tokens(name, theirs), rtol=2e-5, atol=2e-5)
    again = load_adapter(base(name, cls), tmp_path)
    assert torch.equal(answer(name, again), answer(name, ours))


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_a_prompt_goes_both_ways_with_the_head_of_a_classifier(name: str, tmp_path: Path) -> None:
    cls = "AutoModelForSequenceClassification"
    config = peft.PromptTuningConfig(num_virtual_tokens=3, task_type="SEQ_CLS")
    theirs = hf_moved(base(name, cls), config)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    ours = load_adapter(base(name, cls), tmp_path / "theirs")
    texts = {"input_ids": IDS[:1]}  # of several, HF PEFT's classifier of a decoder wants to know the padding
    torch.testing.assert_close(ours(**texts).logits, theirs(**texts).logits, rtol=1e-9, atol=1e-9)
    save_adapter(ours, tmp_path / "ours")
    again = PeftModel.from_pretrained(base(name, cls), str(tmp_path / "ours")).eval()
    torch.testing.assert_close(again(**texts).logits, theirs(**texts).logits, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("method", "cls", "part"),
    [
        (PromptTuning(num_virtual_tokens=3), "AutoModel", "stay before this one"),
        (
            PTuning(num_virtual_tokens=3, class_tokens=0),
            "AutoModelForSequenceClassification",
            "wants the head 'classifier' in a file for SEQ_CLS",
        ),
        (
            PromptTuning(num_virtual_tokens=3, class_tokens=0),
            "AutoModelForMaskedLM",
            "knows no task of BertForMaskedLM",
        ),
    ],
)
def test_a_prompt_that_hf_peft_has_no_place_for_is_written_in_our_own_format(
    method: Method, cls: str, part: str, tmp_path: Path
) -> None:
    ours = moved(inject(base("bert", cls), method))
    with pytest.warns(UserWarning, match=f"our own format, not in HF PEFT's: .*{part}"):
        save_adapter(ours, tmp_path)
    again = load_adapter(base("bert", cls), tmp_path)
    assert torch.equal(again(input_ids=IDS)[0], ours(input_ids=IDS)[0])


# in a copy: HF PEFT writes the sizes of the model into it
PREFIXES: dict[str, Callable[..., Any]] = {
    "prefix": lambda **given: peft.PrefixTuningConfig(num_virtual_tokens=3, **given),
    "projection": lambda **given: peft.PrefixTuningConfig(
        num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=5, **given
    ),
    "cartridge": lambda **given: peft.CartridgeConfig(num_virtual_tokens=3, num_frozen_tokens=0, **given),
}
LEFT = torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]])
MASKS = {"none": None, "left": LEFT, "right": LEFT.flip(1)}


def prefixed(
    name: str, kind: str, tmp_path: Path, cls: str | None = None, dtype: torch.dtype = torch.float64, **given: Any
) -> tuple[Any, Any]:
    """The adapter of HF PEFT read here, and by HF PEFT itself."""
    task = given.setdefault("task_type", TASKS[name][0])
    cls = cls or TASKS[name][1]
    hf_moved(base(name, cls, dtype), PREFIXES[kind](**given)).save_pretrained(str(tmp_path))
    theirs = PeftModel.from_pretrained(base(name, cls, dtype), str(tmp_path)).eval()
    assert theirs.peft_config["default"].task_type == task
    return load_adapter(base(name, cls, dtype), tmp_path), theirs


@torch.no_grad()
def masked(name: str, model: Any, mask: Tensor | None) -> Tensor:
    """Its first answer; of an encoder and a decoder both texts are masked."""
    given = {"input_ids": IDS} | ({} if mask is None else {"attention_mask": mask})
    if name == "t5":
        given |= {f"decoder_{key}": value for key, value in given.items()}
    return model(**given)[0]


@each_task
@pytest.mark.parametrize("kind", PREFIXES)
def test_a_prefix_of_hf_peft_is_read(kind: str, name: str, tmp_path: Path) -> None:
    ours, theirs = prefixed(name, kind, tmp_path)
    for mask in MASKS.values():
        seen, without = masked(name, ours, mask), masked(name, base(name, TASKS[name][1]), mask)
        torch.testing.assert_close(seen, masked(name, theirs, mask), rtol=1e-9, atol=1e-9)
        assert not torch.allclose(seen, without, atol=1e-3)


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_a_prefix_of_hf_peft_is_read_in_single_precision(name: str, tmp_path: Path) -> None:
    ours, theirs = prefixed(name, "prefix", tmp_path, dtype=torch.float32)
    torch.testing.assert_close(masked(name, ours, LEFT), masked(name, theirs, LEFT), rtol=2e-5, atol=2e-5)


@each_task
@pytest.mark.parametrize("hidden", [None, 5], ids=["direct", "network"])
def test_a_prefix_of_ours_is_read_by_hf_peft(hidden: int | None, name: str, tmp_path: Path) -> None:
    task, cls = TASKS[name]
    ours = moved(inject(base(name, cls), PrefixTuning(num_virtual_tokens=3, place="cache", reparameterize=hidden)))
    save_adapter(ours, tmp_path)
    theirs = PeftModel.from_pretrained(base(name, cls), str(tmp_path)).eval()
    assert theirs.peft_config["default"].task_type == task
    for mask in MASKS.values():  # HF PEFT keeps a prefix in float32
        torch.testing.assert_close(masked(name, ours, mask), masked(name, theirs, mask), rtol=2e-5, atol=2e-5)
    again = load_adapter(base(name, cls), tmp_path)
    assert torch.equal(answer(name, again), answer(name, ours))


@pytest.mark.parametrize("mask", [torch.ones_like(LEFT), LEFT], ids=["whole", "padded"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_generation_behind_a_prefix_is_as_by_hf_peft(name: str, mask: Tensor, tmp_path: Path) -> None:
    """Token by token: HF PEFT's own ``generate`` hands its prefix over under a name that transformers has changed."""
    ours, theirs = prefixed(name, "prefix", tmp_path)
    given: dict[str, Any] = {"input_ids": IDS, "attention_mask": mask}
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    if name == "t5":
        options |= {"decoder_start_token_id": 2}
        given |= {"decoder_input_ids": torch.full((2, 1), 2)}
    made = [ours.generate(IDS, attention_mask=mask, use_cache=use, **options) for use in (True, False)]
    assert torch.equal(*made)
    grows = "decoder_input_ids" if name == "t5" else "input_ids"
    for _ in range(5):
        if name != "t5":
            given["position_ids"] = (given["attention_mask"].cumsum(1) - 1).clamp(min=0)
        new = theirs(**given, use_cache=False).logits[:, -1:].argmax(-1)
        given[grows] = torch.cat([given[grows], new], dim=1)
        if name != "t5":
            given["attention_mask"] = torch.cat([given["attention_mask"], torch.ones_like(new)], dim=1)
    assert torch.equal(made[0], given[grows])


@pytest.mark.parametrize("n", [1, 3, 4])
def test_a_decoder_sees_the_layers_of_a_prefix_as_hf_peft_hands_them_out(
    n: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(CONFIGS, "t5", CONFIGS["t5"] | {"num_layers": n})
    _built.cache_clear()
    try:
        ours, theirs = prefixed("t5", "prefix", tmp_path / "theirs")
        torch.testing.assert_close(answer("t5", ours), answer("t5", theirs), rtol=1e-9, atol=1e-9)
        save_adapter(moved(ours), tmp_path / "ours")
        theirs = PeftModel.from_pretrained(base("t5", TASKS["t5"][1]), str(tmp_path / "ours")).eval()
        torch.testing.assert_close(answer("t5", ours), answer("t5", theirs), rtol=2e-5, atol=2e-5)
    finally:
        _built.cache_clear()


def test_what_is_trained_whole_beside_a_prefix_is_read(tmp_path: Path) -> None:
    ours, _ = prefixed("t5", "prefix", tmp_path, modules_to_save=["decoder.final_layer_norm"])
    norm = load_file(tmp_path / "adapter_model.safetensors")["base_model.decoder.final_layer_norm.weight"]
    assert torch.equal(ours.decoder.final_layer_norm.weight, norm)
    assert not torch.equal(norm, base("t5", TASKS["t5"][1]).decoder.final_layer_norm.weight)


def test_a_decoder_that_was_joined_to_an_encoder_is_one_too(tmp_path: Path) -> None:
    import transformers as t

    def joined() -> Any:
        torch.manual_seed(1)
        configs = [t.BertConfig(**CONFIGS["bert"]) for _ in range(2)]
        return t.EncoderDecoderModel(t.EncoderDecoderConfig.from_encoder_decoder_configs(*configs)).double().eval()

    ours = moved(inject(joined(), PrefixTuning(num_virtual_tokens=3, place="cache")))
    save_adapter(ours, tmp_path)
    theirs = PeftModel.from_pretrained(joined(), str(tmp_path)).eval()
    given = {"input_ids": IDS, "decoder_input_ids": IDS}
    torch.testing.assert_close(ours(**given).logits, theirs(**given).logits, rtol=2e-5, atol=2e-5)
    assert torch.equal(load_adapter(joined(), tmp_path)(**given).logits, ours(**given).logits)


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_a_prefix_goes_both_ways_with_the_head_of_a_classifier(name: str, tmp_path: Path) -> None:
    cls = "AutoModelForSequenceClassification"
    ours, theirs = prefixed(name, "prefix", tmp_path / "theirs", cls, task_type="SEQ_CLS")

    def answer_of(model: Any) -> Tensor:  # HF PEFT looks for an argument that transformers has renamed
        return model.base_model(input_ids=IDS[:1], cache=model.get_prompt(1)).logits

    torch.testing.assert_close(ours(input_ids=IDS[:1]).logits, answer_of(theirs), rtol=1e-9, atol=1e-9)
    save_adapter(ours, tmp_path / "ours")
    again = PeftModel.from_pretrained(base(name, cls), str(tmp_path / "ours")).eval()
    torch.testing.assert_close(answer_of(again), answer_of(theirs), rtol=1e-9, atol=1e-9)


class Lit(LightningModule):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: Any) -> None: ...


@each_task
def test_a_prefix_goes_both_ways_in_a_lightning_module(name: str, tmp_path: Path) -> None:
    ours, _ = prefixed(name, "prefix", tmp_path / "theirs")
    lit = load_adapter(Lit(base(name, TASKS[name][1])), tmp_path / "theirs")
    assert torch.equal(answer(name, lit.net), answer(name, ours))
    save_adapter(lit, tmp_path / "ours")
    theirs = PeftModel.from_pretrained(base(name, TASKS[name][1]), str(tmp_path / "ours")).eval()
    torch.testing.assert_close(answer(name, theirs), answer(name, ours), rtol=1e-9, atol=1e-9)
    again = load_adapter(Lit(base(name, TASKS[name][1])), tmp_path / "ours")
    assert torch.equal(answer(name, again.net), answer(name, ours))


def test_a_cartridge_says_that_its_first_tokens_train_here(tmp_path: Path) -> None:
    config = peft.CartridgeConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    hf_moved(base("llama", "AutoModelForCausalLM"), config).save_pretrained(str(tmp_path))
    with pytest.warns(UserWarning, match="num_frozen_tokens=1 acts in training alone"):
        load_adapter(base("llama", "AutoModelForCausalLM"), tmp_path)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (
            {"num_layers": 3},
            r"holds \(3, 32\) as 'prompt_embeddings' of 3 layers, and the cache of LlamaFor",
        ),
        ({"num_layers": 1}, "of 1 layers"),
        ({"num_layers": 2.0}, "of 2.0 layers"),
        ({"num_virtual_tokens": 4}, "with 32 features of each of 4 tokens: it is torn, or for another model"),
        ({"task_type": None}, "task_type=None, which is not read here"),
    ],
    ids=repr,
)
def test_a_prefix_that_does_not_fit_is_refused(change: dict[str, Any], part: str, tmp_path: Path) -> None:
    prefixed("llama", "prefix", tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    model = base("llama", "AutoModelForCausalLM")
    with pytest.raises(AdapterFileError, match=part):
        load_adapter(model, tmp_path)
    assert not hasattr(model, "_peft")


@pytest.mark.parametrize(("name", "setting"), [("llama", "num_hidden_layers"), ("t5", "num_layers")])
@pytest.mark.parametrize("n", [1, 3])
def test_a_prefix_for_another_depth_is_refused(
    name: str, setting: str, n: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as other:
        other.setitem(CONFIGS, name, CONFIGS[name] | {setting: n})
        _built.cache_clear()
        prefixed(name, "prefix", tmp_path)
        _built.cache_clear()
    if (name, n) == ("t5", 3):  # it has the layers that these two see
        load_adapter(base(name, TASKS[name][1]), tmp_path)
        return
    with pytest.raises(AdapterFileError, match=f"of {n} layers, and the cache of .* has 2"):
        load_adapter(base(name, TASKS[name][1]), tmp_path)


def test_a_prefix_of_hf_peft_needs_a_cache(tmp_path: Path) -> None:
    prefixed("llama", "prefix", tmp_path)
    with pytest.raises(TargetError, match="0 parts of ViTModel are meant"):
        load_adapter(base("vit"), tmp_path)


@pytest.mark.parametrize("method", [LoHa(r=2), LoKr(r=2), MiSS(r=3)], ids=lambda method: type(method).__name__)
def test_layers_that_hf_peft_does_not_adapt_in_this_way_are_written_in_our_own_format(
    method: Method, tmp_path: Path
) -> None:
    ours = moved(inject(base("gpt2"), method))
    with pytest.warns(UserWarning, match="our own format, not in HF PEFT's: .* does not adapt a Conv1D"):
        save_adapter(ours, tmp_path)
    assert torch.equal(answer("gpt2", load_adapter(base("gpt2"), tmp_path)), answer("gpt2", ours))
