"""Streams of temporal convolution networks: every score equals the network's over all rows of the instrument so far."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
import random

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn

from qfast.errors import CheckpointError, ConfigError, DataError
from qfast.nn import TCNModel, TCNStream
from qfast.ops import temporal_conv_net

F, N = 4, 5


def network(kernel=3, channels=(6, 6, 5), output_size=1, *, dtype=torch.float64, seed=0) -> TCNModel:
    """A network with non-trivial biases and gains."""
    torch.manual_seed(seed)
    model = TCNModel(F, output_size, list(channels), kernel, dropout=0.5).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def history(days: int, count: int = N, *, dtype=torch.float64) -> Tensor:
    return torch.randn(count, F, days, generator=torch.Generator().manual_seed(days), dtype=dtype)


@torch.no_grad()
def over_all_rows(model: TCNModel, x: Tensor) -> Tensor:
    """[N, F, T] -> [N, T(, output_size)]: the network's output on each day for the rows so far."""
    scores = model.linear(model.tcn(x).transpose(1, 2))
    return scores.squeeze(2) if model.output_size == 1 else scores


def pushed(stream: TCNStream, x: Tensor, names=None) -> Tensor:
    return torch.stack([stream.push(x[:, :, day], names) for day in range(x.shape[2])], 1)


def close(result: Tensor, expected: Tensor) -> None:
    assert expected.norm() > 0.01
    torch.testing.assert_close(result, expected, rtol=1e-11, atol=1e-12)


# ---------------------------------------------------------------- the numbers
@pytest.mark.parametrize("output_size", [1, 3])
@pytest.mark.parametrize("channels", [(1,), (4, 4), (7, 3, 3, 9), (5, 5, 5, 5, 5)], ids=str)
@pytest.mark.parametrize("kernel", [1, 2, 3, 5])
def test_every_days_score_is_the_networks_over_all_rows(kernel, channels, output_size):
    model, x = network(kernel, channels, output_size), history(70)
    stream = model.stream()
    assert stream.receptive_field == temporal_conv_net.plan(70, kernel, len(channels)).receptive_field
    result = pushed(stream, x)
    assert result.shape == ((N, 70) if output_size == 1 else (N, 70, output_size))
    close(result, over_all_rows(model, x))
    close(result[:, 9], model(x[:, :, :10]).detach())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_narrow_dtypes(dtype):
    model, x = network(dtype=dtype), history(40, dtype=dtype)
    result = pushed(model.stream(), x)
    assert result.dtype == dtype
    expected = over_all_rows(model.double(), x.double())
    error = (result - expected).norm() / expected.norm()
    assert error < (2e-6 if dtype == torch.float32 else 0.4 * torch.finfo(dtype).eps)  # only the result is rounded


def test_windows_as_long_as_the_receptive_field_agree_and_shorter_ones_do_not():
    model, x = network(2, (6, 6)), history(30)
    reach = model.stream().receptive_field
    assert reach == 7
    last = pushed(model.stream(), x)[:, -1]
    with torch.no_grad():
        for steps in (reach, reach + 1, 20):
            close(model(x[:, :, -steps:]), last)
        for steps in (1, reach - 1):
            assert (model(x[:, :, -steps:]) - last).norm() > 1e-3 * last.norm()


def test_nan_stays_with_its_instrument_and_is_forgotten():
    model, x = network(2, (6, 6)), history(30)
    clean = pushed(model.stream(), x)
    x[2, 1, 10] = torch.nan
    result, reach = pushed(model.stream(), x), model.stream().receptive_field
    assert result[2, 10 : 10 + reach].isnan().any()
    result[2, 10 : 10 + reach] = clean[2, 10 : 10 + reach]
    assert torch.equal(result, clean)


