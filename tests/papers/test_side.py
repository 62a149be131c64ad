"""Side networks: what they must not touch, what they must not see, and where they answer."""

import copy
import functools
import itertools
from typing import Any

import pytest
import torch
from lightning import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from benchmarks.row import saved_bytes
from lightning_peft import (
    LEVI,
    PEFT,
    HierarchicalSideTuning,
    LadderSideTuning,
    LoRA,
    SideTuning,
    UniPT,
    inject,
    unload,
)
from lightning_peft.adapters.side import visible
from lightning_peft.engine import AdapterError, Method, TargetError, adapters_of
from tests.methods.backbones import TinyBlocks, assert_unchanged, backbone, call, moved, snapshot, tiny

METHODS: dict[str, Method] = {
    "side": SideTuning(width=4, depth=2),
    "ladder": LadderSideTuning(r=3, modules_to_save="output-head"),
    "unipt": UniPT(r=3),
    "levi": LEVI(width=4, depth=2),
    "hst": HierarchicalSideTuning(dims=(4, 6), num_heads=(2, 3), detach_taps=True),
}
OF_TEXT = ["side", "ladder", "unipt", "levi"]
by_method = pytest.mark.parametrize("name", METHODS)
by_text_method = pytest.mark.parametrize("name", OF_TEXT)


def leaves(y: Tensor) -> set[Tensor]:
    """All parameters that the gradient of ``y`` comes to."""
    found, seen, todo = set(), set(), [y.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        found |= {node.variable} if hasattr(node, "variable") else set()
        todo += [before for before, _ in node.next_functions]
    return found


# ---- memory: nothing of the backbone is kept


@by_method
@pytest.mark.parametrize("net", ["tiny", "vit", "swin", "convnext"])
def test_nothing_goes_back_through_the_backbone(name: str, net: str) -> None:
    method = METHODS[name]
    if net == "convnext" and name == "hst":
        method = HierarchicalSideTuning(dims=(4, 4, 4, 6), num_heads=(2, 2, 2, 3), detach_taps=True)
    model = TinyBlocks() if net == "tiny" else backbone(net).float()
    x = torch.randn(2, 13, 7) if net == "tiny" else torch.randn(2, 3, 32 if net == "convnext" else 16, 32)
    x = x if net in ("tiny", "convnext") else x[..., :16]
    try:
        inject(model, method)
    except TargetError:
        method = type(method)(**{**vars(method), "r": 2})  # what a narrow net needs
        inject(model, method)
    moved(model)
    inside, grad = set[int](), []
    held = {id(m) for _, _, adapter in adapters_of(model) for m in adapter.modules()}
    taps = {path for path, _, _ in adapters_of(model)}

    def look(module: nn.Module, args: Any, output: Any) -> None:
        grad.append(torch.is_grad_enabled())
        if isinstance(output, Tensor):
            inside.add(output.untyped_storage().data_ptr())

    keep, tapped = [], []  # so that no storage is used again
    for path in taps:
        model.get_submodule(path).register_forward_hook(lambda m, a, o: tapped.extend([*a, o]))
    for path, module in model.named_modules():
        if id(module) not in held and any(path.startswith(tap + ".") for tap in taps) and "adapters" not in path:
            module.register_forward_hook(look)
            module.register_forward_hook(lambda m, a, o: keep.append(o))

    saved = set[int]()

    def pack(t: Tensor) -> Tensor:
        saved.add(t.untyped_storage().data_ptr())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = model(x)
    assert grad
    assert not any(grad)
    assert torch.is_grad_enabled()
    own = {id(p) for p in model.parameters() if p.requires_grad}
    assert {id(p) for p in leaves(y)} == own
    between = {t.untyped_storage().data_ptr() for t in tapped}  # what the taps are, and what a shortcut hands on
    assert not saved & (inside - between)
    assert inside - between
    y.square().mean().backward()
    frozen = [n for n, p in model.named_parameters() if not p.requires_grad and p.grad is not None]
    assert frozen == []


def test_a_quarter_of_what_lora_keeps_is_enough() -> None:
    import timm

    x, kept = torch.randn(4, 3, 64, 64), {}
    for method in (LoRA(r=8), SideTuning(), LadderSideTuning(), UniPT(), LEVI()):
        model = inject(timm.create_model("vit_tiny_patch16_224", img_size=64, num_classes=5), method)
        kept[type(method).__name__] = saved_bytes(functools.partial(model, x), model.parameters())
    allowed = 0.25 * kept.pop("LoRA")
    assert {name: n for name, n in kept.items() if not 0 < n <= allowed} == {}


class Classifier(LightningModule):
    """What a user may have: no word of adapters in it."""

    def __init__(self) -> None:
        super().__init__()
        self.model = TinyBlocks()
        self.seen: list[bool] = []
        for block in self.model.blocks:
            block.mlp.register_forward_hook(lambda *_: self.seen.append(torch.is_grad_enabled()))

    def training_step(self, batch: Any, index: int) -> Tensor:
        (x,) = batch
        y = self.model(x)
        assert y.requires_grad
        return y.square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.1)


