"""Training without Lightning: the Trainer of transformers with its defaults, and loops of plain PyTorch."""

import functools
import inspect
import json
import pydoc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

from lightning_peft import (
    EVA,
    IST,
    LISA,
    LPFT,
    AdaLoRA,
    AdapterError,
    BitFit,
    GaLore,
    LinearProbe,
    LoRA,
    OwLore,
    SaRA,
    inject,
    load_adapter,
    merge,
    save_adapter,
    unload,
)
from lightning_peft.engine import (
    Method,
    adapter_state,
    adapters_of,
    calibrate,
    inputs_require_grad,
    load_adapter_state,
    notify,
)
from tests.engine.quantised_layers import Int8Linear, quantised

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory", "ignore:.*lr_scheduler.step")

METHOD = LoRA(r=4, alpha=16.0, modules_to_save="classifier")


def base() -> Any:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=128,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return BertForSequenceClassification(config)


@functools.cache
def lines() -> list[dict[str, Any]]:
    """Lines of source code, as bytes, with the question whether a line defines or returns."""
    found = [line.strip() for line in inspect.getsource(pydoc).splitlines() if len(line.strip()) > 8]
    kept = [line for line in found if line.isascii() and line.startswith(("def ", "return "))][:64]
    bytes_of = [list(line.encode()[:16].ljust(16)) for line in kept]
    return [{"input_ids": torch.tensor(b), "labels": int(chr(b[0]) == "d")} for b in bytes_of]


def batch(step: int) -> dict[str, Tensor]:
    eight = lines()[step * 8 % 64 :][:8]
    ids, labels = [line["input_ids"] for line in eight], [line["labels"] for line in eight]
    return {"input_ids": torch.stack(ids), "labels": torch.tensor(labels)}


def arguments(folder: Path, **others: Any) -> TrainingArguments:
    settings = {"max_steps": 12, "learning_rate": 1e-2, "report_to": "none", "use_cpu": True, "disable_tqdm": True}
    return TrainingArguments(output_dir=str(folder), **settings | others)


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor], rtol: float = 0, atol: float = 0) -> None:
    assert one.keys() == other.keys()
    for key in one:
        torch.testing.assert_close(one[key], other[key], rtol=rtol, atol=atol, msg=key)


def test_a_default_trainer_saves_and_goes_on_where_it_was(tmp_path: Path) -> None:
    model = inject(base(), METHOD)
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    trainer = Trainer(model, arguments(tmp_path / "a", save_steps=6, logging_steps=1), train_dataset=lines())
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[-1] < losses[0] / 2
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)
    for step in (6, 12):
        keys = load_file(tmp_path / "a" / f"checkpoint-{step}" / "model.safetensors").keys()
        assert set(keys) == set(trained(model)), "nothing of the frozen base"
    again = inject(base(), METHOD)
    with torch.no_grad():
        for p in again.parameters():
            if p.requires_grad:
                p.add_(1.0)
    resumed = Trainer(again, arguments(tmp_path / "b", save_strategy="no"), train_dataset=lines())
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-6"))
    assert_same(trained(again), trained(model))


def test_a_checkpoint_of_the_trainer_is_an_adapter_folder(tmp_path: Path) -> None:
    model = inject(base(), METHOD)
    trainer = Trainer(model, arguments(tmp_path), train_dataset=lines())
    trainer.train()
    trainer.save_model(str(tmp_path / "last"))
    assert json.loads((tmp_path / "last" / "adapter_config.json").read_text())["peft_type"] == "LORA"
    assert not (tmp_path / "last" / "config.json").exists(), "from_pretrained must not take it for a whole model"
    for folder in ("last", "checkpoint-12"):
        assert_same(trained(load_adapter(base(), tmp_path / folder)), trained(model))