# ---------------------------------------------------------------- instruments
def test_instruments_come_and_go_and_miss_days():
    """The scores of an instrument depend on its own rows only, not on the other instruments or their order."""
    model, rng = network(), random.Random(0)
    stream, names = model.stream(), [f"S{i}" for i in range(9)]
    listed = {name: rng.randrange(25) for name in names}
    rows: dict[str, list[Tensor]] = {name: [] for name in names}
    scores: dict[str, list[Tensor]] = {name: [] for name in names}
    for day in range(60):
        there = [name for name in names if day >= listed[name] and rng.random() < 0.8]
        rng.shuffle(there)
        x = torch.randn(len(there), F, dtype=torch.float64)
        for name, row, score in zip(there, x, stream.push(x, there), strict=True):
            rows[name].append(row)
            scores[name].append(score)
    assert min(map(len, rows.values())) > 20
    assert dict(zip(stream.instruments, stream.seen.tolist(), strict=True)) == {k: len(v) for k, v in rows.items()}
    for name in names:
        close(torch.stack(scores[name]), over_all_rows(model, torch.stack(rows[name], 1).unsqueeze(0))[0])


def test_names_may_be_of_any_sequence():
    model, x = network(), history(12)
    expected, names = pushed(model.stream(), x), ["a", "b", "c", "d", "e"]
    for arguments in (
        names,
        tuple(names),
        np.array(names),
        list(np.array(names)),
        pd.Index(names),
        pd.Series(names),
        iter(names),
    ):
        result = model.stream()
        result.push(x[:, :, 0], arguments)
        assert result.instruments == names
        assert {type(name) for name in result.instruments} == {str}
        assert torch.equal(pushed(result, x[:, :, 1:], names), expected[:, 1:])
    for numbers in (range(N), torch.arange(N), np.arange(N), list(np.arange(N))):
        stream = model.stream()
        first, second = stream.push(x[:, :, 0]), stream.push(x[:, :, 1], numbers)
        assert torch.equal(torch.stack((first, second), 1), expected[:, :2])


def test_forgotten_instruments_begin_anew():
    model, x = network(), history(40)
    stream, names = model.stream(), list("abcde")
    stream.warm_start(x[:, :, :19], names)
    stream.push(x[[1, 3], :, 19], ["b", "d"])
    stream.push(x[[0, 2, 4], :, 19], ["a", "c", "e"])
    stream.forget(["b", "d"])
    assert stream.instruments == ["a", "c", "e"]
    assert {part.shape[1] for part in stream.state_dict()["inputs"]} == {3}
    staying = stream.push(x[[0, 2, 4], :, 20], ["a", "c", "e"])
    result = pushed(stream, x[:, :, 21:], names)
    close(torch.cat((staying.unsqueeze(1), result[[0, 2, 4]]), 1), over_all_rows(model, x)[[0, 2, 4], 20:])
    close(result[[1, 3]], over_all_rows(model, x[:, :, 21:])[[1, 3]])


def test_no_rows():
    model, x = network(), history(8)
    stream = model.stream()
    assert stream.push(x[:0, :, 0]).shape == stream.push(x[:0, :, 0], []).shape == (0,)
    assert stream.warm_start(x[:0]).shape == (0,)
    assert network(output_size=3).stream().warm_start(x[:0]).shape == (0, 3)
    result = [stream.push(x[:, :, 0], range(N)), stream.push(x[:0, :, 1], []), stream.push(x[:, :, 1], range(N))]
    close(torch.stack(result[::2], 1), over_all_rows(model, x)[:, :2])


# ---------------------------------------------------------------- warm start
@pytest.mark.parametrize("days", [1, 4, 29, 30, 50])
def test_a_warm_start_equals_pushing_every_row(days):
    model, x = network(), history(days + 9)
    stream, other = model.stream(), model.stream()
    assert stream.receptive_field == 29
    score = stream.warm_start(x[:, :, :days])
    close(score, pushed(other, x[:, :, :days])[:, -1])
    assert torch.equal(stream.seen, other.seen)
    assert torch.equal(stream.seen, torch.full((N,), days))
    close(pushed(stream, x[:, :, days:]), over_all_rows(model, x)[:, days:])


