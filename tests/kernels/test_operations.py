"""The package of operations: what it offers, and that nothing is loaded before it is asked for."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightning_peft import kernels
from lightning_peft.kernels.backend import runs_triton
from tests.kernels.rule import DEVICE, INTERPRETED


def test_every_operation_is_declared_once_for_people_and_once_for_type_checkers() -> None:
    tree = ast.parse(Path(kernels.__file__).read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    declared = {(node.module, node.names[0].name) for node in block.body if isinstance(node, ast.ImportFrom)}
    assert declared == {(file, name) for file, names in kernels._FILES.items() for name in names}
    assert {name for _, name in declared} <= set(dir(kernels))


def test_an_operation_goes_before_the_file_of_its_name() -> None:
    code = """
import sys
import lightning_peft
assert "lightning_peft.kernels.rope" not in sys.modules
import lightning_peft.kernels.rope
from lightning_peft.kernels import rope, scale_shift, swiglu
import lightning_peft.kernels.scale_shift
assert callable(rope) and callable(swiglu)
assert lightning_peft.kernels.rope is rope and lightning_peft.kernels.scale_shift is scale_shift
"""
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_an_unknown_name_is_an_error() -> None:
    with pytest.raises(AttributeError, match="'lightning_peft.kernels' has no attribute 'rpe'"):
        kernels.rpe  # noqa: B018


def test_float64_takes_the_twin() -> None:
    assert runs_triton(torch.zeros(1)) == (INTERPRETED or DEVICE == "cuda")
    assert not runs_triton(torch.zeros(1, dtype=torch.float64))
