"""Transformer and Localformer compared with the same torch layers called one by one, in every way a network is used."""

from __future__ import annotations

import copy
import importlib
import io
import math
import pickle
import warnings
from collections.abc import Callable

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn
from torch.func import functional_call

from qfast.errors import ConfigError, DataError
from qfast.nn import Localformer, Transformer, transformer
from support.operator_case import relative_error
from support.transformer import F32, F64, NATIVE, Network, by_torch_layers, gradients, small_network

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::UserWarning", "ignore::torch.jit.TracerWarning"
)
both = pytest.mark.parametrize("kind", [Transformer, Localformer], ids=lambda kind: kind.__name__)


def positions(steps: int, width: int) -> Tensor:
    """The positional encoding of the paper, element by element, in float64."""
    rows = [
        [(math.cos if d % 2 else math.sin)(t / 10000 ** ((d - d % 2) / width)) for d in range(width)]
        for t in range(steps)
    ]
    return torch.tensor(rows, dtype=F64)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """One entry per call of the operator: whether only the last step was requested."""
    calls: list[bool] = []
    inner = transformer.encoder_layer

    def counted(x: Tensor, weights: object, **options: bool) -> Tensor:
        calls.append(options["last_step"])
        return inner(x, weights, **options)

    monkeypatch.setattr(transformer, "encoder_layer", counted)
    return calls


# ---------------------------------------------------------------- numbers
# With two features a norm returns only their sign, so gradients through it are rounding noise.
SIZES = [(1, 4, 1, 1, 1), (6, 8, 4, 2, 1), (6, 8, 8, 3, 2), (20, 16, 1, 4, 5), (3, 10, 5, 2, 13), (6, 64, 2, 2, 20)]
LARGE = [(20, 64, 2, 2, 60), (6, 128, 4, 3, 30), (3, 36, 3, 4, 130)]


