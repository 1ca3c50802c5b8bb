"""TCNModel and TemporalConvNet compared with pyqlib's and with their modules called one by one."""

from __future__ import annotations

import copy
import importlib
import pickle

import pytest
import safetensors.torch
import torch
import torch._dynamo
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.parametrizations import weight_norm

from qfast.errors import CheckpointError, ConfigError, DataError
from qfast.nn import TCNModel, TemporalBlock, TemporalConvNet
from qfast.training.checkpoint import load_weights, save_weights

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
SIZES = {"num_input": 4, "output_size": 1, "num_channels": [5, 5, 3], "kernel_size": 3, "dropout": 0.0}
STEPS = 11


def qlib_network(suffix: str = "", **sizes) -> nn.Module:
    pytest.importorskip("qlib", reason="pyqlib is the oracle; install qfast-models[qlib]")
    return importlib.import_module(f"qlib.contrib.model.pytorch_tcn{suffix}").TCNModel(**sizes)


def case(dtype: torch.dtype = torch.float64, rows: int = 9, **changed) -> tuple[TCNModel, Tensor]:
    torch.manual_seed(0)
    return TCNModel(**(SIZES | changed)).to(dtype), torch.randn(rows, 4, STEPS, dtype=dtype)


def module_by_module(net: TCNModel, x: Tensor) -> Tensor:
    """The network from its modules, without the operator."""
    for block in net.tcn.network:
        residual = x if block.downsample is None else block.downsample(x)
        x = (block.net(x) + residual).relu()
    return net.linear(x[:, :, -1]).squeeze(-1)


def gradients(net: nn.Module, x: Tensor, along: Tensor) -> list[Tensor]:
    x = x.detach().requires_grad_()
    return list(torch.autograd.grad(net(x), [x, *net.parameters()], along))


def error(result: Tensor, expected: Tensor) -> float:
    return float((result.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30))


# ---------------------------------------------------------------- compared with Qlib
@pytest.mark.parametrize("suffix", ["", "_ts"])
@pytest.mark.parametrize("channels", [[4], [5, 5], [8, 3, 3, 8]])
def test_initial_weights_and_generator_equal_qlib(channels, suffix):
    sizes = SIZES | {"num_channels": channels}
    torch.manual_seed(3)
    theirs = qlib_network(suffix, **sizes)
    after = torch.get_rng_state()
    torch.manual_seed(3)
    ours = TCNModel(**sizes)
    assert torch.equal(torch.get_rng_state(), after)
    expected, result = theirs.state_dict(), ours.state_dict()
    assert list(result) == list(expected)
    assert all(torch.equal(result[key], expected[key]) for key in expected)
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in theirs.named_parameters()]


@pytest.mark.parametrize("channels", [[1], [7, 7], [16] * 5, [33, 16], [16, 33, 1]], ids=str)
@pytest.mark.parametrize("kernel", [2, 3, 5, 7])
@pytest.mark.parametrize("steps", [1, 2, 5, 20, 60])
def test_outputs_and_gradients_equal_qlib(steps, kernel, channels):
    """Compared with Qlib in float64, because Qlib's float32 rounds too."""
    torch.manual_seed(0)
    sizes = SIZES | {"num_channels": channels, "kernel_size": kernel}
    theirs, ours = qlib_network(**sizes), TCNModel(**sizes)
    ours.load_state_dict(theirs.state_dict())
    x, along = torch.randn(6, 4 * steps), torch.randn(6)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        expected = gradients(theirs.double(), x.double(), along.double())
        result = gradients(ours.to(dtype), x.to(dtype), along.to(dtype))
        assert error(ours(x.to(dtype)), theirs(x.double())) < tolerance
        whole = torch.cat([part.flatten() for part in expected]).norm()
        for mine, other in zip(
            result, expected, strict=True
        ):  # a part may be pure rounding noise: then compared with the whole
            assert (mine - other).norm() < tolerance * max(other.norm(), whole / 100)


def test_all_steps_equal_qlib():
    torch.manual_seed(0)
    theirs = qlib_network(**SIZES).tcn
    ours = TemporalConvNet(4, [5, 5, 3], 3, 0.0)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(6, 4, STEPS)
    assert error(ours(x), theirs(x)) < 1e-6


def test_qlib_reads_qfasts_weights():
    ours, x = case(torch.float32)
    theirs = qlib_network(**SIZES)
    theirs.load_state_dict(ours.state_dict())
    assert error(theirs(x), ours(x)) < 1e-6


# ---------------------------------------------------------------- shapes and arguments
def test_flat_and_strided_windows_are_the_same():
    net, x = case()
    flat, windows = net(x.reshape(9, -1)), net(x.transpose(1, 2).contiguous().transpose(1, 2))
    assert torch.equal(flat, net(x))
    assert torch.equal(windows, flat)
    assert net(x[:1]).shape == (1,)
    assert net(x[:0]).shape == (0,)


