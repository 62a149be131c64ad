"""Norms, gates and activations by our operations: the same training, with less saved."""

import copy
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import timm
import torch
from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    BertConfig,
    BertModel,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from lightning_peft import PEFT, LoRA, inject
from lightning_peft.callbacks.fused import fused
from tests.callbacks.nets import Lit, loader, trainer

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def llama() -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(vocab_size=150, num_key_value_heads=2, **SMALL))


def gemma() -> nn.Module:
    return GemmaForCausalLM(GemmaConfig(vocab_size=50, num_key_value_heads=2, head_dim=8, **SMALL))


def bert() -> nn.Module:
    return BertModel(BertConfig(vocab_size=50, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **SMALL))


def vit() -> nn.Module:
    size = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 4}
    return timm.create_model("vit_tiny_patch16_224", num_classes=3, **size)


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, activation=nn.GELU(), batch_first=True)
    return nn.TransformerEncoder(layer, 2)


def tokens() -> Tensor:
    return torch.randint(50, (2, 9))


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], dict[str, int]]] = {
    "llama": (llama, tokens, {"LlamaRMSNorm": 5, "LlamaMLP": 2, "logits": 1}),
    "gemma": (gemma, tokens, {"GemmaRMSNorm": 5, "GemmaMLP": 2}),
    "bert": (bert, tokens, {"LayerNorm": 5, "GELUActivation": 2}),
    "vit": (vit, lambda: torch.randn(2, 3, 16, 16), {"LayerNorm": 5, "GELU": 2}),
    "encoder": (encoder, lambda: torch.randn(2, 7, 32), {"LayerNorm": 4, "GELU": 2}),
}


def first_tensor(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def step(model: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor], int]:
    """Loss, gradients and bytes that were saved for them, but for parameters."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    model.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = first_tensor(model(x)).square().mean()
    loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), grads, sum(n for storage, n in saved.items() if storage not in own)


def gemma3() -> nn.Module:
    return Gemma3ForCausalLM(Gemma3TextConfig(vocab_size=50, num_key_value_heads=2, head_dim=8, **SMALL))


def diffusion_block() -> nn.Module:
    blocks = [BasicTransformerBlock(32, 2, 16, activation_fn=a) for a in ("geglu", "gelu-approximate", "gelu")]
    return nn.Sequential(*blocks)


MODELS["gemma3"] = (gemma3, tokens, {"Gemma3RMSNorm": 13, "Gemma3MLP": 2})
MODELS["gpt2"] = (lambda: gpt2(), tokens, {"LayerNorm": 3, "NewGELUActivation": 1, "logits": 1})
MODELS["diffusion"] = (diffusion_block, lambda: torch.randn(2, 7, 32), {"LayerNorm": 6, "GEGLU": 1, "GELU": 2})
MODELS["activation"] = (lambda: Plain(nn.SiLU()), lambda: torch.randn(6, 32), {"SiLU": 1})
MODELS["in place"] = (lambda: Plain(nn.SiLU(inplace=True)), lambda: torch.randn(6, 32), {})


class Plain(nn.Sequential):
    def __init__(self, activation: nn.Module) -> None:
        super().__init__(nn.Linear(32, 32), activation, nn.Linear(32, 5))


def as_if_kernels_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model is changed as it is where kernels run; here their twins compute."""
    monkeypatch.setattr("lightning_peft.callbacks.fused.runs_triton", lambda x: True)