def test_the_trainer_goes_back_to_its_best_step(tmp_path: Path) -> None:
    model = inject(base(), METHOD)
    every = {"eval_strategy": "steps", "eval_steps": 4, "save_steps": 4, "load_best_model_at_end": True}
    settings = arguments(tmp_path, learning_rate=1.0, metric_for_best_model="loss", greater_is_better=True, **every)
    trainer = Trainer(model, settings, train_dataset=lines(), eval_dataset=lines())
    trainer.train()  # at such a learning rate the steps differ
    best = Path(trainer.state.best_model_checkpoint or "")
    assert_same(trained(model), {key: value for key, value in load_file(best / "model.safetensors").items()})


def test_other_adapters_lie_below(tmp_path: Path) -> None:
    model = inject(inject(base(), METHOD), LoRA(r=2, target_modules="query"), name="second")
    Trainer(model, arguments(tmp_path, max_steps=2), train_dataset=lines()).save_model(str(tmp_path / "x"))
    assert (tmp_path / "x" / "second" / "adapter_model.safetensors").is_file()
    assert set(load_file(tmp_path / "x" / "model.safetensors")) == set(trained(model))


def test_a_person_is_still_told_what_save_pretrained_would_write(tmp_path: Path) -> None:
    model = inject(base(), METHOD)
    with pytest.raises(AdapterError, match=r"merge\(model\) first, or write the adapters with save_adapter"):
        model.save_pretrained(tmp_path / "x")
    assert not (tmp_path / "x").exists()
    model.save_pretrained(tmp_path / "x", is_main_process=False)
    assert not (tmp_path / "x").exists(), "another process writes"
    merge(model).save_pretrained(tmp_path / "x", is_main_process=True)
    assert (tmp_path / "x" / "config.json").is_file(), "what is merged is an ordinary model"


def test_the_trainer_takes_a_quantised_model_with_adapters(tmp_path: Path) -> None:
    def quantised_base() -> Any:
        model = base()
        classifier, model.classifier = model.classifier, nn.Identity()
        quantised(model, Int8Linear)
        model.classifier, model.is_quantized = classifier, True
        model.hf_quantizer = type("Quantizer", (), {"is_trainable": True, "is_qat_trainable": False})()
        return model

    with pytest.raises(ValueError, match="purely quantized"):
        Trainer(quantised_base(), arguments(tmp_path), train_dataset=lines())
    model = inject(quantised_base(), METHOD)
    trainer = Trainer(model, arguments(tmp_path, logging_steps=1), train_dataset=lines())
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[-1] < losses[0] / 2
    assert set(load_file(tmp_path / "checkpoint-12" / "model.safetensors")) == set(trained(model))
    unload(model)
    assert "_hf_peft_config_loaded" not in vars(model)


class Notify(TrainerCallback):
    """Tells a method what happens, as the docs show it."""

    def tell(self, event: Any, state: Any, model: Any, optimizer: Any) -> None:
        now = {"step": state.global_step, "epoch": int(state.epoch), "total_steps": state.max_steps}
        notify(model, event, optimizer, **now, loss=lambda: model(**batch(0)).loss)

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any, optimizer: Any, **_: Any) -> None:
        self.tell("on_train_batch_start", state, model, optimizer)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any, optimizer: Any, **_: Any) -> None:
        self.tell("on_before_optimizer_step", state, model, optimizer)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any, optimizer: Any, **_: Any) -> None:
        self.tell("on_after_optimizer_step", state, model, optimizer)


def test_a_method_that_acts_in_steps_is_told_of_them_by_a_callback(tmp_path: Path) -> None:
    model = inject(base(), LISA(n_layers=1, interval_steps=2))
    seen: list[tuple[bool, ...]] = []

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, *_: Any, model: Any, **__: Any) -> None:
            seen.append(tuple(next(layer.parameters()).requires_grad for layer in model.bert.encoder.layer))

    settings = arguments(tmp_path, max_steps=16, save_strategy="no")
    Trainer(model, settings, train_dataset=lines(), callbacks=[Notify(), Watch()]).train()
    assert {sum(trains) for trains in seen} == {1}
    assert len(set(seen)) == 2, "the block that trains changes"


