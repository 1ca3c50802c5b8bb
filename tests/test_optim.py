"""Clipping and Adam's step in one call: compared with torch's, in float64, with unusual values, and as an optimiser."""

from __future__ import annotations

import copy
import io
import pickle
from itertools import chain, pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import clip_grad_value_
from torch.optim.optimizer import register_optimizer_step_post_hook

from qfast import _backend
from qfast.data import DatasetH
from qfast.errors import DataError
from qfast.models import GRU
from qfast.ops import clipped_adam_
from qfast.ops.adam import self_test
from qfast.training.callbacks import Callback
from qfast.training.optim import ClippedAdam
from support.frames import make_frame

SHAPES = [(64,), (1,), (7,), (8,), (0,), (33, 17), (3, 5, 2), (), (1003,)]
NATIVE = _backend.native is not None
INF, NAN = float("inf"), float("nan")


def parameters(shapes=SHAPES, dtype=torch.float32, seed=0, device="cpu"):
    rng = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=rng, dtype=torch.float64).to(device, dtype)) for shape in shapes]


def give_gradients(params, step, scale=2.0):
    rng = torch.Generator().manual_seed(1000 + step)
    for p in params:
        p.grad = (torch.randn(p.shape, generator=rng, dtype=torch.float64) * scale).to(p.device, p.dtype)


def run(optimizer, params, steps, limit=3.0, first=0):
    """Runs steps with the same gradients for all optimisers. Gradients are clipped before torch's Adam."""
    for step in range(first, first + steps):
        give_gradients(params, step)
        if not isinstance(optimizer, ClippedAdam):
            clip_grad_value_(params, limit)
        optimizer.step()


def everything(optimizer, params):
    """Parameters, gradients and states, in order."""
    states = [optimizer.state[p] for p in params if p in optimizer.state]
    named = [[state[name] for state in states] for name in ("exp_avg", "exp_avg_sq", "step")]
    return [p.detach() for p in params] + [p.grad for p in params if p.grad is not None] + [*chain(*named)]


def same(ours, theirs):
    return all(torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) for a, b in zip(ours, theirs, strict=True))


def is_exact(isa):
    """Whether qfast rounds like torch on this machine: both use FMA."""
    return torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512") and isa in ("avx2", "avx512", "plain torch")


# ---------------------------------------------------------------- compared with torch
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.3, 0.8), (0.0, 0.0)])
def test_equals_torch_fused(isa, dtype, weight_decay, betas):
    ours, theirs = parameters(dtype=dtype), parameters(dtype=dtype)
    settings = {"lr": 1e-2, "weight_decay": weight_decay, "betas": betas}
    mine, other = ClippedAdam(ours, **settings), torch.optim.Adam(theirs, fused=True, **settings)
    run(mine, ours, 25), run(other, theirs, 25)
    if is_exact(isa):
        assert same(everything(mine, ours), everything(other, theirs))
    precision = 1e-6 if dtype == torch.float32 else 1e-15
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=3 * precision, atol=10 * precision * settings["lr"])


@given(
    sizes=st.lists(st.lists(st.integers(0, 40), max_size=3), min_size=1, max_size=6),
    steps=st.integers(1, 6),
    lr=st.floats(1e-6, 1.0),
    beta1=st.floats(0.0, 0.999),
    beta2=st.floats(0.5, 0.9999),
    eps=st.floats(1e-12, 1e-2),
    weight_decay=st.sampled_from([0.0, 1e-3, 0.5]),
    limit=st.sampled_from([0.1, 3.0, INF]),
    wide=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_any_network(sizes, steps, lr, beta1, beta2, eps, weight_decay, limit, wide):
    dtype = torch.float64 if wide else torch.float32
    given_settings = {"lr": lr, "betas": (beta1, beta2), "eps": eps, "weight_decay": weight_decay}
    ours, theirs, plain = (parameters([tuple(s) for s in sizes], dtype) for _ in range(3))
    mine = ClippedAdam(ours, limit=limit, **given_settings)
    other = torch.optim.Adam(theirs, fused=True, **given_settings)
    single = torch.optim.Adam(plain, foreach=False, **given_settings)
    run(mine, ours, steps), run(other, theirs, steps, limit), run(single, plain, steps, limit)
    if is_exact("plain torch" if _backend.native is None else _backend.native.isa()):
        assert same(everything(mine, ours), everything(other, theirs))
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4 if not wide else 1e-11, atol=lr * (1e-4 if not wide else 1e-11))