@pytest.mark.parametrize("where", ["with kernels", "without"])
@pytest.mark.parametrize("name", MODELS)
def test_a_step_is_the_same_and_saves_less(name: str, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    if where == "with kernels":
        as_if_kernels_ran(monkeypatch)
    build, make_input, expected = MODELS[name]
    model, x = inject(build(), LoRA(r=2)).train(), make_input()
    for parameter, p in model.named_parameters():
        if parameter.endswith("lora_B"):
            nn.init.normal_(p, std=0.1)
    loss, grads, before = step(model, x)
    with fused(model) as replaced:
        assert dict(replaced) == expected
        fused_loss, fused_grads, after = step(model, x)
        copied = step(copy.deepcopy(model), x)[0]
    torch.testing.assert_close(fused_loss, loss, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(copied, fused_loss)
    assert fused_grads.keys() == grads.keys()
    for key, value in grads.items():
        torch.testing.assert_close(fused_grads[key], value, rtol=1e-4, atol=1e-6, msg=lambda m, key=key: f"{key}: {m}")
    assert after < 0.9 * before or (after == before and not expected)
    assert all("forward" not in module.__dict__ for module in model.modules())
    assert torch.equal(step(model, x)[0], loss)


def own_loss(model: Any, ids: Tensor) -> Tensor:
    logits = model(input_ids=ids).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def its_loss(model: Any, ids: Tensor) -> Tensor:
    return model(input_ids=ids, labels=ids).loss


UNTIED = {"tie_word_embeddings": False}


def gemma2() -> nn.Module:
    size = {**SMALL, "num_key_value_heads": 2, "head_dim": 8, "final_logit_softcapping": 3.0, **UNTIED}
    return Gemma2ForCausalLM(Gemma2Config(vocab_size=150, attn_implementation="eager", **size))


NO_DROPOUT = {"resid_pdrop": 0, "attn_pdrop": 0, "embd_pdrop": 0}


def gpt2() -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(vocab_size=150, n_embd=32, n_layer=1, n_head=2, **NO_DROPOUT, **UNTIED))


@pytest.mark.parametrize("trained", ["frozen head", "trained head"])
@pytest.mark.parametrize("compute", [own_loss, its_loss])
@pytest.mark.parametrize("build", [llama, gemma2, gpt2])
def test_a_loss_needs_no_logits_in_a_model_or_behind_it(
    build: Callable[[], nn.Module], compute: Callable[[Any, Tensor], Tensor], trained: str
) -> None:
    model = inject(build(), LoRA(r=2, modules_to_save=("lm_head",) if trained == "trained head" else ())).train()
    ids, results = torch.randint(150, (2, 9)), []
    for kernels in (True, False):
        widths: set[int] = set()
        model.zero_grad()
        with (
            fused(model) if kernels else nullcontext(),
            torch.autograd.graph.saved_tensors_hooks(
                lambda t, seen=widths: seen.update(t.shape[-1:]) or t, lambda t: t
            ),  # type: ignore[misc]
        ):
            loss = compute(model, ids)
        loss.backward()
        assert (150 not in widths) == kernels or trained == "trained head"
        results.append((loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("why", ["an adapter", "a hook", "narrow", "sharded"])
def test_a_head_that_must_compute_its_logits_does(why: str) -> None:
    model: Any = llama() if why != "narrow" else LlamaForCausalLM(LlamaConfig(vocab_size=120, **SMALL))
    inject(model, LoRA(r=2, target_modules=("q_proj", "lm_head") if why == "an adapter" else "q_proj"))
    if why == "a hook":
        model.lm_head.register_forward_hook(lambda module, args, output: None)
    if why == "sharded":
        model.lm_head.weight.full_tensor = None  # what tells a DTensor
    with fused(model) as replaced:
        assert "logits" not in replaced
        assert type(model(input_ids=tokens()).logits) is Tensor


def test_where_no_kernel_runs_what_saves_nothing_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    family: Any = sys.modules["transformers.models.llama.modeling_llama"]
    own, model, ids = family.apply_rotary_pos_emb, inject(llama(), LoRA(r=2)).train(), tokens()
    with fused(model):
        assert family.apply_rotary_pos_emb is own
        replaced = {type(module).__name__ for module in model.modules() if "forward" in module.__dict__}
        assert replaced == {"LlamaRMSNorm", "LlamaMLP", "Linear"}  # the last is the head
        kept = step(model, ids)[2]
    as_if_kernels_ran(monkeypatch)
    with fused(model):
        assert family.apply_rotary_pos_emb is not own
        everything = step(model, ids)[2]
    assert kept < 1.02 * everything


def test_where_no_kernel_runs_a_layer_norm_is_torch_s_own_and_is_made_again() -> None:
    norm, x = nn.LayerNorm(32), (1 + 3 * torch.randn(2, 7, 32)).requires_grad_()
    upstream = torch.randn(2, 7, 32)
    own = norm(x)
    wanted = torch.autograd.grad(own, (x, *norm.parameters()), upstream)
    with fused(norm) as replaced:
        y = norm(x)
        assert replaced == {"LayerNorm": 1}
        assert torch.equal(y, own)
        assert torch.equal(y.recipe.make(*y.recipe.inputs), own)
        found = torch.autograd.grad(y, (x, *norm.parameters()), upstream)
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
        for given in (x, x.bfloat16()):
            with torch.autocast("cpu", torch.bfloat16):
                y = norm(given)
            assert torch.equal(y.recipe.make(*y.recipe.inputs), y)  # which happens without autocast


def test_the_projection_behind_an_attention_saves_no_input(monkeypatch: pytest.MonkeyPatch) -> None:
    as_if_kernels_ran(monkeypatch)
    model, inputs = inject(llama(), LoRA(r=2)).train(), []
    for name, module in model.named_modules():
        if name.endswith("o_proj"):
            module.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    shapes: dict[int, torch.Size] = {}

    def pack(t: Tensor) -> Tensor:
        shapes[t.untyped_storage().data_ptr()] = t.shape
        return t

    with fused(model), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = its_loss(model, tokens())
    saved = shapes.keys()
    assert len(inputs) == 2
    factors = {p.untyped_storage().data_ptr() for n, p in model.named_parameters() if "lora_" in n}
    assert factors <= saved  # as they are, and not once more with the scaling in them
    assert not {shapes[s] for s in saved - factors} & {p.shape for n, p in model.named_parameters() if "lora_B" in n}
    assert all(x.untyped_storage().data_ptr() not in saved for x in inputs)  # they are copies of what attention saves
    loss.backward()


def test_rotations_are_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    as_if_kernels_ran(monkeypatch)
    family: Any = sys.modules["transformers.models.llama.modeling_llama"]
    own = family.apply_rotary_pos_emb
    one, other = llama(), llama()
    with fused(one):
        assert family.apply_rotary_pos_emb is not own
        q, cos = torch.randn(1, 2, 3, 8), torch.randn(1, 3, 8)
        for axis, x in ((1, q), (2, q.transpose(1, 2)), (1, q.half())):
            torch.testing.assert_close(family.apply_rotary_pos_emb(x, x, cos, -cos, axis), own(x, x, cos, -cos, axis))
        with fused(other):
            pass
        assert family.apply_rotary_pos_emb is not own
    assert family.apply_rotary_pos_emb is own


class Normed(Lit):
    def __init__(self) -> None:
        super().__init__()
        self.net["norm"] = nn.LayerNorm(5)
        self.net["dropout"] = nn.Dropout(0.0)


class During(L.Callback):
    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
        self.forward = pl_module.net["norm"].__dict__.get("forward")


def test_in_a_trainer_it_is_asked_for_said_and_undone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained = []
    for kernels in ("auto", "off"):
        during, module = During(), Normed()
        peft = PEFT(LoRA(r=2), kernels=kernels)
        trainer(tmp_path, peft, during, max_epochs=1).fit(module, loader(), loader())
        assert (during.forward is not None) == (kernels == "auto")
        assert "forward" not in module.net["norm"].__dict__
        assert ("1 LayerNorm" in capsys.readouterr().out) == (kernels == "auto")
        trained.append(module.state_dict())
    for key, value in trained[0].items():
        torch.testing.assert_close(trained[1][key], value, rtol=1e-4, atol=1e-5)