def test_several_outputs_keep_their_axis():
    net, x = case(output_size=3)
    assert net(x).shape == (9, 3)
    assert net(x[:1]).shape == (1, 3)


def test_kernels_of_one_step():
    net, x = case(kernel_size=1)
    assert error(net(x), module_by_module(net, x)) < 1e-12


def test_wrong_arguments_are_named():
    net, x = case()
    with pytest.raises(DataError, match=r"\[9, 11, 4\], read as \[B, F, T\].*num_input=4.*Remedy: x.transpose"):
        net(x.transpose(1, 2))
    with pytest.raises(DataError, match=r"num_input = 4, got shape \[9, 43\]"):
        net(x.reshape(9, -1)[:, :-1])
    with pytest.raises(DataError, match=r"got shape \[4\]"):
        net(torch.zeros(4))
    for dtype in (torch.float32, torch.bfloat16):
        with pytest.raises(DataError, match=rf"x is {dtype} but the network's weights are torch.float64. Remedy"):
            net(x.to(dtype))
    for changed, message in (
        ({"num_channels": []}, r"num_channels must be a list .*got \[\]"),
        ({"num_channels": 8}, "num_channels must be a list .*got 8"),
        ({"num_channels": None}, "num_channels must be a list .*got None"),
        ({"num_channels": [8, 0]}, "n_outputs must be a whole number of at least 1, got 0"),
        ({"kernel_size": 0}, "kernel_size must be"),
        ({"num_input": 2.5}, "num_input must be"),
        ({"output_size": 0}, "output_size must be"),
        ({"dropout": 1.5}, r"dropout must be in \[0, 1\], got 1.5"),
    ):
        with pytest.raises(ConfigError, match=message):
            TCNModel(**(SIZES | changed))


# ---------------------------------------------------------------- names of the parameters
def with_new_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    new = {"weight_g": "parametrizations.weight.original0", "weight_v": "parametrizations.weight.original1"}
    return {
        ".".join([*key.split(".")[:-1], new.get(key.split(".")[-1], key.split(".")[-1])]): state[key] for key in state
    }


def test_new_names_are_those_of_torch():
    names = set(weight_norm(nn.Conv1d(2, 3, 2)).state_dict())
    assert names == set(with_new_names({"weight_g": torch.ones(1), "weight_v": torch.ones(1), "bias": torch.ones(1)}))


@pytest.mark.parametrize("left_out", [None, ".net.", ".conv"])
@pytest.mark.parametrize("renamed", [False, True])
def test_either_name_is_read(tmp_path, left_out, renamed):
    net, x = case(torch.float32)
    state = {k: v.clone() for k, v in net.state_dict().items() if left_out is None or left_out not in k}
    if renamed:
        state = with_new_names(state)
    held = dict(state)
    other = TCNModel(**SIZES)
    other.load_state_dict(state)
    assert torch.equal(other(x), net(x))
    assert state.keys() == held.keys()
    safetensors.torch.save_file(state, tmp_path / "weights.safetensors")
    other = TCNModel(**SIZES)
    load_weights(other, tmp_path / "weights.safetensors")
    assert torch.equal(other(x), net(x))


def test_copies_that_differ_are_refused(tmp_path):
    net, _ = case(torch.float32)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    state = {key: value + 1 for key, value in before.items()} | {"tcn.network.1.net.4.weight_g": torch.zeros(5, 1, 1)}
    message = r"tcn.network.1.conv2.weight_g and tcn.network.1.net.4.weight_g are two names of one tensor"
    with pytest.raises(CheckpointError, match=message):
        net.load_state_dict(state)
    torch.save(state, tmp_path / "weights.pt")
    with pytest.raises(CheckpointError, match=r"weights.pt: " + message):
        load_weights(net, tmp_path / "weights.pt")
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())


def test_deprecated_names_of_methods_still_work():
    net, _ = case(torch.float32)
    state = net.state_dict()
    with pytest.warns(DeprecationWarning, match="own_names was renamed .*: use translate_state_dict"):
        assert net.own_names(state).keys() == state.keys()
    with pytest.warns(DeprecationWarning, match="takes_operator was renamed .*: use uses_operator"):
        assert net.tcn.takes_operator()


def test_old_and_new_names_that_differ_are_refused():
    net, _ = case(torch.float32)
    state = {key: value for key, value in net.state_dict().items() if ".net." not in key}
    state |= {f"{key}": value + 1 for key, value in with_new_names(state).items() if "original0" in key}
    with pytest.raises(CheckpointError, match=r"conv1.weight_g and .*conv1.parametrizations.weight.original0 are two"):
        net.load_state_dict(state)


@pytest.mark.parametrize("suffix", [".safetensors", ".pkl"])
def test_weights_that_became_nan(tmp_path, suffix):
    """NaN differs from NaN, but both names contain it. A file is refused for that reason only."""
    net, _ = case(torch.float32)
    net.tcn.network[0].conv1.weight_v.data[0, 0, 0] = float("nan")
    other = TCNModel(**SIZES)
    other.load_state_dict(net.state_dict())
    assert torch.isnan(other.tcn.network[0].conv1.weight_v[0, 0, 0])
    save_weights(net, tmp_path / f"weights{suffix}")
    with pytest.raises(CheckpointError, match=r"contains NaN or infinity in tcn\.network\.0\.conv1\.weight_v"):
        load_weights(other, tmp_path / f"weights{suffix}")


