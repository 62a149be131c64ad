"""Whatever is in a file: it is loaded, or refused as an `AdapterError`, and then the model is what it was."""

import json
import re
import shlex
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lightning_peft import IA3, SSF, DoRA, FullFineTuning, LoRA, PaCA, QLoRA, inject, load_adapter, save_adapter
from lightning_peft.engine import AdapterError
from lightning_peft.interop import read_adapter
from tests.methods.backbones import assert_unchanged, moved, snapshot, tiny

TENSORS, CONFIG, DIFFUSERS = "adapter_model.safetensors", "adapter_config.json", "pytorch_lora_weights.safetensors"
PREFIX = "base_model.model."
A = f"{PREFIX}q_proj.lora_A.weight"


class Denoiser(nn.Module):
    """What diffusers would call a unet, as far as files are concerned."""

    def __init__(self) -> None:
        super().__init__()
        self.unet = tiny()
        self.unet.load_lora_adapter = None  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        return self.unet(x)


def ours(folder: Path) -> Path:
    """A file of HF PEFT, which says in our words what it is."""
    method = LoRA(r=2, rank_pattern={"v_proj": 3}, alpha_pattern={"v_proj": 4.0}, modules_to_save="head")
    return save_adapter(moved(inject(tiny(), method)), folder)


def without_our_words(folder: Path) -> Path:
    save_file(load_file(folder / TENSORS), folder / TENSORS, metadata={"format": "pt"})
    return folder


def of_hf_peft(folder: Path) -> Path:
    return without_our_words(ours(folder))


def dora(folder: Path) -> Path:
    return without_our_words(save_adapter(moved(inject(tiny(), DoRA(r=2))), folder))


def ia3(folder: Path) -> Path:
    return without_our_words(save_adapter(moved(inject(tiny(), IA3(target_modules=("q_proj", "v_proj")))), folder))


def native(folder: Path) -> Path:
    return save_adapter(moved(inject(tiny(), PaCA(r=2, modules_to_save="head"))), folder)


def quantised(folder: Path) -> Path:
    return save_adapter(moved(inject(tiny(), QLoRA(r=2))), folder)


def of_diffusers(folder: Path) -> Path:
    model = moved(inject(Denoiser(), LoRA(r=2, target_modules=("q_proj", "v_proj"), rank_pattern={"v_proj": 3})))
    return save_adapter(model, folder, format="diffusers")


MAKERS: list[Callable[[Path], Path]] = [ours, of_hf_peft, dora, ia3, native, quantised, of_diffusers]
each_maker = pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__)


def base_for(make: Any) -> nn.Module:
    return Denoiser() if make is of_diffusers else tiny()


def file_of(folder: Path) -> Path:
    return next(folder.glob("*.safetensors"))


def hooks(model: nn.Module) -> dict[str, Any]:
    """What else loading could leave behind."""
    return {
        name: (
            sorted(m.__dict__),
            len(m._forward_hooks),
            len(m._forward_pre_hooks),
            {id(p) for p in m._parameters.values()},
        )
        for name, m in model.named_modules()
    }


def loaded_or_refused(model: nn.Module, folder: Path) -> str | None:
    """The refusal, if it is one; nothing has changed then."""
    before, other = snapshot(model), hooks(model)
    try:
        load_adapter(model, folder)
    except AdapterError as error:
        assert_unchanged(model, before)
        assert hooks(model) == other
        return str(error)
    return None


def write(folder: Path, tensors: dict[str, Tensor] | None = None, facts: Any = ..., config: Any = ...) -> None:
    """The files in ``folder`` with another content; ``config`` as text, or as what JSON stands for."""
    there, _, old = read_adapter(folder)
    facts = there if facts is ... else facts
    metadata = {"format": "pt"} | ({"lightning_peft": json.dumps(facts)} if facts is not None else {})
    save_file(old if tensors is None else tensors, folder / TENSORS, metadata=metadata)
    if config is not ...:
        (folder / CONFIG).write_text(config if isinstance(config, str) else json.dumps(config))


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / CONFIG).read_text())


# ---- torn, foreign, lying