@both
@pytest.mark.parametrize("sizes", [*SIZES, *(pytest.param(s, marks=pytest.mark.slow) for s in LARGE)], ids=str)
def test_predictions_and_gradients_are_those_of_the_layers(kind: type, sizes: tuple[int, ...]) -> None:
    """In float64 to 1e-11, in float32 to 2e-5 (or three times torch's error)."""
    *build, steps = sizes
    torch.manual_seed(3)
    net = kind(*build, 0.0)
    exact, x = copy.deepcopy(net).double(), torch.randn(9, steps, build[0])
    expected = by_torch_layers(exact, x.double())
    true = {"": expected.detach(), **gradients(exact, expected)}

    def result(call: Callable[[Network, Tensor], Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        of = copy.deepcopy(net).to(dtype)
        out = call(of, x.to(dtype))
        return {"": out.detach(), **gradients(of, out)}

    def ours(net: Network, x: Tensor) -> Tensor:
        return net(x)

    wide, narrow, torchs = result(ours, F64), result(ours, F32), result(by_torch_layers, F32)
    assert list(wide) == list(narrow) == list(true)
    for name, value in true.items():
        assert relative_error(wide[name], value) < 1e-11, name
        assert relative_error(narrow[name], value) <= max(2e-5, 3 * relative_error(torchs[name], value)), name


@both
@pytest.mark.parametrize("layers", [1, 3])
def test_the_network_calls_the_operators(kind: type, layers: int, seen: list[bool]) -> None:
    if not NATIVE:
        pytest.skip("no native library")
    kind(5, 8, 2, layers, 0.1)(torch.randn(4, 7, 5))
    last = kind is Transformer  # Localformer's GRU reads every step
    assert seen == [*[False] * (layers - 1), last]


@both
def test_gradients_of_the_data(kind: type) -> None:
    net, x = small_network(kind)
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    for leaf, out in zip(leaves, (net(leaves[0]), by_torch_layers(net, leaves[1])), strict=True):
        out.pow(2).sum().backward()
        assert leaf.grad is not None
    assert relative_error(leaves[0].grad, leaves[1].grad) < 1e-12


@both
def test_any_batch_and_the_shape_of_one(kind: type) -> None:
    net, x = small_network(kind)
    expected = by_torch_layers(net, x)
    for rows in (0, 1, 5):
        assert net(x[:rows]).shape == (rows,)
        torch.testing.assert_close(net(x[:rows]), expected[:rows], rtol=1e-11, atol=1e-12)
        assert net.to_reference()(x[:rows]).shape == (rows,)
    net(x[:0]).sum().backward()
    assert all(bool((p.grad == 0).all()) for p in net.parameters() if p.grad is not None)


@both
def test_flat_windows_are_read_feature_by_feature(kind: type) -> None:
    net, x = small_network(kind)
    torch.testing.assert_close(net(x.transpose(1, 2).flatten(1)), net(x), rtol=1e-13, atol=1e-14)
    time_first = x.transpose(0, 1).contiguous().transpose(0, 1)
    torch.testing.assert_close(net(time_first), net(x), rtol=1e-13, atol=1e-14)


def test_positions_are_those_of_the_paper() -> None:
    for width in (2, 8, 64):
        pe = Transformer(3, width, 1).pos_encoder.pe
        assert pe.shape == (1000, 1, width)
        torch.testing.assert_close(pe[:, 0].double(), positions(1000, width), rtol=0, atol=1e-4)  # float32 of t
        torch.testing.assert_close(pe[:30, 0].double(), positions(30, width), rtol=0, atol=3e-6)


@both
def test_a_non_finite_window_affects_no_other(kind: type) -> None:
    net, x = small_network(kind)
    clean = net(x)
    x[3, 2, 1] = torch.nan
    result = net(x)
    assert result[3].isnan()
    rest = torch.arange(len(x)) != 3
    torch.testing.assert_close(result[rest], clean[rest], rtol=1e-12, atol=1e-13)


# ---------------------------------------------------------------- unused parameters
@both
def test_the_template_layer_has_no_influence(kind: type) -> None:
    """Qlib's files contain it, so qfast's do too."""
    net, x = small_network(kind)
    expected = net(x).detach()
    net(x).sum().backward()
    unused = [name for name, p in net.named_parameters() if p.grad is None]
    assert unused == [f"encoder_layer.{name}" for name, _ in net.encoder_layer.named_parameters()]
    assert len(unused) == 12
    assert set(unused) <= set(net.state_dict())
    for p in net.encoder_layer.parameters():
        p.data.fill_(7.0)
    assert torch.equal(net(x), expected)


@both
def test_an_optimiser_does_not_change_unused_parameters(kind: type) -> None:
    net, x = small_network(kind)
    before = copy.deepcopy(net.encoder_layer.state_dict())
    adam = torch.optim.Adam(net.parameters(), weight_decay=0.1)
    net(x).sum().backward()
    adam.step()
    assert all(torch.equal(value, before[key]) for key, value in net.encoder_layer.state_dict().items())


# ---------------------------------------------------------------- refusals
@both
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"d_model": 7, "nhead": 7}, "d_model must be even, .*, got 7"),
        ({"d_model": 8, "nhead": 3}, r"nhead must divide d_model=8, got 3\. Remedy: one of \[1, 2, 4, 8\]"),
        ({"d_feat": 0}, "d_feat must be a whole number of at least 1, got 0"),
        ({"d_model": 8.0}, "d_model must be a whole number of at least 1, got 8.0"),
        ({"nhead": 0}, "nhead must be a whole number of at least 1, got 0"),
        ({"num_layers": 0}, "num_layers must be a whole number of at least 1, got 0"),
        ({"num_layers": True}, "num_layers must be a whole number of at least 1, got True"),
        ({"dropout": 1.5}, r"dropout must be in \[0, 1\], got 1.5"),
        ({"dropout": math.nan}, r"dropout must be in \[0, 1\], got nan"),
    ],
)
def test_wrong_sizes_are_reported(kind: type, wrong: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        kind(**wrong)


@both
def test_wrong_data_is_named(kind: type) -> None:
    net, x = small_network(kind)
    for arguments, message in (
        (x[..., :4], r"x has 4 features .* built with d_feat=5\. Remedy: d_feat=4"),
        (x.flatten(1)[:, :33], "x has 33 columns, which is not a multiple of d_feat=5"),
        (x[0, 0], "x must be .*, got 1 axes"),
        (x[:, :0], r"x has no steps: its shape is \[12, 0, 5\]"),
        (x.float(), r"x is torch.float32 but the network's weights are torch.float64\. Remedy: x.to\(torch.float64\)"),
        (x.long(), r"x is torch.int64 .* Remedy: x.to\(torch.float64\)\.$"),
        (torch.zeros(1, 1001, 5, dtype=F64), "x has 1001 steps, but there are positions for 1000. Remedy: a step_len"),
        (torch.zeros(1, 5005, dtype=F64), "x has 1001 steps, .* or check d_feat=5 if x is flat"),
    ):
        for way in (net, net.to_reference()):
            with pytest.raises(DataError, match=message):
                way(arguments)


@both
def test_a_thousand_steps(kind: type) -> None:
    torch.manual_seed(0)
    net, x = kind(2, 2, 1, 1, 0.0).double(), torch.randn(2, 1000, 2, dtype=F64)
    torch.testing.assert_close(net(x), by_torch_layers(net, x), rtol=1e-10, atol=1e-12)


# ---------------------------------------------------------------- dropout
@both
def test_dropout_counts_in_training_only_and_repeats_with_the_seed(kind: type) -> None:
    net, x = small_network(kind, F32, dropout=0.4)
    state = torch.get_rng_state()
    net.eval()
    torch.testing.assert_close(net(x), by_torch_layers(net, x), rtol=1e-5, atol=1e-6)
    assert torch.equal(torch.get_rng_state(), state)
    net.train()
    torch.manual_seed(8)
    first, second = net(x), net(x)
    assert not torch.allclose(first, second)
    torch.manual_seed(8)
    assert torch.equal(net(x), first)
    torch.manual_seed(8)
    with torch.no_grad():
        torch.testing.assert_close(net(x), first, rtol=1e-5, atol=1e-6)


@both
@pytest.mark.parametrize("dropout", [0.1, 0.5])
def test_training_draws_as_torchs_layers_do(kind: type, dropout: float) -> None:
    """Many copies of one window have different masks. Mean, spread and tails equal those of torch's masks."""
    net, x = small_network(kind, F32, rows=1, dropout=dropout)
    many = x[:, :4].expand(3000, 4, 5)
    with torch.no_grad():
        result, expected = net(many).double(), net.to_reference()(many).double()
    spread = float(expected.std())
    assert float(result.std()) == pytest.approx(spread, rel=0.1)
    assert abs(float(result.mean() - expected.mean())) < 5 * spread * (2 / 3000) ** 0.5
    marks = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95], dtype=F64)
    shares = (expected.quantile(marks)[:, None] > result).double().mean(1)
    assert torch.all((shares - marks).abs() < 0.06)