@pytest.mark.parametrize("kind", [{}, {"foreach": True}, {"fused": True}])
def test_errors_are_not_larger_than_torchs(isa, kind):
    """Both are compared with float64 over many steps."""
    ours, theirs, exact = parameters(), parameters(), parameters(dtype=torch.float64)
    for p, e in zip(ours, exact, strict=True):
        e.data.copy_(p.data)
    run(ClippedAdam(ours, lr=1e-2, weight_decay=0.01), ours, 100)
    run(torch.optim.Adam(theirs, lr=1e-2, weight_decay=0.01, **kind), theirs, 100)
    reference = torch.optim.Adam(exact, lr=1e-2, weight_decay=0.01)
    for step in range(100):
        give_gradients(ours, step)  # the float32 gradients
        for p, e in zip(ours, exact, strict=True):
            e.grad = p.grad.double()
        clip_grad_value_(exact, 3.0)
        reference.step()
    largest = lambda ps: max(float((p - e).detach().abs().max()) for p, e in zip(ps, exact, strict=True) if p.numel())  # noqa: E731
    errors = largest(ours), largest(theirs)
    assert errors[0] <= 2 * errors[1] + 1e-7


def test_gradients_are_clipped_in_place(isa):
    """NaN stays NaN and spreads to its own element alone; infinities become the limit, as with clamp_."""
    values = [5.0, -5.0, 3.0, -3.0, 0.5, -0.0, INF, -INF, NAN, 3.0000002, 1e-40]
    params, theirs = ([nn.Parameter(torch.ones(len(values) * 3))] for _ in range(2))
    for group in (params, theirs):
        group[0].grad = torch.tensor(values * 3)
    before = params[0].grad
    ClippedAdam(params, lr=0.1).step()
    clip_grad_value_(theirs, 3.0)
    torch.optim.Adam(theirs, lr=0.1, fused=True).step()
    assert params[0].grad is before
    assert same([before], [theirs[0].grad])
    assert torch.signbit(before).tolist() == torch.signbit(theirs[0].grad).tolist()
    assert torch.equal(params[0].isnan(), before.isnan())
    torch.testing.assert_close(params, theirs, equal_nan=True)


@pytest.mark.skipif(not NATIVE, reason="the twin leaves threads to torch")
def test_threads_change_no_bit(isa):
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            params = parameters([(300, 217), (65,), (90_001,), (31, 7)])
            optimizer = ClippedAdam(params, lr=1e-2, weight_decay=0.1)
            run(optimizer, params, 3)
            results.append(everything(optimizer, params))
    finally:
        torch.set_num_threads(before)
    assert all(same(a, b) for a, b in pairwise(results))


def odd_layouts(dtype=torch.float64):
    """Transposed, a slice of a larger tensor, every other element, reversed axes."""
    rng = torch.Generator().manual_seed(3)
    make = lambda *shape: torch.randn(*shape, generator=rng, dtype=dtype)  # noqa: E731
    return [make(7, 5).t(), make(9, 12)[2:7, 3:11], make(40)[::2], make(2, 3, 4).permute(2, 0, 1), make(3, 4)]


def test_any_strides(isa):
    ours = [nn.Parameter(part) for part in odd_layouts()]
    plain = [nn.Parameter(part.clone(memory_format=torch.contiguous_format)) for part in odd_layouts()]
    mine, single = ClippedAdam(ours, lr=0.1), torch.optim.Adam(plain, lr=0.1, foreach=False)
    for step in range(4):
        give_gradients(plain, step)
        for p, q in zip(ours, plain, strict=True):
            p.grad = q.grad.clone() if step % 2 else torch.empty_like(p).copy_(q.grad)
        clip_grad_value_(plain, 3.0)
        mine.step(), single.step()
        for p, q in zip(ours, plain, strict=True):
            torch.testing.assert_close(p.detach().contiguous(), q.detach(), rtol=1e-12, atol=1e-13)
            assert torch.equal(p.grad, q.grad)


def test_the_operator_equals_plain_torch(isa):
    self_test(torch.device("cpu"))
    lists = [[p.detach() for p in parameters(dtype=torch.float64, seed=i)] for i in range(4)]
    lists[3] = [part.square() for part in lists[3]]
    steps = [torch.tensor(float(i)) for i in range(len(SHAPES))]
    arguments = (*lists, steps, None, 1e-2, 0.9, 0.999, 1e-8, 0.1, 3.0)
    torch.library.opcheck(torch.ops.qfast.clipped_adam_.default, arguments)