def test_weights_without_storage_are_read():
    net, _ = case(torch.float32)
    with torch.device("meta"):
        other = TCNModel(**SIZES)
    other.load_state_dict({key: value.clone() for key, value in other.state_dict().items()}, assign=True)
    other.load_state_dict(net.state_dict(), assign=True)
    assert torch.equal(other.tcn.network[0].conv1.weight_v, net.tcn.network[0].conv1.weight_v)


@pytest.mark.parametrize("suffix", [".safetensors", ".pkl"])
def test_files_hold_both_names(tmp_path, suffix):
    net, x = case(torch.float32)
    path = tmp_path / f"weights{suffix}"
    save_weights(net, path)
    state = safetensors.torch.load_file(path) if suffix == ".safetensors" else torch.load(path, weights_only=True)
    assert sorted(state) == sorted(net.state_dict())
    other = TCNModel(**SIZES)
    load_weights(other, path)
    assert torch.equal(other(x), net(x))
    assert other.tcn.network[0].net[0].weight_v is other.tcn.network[0].conv1.weight_v


# ---------------------------------------------------------------- transforms, compilers, copies
def test_it_is_copied_and_pickled_after_a_forward():
    net, x = case()
    expected = net(x)
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert torch.equal(other(x), expected)
        assert other.tcn.network[0].net[0] is other.tcn.network[0].conv1
        assert other.linear.weight is not net.linear.weight


def test_dropout_is_that_of_the_modules():
    net, x = case(dropout=0.5, rows=4000)
    assert torch.equal(net.eval()(x), net(x))
    net.train()
    torch.manual_seed(1)
    one, other = net(x), net(x)
    torch.manual_seed(1)
    assert torch.equal(net(x), one)
    assert not torch.equal(one, other)
    mean, expected = one.mean(), module_by_module(net, x).mean()
    spread = one.std() / 4000**0.5
    assert abs(mean - expected) < 6 * spread
    net.tcn.network[1].dropout1.p = 0.0  # the operator has one rate for all
    assert torch.isfinite(net(x)).all()


def test_changed_modules_are_called():
    net, x = case()
    expected, seen = net(x), []
    handle = net.tcn.network[1].relu2.register_forward_hook(lambda module, arguments, out: seen.append(out.shape))
    assert error(net(x), expected) < 1e-12
    assert seen == [(9, 5, STEPS)]
    handle.remove()
    net(x)
    assert len(seen) == 1
    net.tcn.network[0].net[2] = nn.Identity()
    assert error(net(x), expected) > 1e-3
    block = TemporalBlock(4, 4, 3, 2, dropout=0.0).double()
    plain = block(x)
    block.relu = nn.Tanh()
    assert error(block(x), (block.net(x) + x).tanh()) < 1e-12
    assert error(block(x), plain) > 1e-3


def test_exchanged_parts_are_called():
    net, x = case()
    expected = net(x)
    net.linear = nn.Sequential(net.linear)
    assert torch.equal(net(x), expected)
    net.tcn = nn.Sequential(net.tcn)
    assert error(net(x), expected) < 1e-12


def test_functional_gradients():
    net, x = case()
    weights = dict(net.named_parameters())

    def loss(values: dict[str, Tensor]) -> Tensor:
        return functional_call(net, values, (x,)).square().sum()

    result = torch.func.grad(loss)(weights)
    expected = torch.autograd.grad(module_by_module(net, x).square().sum(), list(weights.values()))
    assert all(error(result[name], other) < 1e-12 for name, other in zip(weights, expected, strict=True))
    assert all(
        value is weights[name] for name, value in net.named_parameters()
    )  # the network's parameters are restored
    each = torch.func.vmap(lambda row: net(row.unsqueeze(0)))(x)
    assert error(each.squeeze(1), net(x)) < 1e-12


def test_trace_script_and_export_keep_the_numbers():
    net, x = case(torch.float32)
    net.eval()
    expected = net(x)
    for other in (torch.jit.trace(net, x), torch.jit.script(net), torch.export.export(net, (x,)).module()):
        assert error(other(x), expected) < 1e-6


def test_compile_into_one_graph():
    torch._dynamo.reset()
    net, x = case(torch.float32)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    assert error(compiled(x), net(x)) < 1e-6
    along = torch.randn(9)
    for result, expected in zip(gradients(compiled, x, along), gradients(net, x, along), strict=True):
        assert error(result, expected) < 1e-5


def test_half_precision():
    net, x = case(torch.float32)
    expected = net(x)
    assert error(net.bfloat16()(x.bfloat16()), expected) < 0.05
    net.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert error(net(x), expected) < 0.05
