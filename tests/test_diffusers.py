"""Every method under what users of diffusers switch on, in its own models of the smallest size."""

import functools
from pathlib import Path
from typing import Any

import diffusers
import lightning as L
import pytest
import torch
import yaml
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0, SlicedAttnProcessor
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_peft import PEFT, DoRA, LoHa, LoRA, PrefixTuning, SaRA, inject, load_adapter, merge, save_adapter
from lightning_peft.cli import main
from lightning_peft.engine import METHODS, AdapterError, Method, adapters_of
from tests.methods.backbones import backbone, call, moved, snapshot, suited, trainable
from tests.papers.denoisers import NOISE, T, denoise_text
from tests.pipelines import text_encoder, unet, vae

every_method = pytest.mark.parametrize("cls", METHODS.values(), ids=METHODS.keys())
# diffusers computes time embeddings in float32, whose roundings another order of sums can flip
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


@functools.cache
def fitting(cls: type[Method], name: str) -> Method | None:
    """``cls`` for backbone ``name``; None if it has nothing to adapt there."""
    method = suited(cls, name)
    return method if isinstance(method, Method) else None


def adapted(cls: type[Method], name: str, base: nn.Module | None = None) -> Any:
    method = fitting(cls, name)
    if method is None:
        pytest.skip(f"{cls.__name__} has nothing to adapt in {name}")
    return moved(inject(backbone(name) if base is None else base, method))


def set_processors(model: nn.Module, make: Any) -> None:
    """Those of all attentions; a DiT has no method for it."""
    for module in model.modules():
        if isinstance(module, Attention):
            module.set_processor(make())


def gradients(model: nn.Module, name: str) -> dict[str, Tensor]:
    torch.manual_seed(0)  # some draw random numbers in training
    model.zero_grad()
    call(name, model).square().mean().backward()
    return {key: p.grad.clone() for key, p in trainable(model).items() if p.grad is not None}


@every_method
def test_attention_processors_agree(cls: type[Method]) -> None:
    model = adapted(cls, "dit")
    expected = call("dit", model)
    for make in (AttnProcessor2_0, AttnProcessor, lambda: SlicedAttnProcessor(2)):
        set_processors(model, make)
        torch.testing.assert_close(call("dit", model), expected, **CLOSE)


@pytest.mark.parametrize(
    "method",
    [LoRA(r=2), DoRA(r=2), SaRA(share=0.5), PrefixTuning(), PrefixTuning(target_modules=r".*attn[12]")],
    ids=["lora", "dora", "sara", "prefix", "prefix of the text too"],
)
def test_attention_processors_agree_on_text(method: Any) -> None:
    model = moved(inject(unet().double(), method))
    expected = denoise_text(model)
    assert not torch.allclose(expected, denoise_text(unet().double()), atol=1e-3)
    for make in (AttnProcessor2_0, AttnProcessor, lambda: SlicedAttnProcessor(2)):
        model.set_attn_processor(make())
        torch.testing.assert_close(denoise_text(model), expected, **CLOSE)
    model.set_attention_slice("auto")
    torch.testing.assert_close(denoise_text(model), expected, **CLOSE)


@every_method
@pytest.mark.parametrize("name", ["dit", "sd3"])
def test_activation_checkpoints_change_no_gradient(cls: type[Method], name: str) -> None:
    model = adapted(cls, name).train()
    expected = gradients(model, name)
    model.enable_gradient_checkpointing()
    found = gradients(model, name)
    assert found.keys() == expected.keys()
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, **CLOSE)


def families() -> dict[str, type[Method]]:
    """All methods for diffusion, and of each other family the first that has something to adapt."""
    chosen = {name: cls for name, cls in METHODS.items() if cls.family == "diffusion"}
    for family in dict.fromkeys(cls.family for cls in METHODS.values()):
        fits = (name for name, cls in METHODS.items() if cls.family == family and fitting(cls, "dit"))
        chosen |= {name: METHODS[name] for name in [next(fits, None)] if name}
    return chosen