@both
def test_everything_dropped(kind: type) -> None:
    net, x = small_network(kind, dropout=1.0)
    net.eval()
    torch.testing.assert_close(net(x), by_torch_layers(net, x), rtol=1e-12, atol=1e-12)
    net.train()
    torch.testing.assert_close(net(x), net.to_reference()(x), rtol=1e-11, atol=1e-12)
    assert all(torch.isfinite(g).all() for g in gradients(net, net(x)).values())


# ---------------------------------------------------------------- changed networks
def _with_hook(net: Network, layer: nn.TransformerEncoderLayer) -> None:
    layer.register_forward_hook(lambda module, _, out: out * 2)


def _with_inner_hook(net: Network, layer: nn.TransformerEncoderLayer) -> None:
    layer.linear1.register_forward_pre_hook(lambda module, arguments: (arguments[0] * 2,))


def _gelu(net: Network, layer: nn.TransformerEncoderLayer) -> None:
    layer.activation = nn.functional.gelu


def _norm_first(net: Network, layer: nn.TransformerEncoderLayer) -> None:
    layer.norm_first = True


def _other_eps(net: Network, layer: nn.TransformerEncoderLayer) -> None:
    layer.norm2.eps = 0.5


def _no_norm(net: Network, layer: nn.TransformerEncoderLayer) -> None:
    layer.norm1 = nn.Identity()


def _no_bias(net: Network, layer: nn.TransformerEncoderLayer) -> None:
    layer.linear2.bias = None


def _zero_attention(net: Network, layer: nn.TransformerEncoderLayer) -> None:
    layer.self_attn.add_zero_attn = True