# what each of them has measured or begun by step 10 of 12 decides what the last steps do
OF_STEPS: list[Method] = [
    AdaLoRA(r=4, target_r=1, tinit=2, tfinal=1, deltaT=3, target_modules=("query", "value")),
    LISA(n_layers=1, interval_steps=4),
    GaLore(r=4, update_proj_gap=4, target_modules="query"),
    OwLore(n_layers=1, interval_steps=3, r=4, update_proj_gap=4, outlier_threshold=1.5),
    IST(method=LoRA(r=2), n_layers=1, interval_steps=3),
    LPFT(lp_epochs=1),
    SaRA(reselect=0.5),
]


@pytest.mark.parametrize("method", OF_STEPS, ids=lambda m: m.name)
def test_what_a_method_keeps_comes_back_under_the_trainer(method: Method, tmp_path: Path) -> None:
    def fit(out: str, resume: bool) -> dict[str, Tensor]:
        model = inject(base(), method)
        settings = arguments(tmp_path / out, save_steps=10)
        Trainer(model, settings, train_dataset=lines(), callbacks=[Notify()]).train(resume_from_checkpoint=resume)
        return {key: value.detach().clone() for key, value in adapter_state(model).items()}

    whole = fit("a", resume=False)
    (tmp_path / "b").mkdir()
    (tmp_path / "a" / "checkpoint-10").rename(tmp_path / "b" / "checkpoint-10")
    assert_same(fit("b", resume=True), whole)


@pytest.mark.parametrize("method", [BitFit(), LinearProbe()], ids=lambda m: m.name)
def test_a_checkpoint_of_what_trains_in_place_holds_nothing_else(method: Method, tmp_path: Path) -> None:
    model = inject(base(), method)
    Trainer(model, arguments(tmp_path / "a", save_steps=6), train_dataset=lines()).train()
    checkpoint = tmp_path / "a" / "checkpoint-6"
    assert set(load_file(checkpoint / "model.safetensors")) == set(trained(model))
    loaded = load_adapter(base(), checkpoint)
    assert_same(trained(loaded), load_file(checkpoint / "model.safetensors"))
    resumed = Trainer(loaded, arguments(tmp_path / "b", save_strategy="no"), train_dataset=lines())
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert_same(trained(loaded), trained(model))
    unload(model).save_pretrained(tmp_path / "x", is_main_process=True)
    assert (tmp_path / "x" / "config.json").is_file(), "the model is its own again"


def test_a_measured_start_that_changed_the_ranks_is_taken_from_the_checkpoint(tmp_path: Path) -> None:
    model = inject(base(), EVA(r=4))
    calibrate(model, [lambda: model(**batch(0)).loss])
    assert len({len(adapter.lora_A) for _, _, adapter in adapters_of(model)}) > 1
    settings = arguments(tmp_path, save_steps=10)
    Trainer(model, settings, train_dataset=lines(), callbacks=[Notify()]).train()
    again = load_adapter(base(), tmp_path / "checkpoint-10")
    resumed = Trainer(again, settings, train_dataset=lines(), callbacks=[Notify()])
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))
    assert_same(dict(adapter_state(again)), dict(adapter_state(model)))


def test_a_person_saves_a_model_in_which_there_are_no_adapters(tmp_path: Path) -> None:
    model = inject(base(), LPFT())
    model.save_pretrained(tmp_path / "x")
    again = BertForSequenceClassification.from_pretrained(tmp_path / "x")
    assert_same(again.state_dict(), model.state_dict())
    method = IST(method=LoRA(r=2), n_layers=1)
    for _ in range(2):
        inject(model, method, name="second")
        with pytest.raises(AdapterError, match=r"merge\(model\) first"):
            model.save_pretrained(tmp_path / "y")