def test_histories_of_several_lengths():
    """Neither the values before an instrument's first row nor those outside the receptive field are read."""
    model, x = network(), history(60)
    lengths = [50, 3, 29, 1, 31]
    stream = model.stream()
    arguments = x[:, :, :50].clone()
    for row, length in zip(arguments, lengths, strict=True):
        row[:, : 50 - min(length, stream.receptive_field)] = torch.nan
    first = stream.warm_start(arguments, list("abcde"), lengths)
    assert stream.seen.tolist() == lengths
    result = torch.cat((first.unsqueeze(1), pushed(stream, x[:, :, 50:], list("abcde"))), 1)
    for row, length in enumerate(lengths):
        close(result[row], over_all_rows(model, x[row : row + 1, :, 50 - length :])[0, -11:])


def test_a_warm_start_replaces_the_state_of_its_instruments_only():
    model, x = network(), history(40)
    stream, names = model.stream(), list("abcde")
    pushed(stream, x[:, :, :20] + 1, names)
    stream.warm_start(x[[3, 1], :, :20], ["d", "b"], torch.tensor([20, 20]))
    assert sorted(stream.instruments) == names
    result = pushed(stream, x[:, :, 20:], names)
    close(result[[1, 3]], over_all_rows(model, x)[[1, 3], 20:])
    shifted = torch.cat((x[:, :, :20] + 1, x[:, :, 20:]), 2)
    close(result[[0, 2, 4]], over_all_rows(model, shifted)[[0, 2, 4], 20:])


# ---------------------------------------------------------------- saving, moving, interrupting
def test_saved_and_restored():
    model, x = network(), history(50)
    stream = model.stream()
    pushed(stream, x[:, :, :30], list("abcde"))
    file = io.BytesIO()
    torch.save(stream.state_dict(), file)
    saved = stream.state_dict()
    after = pushed(stream, x[:, :, 30:], list("abcde"))
    file.seek(0)
    for state in (torch.load(file, weights_only=True), saved):  # a copy, which later pushes do not change
        restored = copy.deepcopy(model).stream()
        restored.push(x[:2, :, 0], ["other", "a"])
        restored.load_state_dict(state)
        assert restored.instruments == list("abcde")
        assert torch.equal(pushed(restored, x[:, :, 30:], list("abcde")), after)
    copied = pickle.loads(pickle.dumps(restored))
    assert torch.equal(copied.push(x[:, :, 0], list("edcba")), restored.push(x[:, :, 0], list("edcba")))
    assert torch.equal(saved["seen"], torch.full((N,), 30))  # pushes to the restored streams do not change it either


def test_states_that_do_not_fit_are_refused():
    model, x = network(), history(3)
    stream = model.stream()
    stream.push(x[:, :, 0])
    state, before = stream.state_dict(), stream.push(x[:, :, 1])
    for other in (network(seed=1), network(dtype=torch.float32)):
        with pytest.raises(CheckpointError, match="with other weights than this stream's"):
            other.stream().load_state_dict(state)
    dilated = copy.deepcopy(model)
    dilated.tcn.network[1].conv1.dilation = dilated.tcn.network[1].conv2.dilation = 3
    dilated.tcn.network[1].dilation = 3
    with pytest.raises(CheckpointError, match="with other weights"):
        dilated.stream().load_state_dict(state)
    with pytest.raises(CheckpointError, match="no inputs, seen"):
        stream.load_state_dict({"instruments": [], "weights": state["weights"]})
    for wrong in (
        {"instruments": [0, 1]},
        {"instruments": [0, 1, 2, 3, 3]},
        {"seen": state["seen"][:2]},
        {"inputs": state["inputs"][1:]},
        {"inputs": [part.float() for part in state["inputs"]]},
    ):
        with pytest.raises(CheckpointError, match="state does not contain"):
            stream.load_state_dict({**state, **wrong})
    close(stream.push(x[:, :, 2]), over_all_rows(model, x)[:, 2])  # none of them changed anything
    close(before, over_all_rows(model, x)[:, 1])


def test_weights_are_those_of_the_moment_it_was_made():
    model, x = network(), history(40)
    expected, stream = over_all_rows(model, x), model.stream()
    first = pushed(stream, x[:, :, :20])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    close(torch.cat((first, pushed(stream, x[:, :, 20:])), 1), expected)
    close(pushed(model.stream(), x), over_all_rows(model, x))
    assert (over_all_rows(model, x) - expected).norm() > 0.1 * expected.norm()


