"""Files that anybody may have written: what they say is checked before it is done, and no code in them ever runs."""

import contextlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lightning_peft.engine import AdapterError, AdapterFileError, Method
from lightning_peft.engine.errors import nearest
from lightning_peft.engine.slots import base_class, base_parameters, plain_name
from lightning_peft.engine.targets import as_patterns, base_modules
from lightning_peft.interop import hf_peft
from lightning_peft.interop.hf_format import ends_of
from lightning_peft.interop.patterns import check_pattern


@contextlib.contextmanager
def told_by(source: str | Path) -> Iterator[None]:
    """Make an error of the file ``source`` of whatever its description makes fail: it may say anything at all."""
    try:
        yield
    except (AdapterError, Warning):
        raise
    except Exception as error:
        raise AdapterFileError(
            f"{source} does not describe an adapter of this model ({type(error).__name__}: {error}). It is damaged, or "
            "was tampered with: take it from where it was saved again."
        ) from error


def check_patterns(settings: dict[str, Any] | None, source: str) -> None:
    """Raise an `AdapterFileError` if a pattern of HF PEFT, as it is matched, may take very long."""
    for key, patterns in (settings or {}).items():
        if key.endswith("_pattern"):
            for pattern in patterns or {}:
                check_pattern(rf"(.*\.)?({pattern})$", source)


def check_places(tensors: dict[str, Tensor], source: str) -> None:
    """Raise an `AdapterFileError` if two tensors of a file of HF PEFT have one place."""
    there: dict[str, str] = {}
    for key in tensors:
        place = key.removeprefix(hf_peft.PREFIX)
        place = place.removesuffix(".weight") if place.endswith("_vector.weight") else place
        if there.setdefault(place, key) != key:
            raise AdapterFileError(f"{source}: {key!r} and {there[place]!r} are for the same parameter. It is damaged.")


def check_names(method: Method, model: nn.Module, source: str) -> None:
    """Raise an `AdapterFileError` if a name of ``method``, which a file gave, is none in ``model``."""
    names = {plain_name(name) for name in (*dict(base_modules(model)), *base_parameters(model))}
    ends = ends_of(names)
    exact = {f"^{re.escape(name)}" for name in names}
    for field in ("target_modules", "modules_to_save"):
        for name in as_patterns(getattr(method, field, None)):
            if name not in ends and name not in exact:
                raise AdapterFileError(
                    f"{source} adapts {name!r}, which {base_class(model).__name__} does not have."
                    f"{nearest(name, names)} Load it into the model that it was made with."
                )


def check_size(method: Method, model: nn.Module, tensors: dict[str, Tensor], source: str) -> None:
    """Raise an `AdapterFileError` if ``method`` wants far more numbers than the file has, before they are made.

    Of a file that lacks a part, it is said later which.
    """
    host = getattr(method, "host", method)
    if any(cls.rank_axes for cls in host.adapter_types.values()):
        return  # the tensors decide
    wanted, given = method.total_trainable(method.targets(model)), sum(tensor.numel() for tensor in tensors.values())
    if wanted > 10 * given + 10**6:
        raise AdapterFileError(
            f"{source} describes {method}, which has {wanted:,} numbers here, and holds {given:,}. It is damaged, or "
            "made for another model."
        )


def is_pickle(file: Path) -> bool:
    """Whether ``file`` begins as pickles do."""
    with contextlib.suppress(OSError), file.open("rb") as stream:
        return stream.read(2) in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
    return False


def without_code(pickled: Path, file: Path) -> str:
    """The command that writes the tensors in ``pickled`` to ``file``, and runs no code that may be in it."""
    program = (
        "import sys, torch; from safetensors.torch import save_file; "
        "tensors = torch.load(open(sys.argv[1], 'rb'), map_location='cpu', weights_only=True); "
        "save_file({key: tensor.clone().contiguous() for key, tensor in tensors.items()}, sys.argv[2])"
    )
    return f' python -c "{program}" {shlex.quote(str(pickled))} {shlex.quote(str(file))}'
