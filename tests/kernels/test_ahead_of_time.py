"""Every kernel compiles for the accelerators it is meant for, keeps its values in registers and fits into the chip."""

import importlib
import pkgutil

import pytest

import lightning_peft.kernels
from tests.kernels.rule import INTERPRETED

pytest.importorskip("triton")
if INTERPRETED:
    pytest.skip("interpreted kernels cannot be compiled", allow_module_level=True)

from tests.kernels.ahead_of_time import SHARED_LIMIT, build  # noqa: E402  (triton is there)

MODULES = [
    importlib.import_module(m.name)
    for m in pkgutil.iter_modules(lightning_peft.kernels.__path__, "lightning_peft.kernels.")
]
VARIANTS = [(module, variant) for module in MODULES for variant in getattr(module, "VARIANTS", ())]


def name_of(case: object) -> str:
    module, (kernel, types, constants, _) = case  # type: ignore[misc]
    values = "-".join(str(v) for v in constants.values())
    return f"{kernel.fn.__name__.lstrip('_')}-{types[0].lstrip('*')}-{values}"


@pytest.mark.parametrize("target", SHARED_LIMIT)
@pytest.mark.parametrize("case", VARIANTS, ids=name_of)
def test_a_kernel_compiles_without_spills(case: object, target: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    _, (kernel, types, constants, options) = case  # type: ignore[misc]
    built = build(kernel, types, constants, options, target)
    assert built.spills == 0
    assert built.shared <= SHARED_LIMIT[target]
    if target.startswith("sm_") and not built.products:
        assert ".v4.b32" in built.assembly  # 128 bits at a time
    for rows, dtype in built.products:  # fewer than 64 rows wait for memory, not for products
        if target == "sm_90" and rows >= 64 and (dtype != "f32" or types[0] in ("*bf16", "*fp16")):
            assert "wgmma" in built.assembly  # at half the speed without
            assert "mma.sync" not in built.assembly


def test_every_kernel_is_compiled() -> None:
    for module in MODULES:
        kernels = {value for value in vars(module).values() if type(value).__name__ == "JITFunction"}
        entry = {k for k in kernels if k.__name__.startswith("_") and not k.__name__.startswith("__")}
        compiled = {variant[0] for variant in getattr(module, "VARIANTS", ())}
        assert {k.__name__ for k in entry} == {k.__name__ for k in compiled}, module.__name__