def _weight_norm(net: Network, layer: nn.TransformerEncoderLayer) -> None:
    nn.utils.parametrizations.weight_norm(layer.linear1)
    layer.linear1.parametrizations.weight.original0.data.mul_(2)


def _other_linear(net: Network, layer: nn.TransformerEncoderLayer) -> None:
    layer.linear1 = nn.Sequential(layer.linear1, nn.Tanh())


def _batch_first(net: Network, layer: nn.TransformerEncoderLayer) -> None:
    torch.manual_seed(4)
    net.transformer_encoder.layers[1] = nn.TransformerEncoderLayer(8, 2, dropout=0.0, batch_first=True).double()


def _own_layer(net: Network, layer: nn.TransformerEncoderLayer) -> None:
    class Doubled(nn.TransformerEncoderLayer):
        def forward(self, *arguments: Tensor, **options: object) -> Tensor:
            return 2 * super().forward(*arguments, **options)

    layer.__class__ = Doubled


CHANGES = [
    _with_hook,
    _with_inner_hook,
    _gelu,
    _norm_first,
    _other_eps,
    _no_norm,
    _no_bias,
    _zero_attention,
    _weight_norm,
    _other_linear,
    _batch_first,
    _own_layer,
]


@both
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_changed_networks_are_computed_as_they_are(kind: type, change: Callable, seen: list[bool]) -> None:
    net, x = small_network(kind)
    before = net(x)
    seen.clear()
    change(net, net.transformer_encoder.layers[1])
    result = net(x)
    assert seen == []
    assert not torch.allclose(result, before, rtol=1e-9)  # the change counts
    torch.testing.assert_close(result, by_torch_layers(net, x), rtol=1e-11, atol=1e-12)


@both
def test_a_hook_on_the_whole_encoder_is_called(kind: type, seen: list[bool]) -> None:
    net, x = small_network(kind)
    net.transformer_encoder.register_forward_hook(lambda module, _, out: out * 0)
    result = net(x)
    assert seen == []
    torch.testing.assert_close(result, result[:1].expand(12), rtol=1e-12, atol=1e-12)  # the data has no influence


def test_a_norm_after_the_encoder_is_applied(seen: list[bool]) -> None:
    net, x = small_network(Transformer)
    net.transformer_encoder.norm = nn.LayerNorm(8, elementwise_affine=False).double()
    read: list[Tensor] = []
    net.decoder_layer.register_forward_hook(lambda module, arguments, out: read.append(arguments[0]))
    net(x)
    assert seen == []
    torch.testing.assert_close(read[0].mean(1), torch.zeros(12, dtype=F64))


@both
def test_layers_that_are_replaced_by_the_same_kind_count(kind: type, seen: list[bool]) -> None:
    """A wider block, other heads or another number of layers: the operator uses the new layers."""
    net, x = small_network(kind)
    torch.manual_seed(4)
    net.transformer_encoder.layers[0] = nn.TransformerEncoderLayer(8, 4, 30, dropout=0.0, layer_norm_eps=0.1).double()
    torch.testing.assert_close(net(x), by_torch_layers(net, x), rtol=1e-11, atol=1e-12)
    assert len(seen) == 2 * NATIVE


@both
def test_the_first_and_last_layers_may_be_replaced(kind: type) -> None:
    net, x = small_network(kind)
    net.feature_layer = nn.Sequential(net.feature_layer, nn.Tanh())
    net.decoder_layer = nn.Sequential(nn.Tanh(), net.decoder_layer)
    torch.testing.assert_close(net(x), by_torch_layers(net, x), rtol=1e-11, atol=1e-12)


@both
@pytest.mark.parametrize("part", ["dropout", "dropout1", "dropout2", "self_attn", "norm1"])
def test_different_modes_within_a_layer_are_respected(kind: type, part: str, seen: list[bool]) -> None:
    net, x = small_network(kind, F32, dropout=0.5)
    for layer in net.transformer_encoder.layers:
        getattr(layer, part).eval()
    torch.manual_seed(2)
    result = net(x)
    assert seen == []
    torch.manual_seed(2)
    torch.testing.assert_close(result, net.to_reference()(x), rtol=1e-5, atol=1e-6)