@by_method
def test_blocks_run_without_gradients_in_an_unchanged_training_step(name: str, tmp_path: Any) -> None:
    module = Classifier()
    before = copy.deepcopy(module.model.state_dict())
    data = DataLoader([(torch.randn(13, 7),) for _ in range(4)], batch_size=2)
    trainer = Trainer(
        fast_dev_run=True,
        callbacks=[PEFT(METHODS[name])],
        default_root_dir=tmp_path,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, data)
    assert module.seen == [name == "side", False]  # which taps the last block alone: before it nothing has a graph
    after = module.model.state_dict()
    changed = {key for key, value in before.items() if not torch.equal(value, after[key])}
    assert changed == {"head.weight", "head.bias"}
    moves = [p for _, _, adapter in adapters_of(module) for p in adapter.parameters()]
    assert moves


@by_method
def test_an_error_in_a_block_leaves_gradients_on_and_the_next_forward_right(name: str) -> None:
    model, x = moved(inject(TinyBlocks(), METHODS[name])), torch.randn(2, 13, 7)
    expected = model(x)

    def fail(*_: Any) -> None:
        raise RuntimeError("in a block")

    hook = model.blocks[1].mlp.register_forward_hook(fail)  # type: ignore[union-attr, operator]
    with pytest.raises(RuntimeError, match="in a block"):
        model(x)
    assert torch.is_grad_enabled()
    hook.remove()
    assert torch.equal(model(x), expected)


@by_method
def test_no_activation_outlives_the_forward(name: str) -> None:
    model = moved(inject(TinyBlocks(), METHODS[name]))
    model(torch.randn(2, 13, 7))
    stashes = {id(a.stash): a.stash for _, _, a in adapters_of(model)}
    assert len(stashes) == 1
    (stash,) = stashes.values()
    assert (stash.entered, stash.taps, stash.extra, stash.replaced, dict(stash.before)) == (None, {}, {}, [], {})


class Checkpointed(TinyBlocks):
    """Keeps the inputs of its blocks, and runs them again in the backward pass; the first of them, or all."""

    reentrant = False

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), self.embed(x)], dim=1)
        for block in self.blocks:
            x = checkpoint(block, x.requires_grad_(self.reentrant), use_reentrant=self.reentrant)  # type: ignore[assignment]
        x = self.norm(x)
        return self.head(x[:, 1:] + x[:, :1])


@by_method
def test_activation_checkpoints_find_what_the_forward_had(name: str) -> None:
    model = inject(TinyBlocks(), METHODS[name])
    again = inject(Checkpointed(), METHODS[name])
    again.load_state_dict(moved(model).state_dict())
    one, two = torch.randn(2, 13, 7), torch.randn(2, 13, 7)
    for net in (model, again):
        (net(one).square().mean() + net(two).sin().mean()).backward()  # each has to find its own
    for (path, p), q in zip(model.named_parameters(), again.parameters(), strict=True):
        if p.requires_grad:
            torch.testing.assert_close(q.grad, p.grad, msg=path)


@by_text_method
def test_activation_checkpoints_keep_two_forwards_apart_beside_lora(name: str) -> None:
    """Here all blocks run again, and leave what they answer behind when the other forward's turn comes."""
    method = type(METHODS[name])(**{**vars(METHODS[name]), "modules_to_save": ()})
    models = [TinyBlocks(), TinyBlocks()]
    models[1].checkpointed = True
    one, two = torch.randn(2, 13, 7), torch.randn(2, 13, 7)
    for model in models:
        inject(model, LoRA(r=2, target_modules="qkv"), name="lora")
        moved(inject(model, method, name="side"))
    models[1].load_state_dict(models[0].state_dict())
    for model in models:
        (model(one).square().mean() + model(two).sin().mean()).backward()
    for (path, p), q in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        if p.requires_grad and p.grad is not None:
            torch.testing.assert_close(q.grad, p.grad, msg=path)


