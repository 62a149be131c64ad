"""X-LoRA against its formula, by hooks on the layers of a plain model."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_peft import AdapterError, XLoRA, inject
from lightning_peft.adapters.experts import Experts, Router
from lightning_peft.engine import TargetError, adapters_of, notify
from tests.methods.backbones import TinyBlocks, backbone, call, moved, tiny

CASES: dict[str, tuple[XLoRA, Any]] = {
    "plain": (XLoRA(num_experts=3, r=2, temperature=0.7), lambda z: (z / 0.7).softmax(-1)),
    "deep and for each layer": (
        XLoRA(num_experts=2, r=3, depth=3, size=9, layerwise=True, alpha=None, global_scaling_weight=1.3),
        lambda z: 1.3 * z.softmax(-1),
    ),
    "the best two": (XLoRA(num_experts=3, r=1, top_k=2), lambda z: _best(z.softmax(-1), 2)),
    "the best two of any numbers": (XLoRA(num_experts=3, r=1, top_k=2, softmax=False), lambda z: _best(z, 2)),
    "a softmax over the best two": (
        XLoRA(num_experts=3, r=1, top_k=2, softmax=False, softmax_top_k=True),
        lambda z: torch.where(_best(z, 2) != 0, _best(z, 2), -torch.inf).softmax(-1),
    ),
}


def _best(z: Tensor, k: int) -> Tensor:
    return torch.where(z >= z.sort(-1, descending=True).values[..., k - 1 : k], z, 0)


def by_formula(base: nn.Module, adapted: nn.Module, x: Tensor, gate: Any) -> Tensor:
    """What the paper says, of the factors in ``adapted``: a pass of ``base``, a classifier, a pass with the sums."""
    seen: list[Tensor] = []
    last = base.get_submodule("blocks.1")
    handle = last.register_forward_hook(lambda module, args, answer: seen.append(answer.detach()))
    base(x)
    handle.remove()
    (router,) = [a for _, _, a in adapters_of(adapted) if isinstance(a, Router)]
    z = seen[0]
    for i, layer in enumerate(router.layers):
        z = (z.relu() if i else z) @ layer.weight.T + layer.bias
    experts = [(path, a) for path, _, a in adapters_of(adapted) if isinstance(a, Experts)]
    E = len(experts[0][1].lora_A)
    g = gate(z.reshape(*z.shape[:2], -1, E)).expand(-1, -1, len(experts), -1)

    def hook(i: int, adapter: Experts) -> Any:
        def add(module: nn.Module, args: tuple[Tensor], answer: Tensor) -> Tensor:
            parts = [
                adapter.scaling * args[0] @ A.T @ B.T
                for A, B in zip(adapter.lora_A, adapter.lora_B.unbind(1), strict=True)
            ]
            return answer + sum(g[:, :, i, e, None] * part for e, part in enumerate(parts))

        return add

    handles = [base.get_submodule(path).register_forward_hook(hook(i, a)) for i, (path, a) in enumerate(experts)]
    y = base(x)
    for handle in handles:
        handle.remove()
    return y


@pytest.mark.parametrize("case", CASES)
def test_output_and_gradients_follow_the_formula(case: str) -> None:
    method, gate = CASES[case]
    x = torch.randn(2, 5, 7, dtype=torch.float64)
    model = moved(inject(tiny(method).double(), method)).eval()
    y = model(x)
    weights = torch.randn_like(y)
    got = torch.autograd.grad((y * weights).sum(), [p for p in model.parameters() if p.requires_grad])
    expected = by_formula(tiny(method).double(), model, x, gate)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    wanted = torch.autograd.grad((expected * weights).sum(), [p for p in model.parameters() if p.requires_grad])
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_the_best_two_are_two() -> None:
    gates = XLoRA(num_experts=4, top_k=2, softmax_top_k=True).gates(torch.randn(5, 3, 1, 4))
    assert gates.ne(0).sum(-1).eq(2).all()
    torch.testing.assert_close(gates.sum(-1), torch.ones(5, 3, 1))


def test_two_forwards_before_a_backward_go_back_with_their_own_shares() -> None:
    """Where activations are computed again, the shares of the other forward would be wrong, and nobody would see."""
    method = XLoRA(num_experts=2, r=2)
    x = torch.randn(2, 3, 5, 7, dtype=torch.float64)
    plain, again = (moved(inject(tiny(method).double(), method)) for _ in range(2))
    again.checkpointed = True  # type: ignore[assignment]
    for model in (plain, again):
        first, second = model(x[0]), model(x[1])
        (first.square().mean() + 3 * second.square().mean()).backward()
        model(x[0]).square().mean().backward()
    for one, other in zip(again.parameters(), plain.parameters(), strict=True):
        if other.grad is not None:
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-10, atol=1e-10)


def test_the_classifier_alone_trains() -> None:
    method = XLoRA(num_experts=2, r=2, train_experts=False)
    model = inject(tiny(method), method)
    names = {name.rpartition("adapters.default.")[2] for name, p in model.named_parameters() if p.requires_grad}
    assert names == {"layers.0.weight", "layers.0.bias"}


def test_the_first_look_has_no_graph() -> None:
    method = XLoRA(num_experts=2, r=2, modules_to_save="blocks.0.norm1")
    model = inject(tiny(method), method)
    seen: list[bool] = []
    (router,) = [a for _, _, a in adapters_of(model) if isinstance(a, Router)]
    router.layers[0].register_forward_hook(lambda module, args, answer: seen.append(args[0].requires_grad))
    model(torch.randn(2, 5, 7))
    assert seen == [False]


def test_frozen_experts_that_nobody_filled_do_not_train() -> None:
    method = XLoRA(num_experts=2, r=2, train_experts=False)
    model = inject(tiny(method), method)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(AdapterError, match=r"Take trained ones with load_experts\(model, folders\)"):
        notify(model, "on_train_batch_start", optimizer, step=0, epoch=0)
    for _, _, adapter in adapters_of(model):
        if isinstance(adapter, Experts):
            nn.init.ones_(adapter.lora_B)
    notify(model, "on_train_batch_start", optimizer, step=0, epoch=0)


def test_embeddings_have_experts() -> None:
    method = XLoRA(num_experts=2, r=3, target_modules="embed_tokens", alpha=6.0)
    model, base = moved(inject(backbone("llama"), method)), backbone("llama")
    (experts,) = [a for _, _, a in adapters_of(model) if isinstance(a, Experts)]
    (router,) = [a for _, _, a in adapters_of(model) if isinstance(a, Router)]
    nn.init.normal_(experts.lora_A)
    ids = torch.randint(0, 31, (2, 6), generator=torch.Generator().manual_seed(3))
    h = base.model(input_ids=ids).last_hidden_state
    g = (h @ router.layers[0].weight.T + router.layers[0].bias).softmax(-1)
    whole = [2.0 * A.T @ B.T for A, B in zip(experts.lora_A, experts.lora_B.unbind(1), strict=True)]
    embeds = base.model.embed_tokens(ids) + sum(g[..., e, None] * table[ids] for e, table in enumerate(whole))
    torch.testing.assert_close(call("llama", model), base(inputs_embeds=embeds).logits, rtol=1e-9, atol=1e-9)


def test_what_cannot_be_shared_out_is_refused() -> None:
    with pytest.raises(AdapterError, match="top_k must be None or at most num_experts=2, got 3"):
        XLoRA(num_experts=2, top_k=3)
    with pytest.raises(TargetError, match="'lm_head' is not in 'model.layers.1' or its like"):
        inject(backbone("llama"), XLoRA(target_modules=["q_proj", "lm_head"]))
    with pytest.raises(TargetError, match="module 'mode' embeds no text. Did you mean 'model'"):
        inject(backbone("llama"), XLoRA(module="mode"))
    model = inject(TinyBlocks(), XLoRA(num_experts=2, r=2, target_modules="qkv"))
    with pytest.raises(AdapterError, match="during no call of the model"):
        model.blocks[0](torch.randn(1, 4, 12))
    late = inject(nn.ModuleDict({"net": TinyBlocks()}), XLoRA(num_experts=2, r=2, target_modules="qkv"))
    late["net"].blocks[0].attn.more = nn.ModuleDict({"qkv": nn.Linear(12, 12)})
    with pytest.raises(TargetError, match="was built after its router"):
        inject(late, XLoRA(num_experts=2, r=2, target_modules="qkv"))


def llama() -> nn.Module:
    """A small one, in float64, the same weights at each call."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=31, eos_token_id=None, use_cache=False, **sizes)).double().eval()


def test_a_cache_is_refused_and_text_is_generated_without() -> None:
    model = moved(inject(llama(), XLoRA(num_experts=2, r=2)))
    ids = torch.randint(0, 31, (2, 4))
    with pytest.raises(AdapterError, match=r"generate\(\.\.\., use_cache=False\)"):
        model.generate(ids, max_new_tokens=3, do_sample=False, use_cache=True)
    got = model.generate(ids, max_new_tokens=3, do_sample=False, use_cache=False)
    expected = ids
    for _ in range(3):
        expected = torch.cat([expected, model(expected).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(got, expected)
