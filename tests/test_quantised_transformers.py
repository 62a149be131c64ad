"""Language models that ``from_pretrained`` of transformers quantises while it loads them, and what becomes of them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    TorchAoConfig,
    Trainer,
    TrainingArguments,
)

from lightning_peft import (
    PEFT,
    AdapterError,
    DoRA,
    LoRA,
    QLoRA,
    inject,
    load_adapter,
    merge,
    save_adapter,
    unload,
    unmerge,
)
from lightning_peft.engine import MergeError, Method, TargetError, adapters_of

pytestmark = pytest.mark.filterwarnings("ignore")  # of libraries, about other hardware than this


def bitsandbytes(**settings: Any) -> tuple[Callable[[], Any], float]:
    pytest.importorskip("bitsandbytes")
    # on some CPUs it evaluates in bfloat16, and in 8 bits it rounds its input, too
    return lambda: BitsAndBytesConfig(**settings), 0.03


def torchao(config: str) -> tuple[Callable[[], Any], float]:
    quantization = pytest.importorskip("torchao.quantization")
    return lambda: TorchAoConfig(getattr(quantization, config)()), 1e-5


NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
KINDS: dict[str, Callable[[], tuple[Callable[[], Any], float]]] = {
    "nf4": lambda: bitsandbytes(**NF4),
    "nf4 stored as bfloat16": lambda: bitsandbytes(**NF4, bnb_4bit_quant_storage=torch.bfloat16),
    "int8": lambda: bitsandbytes(load_in_8bit=True),
    "torchao int8": lambda: torchao("Int8WeightOnlyConfig"),
    "torchao fp8": lambda: torchao("Float8WeightOnlyConfig"),
    "torchao intx": lambda: torchao("IntxWeightOnlyConfig"),
}
METHODS = [LoRA(r=4), DoRA(r=4), LoRA(r=4, modules_to_save="output-head")]


def saved(folder: Path, **others: Any) -> Path:
    """A language model in full precision, as ``save_pretrained`` writes it."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=61, num_hidden_layers=2, **sizes, **others)).save_pretrained(folder)
    return folder


@pytest.fixture(params=KINDS)
def quantised(request: Any) -> tuple[Callable[..., Any], float]:
    """(folder, settings) -> the model in it, quantised anew; and how far a merged one may be from it."""
    config, atol = KINDS[request.param]()
    return lambda folder, **k: AutoModelForCausalLM.from_pretrained(folder, quantization_config=config(), **k), atol


IDS = torch.arange(27).view(3, 9) * 7 % 61


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def trained(model: Any, steps: int = 3) -> list[float]:
    """The losses of some steps on one batch, and the one behind them."""
    optimizer = torch.optim.AdamW([p for p in model.train().parameters() if p.requires_grad], lr=5e-3)
    losses = []
    for _ in range(steps + 1):
        loss = model(input_ids=IDS, labels=IDS).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        if len(losses) <= steps:
            optimizer.step()
    return losses


@pytest.mark.parametrize("method", METHODS, ids=lambda m: f"{m.name} {m.modules_to_save}")
def test_it_is_adapted_trained_saved_and_merged(quantised: Any, method: Method, tmp_path: Path) -> None:
    load, atol = quantised
    folder = saved(tmp_path / "base")
    y_base, model = logits(load(folder)), inject(load(folder), method)
    assert model.is_quantized
    assert type(model.lm_head) is nn.Linear
    assert len(adapters_of(model)) == 14, "all linear layers of two blocks, and not the head"
    losses = trained(model)
    assert losses == sorted(losses, reverse=True)
    y_train, y = model(input_ids=IDS).logits, logits(model)
    assert (y - y_base).abs().max() > 0.1
    save_adapter(model, tmp_path / "adapter")
    assert torch.equal(logits(load_adapter(load(folder), tmp_path / "adapter")), y)
    theirs = peft.PeftModel.from_pretrained(load(folder), tmp_path / "adapter")
    # in training mode: DoRA of HF PEFT misreads what bitsandbytes packs anew to evaluate on a CPU
    torch.testing.assert_close(theirs.train()(input_ids=IDS).logits, y_train, rtol=0, atol=1e-5)
    with pytest.raises(MergeError, match="dequantize=True"):
        merge(model)
    assert torch.equal(logits(model), y)
    merge(model, dequantize=True)
    assert type(model.model.layers[1].mlp.up_proj) is nn.Linear
    torch.testing.assert_close(logits(model), y, rtol=0, atol=atol)
    with pytest.raises(AdapterError, match="for what the configuration says"):
        model.save_pretrained(tmp_path / "merged")
    assert torch.equal(logits(unmerge(model)), y)
    assert torch.equal(logits(unload(model)), y_base)
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    torch.testing.assert_close(logits(again), y_base, rtol=0, atol=atol)  # bitsandbytes has packed it anew meanwhile