@both
def test_different_dropout_rates_within_a_layer_are_respected(kind: type, seen: list[bool]) -> None:
    net, x = small_network(kind, dropout=0.5)
    net.transformer_encoder.layers[0].dropout1.p = 0.1
    net(x)
    assert seen == []


@both
def test_layers_in_different_modes(kind: type, seen: list[bool]) -> None:
    """The operator supports a layer that is entirely in eval mode."""
    net, x = small_network(kind, dropout=0.5)
    net.transformer_encoder.eval()
    if kind is Localformer:
        net.rnn.eval()
    torch.testing.assert_close(net(x), by_torch_layers(net, x), rtol=1e-11, atol=1e-12)
    assert len(seen) == 2 * NATIVE


# ---------------------------------------------------------------- in torch: compile, export, transforms
@both
def test_trace_script_and_export_hold_torchs_operations_only(kind: type) -> None:
    net, x = small_network(kind)
    expected = by_torch_layers(net, x)
    for made in (torch.jit.trace(net, (x,)), torch.jit.script(net)):
        torch.testing.assert_close(made(x), expected, rtol=1e-12, atol=1e-12)
        assert "qfast::" not in str(made.inlined_graph)
    program = torch.export.export(net, (x,))
    assert "qfast" not in str(program.graph)
    torch.testing.assert_close(program.module()(x), expected, rtol=1e-12, atol=1e-12)


@both
def test_export_of_any_batch_and_a_file(kind: type) -> None:
    """As exporters to other formats use it: eval mode, dynamic batch, saved and loaded."""
    net, x = small_network(kind, F32)
    plain = net.eval().to_reference()
    assert "qfast" not in str(torch.export.export(plain, (x,)).graph)
    open_batch = {"x": {0: torch.export.Dim("batch", min=2, max=4096)}}
    file = io.BytesIO()
    torch.export.save(torch.export.export(plain, (x,), dynamic_shapes=open_batch), file)
    file.seek(0)
    again = torch.export.load(file).module()
    for rows in (12, 5):
        torch.testing.assert_close(again(x[:rows]), net(x[:rows]), rtol=1e-5, atol=1e-6)


@both
def test_compile_into_one_graph(kind: type) -> None:
    net, x = small_network(kind)
    compiled = torch.compile(copy.deepcopy(net), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), net(x), rtol=1e-12, atol=1e-12)
    expected = gradients(net, net(x))
    compiled(x).pow(2).sum().backward()
    for name, p in compiled._orig_mod.named_parameters():
        if name in expected:
            torch.testing.assert_close(p.grad, expected[name], rtol=1e-10, atol=1e-10)
    torch.compiler.reset()


@both
def test_transforms(kind: type) -> None:
    net, x = small_network(kind, rows=4)
    along = torch.randn_like(x)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):  # torch's operator has no forward mode
        expected = torch.func.jvp(lambda x: by_torch_layers(net, x), (x,), (along,))[1]
    torch.testing.assert_close(torch.func.jvp(net, (x,), (along,))[1], expected, rtol=1e-9, atol=1e-12)
    used = {name: p for name, p in net.named_parameters() if not name.startswith("encoder_layer.")}
    result = torch.func.grad(lambda p: functional_call(net, p, (x,)).pow(2).sum())(used)
    for name, value in gradients(net, by_torch_layers(net, x)).items():
        torch.testing.assert_close(result[name], value, rtol=1e-9, atol=1e-12)
    windows = torch.stack((x, along))
    torch.testing.assert_close(torch.vmap(net)(windows), torch.stack((net(x), net(along))), rtol=1e-11, atol=1e-12)
    parameters, buffers = torch.func.stack_module_state([copy.deepcopy(net) for _ in range(2)])
    ensemble = torch.vmap(lambda p, b: functional_call(net, (p, b), (x,)))(parameters, buffers)
    torch.testing.assert_close(ensemble, torch.stack([by_torch_layers(net, x)] * 2), rtol=1e-11, atol=1e-12)