@pytest.mark.parametrize("family", sorted({cls.family for cls in METHODS.values()}))
def test_compiled_in_one_graph(family: str) -> None:
    for cls in [cls for cls in families().values() if cls.family == family]:
        torch._dynamo.reset()
        model = adapted(cls, "dit")
        expected = call("dit", model)
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(call("dit", compiled), expected, **CLOSE)


def cast_inputs(module: nn.Module, args: Any, kwargs: Any) -> Any:
    def cast(value: Any) -> Any:
        return value.bfloat16() if isinstance(value, Tensor) and value.dtype == torch.float64 else value

    return tuple(map(cast, args)), {key: cast(value) for key, value in kwargs.items()}


@every_method
def test_weights_in_half_precision(cls: type[Method]) -> None:
    name = "dit"
    base = backbone(name).bfloat16()
    base.register_forward_pre_hook(cast_inputs, with_kwargs=True)
    model = adapted(cls, name, base).train()
    for _, _, adapter in adapters_of(model):
        assert {p.dtype for p in adapter.parameters()} <= {torch.float32}
    y = call(name, model)
    assert y.dtype == torch.bfloat16
    assert y.isfinite().all()
    y.float().square().mean().backward()
    assert all(p.grad.isfinite().all() for p in trainable(model).values() if p.grad is not None)
    assert any(p.grad is not None and p.grad.any() for p in trainable(model).values())


@every_method
def test_guidance_in_one_batch_is_two_calls(cls: type[Method]) -> None:
    model = adapted(cls, "dit")
    null, condition = torch.tensor([10, 10]), torch.tensor([1, 2])
    noise, t = NOISE[:2], T[:2]
    both = model(torch.cat([noise, noise]), torch.cat([t, t]), class_labels=torch.cat([null, condition])).sample
    apart = [model(noise, t, class_labels=labels).sample for labels in (null, condition)]
    torch.testing.assert_close(both, torch.cat(apart), **CLOSE)


@every_method
@pytest.mark.parametrize("name", ["unet", "unet_text", "sd3", "flux"])
def test_a_merged_model_is_a_plain_one_of_diffusers(cls: type[Method], name: str, tmp_path: Path) -> None:
    if not cls.mergeable:
        pytest.skip("it does not merge")
    model = adapted(cls, name)
    expected, keys = call(name, model), set(backbone(name).state_dict())
    if adapters_of(model):
        with pytest.raises(AdapterError, match=r"merge\(model\) first, or write the adapters"):
            model.save_pretrained(tmp_path)
    merge(model, keep_base=False)
    if set(model.state_dict()) == keys:
        model.save_pretrained(tmp_path)
        loaded = type(backbone(name)).from_pretrained(tmp_path, torch_dtype=torch.float64)
        assert set(loaded.state_dict()) == keys
        torch.testing.assert_close(call(name, loaded), expected, rtol=1e-6, atol=1e-6)
    else:  # it has made a bias where there was none
        with pytest.raises(AdapterError, match=r"from_pretrained passes over it. Save the adapters"):
            model.save_pretrained(tmp_path)


class Denoising(L.LightningModule):
    """A user's module: pictures and ids of text, of which the noise is told."""

    def __init__(self) -> None:
        super().__init__()
        self.vae, self.text_encoder, self.unet = vae(), text_encoder(), unet()

    def forward(self, pictures: Tensor, ids: Tensor, noise: Tensor) -> Tensor:
        latents = self.vae.encode(pictures).latent_dist.mode()
        text = self.text_encoder(ids).last_hidden_state
        return self.unet(latents + noise, torch.tensor([3, 5]), encoder_hidden_states=text).sample

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        return F.mse_loss(self(*batch), batch[2])

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)


