"""Parallel adapters and AdaptFormer: what the branch reads, and what becomes of it."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_peft import AdapterError, AdaptFormer, LoRA, ParallelAdapter, disabled, inject, set_active
from lightning_peft.adapters.bottleneck import Bottleneck, Tap
from lightning_peft.engine import adapters_of
from tests.methods.backbones import TinyBlock, assert_unchanged, backbone, call, moved, snapshot, tiny


def branches(model: nn.Module, name: str = "default") -> dict[str, Any]:
    """Path -> bottleneck."""
    return {path: adapter for path, _, adapter in adapters_of(model, name) if isinstance(adapter, Bottleneck)}


def branch(adapter: Any, x: Tensor, scaling: float) -> Tensor:
    if not isinstance(adapter, nn.Module):  # several
        return adapter(x)
    return scaling * ((x @ adapter.down.T + adapter.down_bias).relu() @ adapter.up.T + adapter.up_bias)


def tiny_by_hand(model: Any, x: Tensor, adapters: list[Any], scaling: float, reads_norm: bool) -> Tensor:
    """The tiny stack of blocks, with a branch in each."""
    x = torch.cat([model.cls_token.expand(len(x), -1, -1), model.embed(x)], dim=1)
    for block, adapter in zip(model.blocks, adapters, strict=True):
        x = x + block.attn(block.norm1(x))
        x = x + block.mlp(block.norm2(x)) + branch(adapter, block.norm2(x) if reads_norm else x, scaling)
    x = model.norm(x)
    return model.head(x[:, 1:] + x[:, :1])


@pytest.mark.parametrize(
    ("method", "scaling", "reads_norm"), [(ParallelAdapter(r=3), 4.0, True), (AdaptFormer(r=3), 0.1, False)]
)
def test_the_branch_reads_what_the_paper_says(method: Any, scaling: float, reads_norm: bool) -> None:
    model = moved(inject(tiny(method).double(), method))
    x, base, adapters = torch.randn(2, 5, 7).double(), tiny(method).double(), list(branches(model).values())
    expected = tiny_by_hand(base, x, adapters, scaling, reads_norm)
    torch.testing.assert_close(model(x), expected)
    parameters = [p for adapter in adapters for p in adapter.parameters()]
    theirs = torch.autograd.grad(expected.square().sum(), parameters)
    torch.testing.assert_close(torch.autograd.grad(model(x).square().sum(), parameters), theirs)


# name -> feed-forward network of each block; the layer whose input (True) or output (False) each branch reads
PARALLEL = {
    "vit": ("mlp", "mlp", True),
    "llama": ("mlp", "mlp", True),
    "gpt2": ("mlp", "mlp", True),
    "mixer": ("mlp_channels", "mlp_channels", True),
    "convnext": ("mlp", "mlp", True),
    "swin": ("mlp", "mlp", True),
    "dit": ("ff", "ff", True),
    "bert": ("output.dense", "intermediate.dense", True),
    "encoder": ("linear2", "linear1", True),
}
ADAPTFORMER = PARALLEL | {
    "vit": ("mlp", "norm2", True),
    "llama": ("mlp", "post_attention_layernorm", True),
    "gpt2": ("mlp", "ln_2", True),
    "mixer": ("mlp_channels", "norm2", True),
    "swin": ("mlp", "norm2", True),
}


@pytest.mark.parametrize(
    ("method", "scaling", "name", "where"),
    [(ParallelAdapter(r=3), 4.0, name, where) for name, where in PARALLEL.items()]
    + [(AdaptFormer(r=3), 0.1, name, where) for name, where in ADAPTFORMER.items()],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_branch_in_models_of_many_kinds(method: Any, scaling: float, name: str, where: Any) -> None:
    """Hooks on whole sub-layers and norms find the same: BERT, DiT and the encoder do not normalise before."""
    network, source, _ = where
    model, reference = moved(inject(backbone(name), method)), backbone(name).train()
    for module in reference.modules():
        module.training = isinstance(module, nn.TransformerEncoderLayer | nn.TransformerEncoder)  # not the fused one
    seen: dict[str, Tensor] = {}
    for path, adapter in branches(model).items():
        block = path[: path.index(f".{network}")] if f".{network}" in path else path.rpartition(".")[0]

        def keep(module: Any, args: Any, block: str = block) -> None:
            seen[block] = args[0]

        def add(module: Any, args: Any, y: Tensor, block: str = block, adapter: Any = adapter) -> Tensor:
            x, last = seen[block], y.shape[-1] == adapter.up.shape[0]
            return y + (
                branch(adapter, x, scaling) if last else branch(adapter, x.movedim(1, -1), scaling).movedim(-1, 1)
            )

        reference.get_submodule(f"{block}.{source}").register_forward_pre_hook(keep)
        reference.get_submodule(f"{block}.{network}").register_forward_hook(add)
    torch.testing.assert_close(call(name, model), call(name, reference), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("norm_first", [False, True])
def test_an_encoder_layer_of_torch(norm_first: bool) -> None:
    """Behind the add, the norm's output is the residual stream, so that is what is read."""
    torch.manual_seed(1)
    layer = nn.TransformerEncoderLayer(6, 2, 10, dropout=0.0, batch_first=True, norm_first=norm_first).double().eval()
    layers = nn.ModuleList([layer, copy.deepcopy(layer)])
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    attended = lambda z: layer.self_attn(z, z, z)[0]  # noqa: E731
    feed = lambda z: layer.linear2(layer.linear1(z).relu())  # noqa: E731
    residual = x + attended(layer.norm1(x)) if norm_first else layer.norm1(x + attended(x))
    fed = feed(layer.norm2(residual) if norm_first else residual)
    moved(inject(layers, AdaptFormer(r=3)))
    with torch.no_grad():  # where evaluation would take the fused way
        seen = layers[0](x)
    out = residual + fed + branch(branches(layers)["0.linear2"], residual, 0.1)
    torch.testing.assert_close(seen, out if norm_first else layer.norm2(out))