@both
def test_gradients_of_gradients(kind: type) -> None:
    """By torch.func, and by `backward` through torch's layers with an attention that supports it."""
    net, x = small_network(kind, rows=2)
    leaf = x.clone().requires_grad_()
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        (first,) = torch.autograd.grad(net.to_reference()(leaf).pow(2).sum(), leaf, create_graph=True)
        (expected,) = torch.autograd.grad(first.pow(2).sum(), leaf)
    slope = torch.func.grad(lambda x: net(x).pow(2).sum())
    result = torch.func.grad(lambda x: slope(x).pow(2).sum())(x)
    assert relative_error(result, expected) < 1e-10
    if NATIVE:
        (first,) = torch.autograd.grad(net(leaf).pow(2).sum(), leaf, create_graph=True)
        with pytest.raises(NotImplementedError, match=r"double backward is not supported"):
            first.pow(2).sum().backward()


@both
def test_autocast_and_halves(kind: type) -> None:
    net, x = small_network(kind, F32)
    expected = by_torch_layers(net, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = net(x)
    assert (result.float() - expected).norm() <= 0.05 * expected.norm() + 0.05
    half = copy.deepcopy(net).bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16
    assert (half.float() - expected).norm() <= 0.1 * expected.norm() + 0.1


@both
def test_dynamic_quantisation(kind: type) -> None:
    net, x = small_network(kind, F32)
    net.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        small = torch.ao.quantization.quantize_dynamic(net, {nn.GRU, nn.Linear}, dtype=torch.qint8)
    assert type(small.decoder_layer) is not nn.Linear
    assert (small(x) - net(x)).norm() <= 0.2 * net(x).norm() + 0.05


@both
def test_it_is_copied_and_pickled_after_a_forward(kind: type) -> None:
    net, x = small_network(kind)
    expected = net(x)
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert torch.equal(other(x), expected)
    plain = net.to_reference()
    torch.testing.assert_close(plain(x), expected, rtol=1e-12, atol=1e-12)
    plain.feature_layer.weight.data.zero_()
    assert torch.equal(net(x), expected)  # a separate copy of the weights


# ---------------------------------------------------------------- compared with Qlib
@pytest.mark.parametrize("suffix", ["", "_ts"])
@pytest.mark.parametrize("sizes", [(6, 8, 4, 2), (20, 16, 2, 1), (5, 12, 1, 3)], ids=str)
@both
def test_weights_names_and_values_equal_qlib(kind: type, suffix: str, sizes: tuple[int, ...]) -> None:
    pytest.importorskip("qlib", reason="pyqlib is the oracle; install qfast-models[qlib]")
    theirs = importlib.import_module(f"qlib.contrib.model.pytorch_{kind.__name__.lower()}{suffix}").Transformer
    torch.manual_seed(5)
    qlib_network, after = theirs(*sizes, 0.0, None), torch.get_rng_state()
    torch.manual_seed(5)
    net = kind(*sizes, 0.0)
    assert torch.equal(torch.get_rng_state(), after)
    expected = qlib_network.state_dict()
    assert list(net.state_dict()) == list(expected)
    assert all(torch.equal(value, expected[key]) for key, value in net.state_dict().items())
    assert [name for name, _ in net.named_parameters()] == [name for name, _ in qlib_network.named_parameters()]
    x = torch.randn(11, 12, sizes[0], dtype=F64)
    arguments = x if suffix else x.transpose(1, 2).reshape(11, -1)
    qlib_network.double().load_state_dict(net.double().state_dict())
    result, numbers = net(arguments), qlib_network(arguments)
    assert relative_error(result, numbers) < 1e-12
    assert net(arguments[:1]).shape == (1,)
    of_ours, of_theirs = gradients(net, result), gradients(qlib_network, numbers)
    assert list(of_ours) == list(of_theirs)
    for name, value in of_theirs.items():
        assert relative_error(of_ours[name], value) < 1e-11, name


@both
def test_qlibs_defaults(kind: type) -> None:
    import inspect

    pytest.importorskip("qlib", reason="pyqlib is the oracle; install qfast-models[qlib]")
    theirs = importlib.import_module(f"qlib.contrib.model.pytorch_{kind.__name__.lower()}").Transformer
    expected = [(p.name, p.default) for p in inspect.signature(theirs).parameters.values()]
    ours = inspect.signature(kind).parameters.values()
    assert [(p.name, p.default) for p in ours if p.kind != p.KEYWORD_ONLY] == expected
    assert [(p.name, p.default) for p in ours if p.kind == p.KEYWORD_ONLY] == [("precision", "float32")]