def pictures() -> DataLoader[Any]:
    g = torch.Generator().manual_seed(0)
    rows = [
        (torch.randn(3, 8, 8, generator=g), torch.randint(2, 12, (5,), generator=g), torch.randn(3, 8, 8, generator=g))
        for _ in range(4)
    ]
    return DataLoader(rows, batch_size=2)


def fit(module: L.LightningModule, *callbacks: Any, **options: Any) -> L.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = L.Trainer(max_epochs=1, callbacks=list(callbacks), **{"enable_checkpointing": False, **quiet, **options})
    trainer.fit(module, pictures())
    assert trainer.global_step == 2
    return trainer


def frozen_values(module: nn.Module) -> dict[str, Tensor]:
    return {key: value for key, value in module.state_dict().items() if ".adapters." not in key}


IN_UNET = r"unet\..*to_[qkv]"
one_part = pytest.mark.parametrize(
    "method",
    [LoRA(r=2, target_modules=IN_UNET), DoRA(r=2, target_modules=IN_UNET), LoHa(r=2, target_modules=IN_UNET)]
    + [SaRA(share=0.2, target_modules=r"unet\..*(to_[qkv]|conv\d)")],
    ids=lambda method: method.name,
)
# pictures are few and the trainer says so
lightning = pytest.mark.filterwarnings("ignore:.*(does not have many workers|eval mode at the start of training)")


@lightning
@one_part
def test_one_part_of_a_module_is_trained_and_the_others_stay(method: Any, tmp_path: Path) -> None:
    module = Denoising()
    before = snapshot(module)["tensors"]
    trainer = fit(module, PEFT(method))
    after = frozen_values(module)
    assert [key for key, value in before.items() if not torch.equal(value, after[key])] == []
    paths = [path for path, _, _ in adapters_of(module)]
    assert paths
    assert all(path.startswith("unet.") for path in paths)
    assert {key.partition(".")[0] for key in trainable(module)} == {"unet"}

    batch = next(iter(pictures()))
    module.eval()
    with torch.no_grad():
        expected = module(*batch)
        assert not torch.equal(Denoising()(*batch), expected)
        again = load_adapter(Denoising(), save_adapter(module, tmp_path / "adapter"))
        assert torch.equal(again(*batch), expected)
        trainer.save_checkpoint(tmp_path / "run.ckpt")
        resumed = PEFT.load_from_checkpoint(Denoising, tmp_path / "run.ckpt").eval()
        assert torch.equal(resumed(*batch), expected)
        merged = merge(again, keep_base=False)
        torch.testing.assert_close(merged(*batch), expected, rtol=1e-4, atol=1e-5)  # float32


@lightning
def test_training_starts_from_a_file_of_diffusers(tmp_path: Path) -> None:
    module = Denoising()
    fit(module, PEFT(LoRA(r=2, alpha=5.0, use_rslora=True, target_modules=IN_UNET)))
    save_adapter(module, tmp_path, format="diffusers")
    again = Denoising()
    again.configure_optimizers = lambda: torch.optim.SGD(again.parameters(), lr=0.0)  # type: ignore[method-assign]
    fit(again, PEFT(init_from=str(tmp_path)))
    batch = next(iter(pictures()))
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(*batch), module.eval()(*batch), rtol=1e-5, atol=1e-6)
        assert not torch.allclose(again(*batch), Denoising().eval()(*batch), rtol=1e-5, atol=1e-6)