def test_autograd_sees_the_change():
    p, state = torch.ones(3, requires_grad=True), [[torch.zeros(3)], [torch.zeros(3)], [torch.tensor(0.0)]]
    loss = (p * p).sum()
    clipped_adam_([p.detach()], [torch.ones(3)], *state, lr=0.1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# ---------------------------------------------------------------- wrong inputs
def lists_of(*shapes, dtype=torch.float32):
    return [[torch.zeros(shape, dtype=dtype) for shape in shapes] for _ in range(4)] + [
        [torch.zeros(()) for _ in shapes]
    ]


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ((1, 1), torch.zeros(4), r"gradients\[1\]: expected the shape of parameters\[1\], \(3,\), got \(4,\)"),
        ((2, 0), torch.zeros(2, dtype=torch.float64), r"exp_avg\[0\]: expected the dtype .*Remedy: one call"),
        ((0, 0), torch.zeros(2, dtype=torch.float16), "parameters: expected dtype float32 or float64, got"),
        ((4, 1), torch.zeros(2), r"steps\[1\]: expected one float32 number, got shape \(2,\)"),
        ((4, 0), torch.zeros((), dtype=torch.float64), r"steps\[0\]: expected one float32 number"),
        ((1, 0), torch.zeros(1).expand(2), r"gradients\[0\]: several elements share memory.*clone"),
        ((1, 0), None, r"gradients\[0\]: expected a tensor, got NoneType.*Remedy: leave out"),
    ],
)
def test_wrong_tensors(isa, place, value, message):
    lists = lists_of((2,), (3,))
    lists[place[0]][place[1]] = value
    with pytest.raises(DataError, match=message):
        clipped_adam_(*lists, lr=0.1)
    assert all(part is value or float(part.abs().sum()) == 0 for tensors in lists for part in tensors)  # untouched


@pytest.mark.parametrize("place", range(5))
def test_sparse_tensors_change_nothing(isa, place):
    lists = [[torch.ones(3)] for _ in range(4)] + [[torch.tensor([1.0])]]
    lists[place] = [lists[place][0].to_sparse()]
    with pytest.raises(DataError, match=r"\[0\]: expected a dense tensor, got torch.sparse_coo. Remedy: .to_dense\(\)"):
        clipped_adam_(*lists, lr=0.1)
    assert all(torch.equal(part[0].to_dense(), torch.ones(part[0].shape)) for part in lists)


def test_wrong_lengths_and_limits(isa):
    lists = lists_of((2,), (3,))
    with pytest.raises(DataError, match=r"exp_avg_sq: expected 2 tensors as in parameters, got 1"):
        clipped_adam_(*lists[:3], lists[3][:1], lists[4], lr=0.1)
    with pytest.raises(DataError, match=r"steps: expected 2 tensors as in parameters, got 1"):
        clipped_adam_(*lists[:4], lists[4][:1], lr=0.1)
    for limit in (0.0, -1.0, NAN):
        with pytest.raises(DataError, match=r"limit: expected a number above 0, got .*Remedy: pass inf for no limit"):
            clipped_adam_(*lists, lr=0.1, limit=limit)
    for limit in (0, -1.0, NAN, "3", True, None):
        with pytest.raises(DataError, match=r"ClippedAdam: limit: expected a positive number, got .*Remedy"):
            ClippedAdam(parameters(), limit=limit)
    with pytest.raises(ValueError, match="Invalid learning rate"):
        ClippedAdam(parameters(), lr=-1.0)


# ---------------------------------------------------------------- as an optimiser
def count_operator(monkeypatch):
    calls = []
    original = clipped_adam_

    def counted(*args, **kwargs):
        calls.append(len(args[0]))
        return original(*args, **kwargs)

    monkeypatch.setattr("qfast.training.optim.clipped_adam_", counted)
    return calls


@pytest.mark.skipif(not NATIVE, reason="plain torch always runs torch's step")
@pytest.mark.parametrize(
    ("settings", "dtype"),
    [
        ({"amsgrad": True}, torch.float32),
        ({"maximize": True}, torch.float32),
        ({"decoupled_weight_decay": True, "weight_decay": 0.1}, torch.float32),
        ({"foreach": True}, torch.float32),
        ({"fused": False}, torch.float32),
        ({}, torch.bfloat16),
    ],
)
def test_unsupported_parameters_use_torchs_adam(monkeypatch, settings, dtype):
    calls = count_operator(monkeypatch)
    ours, theirs = parameters(dtype=dtype), parameters(dtype=dtype)
    mine = ClippedAdam(ours, lr=0.1, **settings)
    chosen = {} if "foreach" in settings else {"fused": True}
    other = torch.optim.Adam(theirs, lr=0.1, **{**chosen, **settings})
    run(mine, ours, 3), run(other, theirs, 3)
    assert same(everything(mine, ours), everything(other, theirs))
    assert not calls