def test_one_layer_has_its_input_itself() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.mix = nn.LayerNorm(4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.mix(self.norm(x))

    model, x = nn.Sequential(Block(), Block()).double(), torch.randn(3, 4).double()
    block: Any = copy.deepcopy(model[0])
    moved(inject(model, ParallelAdapter(r=2)))
    adapters = branches(model)
    assert [path for path, _, _ in adapters_of(model)] == list(adapters) == ["0.mix", "1.mix"]
    torch.testing.assert_close(model[0](x), block(x) + branch(adapters["0.mix"], block.norm(x), 4.0))


def test_named_layers_get_branches_of_their_own() -> None:
    model = moved(inject(nn.Sequential(nn.Linear(5, 3)).double(), ParallelAdapter(r=2, target_modules="0")))
    adapter, x = branches(model)["0"], torch.randn(4, 5).double()
    assert adapter.down.shape == (2, 5)
    base = x @ model.get_parameter("0.weight").T + model.get_parameter("0.bias")
    torch.testing.assert_close(model(x), base + branch(adapter, x, 4.0))


class Sandwiched(TinyBlock):
    """Normalises the answer of its feed-forward network, too."""

    def __init__(self) -> None:
        super().__init__()
        self.norm3 = nn.LayerNorm(12)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.norm3(self.mlp(self.norm2(x)))


def sandwich() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(Sandwiched(), Sandwiched())


@pytest.mark.parametrize("method", [ParallelAdapter(r=2), AdaptFormer(r=2)])
@pytest.mark.parametrize(
    ("build", "ask"),
    [
        (lambda: tiny(AdaptFormer()), lambda model: model(torch.randn(2, 5, 7))),
        (lambda: backbone("bert"), lambda model: call("bert", model)),  # normalises behind the add
        (sandwich, lambda model: model(torch.randn(2, 5, 12))),
    ],
    ids=["tiny", "bert", "sandwich"],
)
def test_nothing_of_a_forward_is_kept(build: Any, ask: Any, method: Any) -> None:
    model = inject(build(), method)
    ask(model)
    stashes = {id(a.stash): a.stash for _, _, a in adapters_of(model) if isinstance(a, Tap)}
    assert len(stashes) == 2
    for stash in stashes.values():
        assert (stash.block, stash.normed, stash.value) == (None, None, None)
    copy.deepcopy(model)  # which no activation with a graph would let happen


def test_a_norm_behind_the_network_changes_nothing_of_what_is_read() -> None:
    model, x = moved(inject(sandwich(), AdaptFormer(r=2, dropout=0.0))), torch.randn(2, 5, 12)
    (first, _), block = branches(model).values(), sandwich()[0]  # type: ignore[index]
    h = x + block.attn(block.norm1(x))
    expected = h + block.norm3(block.mlp(block.norm2(h)) + branch(first, h, 0.1))
    torch.testing.assert_close(model[0](x), expected)  # type: ignore[index]


@pytest.mark.parametrize("before", [False, True])
def test_a_network_that_is_called_in_parts_says_what_is_missing(before: bool) -> None:
    model = inject(tiny(AdaptFormer()), AdaptFormer(r=2))
    if before:
        model(torch.randn(2, 5, 7))
    with pytest.raises(AdapterError, match=r"waits for the input .* 'blocks.1.mlp.0' was not called before\. Name"):
        model.get_submodule("blocks.1.mlp.2")(torch.randn(2, 20))
    with pytest.raises(AdapterError, match=r"beside 'blocks.1.mlp.0' reads .* no norm layer .*\. Call the whole block"):
        model.get_submodule("blocks.1.mlp")(torch.randn(2, 12))
    inject(other := tiny(AdaptFormer()), ParallelAdapter(r=2))
    other.get_submodule("blocks.1.mlp")(torch.randn(2, 12))


class PartCheckpointed(TinyBlock):
    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + checkpoint(self.mlp, self.norm2(x), use_reentrant=False)


def test_a_checkpoint_that_leaves_the_norm_layer_out_is_refused() -> None:
    model, x = tiny(AdaptFormer()), torch.randn(2, 5, 7)
    for block in model.get_submodule("blocks").children():
        block.__class__ = PartCheckpointed
    inject(model, AdaptFormer(r=2))
    with pytest.raises(AdapterError, match="let activation checkpoints hold whole blocks"):
        model(x).sum().backward()


class Checkpointed(TinyBlock):
    reentrant = False

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(super().forward, x, use_reentrant=self.reentrant)


class CheckpointedSandwich(Checkpointed, Sandwiched):
    """The same of a block that normalises behind, too."""


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize("method", [ParallelAdapter(r=3), AdaptFormer(r=3, dropout=0.0)])
def test_activation_checkpoints_change_nothing(method: Any, behind: bool, reentrant: bool) -> None:
    x = torch.randn(2, 5, 12 if behind else 7, requires_grad=True)
    gradients = []
    for checkpointed in (False, True):
        model = sandwich() if behind else tiny(method)
        if checkpointed:
            base = CheckpointedSandwich if behind else Checkpointed
            cls = type("Block", (base,), {"reentrant": reentrant})
            for block in (model if behind else model.get_submodule("blocks")).children():
                block.__class__ = cls
        moved(inject(model, method))
        model(x).square().sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    torch.testing.assert_close(*gradients)


def test_branches_of_two_names_read_the_same() -> None:
    method = AdaptFormer(r=3)
    model = moved(inject(tiny(method).double(), method, name="one"))
    moved(inject(model, AdaptFormer(r=2), name="two"), seed=5)
    inject(model, LoRA(r=2, target_modules=("mlp.0", "mlp.2")), name="lora")  # on the layers that are tapped as well
    x, base = torch.randn(2, 5, 7).double(), tiny(method).double()

    def by_hand(*names: str) -> Tensor:
        def both(i: int) -> Any:
            adapters = [list(branches(model, name).values())[i] for name in names]
            return lambda x: sum(branch(adapter, x, 0.1) for adapter in adapters)

        return tiny_by_hand(base, x, [both(0), both(1)], 0.1, reads_norm=False)

    torch.testing.assert_close(model(x), by_hand("one", "two"))
    set_active(model, "two")
    torch.testing.assert_close(model(x), by_hand("two"))
    with disabled(model):
        assert torch.equal(model(x), base(x))


def test_the_count_is_that_of_the_paper() -> None:
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        vit = timm.create_model("vit_base_patch16_224")
    for method in (AdaptFormer(), ParallelAdapter()):
        assert method.total_trainable(method.targets(vit)) == 12 * (2 * 768 * 64 + 64 + 768) == 1_189_632


def test_a_copy_taps_into_itself() -> None:
    method = AdaptFormer(r=3)
    model = moved(inject(tiny(method), method))
    copied = copy.deepcopy(model)
    stashes = lambda m: {id(a.stash) for _, _, a in adapters_of(m)}  # noqa: E731
    assert len(stashes(copied)) == 2
    assert not stashes(copied) & stashes(model)


@pytest.mark.parametrize("arguments", [{"r": 0}, {"scaling": 0}, {"scaling": "learnt"}, {"dropout": 1.5}])
@pytest.mark.parametrize("cls", [ParallelAdapter, AdaptFormer])
def test_an_argument_out_of_range_is_refused(cls: Any, arguments: dict[str, Any]) -> None:
    with pytest.raises(AdapterError, match=f"{cls.__name__}: {next(iter(arguments))} must be .*, got "):
        cls(**arguments)


def test_a_refusal_leaves_the_model_as_it_was() -> None:
    model = backbone("resnet")
    before = snapshot(model)
    with pytest.raises(AdapterError, match="AdaptFormer"):
        inject(model, AdaptFormer())
    assert_unchanged(model, before)