def test_a_base_that_was_saved_in_codes_takes_the_same_adapter(quantised: Any, tmp_path: Path) -> None:
    load, _ = quantised
    folder = saved(tmp_path / "base")
    load(folder).save_pretrained(tmp_path / "codes")
    model = inject(load(folder), LoRA(r=4))
    trained(model)
    save_adapter(model, tmp_path / "adapter")
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "codes")
    assert torch.equal(logits(load_adapter(other, tmp_path / "adapter")), logits(model))


def test_a_tied_head_stays_tied(quantised: Any, tmp_path: Path) -> None:
    load, atol = quantised
    folder = saved(tmp_path / "base", tie_word_embeddings=True)
    with pytest.raises(TargetError, match=r"lm_head\.weight' is tied to 'model\.embed_tokens\.weight'"):
        inject(load(folder), LoRA(r=4, modules_to_save="output-head"))
    model = inject(load(folder), LoRA(r=4))
    trained(model)
    y = logits(model)
    merge(model, dequantize=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    torch.testing.assert_close(logits(model), y, rtol=0, atol=atol)


def test_nothing_needs_to_be_prepared(quantised: Any, tmp_path: Path) -> None:
    load, _ = quantised
    model = load(saved(tmp_path), dtype=torch.bfloat16)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    inject(model, LoRA(r=4)).train()
    for _, _, adapter in adapters_of(model):
        nn.init.normal_(adapter.lora_B)
    model(input_ids=IDS, labels=IDS).loss.backward()
    own = [p for p in model.parameters() if p.requires_grad]
    assert len(own) == 28
    assert all(p.dtype == torch.float32 and p.grad is not None and p.grad.any() for p in own)
    assert model.model.norm.weight.dtype == torch.bfloat16


def test_its_codes_are_not_quantised_again(quantised: Any, tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="quantised by another library already. Use LoRA"):
        inject(quantised[0](saved(tmp_path)), QLoRA(r=4))


def test_the_trainer_of_transformers_trains_it_and_goes_on(quantised: Any, tmp_path: Path) -> None:
    load, _ = quantised
    folder = saved(tmp_path / "base")
    data = [{"input_ids": IDS[i % 3], "labels": IDS[i % 3]} for i in range(16)]

    def fit(out: str, **resume: Any) -> dict[str, Tensor]:
        model = inject(load(folder), LoRA(r=4))
        quiet = {"report_to": "none", "use_cpu": True, "disable_tqdm": True}
        settings = TrainingArguments(str(tmp_path / out), max_steps=4, save_steps=2, learning_rate=1e-2, **quiet)
        Trainer(model, settings, train_dataset=data).train(**resume)
        return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    whole = fit("a")
    checkpoint = tmp_path / "a" / "checkpoint-2"
    assert set(load_file(checkpoint / "model.safetensors")) == set(whole), "nothing of the base"
    resumed = fit("b", resume_from_checkpoint=str(checkpoint))
    assert all(torch.equal(resumed[name], p) for name, p in whole.items())


def test_a_run_of_lightning_that_loads_it_late_goes_on(quantised: Any, tmp_path: Path) -> None:
    load, _ = quantised
    folder = saved(tmp_path / "base")

    class Lit(L.LightningModule):
        def configure_model(self) -> None:
            if not hasattr(self, "net"):
                self.net = load(folder)

        def training_step(self, ids: Tensor) -> Tensor:
            return self.net(input_ids=ids, labels=ids).loss

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.01)

    def fit(epochs: int, resume: Path | None = None) -> tuple[Lit, L.Trainer]:
        lit, quiet = Lit(), {"accelerator": "cpu", "logger": False, "enable_progress_bar": False}
        options = quiet | {"enable_model_summary": False, "enable_checkpointing": False}
        trainer = L.Trainer(max_epochs=epochs, callbacks=[PEFT(LoRA(r=4), summary=False)], **options)
        trainer.fit(lit, DataLoader(IDS, batch_size=2, shuffle=True), ckpt_path=resume)
        return lit, trainer

    torch.manual_seed(1)
    fit(1)[1].save_checkpoint(tmp_path / "one.ckpt")
    assert all(".adapters." in key for key in torch.load(tmp_path / "one.ckpt", weights_only=True)["state_dict"])
    resumed, _ = fit(2, tmp_path / "one.ckpt")
    torch.manual_seed(1)
    whole, _ = fit(2)
    for (_, _, a), (_, _, b) in zip(adapters_of(whole.net), adapters_of(resumed.net), strict=True):
        assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
