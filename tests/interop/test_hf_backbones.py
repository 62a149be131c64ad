"""Files go both ways between HF PEFT and here on real architectures, for every type that both can express.

HF PEFT's own reload of the file is the reference. In float64, so that an answer that is nearly right does not pass; the
starts that HF PEFT decomposes in float32 alone are compared in that.
"""

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model
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
    PromptTuning,
    PTuning,
    VeRA,
    inject,
    load_adapter,
    save_adapter,
)
from lightning_peft.engine import Method
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


@pytest.mark.parametrize("method", [LoHa(r=2), LoKr(r=2), MiSS(r=3)], ids=lambda method: type(method).__name__)
def test_layers_that_hf_peft_does_not_adapt_in_this_way_are_written_in_our_own_format(
    method: Method, tmp_path: Path
) -> None:
    ours = moved(inject(base("gpt2"), method))
    with pytest.warns(UserWarning, match="our own format, not in HF PEFT's: .* does not adapt a Conv1D"):
        save_adapter(ours, tmp_path)
    assert torch.equal(answer("gpt2", load_adapter(base("gpt2"), tmp_path)), answer("gpt2", ours))
