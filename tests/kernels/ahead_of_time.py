"""Compiles Triton kernels for accelerators that are not there, and reads what became of them."""

import functools
import re
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lightning_peft.kernels.backend import OPTIONS

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "gfx942": 64 * 1024}


class Built(NamedTuple):
    """Registers of a thread, bytes spilled, bytes of shared memory, assembly, and (rows, dtype) of each product."""

    registers: int
    spills: int
    shared: int
    assembly: str
    products: list[tuple[int, str]]


def build(
    kernel: Any, types: Sequence[str], constants: Mapping[str, Any], options: Mapping[str, Any], target: str
) -> Built:
    """Compile ``kernel``, whose arguments have ``types`` and then ``constants``; pointers and sizes divide by 16."""
    while not hasattr(kernel, "arg_names"):
        kernel = kernel.fn
    plain = [name for name in kernel.arg_names if name not in constants]
    if len(plain) != len(types):
        raise ValueError(f"{kernel.fn.__name__}: {len(types)} types for the arguments {plain}")
    by_name = dict(zip(plain, types, strict=True))
    signature = {name: by_name.get(name, "constexpr") for name in kernel.arg_names}
    places = {name: (index,) for index, name in enumerate(kernel.arg_names)}
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={places[name]: value for name, value in constants.items()},
        attrs={
            places[name]: [["tt.divisibility", 16]]
            for name, kind in by_name.items()
            if kind.startswith("*") or kind == "i32"
        },
    )
    built = triton.compile(source, target=TARGETS[target], options={**options, **OPTIONS})
    products = _products(built.asm["ttir"])
    if target == "gfx942":
        text = built.asm["amdgcn"]
        spills = sum(int(n) for n in re.findall(r"\.(?:vgpr|sgpr)_spill_count:\s+(\d+)", text))
        registers = max(int(n) for n in re.findall(r"\.vgpr_count:\s+(\d+)", text))
        return Built(registers, spills, built.metadata.shared, text, products)
    registers, spills = _assembled(built.asm["ptx"], target)
    return Built(registers, spills, built.metadata.shared, built.asm["ptx"], products)


def _products(ttir: str) -> list[tuple[int, str]]:
    """Of the left factor of each product, as in ``tt.dot %a, %b, %c : tensor<128x64xbf16> * tensor<64x128xbf16>``."""
    found = re.findall(r"tt\.dot .*: tensor<(\d+)x\d+x(\w+)>", ttir)
    if len(found) != ttir.count("tt.dot "):
        raise ValueError(f"not all products can be read: {found}")
    return [(int(rows), dtype) for rows, dtype in found]


def _assembled(ptx: str, target: str) -> tuple[int, int]:
    """Registers of a thread, and bytes that it spills."""
    from triton.backends.nvidia.compiler import get_ptxas

    arch = int(target.removeprefix("sm_"))
    name = f"{target}a" if arch >= 90 else target
    command = [_ptxas(get_ptxas, arch), "-v", f"--gpu-name={name}", "-o", "/dev/null", "/dev/stdin"]
    done = subprocess.run(command, input=ptx, capture_output=True, text=True, check=True)
    registers = max(int(n) for n in re.findall(r"Used (\d+) registers", done.stderr))
    return registers, sum(int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", done.stderr))


@functools.cache
def _ptxas(get_ptxas: Any, arch: int) -> str:
    return get_ptxas(arch).path