def interrupt_in(patch: pytest.MonkeyPatch, number: int) -> None:
    """Ctrl-C in a convolution."""
    addmm, calls = torch.addmm, itertools.count()

    def interrupted(*arguments):
        if next(calls) == number:
            raise KeyboardInterrupt
        return addmm(*arguments)

    patch.setattr(torch, "addmm", interrupted)


def test_an_interrupted_push_can_be_repeated(monkeypatch):
    model, x = network(), history(40)
    stream, result = model.stream(), []
    for day in range(40):
        with monkeypatch.context() as patch:
            interrupt_in(patch, day % 6)
            with pytest.raises(KeyboardInterrupt):
                stream.push(x[:, :, day])
        result.append(stream.push(x[:, :, day]))
    close(torch.stack(result, 1), over_all_rows(model, x))


def test_an_interrupted_warm_start_changes_nothing(monkeypatch):
    model, x = network(), history(40)
    stream = model.stream()
    stream.warm_start(x[:, :, :20])
    with monkeypatch.context() as patch:
        interrupt_in(patch, 100)
        with pytest.raises(KeyboardInterrupt):
            stream.warm_start(x[:, :, :39])
    close(pushed(stream, x[:, :, 20:]), over_all_rows(model, x)[:, 20:])


def test_inference_mode_autocast_gradients_and_strides():
    model, x = network(dtype=torch.float32), history(12, dtype=torch.float32)
    expected = pushed(model.stream(), x)
    with torch.inference_mode():
        stream = model.stream()
        first = stream.push(x[:, :, 0])
        stream.load_state_dict(stream.state_dict())
        stream.push(x[:1, :, 0], ["gone"])
        stream.forget(["gone"])
    with torch.autocast("cpu", torch.bfloat16):
        second = stream.push(x.clone().requires_grad_()[:, :, 1])
    assert not second.requires_grad
    with torch.inference_mode():
        third = stream.push(x.clone()[:, :, 2])
    rest = pushed(stream, x.flip(1).flip(1).permute(2, 0, 1).contiguous().permute(1, 2, 0)[:, :, 3:])
    assert torch.equal(torch.cat((torch.stack((first, second, third), 1), rest), 1), expected)


def test_another_device():
    model, x = network(dtype=torch.float32), history(4, dtype=torch.float32)
    stream = model.stream()
    stream.push(x[:, :, 0])
    assert stream.to("meta") is stream
    assert stream.device.type == "meta"
    with pytest.raises(DataError, match=r"rows is torch.float32 on cpu but the stream is torch.float32 on meta\. Rem"):
        stream.push(x[:, :, 2])
    assert next(model.parameters()).device.type == "cpu"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
def test_on_a_gpu_and_back():
    model, x = network(), history(60)
    stream = model.stream()
    result = [pushed(stream, x[:, :, :20])]
    result.append(pushed(stream.to("cuda"), x[:, :, 20:40].cuda()).cpu())
    restored = model.stream()
    restored.load_state_dict(stream.state_dict())
    result.append(pushed(restored, x[:, :, 40:]))
    close(torch.cat(result, 1), over_all_rows(model, x))
    on_gpu = copy.deepcopy(model).cuda().stream()
    on_gpu.load_state_dict(restored.state_dict())
    assert on_gpu.device.type == "cuda"


def test_the_reported_memory_is_correct():
    model, x = network(3, (6, 6, 5), dtype=torch.float32), history(2, dtype=torch.float32)
    stream = model.stream()
    floats = 3 * (4 + 6) + 5 * (6 + 6) + 9 * (6 + 5)  # ((k - 1) d + 1) (C_in + C) of each block
    assert stream.bytes_per_instrument == 4 * floats + 8
    pushed(stream, x)
    state = stream.state_dict()
    assert sum(part.nbytes for part in (*state["inputs"], state["seen"])) == N * stream.bytes_per_instrument
    assert repr(stream) == "TCNStream(5 instruments, 764 bytes each, receptive field 29, torch.float32, cpu)"
    assert len(stream) == N