@pytest.mark.skipif(not NATIVE, reason="plain torch always runs torch's step")
def test_groups_and_missing_gradients(monkeypatch):
    """Groups have separate settings, parameters without a gradient do not change, mixed dtypes use torch's step."""
    calls = count_operator(monkeypatch)
    ours, theirs = parameters(), parameters()
    make = lambda ps: [{"params": ps[:3], "lr": 0.3, "weight_decay": 0.1}, {"params": ps[3:]}]  # noqa: E731
    mine, other = ClippedAdam(make(ours), lr=0.1), torch.optim.Adam(make(theirs), lr=0.1, fused=True)
    extra = [nn.Parameter(torch.ones(5)), nn.Parameter(torch.ones(5))]
    mine.add_param_group({"params": [extra[0]], "betas": (0.5, 0.9)})
    other.add_param_group({"params": [extra[1]], "betas": (0.5, 0.9)})
    ours.append(extra[0]), theirs.append(extra[1])
    for step in range(4):
        for optimizer, params in ((mine, ours), (other, theirs)):
            give_gradients(params, step)
            params[2].grad = params[4].grad = None
            if step == 1:
                params[0].grad = None  # its step count is behind that of the others
            if optimizer is other:
                clip_grad_value_(params, 3.0)
            optimizer.step()
    assert calls == [2, 5, 1, 1, 5, 1, 2, 5, 1, 2, 5, 1]
    assert same(everything(mine, ours), everything(other, theirs))
    assert float(mine.state[ours[0]]["step"]) == 3
    mixed = [*parameters([(3,)]), *parameters([(3,)], torch.float64)]
    run(ClippedAdam(mixed, lr=0.1), mixed, 2)
    assert len(calls) == 12
    nothing = ClippedAdam(parameters(), lr=0.1)
    nothing.step()
    assert not nothing.state


def test_states_exchange_with_torchs():
    """Three steps of each optimiser, in either order, equal six steps of one."""
    for kind in ({"fused": True}, {}, {"foreach": True}):
        for ours_first in (True, False):
            whole, params = parameters(), parameters()
            run(torch.optim.Adam(whole, lr=0.1, fused=True), whole, 6)
            first = ClippedAdam(params, lr=0.1) if ours_first else torch.optim.Adam(params, lr=0.1, **kind)
            run(first, params, 3)
            buffer = io.BytesIO()
            torch.save(first.state_dict(), buffer)
            saved = torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)
            second = torch.optim.Adam(params, lr=0.5, **kind) if ours_first else ClippedAdam(params, lr=0.5)
            second.load_state_dict(saved)
            run(second, params, 3, first=3)
            for a, b in zip(params, whole, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
            state = second.state[params[0]]
            assert state["step"].dtype == torch.float32
            assert state["step"].shape == ()
            assert float(state["step"]) == 6


def test_state_dict_is_torchs():
    ours, theirs = parameters(), parameters()
    mine, other = ClippedAdam(ours, lr=0.1, limit=1.0), torch.optim.Adam(theirs, lr=0.1, fused=True)
    run(mine, ours, 1), run(other, theirs, 1)
    result, expected = mine.state_dict(), other.state_dict()
    assert result["param_groups"] == expected["param_groups"]
    assert [list(s) for s in result["state"].values()] == [list(s) for s in expected["state"].values()]


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["copy", "pickle"]
)
def test_copies_continue_equally(copied):
    params = parameters()
    optimizer = ClippedAdam(params, lr=0.1, limit=0.5)
    run(optimizer, params, 2)
    others, twin = copied((params, optimizer))
    assert twin.limit == 0.5
    run(optimizer, params, 2, first=2), run(twin, others, 2, first=2)
    assert same(everything(optimizer, params), everything(twin, others))


