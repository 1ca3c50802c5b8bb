"""qfast.precision: the sources of the setting for GPUs and their order. test_bf16.py tests the argument for CPUs."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from qfast import precision as module
from qfast.ops import feed_forward
from qfast.precision import NAMES, precision, precision_for, set_precision, using_precision
from support.encoder import BlockCase, LayerCase
from support.operator_case import results


@pytest.fixture(autouse=True)
def _restore_settings() -> Iterator[None]:
    torchs = torch.get_float32_matmul_precision()
    yield
    set_precision("auto")
    torch.set_float32_matmul_precision(torchs)


def test_torchs_setting_is_followed_until_another_is_made() -> None:
    for theirs, ours in (("highest", "ieee"), ("high", "tf32"), ("medium", "bf16")):
        torch.set_float32_matmul_precision(theirs)
        assert precision() == ours
    assert set_precision("3xtf32") == "auto"
    assert precision() == "3xtf32"
    assert set_precision("auto") == "3xtf32"
    assert precision() == "bf16"


def test_torchs_newer_setting_is_followed_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    """While it is set, torch refuses to read the older setting."""

    def refuse() -> str:
        raise RuntimeError("a mix of the legacy and new APIs")

    monkeypatch.setattr(torch, "get_float32_matmul_precision", refuse)
    for theirs, ours in (("ieee", "ieee"), ("tf32", "tf32"), ("none", "ieee")):
        monkeypatch.setattr(torch.backends.cuda, "matmul", SimpleNamespace(fp32_precision=theirs))
        assert precision() == ours
    monkeypatch.undo()  # before the settings are restored


def test_a_block_restores_the_previous_setting() -> None:
    set_precision("tf32")
    with using_precision("bf16"):
        assert precision() == "bf16"
        with using_precision("auto"):
            assert precision() == "ieee"
        assert precision() == "bf16"
    assert precision() == "tf32"
    with pytest.raises(KeyError), using_precision("bf16"):
        raise KeyError
    assert precision() == "tf32"


@pytest.mark.parametrize("name", ["fp32", "", "IEEE", None, 1])
def test_other_names_are_refused(name: object) -> None:
    with pytest.raises(ValueError, match="expected one of auto, ieee, 3xtf32, tf32, bf16, got"):
        set_precision(name)  # type: ignore[arg-type]
    assert precision() == "ieee"


def test_only_float32_on_a_gpu_has_a_choice() -> None:
    set_precision("bf16")
    for dtype in (torch.float32, torch.float64):
        assert precision_for(torch.empty(2, dtype=dtype)) == 0
    if torch.cuda.is_available():
        assert precision_for(torch.empty(2, device="cuda")) == NAMES.index("bf16")
        assert precision_for(torch.empty(2, dtype=torch.float64, device="cuda")) == 0


def test_nothing_on_the_cpu_depends_on_it() -> None:
    block, layer = BlockCase((37,), 20, 130, 9), LayerCase(5, 7, 24, 3, 70)

    def result() -> list[torch.Tensor]:
        of_block = results(lambda t: feed_forward(*t), block.inputs(torch.float32))
        return of_block + results(lambda t: layer.operator(t), layer.inputs(torch.float32))

    expected = result()
    for name in NAMES:
        with using_precision(name):
            assert all(torch.equal(a, b) for a, b in zip(result(), expected, strict=True))


@pytest.mark.parametrize("number", range(len(NAMES) - 1))  # test_bf16.py tests the last one
def test_cpu_operators_take_the_number_and_do_as_ever(number: int) -> None:
    tensors = [part.requires_grad_() for part in BlockCase((5,), 4, 9, 3).inputs(torch.float64)]
    torch.library.opcheck(torch.ops.qfast.feed_forward, (*tensors, 0.0, None, number))
    x, *weights = (part.requires_grad_() for part in LayerCase(3, 5, 4, 2, 6).inputs(torch.float64))
    arguments = x, weights, 2, 1e-5, 0.0, None, False, True
    torch.library.opcheck(torch.ops.qfast.encoder_layer, (*arguments, number))
    assert torch.equal(
        torch.ops.qfast.encoder_layer(*arguments, number)[0], torch.ops.qfast.encoder_layer(*arguments)[0]
    )


def test_torch_compile_reads_the_setting_and_its_changes() -> None:
    @torch.compile(backend="eager", fullgraph=True)
    def chosen(x: torch.Tensor) -> torch.Tensor:
        return x + NAMES.index(module.precision())

    zero = torch.zeros(())
    assert chosen(zero) == 0
    torch.set_float32_matmul_precision("high")
    assert chosen(zero) == 2
    set_precision("3xtf32")
    assert chosen(zero) == 1