# ---------------------------------------------------------------- error messages
def test_models_that_cannot_stream():
    model = network()
    with pytest.raises(ConfigError, match=r"model is in training mode.*Remedy: model\.eval\(\)"):
        model.train().stream()
    model.eval().tcn.network[0].dropout1.train()
    with pytest.raises(ConfigError, match="training mode"):
        model.stream()
    model.eval()
    hook = model.tcn.network[0].conv1.register_forward_hook(lambda *_: None)
    with pytest.raises(ConfigError, match=r"model has hooks \(tcn\.network\.0\.conv1\)"):
        model.stream()
    hook.remove()
    model.stream()
    hook = model.register_forward_pre_hook(lambda *_: None)
    with pytest.raises(ConfigError, match=r"model has hooks \(model\)"):
        model.stream()
    hook.remove()
    model.tcn.network[1].relu2 = model.tcn.network[1].net[6] = nn.GELU().eval()
    with pytest.raises(ConfigError, match="model has modules that were replaced"):
        model.stream()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s, x: s.push(x), r"rows must be \[N, F\] with F = num_input = 4 of the model, got shape \[5, 4, 3\]"),
        (lambda s, x: s.push(x[:, 0]), r"rows must be .* got shape \[5, 3\]"),
        (lambda s, x: s.push(x[:, :, 0].float()), "rows is torch.float32 on cpu but the stream is torch.float64"),
        (
            lambda s, x: s.push(x[:, :, 0].numpy()),
            r"rows must be a tensor \[N, F\], got ndarray.*Remedy: torch\.as_tensor\(rows\)",
        ),
        (lambda s, x: s.push(x[:, :, 0]), r"instruments is None for 5 rows, but the stream has 2 instruments \(a, b\)"),
        (lambda s, x: s.push(x[:, :, 0], ["a"]), "instruments has 1 names for 5 rows"),
        (lambda s, x: s.push(x[:2, :, 0], ["a", "a"]), "instruments contains 'a' 2 times"),
        (
            lambda s, x: s.push(x[:2, :, 0], ["a", None]),
            "instruments contains None of type NoneType, expected str or int",
        ),
        (lambda s, x: s.push(x[:1, :, 0], "a"), r"instruments must be a list of names, got 'a'\. Remedy: \['a'\]"),
        (
            lambda s, x: s.forget(["a", "bb"]),
            r"the stream has no instrument 'bb', it has 2 \(a, b\)\. Did you mean 'b'\?",
        ),
        (lambda s, x: s.warm_start(x[:, :, 0]), r"history must be \[N, F, T\] with F = num_input = 4"),
        (
            lambda s, x: s.warm_start(x.mT),
            r"Windows .* are \[N, T, F\]\. Remedy: history\.transpose\(1, 2\)\.",
        ),
        (lambda s, x: s.warm_start(x[:, :, :0]), r"history must be .* got shape \[5, 4, 0\]"),
        (lambda s, x: s.warm_start(x[:2], ["a", "b"], [0, 1]), r"lengths must be 2 integers in \[1, 3\]"),
        (lambda s, x: s.warm_start(x[:2], ["a", "b"], [1, 4]), r"lengths must be .* got \[1, 4\]"),
        (lambda s, x: s.warm_start(x[:2], ["a", "b"], [1]), "lengths must be 2 integers"),
        (lambda s, x: s.warm_start(x[:2], ["a", "b"], [1.5, 2.0]), "lengths must be 2 integers"),
    ],
)
def test_wrong_arguments_change_nothing(call, message):
    model, x = network(), history(3)
    stream = model.stream()
    stream.push(x[:2, :, 0], ["a", "b"])
    with pytest.raises(DataError, match=message):
        call(stream, x)
    assert stream.instruments == ["a", "b"]
    close(pushed(stream, x[:2, :, 1:], ["a", "b"]), over_all_rows(model, x[:2])[:, 1:])