@pytest.mark.parametrize("settings", [{}, {"amsgrad": True}], ids=["operator", "torch"])
def test_hooks_are_called_once(settings):
    params = parameters()
    torch.optim.Adam(params)  # torch wraps the step of a class in hooks when the first instance is created
    optimizer, seen = ClippedAdam(params, lr=0.1, **settings), []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    handle = register_optimizer_step_post_hook(lambda *_: seen.append("any"))
    try:
        run(optimizer, params, 1)
    finally:
        handle.remove()
    assert seen == ["before", "after", "any"]


def test_a_replaced_state_is_used_in_the_next_step():
    """Also if only one tensor of it was replaced."""
    params, copies = parameters(), parameters()
    ours, theirs = ClippedAdam(params, lr=0.1), ClippedAdam(copies, lr=0.1)
    run(ours, params, 2), run(theirs, copies, 2)
    ours.state[params[0]]["exp_avg"] = torch.full_like(params[0], 3.0)
    theirs.state[copies[0]]["exp_avg"].fill_(3.0)
    ours.state[params[1]] = {}
    theirs.state[copies[1]]["step"].zero_(), theirs.state[copies[1]]["exp_avg"].zero_()
    theirs.state[copies[1]]["exp_avg_sq"].zero_()
    run(ours, params, 2, first=2), run(theirs, copies, 2, first=2)
    assert same(everything(ours, params), everything(theirs, copies))


def test_an_overridden_init_group_is_called():
    calls = []

    class Counting(ClippedAdam):
        def _init_group(self, group, *lists):
            calls.append(group)
            return super()._init_group(group, *lists)

    params = parameters()
    optimizer = Counting(params, lr=0.1)
    run(optimizer, params, 3)
    assert len(calls) == 3


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(set_to_none):
    params = parameters()
    optimizer = ClippedAdam(params[:-1], lr=0.1)
    give_gradients(params, 0)
    params[1].grad = None
    optimizer.zero_grad(set_to_none)
    for number, parameter in enumerate(params[:-1]):
        if set_to_none or number == 1:
            assert parameter.grad is None
        else:
            assert torch.equal(parameter.grad, torch.zeros_like(parameter))
    assert params[-1].grad is not None
    with torch.autograd.profiler.profile() as profile:
        optimizer.zero_grad(set_to_none)
    assert "Optimizer.zero_grad#ClippedAdam.zero_grad" in {event.name for event in profile.function_events}


def test_closures_schedulers_and_tensor_rates():
    params = parameters([(5,)])
    optimizer = ClippedAdam(params, lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = params[0].square().sum()
        loss.backward()
        return loss

    first = optimizer.step(closure)
    assert first.requires_grad
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    assert float(optimizer.step(closure).detach()) < float(first.detach())
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.05
    ours, theirs = parameters(), parameters()
    run(ClippedAdam(ours, lr=torch.tensor(0.125)), ours, 2), run(ClippedAdam(theirs, lr=0.125), theirs, 2)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_scaled_gradients_are_clipped_after_unscaling():
    ours, theirs = parameters([(6,)]), parameters([(6,)])
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = ClippedAdam(ours, lr=0.1)
    loss = (ours[0] * 2).sum()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    theirs[0].grad = torch.full((6,), 2.0)
    ClippedAdam(theirs, lr=0.1).step()
    assert torch.equal(ours[0].grad, theirs[0].grad)
    assert torch.equal(ours[0], theirs[0])


def test_sparse_gradients_are_refused_as_torch_does():
    table = nn.Embedding(5, 3, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match=r"[Ss]parse"):
        ClippedAdam(table.parameters(), lr=0.1).step()


# ---------------------------------------------------------------- in the training loop
@pytest.mark.parametrize("name", ["adam", "gd"])
def test_estimators_clip_whatever_the_optimizer(name):
    """The labels make gradients large. A callback sees them clipped."""
    largest = []

    class Look(Callback):
        def on_batch_end(self, model):
            largest.append(max(float(p.grad.abs().max()) for p in model.network.parameters()))

    frame = make_frame(40, 9, 12)
    frame["label"] *= 1e4
    dataset = DatasetH(handler=frame, segments={"train": (None, None)})
    model = GRU(d_feat=3, hidden_size=8, n_epochs=1, batch_size=32, lr=1e-6, seed=1, optimizer=name)
    model.fit(dataset, callbacks=[Look()])
    assert isinstance(model.train_optimizer, torch.optim.Adam if name == "adam" else torch.optim.SGD)
    assert isinstance(model.train_optimizer, ClippedAdam) == (name == "adam")
    assert largest
    assert max(largest) == 3.0
