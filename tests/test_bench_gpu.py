"""The benchmark of a GPU, in sizes that a CPU can do: everything runs and agrees, and nothing stops it."""

from functools import partial
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor

from benchmarks import kernels
from benchmarks.gpu import results
from benchmarks.gpu.case import Case, Machine, Peer, Work, plain
from benchmarks.gpu.measured import measured
from lightning_peft.kernels import linear_cross_entropy

TINY = Machine(torch.device("cpu"), tiny=True)
POINTS = [point for part in kernels.PARTS.values() for point in part]


@pytest.fixture(scope="module")
def made() -> kernels.Makers:
    return kernels.makers(TINY)


# compiling HF PEFT's DoRA says it
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("point", POINTS[1:])
def test_every_peer_of_a_point_computes_what_is_right(made: kernels.Makers, point: int) -> None:
    lines = list(kernels.run(TINY, (point,), made))
    cases = {line["case"] for line in lines}
    assert len(cases) == len(made[point]) + 1  # and the ceilings
    assert {line["point"] for line in lines} == {1, point}
    for line in lines[1:]:
        about = f"{line['case']}, {line['peer']}"
        assert line["error"] == "", about
        if line["skipped"]:
            assert line["forward"] == line["both"] == [], about
            continue
        assert len(line["both"]) == 2 or len(line["forward"]) == 2, about
        assert all(seconds > 0 for seconds in line["forward"] + line["both"]), about
        assert (line["both_floor"] or line["forward_floor"]) > 0, about
        assert line["grad_norm"] is None or line["grad_norm"] > 0, about
        # float32 beside float64; of a whole model, whose norms are in float32 in both. Unpacked alone, bitsandbytes
        # answers in bfloat16
        rounded = line["peer"] == "bitsandbytes" and "unpacked" in line["case"]
        for error in (line["output_error"], line["grad_error"]):
            assert error is None or error < (2**-8 if rounded else 2e-5), about


def wrong_shape(machine: Machine) -> Case:
    raise ValueError("this case cannot be made")


def loss_case(machine: Machine, *peers: Peer) -> Case:
    """A small loss, with the given peers beside one that is right."""
    inputs = {"x": machine.randn(7, 5, grad=True), "weight": machine.randn(11, 5), "labels": machine.randint(11, 7)}
    right = plain(linear_cross_entropy)
    return Case("a loss", inputs, right, [*peers, Peer("right", right)], Work(1.0), Work(2.0))


def test_what_fails_is_recorded_and_the_others_go_on(made: kernels.Makers) -> None:
    def broken(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        raise RuntimeError("out of | memory")

    wanted = {2: [lambda: wrong_shape(TINY)], 4: made[4], 8: [lambda: loss_case(TINY, Peer("broken", plain(broken)))]}
    lines = list(kernels.run(TINY, (2, 4, 8), wanted))
    assert [line["error"] for line in lines if line["point"] == 2] == ["ValueError: this case cannot be made"]
    assert all(line["error"] == "" for line in lines if line["point"] == 4)
    broke, right = (line for line in lines if line["point"] == 8)
    assert broke["error"] == "RuntimeError: out of | memory"
    assert broke["both"] == []
    assert right["error"] == ""
    assert len(right["both"]) == 2
    assert results.cells(broke)[-1] == "RuntimeError: out of / memory"


def test_a_wrong_result_and_a_missing_gradient_get_no_figures() -> None:
    def wrong(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return 1.1 * linear_cross_entropy(x, weight, labels)

    def constant(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return linear_cross_entropy(x.detach(), weight, labels) + 0 * x.sum()

    case = loss_case(TINY, Peer("wrong", plain(wrong)), Peer("constant", plain(constant), checked=False))
    off, without, right = measured(2, case, TINY, None, deadline=float("inf"))
    assert off["output_error"] == pytest.approx(0.1, rel=1e-4)
    assert off["grad_error"] == pytest.approx(0.1, rel=1e-4)
    assert without["grad_norm"] == 0
    assert results.cells(off)[1:7] == results.cells(without)[1:7] == [""] * 6
    assert "wrong" in results.cells(off)[-1]
    assert "ms" in results.cells(right)[1]


def test_inputs_that_a_peer_overwrites_are_restored_for_the_others() -> None:
    def rude(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        loss = linear_cross_entropy(x, weight, labels)
        x.data.zero_()
        return loss

    for _ in range(3):  # the order is random
        case = loss_case(TINY, Peer("rude", plain(rude)))
        before = case.inputs["x"].detach().clone()
        overwrote, right = measured(2, case, TINY, None, deadline=float("inf"))
        assert overwrote["remark"] == "overwrites x"
        assert right["remark"] == ""
        assert right["output_error"] < 1e-6  # of float32
        assert torch.equal(case.inputs["x"], before)


def test_what_has_no_time_left_says_so() -> None:
    _, line = kernels.run(TINY, (2,), {2: [partial(loss_case, TINY, softcap=3.0)]}, seconds=0.0)
    assert (line["case"], line["skipped"], line["both"]) == ("loss_case softcap=3.0", "out of time", [])
    lines = measured(2, loss_case(TINY), TINY, None, deadline=0.0)
    assert [(line["peer"], line["skipped"], line["both"]) for line in lines] == [("right", "out of time", [])]


def test_lines_are_kept_until_their_point_is_measured_anew(tmp_path: Path) -> None:
    path = tmp_path / "a gpu" / "kernels.jsonl"
    results.begin(path, {1, 2})
    lines = list(kernels.run(TINY, (2,), {2: [lambda: loss_case(TINY, Peer("Liger", plain(print), skipped="absent"))]}))
    for line in lines:
        results.append(path, line)
    assert results.read(path)[1:] == lines[1:]
    results.begin(path, {1, 6})
    assert results.read(path) == lines[1:]
    console = Console(width=200)
    with console.capture() as capture:
        console.print(*results.tables(results.read(path)))
    for text in (capture.get(), results.markdown(results.read(path))):
        assert "2. a loss" in text
        assert "absent" in text
        assert " ms" in text
    assert f"torch {torch.__version__}" in results.heading(results.read(path))


def test_without_a_gpu_nothing_is_measured(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(kernels, "makers", lambda machine: pytest.fail("it began"))
    with pytest.raises(SystemExit, match="needs an NVIDIA GPU"):
        kernels.main([])
    with pytest.raises(SystemExit, match="--tiny"):
        kernels.main(["--device", "cpu"])