@each_maker
def test_a_file_cut_at_any_length_is_refused(make: Any, tmp_path: Path) -> None:
    file = file_of(make(tmp_path))
    whole = file.read_bytes()
    header = struct.unpack("<Q", whole[:8])[0] + 8
    lengths = {*range(12), header - 1, header, header + 1, len(whole) - 4, len(whole) - 1, *range(12, len(whole), 97)}
    model = base_for(make)
    for length in sorted(lengths):
        file.write_bytes(whole[:length])
        refusal = loaded_or_refused(model, tmp_path)
        assert refusal is not None
        assert "is damaged, or of another kind" in refusal


def with_header(header: bytes, body: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + body


LIES = {
    "a huge header": struct.pack("<Q", 2**62) + b"{}",
    "a header as long as can be": struct.pack("<Q", 2**64 - 1) + b"{}",
    "a header of nothing": with_header(b""),
    "no JSON": with_header(b"not json"),
    "not utf-8": with_header(b'{"\xff":1}'),
    "nested deeply": with_header(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "offsets beyond the end": with_header(b'{"x":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}', b"1234"),
    "offsets that turn back": with_header(b'{"x":{"dtype":"F32","shape":[1],"data_offsets":[4,0]}}', b"1234"),
    "a shape of too many": with_header(b'{"x":{"dtype":"F32","shape":[99],"data_offsets":[0,4]}}', b"1234"),
    "a shape that overflows": with_header(
        b'{"x":{"dtype":"F32","shape":[4294967296,4294967296,4294967296],"data_offsets":[0,4]}}', b"1234"
    ),
    "a negative shape": with_header(b'{"x":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}', b"1234"),
    "an unknown type": with_header(b'{"x":{"dtype":"F99","shape":[1],"data_offsets":[0,4]}}', b"1234"),
    "a hole": with_header(b'{"x":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}', b"12345678"),
    "metadata of numbers": with_header(b'{"__metadata__":{"lightning_peft":1}}'),
    "an array": with_header(b"[]"),
}


@pytest.mark.parametrize("content", LIES.values(), ids=LIES.keys())
def test_a_header_that_lies_is_refused(content: bytes, tmp_path: Path) -> None:
    ours(tmp_path)
    (tmp_path / TENSORS).write_bytes(content)
    refusal = loaded_or_refused(tiny(), tmp_path)
    assert refusal is not None
    assert "is damaged, or of another kind" in refusal


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "F6_E2M3", "C64", "I8", "BOOL", "U64", "I16"])
def test_types_of_all_kinds_are_read_or_refused(dtype: str, tmp_path: Path) -> None:
    of_hf_peft(tmp_path)
    tensors = load_file(tmp_path / TENSORS)
    shape = list(tensors.pop(A).shape)
    bits = {"F8": 8, "F4": 4, "F6": 6, "C6": 64, "I8": 8, "BO": 8, "U6": 64, "I1": 16}[dtype[:2]]
    save_file(tensors, tmp_path / TENSORS)
    whole = (tmp_path / TENSORS).read_bytes()
    size = struct.unpack("<Q", whole[:8])[0]
    header, body = json.loads(whole[8 : 8 + size]), whole[8 + size :]
    more = bytes(-(-bits * shape[0] * shape[1] // 8))
    header[A] = {"dtype": dtype, "shape": shape, "data_offsets": [len(body), len(body) + len(more)]}
    (tmp_path / TENSORS).write_bytes(with_header(json.dumps(header).encode(), body + more))
    model = tiny()
    refusal = loaded_or_refused(model, tmp_path)
    if dtype.startswith("F8"):  # numbers of less precision
        assert refusal is None
        assert model.q_proj.adapters["default"].lora_A.abs().max() < 1e-30
    else:
        assert refusal is not None


# ---- tensors


def but(**changes: Tensor) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: tensors | changes


@pytest.mark.parametrize("make", [ours, of_hf_peft], ids=["ours", "hf_peft"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: {k: v for k, v in t.items() if not k.endswith("q_proj.lora_B.weight")},
            "missing|no 'lora_B|damaged",
        ),
        (lambda t: {k: v for k, v in t.items() if "head.bias" not in k}, "missing"),
        (lambda t: {}, "missing|holds 0|nothing"),
        (lambda t: t | {A: t[A].long()}, "another kind of number: q_proj.adapters.lora_A"),
        (lambda t: t | {A: t[A] > 0}, "another kind of number: q_proj.adapters.lora_A"),
        (lambda t: t | {A: torch.full_like(t[A], torch.inf)}, "NaN or infinite: q_proj.adapters.lora_A"),
        (lambda t: t | {A: torch.tensor(1.0)}, ""),
        (lambda t: t | {A: torch.zeros(2, 7, 1)}, ""),
        (lambda t: t | {A: torch.zeros(0, 7)}, ""),
        (lambda t: t | {A: torch.zeros(10**9, 0)}, ""),
        (lambda t: t | {A.replace("q_proj", "k_proj"): t[A]}, "k_proj"),
        (lambda t: t | {f"{PREFIX}../../q_proj.lora_A.weight": t[A]}, "q_proj"),
        (lambda t: t | {f"{PREFIX}__class__.lora_A.weight": t[A]}, "__class__"),
        (lambda t: t | {f"{PREFIX}q_proj.adapters.default.lora_A.weight": t[A]}, "adapters"),
        (lambda t: t | {f"{PREFIX}head.__init__": t[A]}, "__init__|unexpected"),
        (lambda t: t | {f"{PREFIX}_modules.weight": t[A]}, "_modules"),
        (lambda t: t | {"": t[A]}, ""),
        (lambda t: t | {".": t[A]}, ""),
        (lambda t: t | {f"{PREFIX}.lora_A.weight": t[A]}, ""),
        (lambda t: t | {f"{PREFIX}q_proj\n.lora_A.weight": t[A]}, ""),
        (lambda t: t | {f"{PREFIX}.*.lora_A.weight": t[A]}, r"'\.\*', which Tiny does not|unexpected: \.\*.lora_A"),
        (lambda t: t | {f"{PREFIX}(.*)*x.lora_A.weight": t[A]}, r"\*x', which Tiny does not|unexpected: \(\.\*\)"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(change: Any, message: str, make: Any, tmp_path: Path) -> None:
    make(tmp_path)
    tensors = change(load_file(tmp_path / TENSORS))
    write(tmp_path, {key: tensor.clone().contiguous() for key, tensor in tensors.items()})
    model = tiny()
    refusal = loaded_or_refused(model, tmp_path)
    assert refusal is not None
    assert re.search(message, refusal), refusal
    there = moved(inject(model, LoRA(r=2)))  # an adapter of this name is there already, and stays as it is
    assert loaded_or_refused(there, tmp_path) is not None


def test_two_keys_for_one_parameter_are_refused(tmp_path: Path) -> None:
    for make in (ours, of_hf_peft):
        tensors = load_file(make(tmp_path) / TENSORS)
        write(tmp_path, tensors | {A.removeprefix(PREFIX): tensors[A] + 1})
        assert "are for the same parameter" in str(loaded_or_refused(tiny(), tmp_path))
    dora(tmp_path / "dora")
    tensors = load_file(tmp_path / "dora" / TENSORS)
    key = f"{PREFIX}q_proj.lora_magnitude_vector"
    write(tmp_path / "dora", tensors | {f"{key}.weight": tensors[key] + 1})
    assert "are for the same parameter" in str(loaded_or_refused(tiny(), tmp_path / "dora"))


# ---- descriptions

HUGE = 10**12


@pytest.mark.parametrize(
    "change",
    [
        {"arguments": {"r": HUGE}},
        {"arguments": {"r": 2, "rank_pattern": {"q_proj": HUGE}}},
        {"arguments": {"r": [2]}},
        {"arguments": {"r": "2"}},
        {"arguments": {"r": 2, "layers_to_transform": "abc"}},
        {"arguments": {"r": 2, "layers_to_transform": {"a": 1}}},
        {"arguments": {"r": 2, "target_modules": "("}},
        {"arguments": {"r": 2, "target_modules": "(.*)*x"}},
        {"arguments": {"r": 2, "exclude_modules": ["(a|a)*b"]}},
        {"arguments": {"r": 2, "rank_pattern": {"(.*)*x": 2}}},
        {"arguments": {"r": 2, "rank_pattern": [1]}},
        {"arguments": {"r": 2, "alpha_pattern": {"q_proj": "x"}}},
        {"arguments": {"r": 2, "modules_to_save": {"head": 1}}},
        {"arguments": {"r": 2, "dropout": {}}},
        {"arguments": {"r": {"method": "lora", "arguments": {}}}},
        {"arguments": {"__class__": "x"}},
        {"arguments": []},
        {"method": ["lora"]},
        {"method": "__init__"},
        {"method": "dora"},
        {"format": "9"},
        {"format": None},
        {"base": "x"},
        {"base": [1]},
        {"base": {"structure": 1, "values": 2}},
        {"base": None},
        {"layout": "diffusers"},
        {"layout": ["peft"]},
        {"layout": None},
    ],
    ids=json.dumps,
)
def test_our_description_may_say_anything(change: dict[str, Any], tmp_path: Path) -> None:
    ours(tmp_path)
    facts, _, _ = read_adapter(tmp_path)
    write(tmp_path, facts={**(facts or {}), **change})
    refusal = loaded_or_refused(tiny(), tmp_path)
    assert (refusal is None) == (change == {"layout": "diffusers"})
    if str(HUGE) in json.dumps(change):
        assert "numbers here, and holds" in str(refusal), "before the memory is taken"
    if "*" in json.dumps(change):
        assert "could take very long" in str(refusal)
    (tmp_path / CONFIG).unlink()  # the file alone says what it is
    assert (loaded_or_refused(tiny(), tmp_path) is None) == (change == {"layout": "diffusers"})


@pytest.mark.parametrize("key", ["method", "arguments", "base"])
def test_our_description_lacks_something(key: str, tmp_path: Path) -> None:
    ours(tmp_path)
    facts, _, _ = read_adapter(tmp_path)
    write(tmp_path, facts={k: v for k, v in (facts or {}).items() if k != key})
    assert loaded_or_refused(tiny(), tmp_path) is not None


FATAL: list[dict[str, Any]] = [
    {"peft_type": None},
    {"peft_type": ["LORA"]},
    {"peft_type": "NOT_KNOWN"},
    {"r": None},
    {"r": "2"},
    {"lora_alpha": "much"},
    {"lora_alpha": {}},
    {"lora_dropout": "x"},
    {"alpha_pattern": ["q_proj"]},
    {"alpha_pattern": {"(": 3}},
    {"alpha_pattern": {"(.*)*x": 3}},
    {"alpha_pattern": {"(a+)+$": 3}},
    {"rank_pattern": {"(.|.)*x": 3}},
    {"alpha_pattern": {"q_proj": "x"}},
    {"layer_replication": [[0, 1]]},
]
HARMLESS: list[dict[str, Any]] = [
    {"target_modules": "(.*)*x"},  # the tensors say what is adapted
    {"target_modules": ["../../etc"], "base_model_name_or_path": "/etc/passwd"},
    {"layout": "diffusers"},
    {"settings": {}},
    {"auto_mapping": {"base_model_class": "os.system"}},
    {"task_type": "NOT_KNOWN"},
]


@pytest.mark.parametrize("change", [*FATAL, *HARMLESS], ids=json.dumps)
@pytest.mark.filterwarnings("ignore:.*is not known here, and is passed over:UserWarning")
def test_a_config_of_hf_peft_may_say_anything(change: dict[str, Any], tmp_path: Path) -> None:
    of_hf_peft(tmp_path)
    write(tmp_path, config=config_of(tmp_path) | change)
    model = tiny()
    refusal = loaded_or_refused(model, tmp_path)
    assert (refusal is None) == (change in HARMLESS)
    if change in FATAL and re.search(r"\)[*+]", json.dumps(change)):
        assert "could take very long" in str(refusal)
    if refusal is None:
        again = load_adapter(tiny(), of_hf_peft(tmp_path / "again"))
        assert_unchanged(model, snapshot(again))


@pytest.mark.parametrize("key", ["peft_type", "r"])
def test_a_config_of_hf_peft_lacks_something(key: str, tmp_path: Path) -> None:
    of_hf_peft(tmp_path)
    write(tmp_path, config={k: v for k, v in config_of(tmp_path).items() if k != key})
    assert loaded_or_refused(tiny(), tmp_path) is not None


TEXTS = {
    "empty": b"",
    "not utf-8": b'{"peft_type": "\xff"}',
    "utf-16": '{"peft_type": "LORA"}'.encode("utf-16"),
    "nested": b"[" * 200_000,
    "nested objects": b'{"a":' * 200_000,
    "a number too long": b'{"r": ' + b"9" * 5000 + b"}",
    "null": b"null",
    "a string": b'"LORA"',
    "half": b'{"peft_type": "LORA"',
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
def test_a_config_that_is_no_json_object_is_refused(text: bytes, tmp_path: Path) -> None:
    of_hf_peft(tmp_path)
    (tmp_path / CONFIG).write_bytes(text)
    assert "adapter_config.json" in str(loaded_or_refused(tiny(), tmp_path))


@pytest.mark.parametrize(
    "settings_",
    [
        {"unet.peft_type": []},
        {"unet.r": "x"},
        {"unet.alpha_pattern": {"(.*)*x": 1}},
        {"unet.alpha_pattern": 3},
        {"unet.lora_alpha": []},
        {"unet.use_rslora": []},
    ],
    ids=json.dumps,
)
def test_settings_of_diffusers_may_say_anything(settings_: dict[str, Any], tmp_path: Path) -> None:
    of_diffusers(tmp_path)
    _, config, tensors = read_adapter(tmp_path)
    metadata = {"lora_adapter_metadata": json.dumps(config["settings"] | settings_)}
    save_file(tensors, tmp_path / DIFFUSERS, metadata=metadata)
    assert (loaded_or_refused(Denoiser(), tmp_path) is None) == (settings_ == {"unet.use_rslora": []})


# ---- pickles, links


def test_the_command_for_a_pickle_makes_a_file_that_loads(tmp_path: Path) -> None:
    of_hf_peft(tmp_path)
    expected = load_file(tmp_path / TENSORS)
    (tmp_path / TENSORS).unlink()
    torch.save(expected, tmp_path / "adapter_model.bin")
    refusal = loaded_or_refused(tiny(), tmp_path)
    assert refusal is not None
    command = shlex.split(refusal.partition(", by ")[2])
    assert command[0] == "python"
    subprocess.run([sys.executable, *command[1:]], check=True)
    assert_unchanged(load_adapter(tiny(), tmp_path), snapshot(load_adapter(tiny(), of_hf_peft(tmp_path / "again"))))


class Bomb:
    def __reduce__(self) -> Any:
        return exec, ("raise SystemExit('code of the file was run')",)


@pytest.mark.parametrize("name", ["adapter_model.bin", TENSORS])
def test_the_command_runs_no_code_of_the_file(name: str, tmp_path: Path) -> None:
    torch.save({"x": Bomb()}, tmp_path / name)
    (tmp_path / CONFIG).write_text("{}")
    refusal = loaded_or_refused(tiny(), tmp_path)
    command = shlex.split(str(refusal).partition(", by ")[2])
    run = subprocess.run([sys.executable, *command[1:]], capture_output=True, text=True)
    assert run.returncode == 1
    assert "Weights only load failed" in run.stderr
    assert "code of the file was run" not in run.stderr


def test_links_are_followed_and_those_without_an_end_are_refused(tmp_path: Path) -> None:
    source = of_hf_peft(tmp_path / "source")
    linked = tmp_path / "linked"
    linked.mkdir()
    for name in (CONFIG, TENSORS):  # as in the cache of the hub
        (linked / name).symlink_to(source / name)
    assert loaded_or_refused(tiny(), linked) is None
    for target in ("nowhere", TENSORS, tmp_path):
        (linked / TENSORS).unlink()
        (linked / TENSORS).symlink_to(target)
        assert "there is no adapter_model.safetensors" in str(loaded_or_refused(tiny(), linked))
    (linked / TENSORS).unlink()
    (linked / TENSORS).symlink_to(source / TENSORS)
    before = (source / TENSORS).read_bytes()
    save_adapter(inject(tiny(), SSF()), linked)  # takes the place of the link, and leaves what it leads to
    assert (source / TENSORS).read_bytes() == before


# ---- what is there after a failure


def test_a_base_that_was_quantised_for_the_file_comes_back(tmp_path: Path) -> None:
    quantised(tmp_path)
    _, _, tensors = read_adapter(tmp_path)
    write(tmp_path, tensors | {next(iter(tensors)): torch.full_like(next(iter(tensors.values())), torch.nan)})
    assert "NaN" in str(loaded_or_refused(tiny(), tmp_path))


def test_an_error_from_elsewhere_leaves_the_model_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_adapter(moved(inject(tiny(), FullFineTuning())), tmp_path)
    model = tiny()
    before = snapshot(model)

    def stopped(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lightning_peft.interop.files.load_adapter_state", stopped)
    with pytest.raises(KeyboardInterrupt):
        load_adapter(model, tmp_path)
    assert_unchanged(model, before)


# ---- at random


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    """Maker -> name -> content of the files that it wrote."""
    written = {}
    for make in MAKERS:
        folder = make(tmp_path_factory.mktemp("made") / make.__name__)
        written[make.__name__] = {path.name: path.read_bytes() for path in folder.iterdir()}
    return written


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(["LORA", "q_proj"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
at_random = settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def restored(files: dict[str, bytes], folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
    for name, content in files.items():
        (folder / name).write_bytes(content)


@each_maker
@at_random
@given(data=st.data())
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_bytes_that_flip(make: Any, data: st.DataObject, folders: Any, tmp_path: Path) -> None:
    restored(folders[make.__name__], tmp_path)
    path = data.draw(st.sampled_from(sorted(tmp_path.iterdir())))
    content = bytearray(path.read_bytes())
    header = struct.unpack("<Q", content[:8])[0] + 8 if path.suffix == ".safetensors" else len(content)
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, data.draw(st.sampled_from([header, len(content)])) - 1))
        content[place] = data.draw(st.integers(0, 255) | st.sampled_from(list(b'"{}[]:,0')))
    path.write_bytes(bytes(content))
    loaded_or_refused(base_for(make), tmp_path)


@each_maker
@at_random
@given(data=st.data())
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_tensors_that_are_dropped_renamed_and_reshaped(
    make: Any, data: st.DataObject, folders: Any, tmp_path: Path
) -> None:
    restored(folders[make.__name__], tmp_path)
    facts, config, tensors = read_adapter(tmp_path)
    names = sorted(tensors)
    for _ in range(data.draw(st.integers(1, 3))):
        key = data.draw(st.sampled_from(names))
        value = tensors.pop(key, torch.zeros(2))
        part = data.draw(st.text(max_size=6))
        new = [*names, part, key.replace(".", "..", 1), key.removeprefix(PREFIX), key.replace("q_proj", part)]
        shaped = [value, value.flatten(), value.flatten()[:1], value[None], value.double(), value.long(), value.sum()]
        if data.draw(st.booleans()):
            tensors[data.draw(st.sampled_from(new))] = data.draw(st.sampled_from(shaped)).clone()
    metadata = {"lightning_peft": json.dumps(facts)} if facts else {}
    metadata |= {"lora_adapter_metadata": json.dumps(config["settings"])} if make is of_diffusers else {}
    try:
        save_file(tensors, file_of(tmp_path), metadata=metadata)
    except Exception:  # a key that safetensors does not write
        return
    loaded_or_refused(base_for(make), tmp_path)


@each_maker
@at_random
@given(data=st.data())
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_descriptions_that_say_something_else(make: Any, data: st.DataObject, folders: Any, tmp_path: Path) -> None:
    restored(folders[make.__name__], tmp_path)
    facts, config, tensors = read_adapter(tmp_path)
    settings_ = config.get("settings") or config

    def altered(said: dict[str, Any]) -> dict[str, Any]:
        said = dict(said)
        for _ in range(data.draw(st.integers(0, 2))):
            key = data.draw(st.sampled_from(sorted(said)) | st.text(max_size=6))
            said[key] = data.draw(anything)
            if data.draw(st.booleans()):
                del said[key]
        return said

    if facts:
        facts = altered(facts)
        if isinstance(facts.get("arguments"), dict) and facts["arguments"]:
            facts["arguments"] = altered(facts["arguments"])
    metadata = {"lightning_peft": json.dumps(facts)} if facts else {}
    settings_ = altered(settings_)
    if make is of_diffusers:
        metadata["lora_adapter_metadata"] = json.dumps(settings_)
    else:
        (tmp_path / CONFIG).write_text(json.dumps(settings_))
    save_file(tensors, file_of(tmp_path), metadata=metadata)
    loaded_or_refused(base_for(make), tmp_path)