def test_what_a_failed_forward_has_left_is_not_used() -> None:
    class Skipping(TinyBlocks):
        skips = False

        def forward(self, x: Tensor) -> Tensor:
            x = self.blocks[0](self.embed(x))
            if self.skips:
                return self.blocks[2](x)
            self.blocks[1](x)
            raise RuntimeError("on the way")

    model = Skipping()
    model.blocks.append(copy.deepcopy(model.blocks[0]))
    inject(model, LadderSideTuning(r=2))
    with pytest.raises(RuntimeError, match="on the way"):
        model(torch.randn(2, 5, 7))
    model.skips = True
    with pytest.raises(AdapterError, match=r"'blocks.1' was not called before 'blocks.2'"):
        model(torch.randn(2, 5, 7))


def test_checkpoints_that_lose_what_the_forward_had_are_refused() -> None:
    class Reentrant(Checkpointed):
        reentrant = True

    model = inject(Reentrant(), METHODS["ladder"])
    with pytest.raises(AdapterError, match=r"LadderSideTuning: 'blocks.0' was not called.*use_reentrant=False"):
        model(torch.randn(2, 13, 7)).square().mean().backward()


def test_what_others_train_inside_a_block_gets_its_gradients() -> None:
    model = inject(TinyBlocks(), LoRA(r=2, target_modules="qkv"), name="lora")
    inject(model, SideTuning(width=4, depth=1, modules_to_save=()), name="side")
    moved(model)(torch.randn(2, 13, 7)).square().mean().backward()
    found = {path: a.lora_A.grad for path, _, a in adapters_of(model, "lora")}
    assert all(grad is not None and grad.any() for grad in found.values())
    assert len(found) == 2


# ---- what a token sees


def last_logits(model: nn.Module, ids: Tensor, **more: Any) -> Tensor:
    return model(input_ids=ids, **more).logits