@lightning
def test_the_command_writes_the_merged_part_as_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["lightning-peft"])
    module = Denoising()
    fit(module, PEFT(LoRA(r=2, target_modules=IN_UNET), save_to="adapter"))
    config = {
        "seed_everything": 1,
        "model": {"class_path": f"{__name__}.Denoising"},
        "trainer": {"logger": False, "accelerator": "cpu"},
    }
    Path("denoising.yaml").write_text(yaml.safe_dump(config))
    main(["merge", "denoising.yaml", "adapter", "merged"])
    plain = Denoising().eval()
    for loaded in (type(plain.unet).from_pretrained("merged"), diffusers.AutoModel.from_pretrained("merged")):
        assert type(loaded) is type(plain.unet)
        assert loaded.state_dict().keys() == plain.unet.state_dict().keys()
        plain.unet = loaded.eval()
        batch = next(iter(pictures()))
        with torch.no_grad():
            torch.testing.assert_close(plain(*batch), module.eval()(*batch), rtol=1e-4, atol=1e-5)  # float32


class Steps(L.Callback):
    """Keeps what trains after each step."""

    def __init__(self) -> None:
        self.values: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
        self.values.append({key: p.detach().clone() for key, p in trainable(module).items()})


@lightning
@one_part
def test_averages_of_lightning_leave_the_base(method: Any) -> None:
    module, steps = Denoising(), Steps()
    before = snapshot(module)["tensors"]
    fit(module, PEFT(method), EMAWeightAveraging(decay=0.75), steps)
    after = frozen_values(module)
    assert [key for key, value in before.items() if not torch.equal(value, after[key])] == []
    first, second = steps.values
    for key, p in trainable(module).items():  # the first average is what there is
        torch.testing.assert_close(p.detach(), 0.75 * first[key] + 0.25 * second[key])
    assert any(not torch.equal(p, second[key]) for key, p in trainable(module).items())


@every_method
def test_averages_of_diffusers_leave_the_base(cls: type[Method]) -> None:
    from diffusers.training_utils import EMAModel

    model = adapted(cls, "dit")
    frozen = {key: p.detach().clone() for key, p in model.named_parameters() if not p.requires_grad}
    for chosen in (list(trainable(model).values()), list(model.parameters())):
        first = {key: p.detach().clone() for key, p in trainable(model).items()}
        average = EMAModel(chosen, decay=0.75)
        average.step(chosen)  # the first is a copy
        moved(model, seed=5)
        second = {key: p.detach().clone() for key, p in trainable(model).items()}
        trained = call("dit", model).detach()
        average.step(chosen)
        average.store(chosen)
        average.copy_to(chosen)
        weight = min(0.75, 2 / 11)  # by its warm-up: (1 + n) / (10 + n) in step n
        for key, p in trainable(model).items():
            torch.testing.assert_close(p.detach(), weight * first[key] + (1 - weight) * second[key])
        assert not torch.allclose(call("dit", model), trained)
        average.restore(chosen)
        assert all(torch.equal(p, second[key]) for key, p in trainable(model).items())
        assert all(torch.equal(model.get_parameter(key), value) for key, value in frozen.items())


def large_unet() -> Any:
    """1.3 million weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return diffusers.UNet2DModel(
            sample_size=8,
            block_out_channels=(64, 96),
            layers_per_block=1,
            norm_num_groups=8,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        ).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sparse_change_is_a_small_file_that_goes_on_the_base_in_one_call(dtype: Any, tmp_path: Path) -> None:
    model = moved(inject(large_unet(), SaRA(share=0.2)))
    trained = sum(p.numel() for p in trainable(model).values())
    assert trained >= 200_000
    folder = save_adapter(model, tmp_path)
    size = sum(path.stat().st_size for path in folder.iterdir())
    assert size <= 1.1 * (4 + 4) * trained  # a value and its place

    changes = {path: adapter for path, _, adapter in adapters_of(model)}
    loaded = merge(load_adapter(large_unet().to(dtype), folder), keep_base=False)
    for path, module in large_unet().to(dtype).named_modules():
        if path in changes:
            dense = torch.zeros(module.weight.numel())
            dense[changes[path].indices.long()] = changes[path].values.detach()
            expected = (module.weight.float() + dense.view_as(module.weight)).to(dtype)
            assert torch.equal(loaded.get_submodule(path).weight, expected)