@pytest.mark.parametrize("method", OF_STEPS, ids=lambda m: m.name)
def test_what_a_method_keeps_comes_back_in_a_plain_loop(method: Method, tmp_path: Path) -> None:
    def fit(first: int, last: int, resume: bool) -> dict[str, Tensor]:
        model = inject(base(), method)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        if resume:
            load_adapter_state(model, load_file(tmp_path / "adapter.safetensors"))
            optimizer.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
        for step in range(first, last):
            now = {"step": step, "epoch": step // 8, "total_steps": 12}
            inputs = batch(step)
            notify(model, "on_train_batch_start", optimizer, **now, loss=lambda inputs=inputs: model(**inputs).loss)
            model(**inputs).loss.backward()
            notify(model, "on_before_optimizer_step", optimizer, **now)
            optimizer.step()
            notify(model, "on_after_optimizer_step", optimizer, **now)
            optimizer.zero_grad()
        state = {key: value.detach().clone() for key, value in adapter_state(model).items()}
        save_file(state, tmp_path / "adapter.safetensors")
        torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
        return state

    whole = fit(0, 12, resume=False)
    fit(0, 10, resume=False)
    assert_same(fit(10, 12, resume=True), whole)


def test_a_loop_of_plain_torch(tmp_path: Path) -> None:
    model = inject(base(), METHOD)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    ids = torch.stack([line["input_ids"] for line in lines()])
    labels = torch.tensor([line["labels"] for line in lines()])
    losses = []
    for _ in range(12):
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    loaded = load_adapter(base(), save_adapter(model, tmp_path)).eval()
    assert torch.equal(loaded(ids).logits, model.eval()(ids).logits)


def llama() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=32, num_key_value_heads=1, **sizes))


def vit() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, **sizes))


def gradients(make: Callable[[], Any], batch: dict[str, Tensor], quantise: bool, before: Any, after: Any) -> Any:
    model = make()
    if quantise:
        head = "lm_head" if hasattr(model, "lm_head") else "classifier"
        kept = getattr(model, head)
        setattr(model, head, nn.Identity())
        quantised(model, Int8Linear)
        setattr(model, head, kept)
    before(model)
    inject(model, LoRA(r=2)).train()
    after(model)
    torch.manual_seed(1)
    with torch.no_grad():
        for _, _, adapter in adapters_of(model):
            adapter.lora_B.copy_(torch.randn(adapter.lora_B.shape))
    model(**batch).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def checkpointed(model: Any, reentrant: bool) -> None:
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": reentrant})


def nothing(model: Any) -> None:
    pass


@pytest.mark.parametrize("quantise", [False, True], ids=["whole", "codes"])
@pytest.mark.parametrize("reentrant", [False, True], ids=["saved", "reentrant"])
@pytest.mark.parametrize("first", [False, True], ids=["inject first", "checkpoint first"])
def test_adapters_in_activation_checkpoints_of_a_language_model_have_their_gradients(
    quantise: bool, reentrant: bool, first: bool
) -> None:
    enable = functools.partial(checkpointed, reentrant=reentrant)
    ids = torch.randint(32, (3, 7))
    batch = {"input_ids": ids, "labels": ids}
    plain = gradients(llama, batch, quantise, nothing, nothing)
    assert len(plain) == 28
    assert all(g is not None and g.any() for g in plain.values())
    found = gradients(llama, batch, quantise, *((enable, nothing) if first else (nothing, enable)))
    assert_same(found, plain, rtol=1e-5, atol=1e-7)


def test_adapters_in_reentrant_checkpoints_of_any_model_have_theirs_where_inputs_are_let_require_gradients() -> None:
    batch = {"pixel_values": torch.randn(3, 3, 8, 8), "labels": torch.tensor([0, 1, 1])}
    plain = gradients(vit, batch, False, nothing, nothing)
    enable = functools.partial(checkpointed, reentrant=True)
    with pytest.raises(RuntimeError, match="does not require grad"), pytest.warns(UserWarning, match="None of the"):
        gradients(vit, batch, False, nothing, enable)
    with inputs_require_grad():
        found = gradients(vit, batch, False, nothing, enable)
    assert_same(found, plain, rtol=1e-5, atol=1e-7)
    found = gradients(vit, batch, False, nothing, functools.partial(checkpointed, reentrant=False))
    assert_same(found, plain, rtol=1e-5, atol=1e-7)