@by_text_method
@pytest.mark.parametrize("net", ["llama", "gpt2"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_language_models_stay_causal(name: str, net: str, attention: str) -> None:
    method = type(METHODS[name])(**{**vars(METHODS[name]), "modules_to_save": ()})
    model = backbone(net)
    model.set_attn_implementation(attention)  # type: ignore[operator]
    model = moved(inject(model, method))
    ids = torch.tensor([[3, 5, 7, 11, 13, 17], [2, 4, 6, 8, 10, 12]])
    other = ids.clone()
    other[:, 4:] = 1
    y, z = last_logits(model, ids), last_logits(model, other)
    torch.testing.assert_close(z[:, :4], y[:, :4])
    assert not torch.allclose(z[:, 4:], y[:, 4:])
    # and padding on the right influences nothing before it
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
    padded, changed = last_logits(model, ids, attention_mask=mask), last_logits(model, other, attention_mask=mask)
    torch.testing.assert_close(padded[0, :4], y[0, :4])
    torch.testing.assert_close(changed[0, :4], padded[0, :4])


@by_text_method
def test_padding_on_the_left_is_not_seen(name: str) -> None:
    method = type(METHODS[name])(**{**vars(METHODS[name]), "modules_to_save": ()})
    model = moved(inject(backbone("llama").float(), method))  # whose own attention is not a number there in float64
    ids = torch.tensor([[1, 1, 7, 11, 13, 17]])
    mask = torch.tensor([[0, 0, 1, 1, 1, 1]])
    other = torch.tensor([[9, 4, 7, 11, 13, 17]])
    y, z = (last_logits(model, each, attention_mask=mask) for each in (ids, other))
    torch.testing.assert_close(z[:, 2:], y[:, 2:])
    assert y.isfinite().all()  # where a token saw not even itself, gradients would be no numbers


@by_text_method
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_padding_of_an_encoder_is_not_seen(name: str, attention: str) -> None:
    model = backbone("bert")
    model.set_attn_implementation(attention)  # type: ignore[operator]
    model = moved(inject(model, METHODS[name]))
    ids, mask = torch.tensor([[3, 5, 7, 11, 1, 1]]), torch.tensor([[1, 1, 1, 1, 0, 0]])
    other = torch.tensor([[3, 5, 7, 11, 9, 8]])
    y, z = (last_logits(model, each, attention_mask=mask) for each in (ids, other))
    torch.testing.assert_close(z, y)
    torch.testing.assert_close(last_logits(model, ids[:, :4]), y)
    # a later token is seen by those before it
    assert not torch.allclose(last_logits(model, other), last_logits(model, ids))


@pytest.mark.parametrize("name", ["ladder", "unipt"])
@pytest.mark.parametrize("masked", ["src_key_padding_mask", "mask"])
def test_masks_of_an_encoder_of_torch_hold(name: str, masked: str) -> None:
    method = type(METHODS[name])(**{**vars(METHODS[name]), "modules_to_save": ()})
    model = moved(inject(backbone("encoder"), method))
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    other = x.clone()
    other[:, 3:] += 1.0
    drop = torch.tensor([[False] * 3 + [True] * 2] * 2)
    given = drop if masked != "mask" else torch.ones(5, 5, dtype=torch.bool).triu(1)
    y, z = (model(each, **{masked: given}) for each in (x, other))
    torch.testing.assert_close(z[:, :3], y[:, :3])
    assert not torch.allclose(model(other)[:, :3], model(x)[:, :3])


HIDDEN = torch.tensor([[False, False, True], [True, False, False]])  # by sample and token
NOT_YET = torch.tensor([[False, True, True], [False, False, True], [True, True, True]])  # by token, and what it sees
BY_HEAD = torch.stack([NOT_YET, NOT_YET.T, torch.zeros_like(NOT_YET), NOT_YET])  # two heads for each sample


@pytest.mark.parametrize(
    ("arguments", "causal", "sees"),
    [
        ({}, False, lambda b, i, j: True),
        ({}, True, lambda b, i, j: j <= i),
        ({"is_causal": True}, False, lambda b, i, j: j <= i),
        ({"is_causal": False, "mask": None}, False, lambda b, i, j: True),
        ({"src_key_padding_mask": HIDDEN}, False, lambda b, i, j: not HIDDEN[b, j]),
        ({"key_padding_mask": HIDDEN}, True, lambda b, i, j: not HIDDEN[b, j] and j <= i),
        ({"src_mask": NOT_YET}, False, lambda b, i, j: not NOT_YET[i, j]),
        (
            {"tgt_mask": NOT_YET, "tgt_key_padding_mask": HIDDEN},
            False,
            lambda b, i, j: not NOT_YET[i, j] | HIDDEN[b, j],
        ),
        ({"src_mask": BY_HEAD}, False, lambda b, i, j: not BY_HEAD[2 * b, i, j] | BY_HEAD[2 * b + 1, i, j]),
        (
            {"attention_mask": ~BY_HEAD.unflatten(0, (2, 2))},
            False,
            lambda b, i, j: not BY_HEAD[2 * b, i, j] | BY_HEAD[2 * b + 1, i, j],
        ),
        ({"attention_mask": ~HIDDEN}, False, lambda b, i, j: not HIDDEN[b, j]),
        ({"attention_mask": (~HIDDEN).long()}, True, lambda b, i, j: not HIDDEN[b, j] and j <= i),
        ({"attn_mask": ~HIDDEN[:, None, None]}, False, lambda b, i, j: not HIDDEN[b, j]),
        ({"attention_mask": ~NOT_YET[None, None]}, False, lambda b, i, j: not NOT_YET[i, j]),
        ({"src_mask": torch.zeros(3, 3).masked_fill(NOT_YET, -torch.inf)}, False, lambda b, i, j: not NOT_YET[i, j]),
        (
            {"attention_mask": torch.finfo(torch.float32).min * NOT_YET[None, None]},
            False,
            lambda b, i, j: not NOT_YET[i, j],
        ),
        (
            {"attention_mask": -2.0 * NOT_YET[None, None]},
            False,
            lambda b, i, j: True,
        ),  # a bias, by which none is hidden
        ({"encoder_attention_mask": torch.zeros(2, 7), "memory_mask": torch.zeros(3, 7)}, False, lambda b, i, j: True),
    ],
)
def test_a_token_sees_itself_and_what_the_masks_of_its_block_show(arguments: Any, causal: bool, sees: Any) -> None:
    class Called:
        def arguments(self) -> Any:
            return arguments

    seen: Any = visible(Called(), torch.zeros(2, 3, 4), causal, "Test")  # type: ignore[arg-type]
    if seen is None:
        seen = torch.ones(1, 1, 3, 3, dtype=torch.bool)
    assert seen.shape[1:] == (1, 3, 3)
    for b, i, j in itertools.product(range(2), range(3), range(3)):
        assert bool(seen.expand(2, -1, -1, -1)[b, 0, i, j]) == (i == j or bool(sees(b, i, j))), (b, i, j)


def test_a_mask_for_more_tokens_than_there_are_is_refused() -> None:
    class Cached(TinyBlocks):
        """As if one token were kept from an earlier call."""

        def forward(self, x: Tensor) -> Tensor:
            x = self.embed(x)
            for block in self.blocks:
                x = block(x, attention_mask=torch.ones(len(x), x.shape[1] + 1))
            return x

    class Masked(nn.Module):
        def __init__(self, block: nn.Module) -> None:
            super().__init__()
            self.block = block

        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            return self.block(x)

    model = Cached()
    model.blocks = nn.ModuleList(Masked(block) for block in model.blocks)
    inject(model, LadderSideTuning(r=2))
    message = r"LadderSideTuning: 'attention_mask' is a mask for 6 tokens, and there are 5. A side.*use_cache=False"
    with pytest.raises(AdapterError, match=message):
        model(torch.randn(2, 5, 7))


def test_a_user_says_that_a_model_is_causal() -> None:
    x = torch.randn(1, 6, 7)
    other = x.clone()
    other[:, 5] += 1.0

    class Causal(TinyBlocks):
        """Tokens by themselves, so that only the side network could look ahead."""

        def forward(self, x: Tensor) -> Tensor:
            x = self.embed(x)
            for block in self.blocks:
                x = block(x)
            return self.head(self.norm(x))

    for block in (net := Causal()).blocks:
        block.attn = nn.Sequential(nn.Linear(12, 12))  # type: ignore[assignment]
    for causal in (True, None):
        model = moved(inject(copy.deepcopy(net), LadderSideTuning(r=2, causal=causal)))
        assert torch.allclose(model(other)[:, :5], model(x)[:, :5]) == bool(causal)


@pytest.mark.parametrize("name", ["ladder", "unipt"])
def test_generating_with_a_cache_is_refused_and_without_one_works(name: str) -> None:
    method = type(METHODS[name])(**{**vars(METHODS[name]), "modules_to_save": ()})
    model: Any = inject(backbone("llama"), method)
    ids = torch.tensor([[3, 5, 7]])
    with pytest.raises(AdapterError, match=rf"{type(method).__name__}.*cache.*\. Generate with use_cache=False"):
        model.generate(ids, max_new_tokens=3, do_sample=False, use_cache=True)
    assert model.generate(ids, max_new_tokens=3, do_sample=False, use_cache=False).shape == (1, 6)


@pytest.mark.parametrize("name", ["ladder", "unipt"])
def test_a_model_that_keeps_a_state_looks_back_alone(name: str) -> None:
    """Nothing in it attends, or says that it is causal; and its cache does not say how much it holds."""
    transformers = pytest.importorskip("transformers")
    config = transformers.MambaConfig(vocab_size=31, hidden_size=12, num_hidden_layers=2, state_size=4)
    torch.manual_seed(1)
    model = transformers.MambaForCausalLM(config).double().eval()
    moved(inject(model, type(METHODS[name])(r=2, modules_to_save=())))
    ids = torch.tensor([[3, 5, 7, 2]])
    with pytest.raises(AdapterError, match=r"does not say how many tokens it holds.*use_cache=False"):
        model(ids)
    before, after = (model(i, use_cache=False).logits for i in (ids, torch.tensor([[3, 5, 7, 9]])))
    torch.testing.assert_close(after[:, :3], before[:, :3])
    assert not torch.allclose(after[:, 3], before[:, 3])


@pytest.mark.parametrize("name", ["side", "levi"])
def test_a_network_of_single_tokens_generates_with_a_cache(name: str) -> None:
    method = type(METHODS[name])(**{**vars(METHODS[name]), "modules_to_save": ()})
    model: Any = moved(inject(backbone("llama"), method))
    ids = torch.tensor([[3, 5, 7]])
    with_cache, without = (model.generate(ids, max_new_tokens=4, do_sample=False, use_cache=c) for c in (True, False))
    assert torch.equal(with_cache, without)


def test_embedded_inputs_leave_a_side_network_without_its_input() -> None:
    model: Any = inject(backbone("llama"), SideTuning(modules_to_save=()))
    with pytest.raises(AdapterError, match=r"'model.embed_tokens' was not called.*\. Give the model its usual inputs"):
        model(inputs_embeds=torch.randn(1, 3, 12, dtype=torch.float64))


# ---- where it answers


def pyramid(kind: str) -> nn.Module:
    import timm

    options: dict[str, dict[str, Any]] = {
        "swin_tiny_patch4_window7_224": {
            "img_size": 32,
            "window_size": 2,
            "embed_dim": 8,
            "depths": (2, 2, 2, 2),
            "num_heads": (1, 1, 2, 2),
        },
        "convnext_atto": {"depths": (2, 2, 2, 2), "dims": (6, 8, 10, 12)},
        "resnet18": {"layers": (2, 2, 2, 2), "channels": (6, 8, 10, 12), "out_indices": (1, 2, 3, 4)},
        "vit_tiny_patch16_224": {
            "img_size": 32,
            "patch_size": 8,
            "depth": 8,
            "embed_dim": 12,
            "num_heads": 3,
            "out_indices": (1, 3, 5, 7),
        },
    }
    return timm.create_model(kind, features_only=True, **options[kind]).eval()


STAGES = {
    "swin_tiny_patch4_window7_224": tuple(f"layers_{i}" for i in range(4)),
    "convnext_atto": tuple(f"stages_{i}" for i in range(4)),
    "resnet18": tuple(f"layer{i + 1}" for i in range(4)),
    "vit_tiny_patch16_224": tuple(f"model.blocks.{i}" for i in (1, 3, 5, 7)),
}


@pytest.mark.parametrize("kind", STAGES)
def test_a_pyramid_is_blended_at_every_stage_with_its_own_base(kind: str) -> None:
    """Each stage sees the model as it was, not what a stage before has answered."""
    torch.manual_seed(0)
    model, x = pyramid(kind), torch.randn(2, 3, 32, 32)
    base = model(x)
    inject(model, SideTuning(taps=STAGES[kind], width=4, depth=2, modules_to_save=()))
    exits = [a for _, _, a in adapters_of(model) if hasattr(a, "alpha")]
    assert len(exits) == 4
    for i, each in enumerate(exits):
        nn.init.zeros_(each.net.out.weight)
        nn.init.constant_(each.net.out.bias, 2.0 + i)
        nn.init.constant_(each.alpha, 0.5)
    a = 1 / (1 + torch.tensor(-0.5).exp())
    got = model(x)
    for i, (y, h) in enumerate(zip(got, base, strict=True)):
        torch.testing.assert_close(y, a * h + (1 - a) * (2.0 + i))
    sum(y.square().mean() for y in got).backward()
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    assert [n for n, p in model.named_parameters() if not p.requires_grad and p.grad is not None] == []
    for y, h in zip(unload(model)(x), base, strict=True):
        assert torch.equal(y, h)


@pytest.mark.parametrize("kind", STAGES)
@pytest.mark.parametrize("detach_taps", [False, True])
def test_a_pyramid_of_stages_answers_at_every_one(kind: str, detach_taps: bool) -> None:
    torch.manual_seed(0)
    model, x = pyramid(kind), torch.randn(2, 3, 32, 32)
    base = model(x)
    method = HierarchicalSideTuning(
        dims=(4, 4, 6, 6), num_heads=(2, 2, 3, 3), pyramid=True, detach_taps=detach_taps, modules_to_save=()
    )
    moved(inject(model, method))
    got = model(x)
    assert [y.shape for y in got] == [h.shape for h in base]
    for i, y in enumerate(got):
        model.zero_grad()
        y.square().mean().backward(retain_graph=True)
        ups = {path: a.up.weight.grad for path, _, a in adapters_of(model) if hasattr(a, "up")}
        assert len(ups) == 4
        reached = [grad is not None and bool(grad.any()) for grad in ups.values()]
        assert reached == [j == i for j in range(4)]
    sum(y.square().mean() for y in got).backward()
    without = [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert without == []


def test_features_that_are_changed_between_two_exits_are_refused() -> None:
    class Between(TinyBlocks):
        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.blocks[1](2 * self.blocks[0](self.embed(x))))

    model = inject(Between(), SideTuning(taps=("blocks",), modules_to_save=()))
    with pytest.raises(AdapterError, match=r"changed before it came to 'blocks.1'.*\. Name modules"):
        model(torch.randn(2, 5, 7))


# ---- what is refused


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(TargetError, match=r"LadderSideTuning: no list of like blocks.*\. Give its path"):
        inject(nn.Sequential(nn.Linear(2, 3), nn.ReLU()), LadderSideTuning())


def test_blocks_of_several_kinds_are_refused_and_named() -> None:
    with pytest.raises(TargetError, match=r"UniPT: UNet2DModel holds several kinds of blocks, 'up_blocks.0.*\. Name"):
        inject(backbone("unet"), UniPT(modules_to_save=()))
    model = inject(backbone("unet"), SideTuning(taps=("up_blocks.1.resnets.1",), modules_to_save=()))
    y = model(torch.randn(2, 3, 8, 8, dtype=torch.float64), torch.tensor([3, 5])).sample
    y.square().mean().backward()


def test_a_ladder_too_narrow_is_refused() -> None:
    with pytest.raises(TargetError, match=r"r=8 leaves 1 of the 12 features of 'blocks.0'. Choose a smaller r"):
        inject(TinyBlocks(), LadderSideTuning())


def test_a_block_that_is_skipped_is_missed() -> None:
    class Skipping(TinyBlocks):
        def forward(self, x: Tensor) -> Tensor:
            return self.blocks[1](self.embed(x))

    model = inject(Skipping(), LadderSideTuning(r=2))
    with pytest.raises(AdapterError, match=r"LadderSideTuning: 'blocks.0' was not called before 'blocks.1'"):
        model(torch.randn(2, 5, 7))


def test_answers_of_another_form_are_refused() -> None:
    model = nn.Sequential(nn.Linear(2, 12), nn.Sequential(*(nn.Sequential(nn.Linear(12, 12)) for _ in range(2))))
    inject(model, LadderSideTuning(r=2))
    with pytest.raises(AdapterError, match=r"'1.0' answered \(5, 12\); expected 12 features on axis -1"):
        model(torch.randn(5, 2))


def test_samples_have_to_come_first() -> None:
    layer = nn.TransformerEncoderLayer(12, 3, 20)
    with pytest.raises(TargetError, match=r"takes its tokens before its samples. Build the model with batch_first"):
        inject(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), LadderSideTuning(r=2))


def test_stages_of_several_widths_are_refused_with_how_many_there_are() -> None:
    """Before anything is changed; with a stage for each of the model's own, all is well."""
    model = backbone("convnext")
    before = snapshot(model)
    message = (
        r"the blocks .stages.0.blocks.0. to .stages.1.blocks.0. feed one of 2 stages, and answer with 6 and 8 "
        r"features\. Give as many dims and num_heads as the model has stages \(4\)"
    )
    with pytest.raises(TargetError, match=message):
        inject(model, HierarchicalSideTuning(dims=(4, 6), num_heads=(2, 3)))
    assert_unchanged(model, before)
    inject(model, HierarchicalSideTuning(dims=(4, 4, 6, 6), num_heads=(2, 2, 3, 3)))
    assert call("convnext", model).isfinite().all()


def test_a_hierarchy_beside_text_is_refused() -> None:
    method = HierarchicalSideTuning(dims=(4, 6), num_heads=(2, 3), modules_to_save=())
    with pytest.raises(TargetError, match=r"begins with an embedding of words.*\. Choose"):
        inject(backbone("llama"), method)
    with pytest.raises(TargetError, match=r"2 blocks cannot feed 4 stages. Give fewer"):
        inject(tiny(method), HierarchicalSideTuning(modules_to_save=()))
    with pytest.raises(AdapterError, match="num_heads must be divisors"):
        HierarchicalSideTuning(dims=(4, 6), num_heads=(2, 4))


@pytest.mark.parametrize("taps", ["layers_", ("blocks.0", "block.7")])
def test_taps_that_do_not_exist_are_refused(taps: Any) -> None:
    with pytest.raises(TargetError, match=r"SideTuning: TinyBlocks has no module '(layers_|block.7)'"):
        inject(TinyBlocks(), SideTuning(taps=taps))


def test_autocast_takes_every_method() -> None:
    for name in METHODS:
        model = moved(inject(TinyBlocks(), METHODS[name]))
        x = torch.randn(2, 13, 7)
        expected = model(x)
        with torch.autocast("cpu", torch.bfloat16):
            y = model(x)
        y.float().square().mean().backward()
        torch.testing.assert_close(y.float(), expected, rtol=0.1, atol=0.1)
