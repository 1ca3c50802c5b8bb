"""Temporal convolution networks day by day: a new row of each instrument in, its score out, nothing computed twice.

Reading order: `TCNStream` (names and checks), then `_State` and `_Network` (one step of all convolutions).
"""

from __future__ import annotations

import copy
import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Integral
from typing import TYPE_CHECKING, Any, NamedTuple, ParamSpec, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from qfast.errors import CheckpointError, ConfigError, DataError, shown, some, suggest

if TYPE_CHECKING:
    from qfast.nn.tcn import CausalConv1d, TCNModel, TemporalBlock

__all__ = ["TCNStream"]

Name = str | int
_P = ParamSpec("_P")
_R = TypeVar("_R")


def _without_autograd(method: Callable[_P, _R]) -> Callable[_P, _R]:
    """Without gradients, but not in inference mode: a state made in it could not be changed outside of it."""
    return torch.inference_mode(False)(torch.no_grad()(method))


class TCNStream:
    """Scores the next day from what the days before left behind: one row of each instrument, one step of each layer.

    For each instrument it keeps the inputs of every convolution that later steps will read: the last
    (kernel_size - 1) * dilation + 1. A push costs what one step of the network costs, however long the history is.

    Parameters
    ----------
    model : TCNModel
        In evaluation mode. Its weights are copied: the stream goes on with those it was made with when the model is
        trained further, because what it keeps was computed with them. `model.stream()` is the same.

    Raises
    ------
    ConfigError
        The model is in training mode, or has hooks or replaced modules.

    Notes
    -----
    The n-th score of an instrument is that of the network over its first n rows, up to rounding, and so that of every
    window of its last `receptive_field` rows or more. A shorter window begins with zeros where the stream remembers
    rows: its score differs. A NaN stays with its instrument and is forgotten `receptive_field` rows later.

    Computed in the model's dtype (half precisions in float32), without gradients, whatever autocast says. A push that
    fails or is interrupted can be repeated with the same rows.

    Source
    ------
    Paine et al. 2016 (Fast Wavenet Generation Algorithm), here with residual blocks of two convolutions.

    Examples
    --------
    >>> from qfast.nn import TCNModel
    >>> model = TCNModel(num_input=6, output_size=1, num_channels=[8] * 2, kernel_size=3, dropout=0.5).eval()
    >>> history = torch.randn(2, 6, 60)  # two instruments, 60 days
    >>> stream = TCNStream(model)
    >>> stream.warm_start(history[:, :, :59], ["AAPL", "MSFT"]).shape
    torch.Size([2])
    >>> scores = stream.push(history[:, :, 59], ["AAPL", "MSFT"])
    >>> torch.allclose(scores, model(history), atol=1e-5)
    True
    """

    @_without_autograd
    def __init__(self, model: TCNModel) -> None:
        _check_model(model)
        self._network = _Network(model)
        self._state = self._network.beginning(0)
        self._row_of: dict[Name, int] = {}
        self._last: tuple[list[Name], Tensor] | None = None  # names of the last call and their rows

    # ------------------------------------------------------------ day by day
    @_without_autograd
    def push(self, rows: Tensor, instruments: Iterable[Name] | None = None) -> Tensor:
        """Takes the next row of each of these instruments and scores it.

        Parameters
        ----------
        rows : Tensor [N, F]
            In the model's dtype, on the stream's device, any strides.
        instruments : N names (str or int), optional
            Whose rows these are, in any order. A new name begins with an empty past, as a window begins with zeros;
            one that is left out stays at its last row, as if there had been no such day. Without names the rows are
            those of the instruments 0, 1, ..., always of all of them.

        Returns
        -------
        Tensor [N], or [N, output_size] if that is more than 1
            In the order of the rows.

        Raises
        ------
        DataError
            `rows` does not fit the model; a name is missing, comes twice or is neither str nor int.
        """
        self._check_given("rows", "[N, F]", rows)
        names = self._names(instruments, len(rows))
        new = [name for name in names if name not in self._row_of]
        if new:
            self._hold([*self._row_of, *new], self._state.joined(self._network.beginning(len(new))))
        return self._network.step(self._state, self._rows(names), rows)

    @_without_autograd
    def warm_start(
        self, history: Tensor, instruments: Iterable[Name] | None = None, lengths: Sequence[int] | Tensor | None = None
    ) -> Tensor:
        """Puts these instruments where pushing their rows one by one would have put them, whatever they had before.

        Only the last `receptive_field` rows count, and only they are computed.

        Parameters
        ----------
        history : Tensor [N, F, T]
            As the network takes it, the newest row last.
        instruments : N names (str or int), optional
            As in `push`.
        lengths : N whole numbers in [1, T], optional
            How many rows each instrument has: its last ones; what stands before them is not read. T unless given.

        Returns
        -------
        Tensor [N], or [N, output_size] if that is more than 1
            Scores of the newest rows.

        Raises
        ------
        DataError
            As `push`; a length outside [1, T].
        """
        self._check_given("history", "[N, F, T]", history)
        count, _, steps = history.shape
        known = _lengths(lengths, count, steps)
        names = self._names(instruments, count)
        fresh = self._network.beginning(count)
        fresh.seen.copy_((known - self.receptive_field).clamp(min=0))
        scores = history.new_empty(0)
        for back in range(min(steps, self.receptive_field), 0, -1):
            begun = (known >= back).nonzero().squeeze(1).to(self.device)
            scores = self._network.step(fresh, begun, history[:, :, -back].index_select(0, begun))
        warm = set(names)
        others = [name for name in self._row_of if name not in warm]
        self._hold([*others, *names], self._state.take(self._rows(others)).joined(fresh))
        return scores

    @_without_autograd
    def forget(self, instruments: Iterable[Name]) -> None:
        """Drops these instruments and the memory they take; a name that comes again begins anew.

        Raises
        ------
        DataError
            A name that the stream does not hold.
        """
        leaving = set(_as_list(instruments))
        for name in leaving - self._row_of.keys():
            raise DataError(f"instruments: the stream holds no {name!r}.{suggest(name, self._row_of)}")
        staying = [name for name in self._row_of if name not in leaving]
        self._hold(staying, self._state.take(self._rows(staying)))

    # ------------------------------------------------------------ what it holds
    @property
    def instruments(self) -> list[Name]:
        """Names, in the order of `seen` and of the state."""
        return list(self._row_of)

    @property
    def seen(self) -> Tensor:
        """int64 [N], how many rows each of `instruments` has had."""
        return self._state.seen.clone()

    @property
    def receptive_field(self) -> int:
        """How many rows a score depends on."""
        return self._network.receptive_field

    @property
    def bytes_per_instrument(self) -> int:
        """Memory that the state of one instrument takes."""
        state = self._network.beginning(1)
        return sum(part.nbytes for part in (*state.inputs, state.seen))

    @property
    def device(self) -> torch.device:
        """Where weights and state are."""
        return self._state.seen.device

    def __len__(self) -> int:
        return len(self._row_of)

    def __repr__(self) -> str:
        return (
            f"TCNStream({len(self)} instruments, {self.bytes_per_instrument} bytes each, receptive field "
            f"{self.receptive_field}, {self._network.dtype}, {self.device})"
        )

    @_without_autograd
    def to(self, device: torch.device | str) -> TCNStream:
        """Moves weights and state, in place, as a module's `to` does."""
        self._network.to(torch.device(device))
        self._hold(self.instruments, self._state.to(torch.device(device)))
        return self

    # ------------------------------------------------------------ saving
    def state_dict(self) -> dict[str, Any]:
        """A copy of the state, for `torch.save`; it holds nothing that `torch.load` would have to execute.

        Returns
        -------
        dict
            "instruments": names. "seen": int64 [N]. "inputs": of each convolution [slots, N, C_in], the input of step
            t in slot t % slots. "weights": digest of the model's weights.
        """
        inputs = [part.clone() for part in self._state.inputs]
        return {"instruments": self.instruments, "seen": self.seen, "inputs": inputs, "weights": self._network.digest}

    @_without_autograd
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where `state_dict` was called, on any device.

        Raises
        ------
        CheckpointError
            The state is of a model with other weights, or is not a whole state.
        """
        missing = {"instruments", "seen", "inputs", "weights"} - state.keys()
        if missing:
            raise CheckpointError(f"state has no {some(sorted(missing))}: it is not of TCNStream.state_dict().")
        if state["weights"] != self._network.digest:
            raise CheckpointError(
                "state was computed with other weights than this stream's: it would score with neither. Remedy: load "
                "the weights it was made with before model.stream(), or warm_start from the rows."
            )
        names, given = list(state["instruments"]), _State(list(state["inputs"]), state["seen"])
        expected = self._network.beginning(len(names))
        if given.layout() != expected.layout() or len(set(names)) < len(names):
            raise CheckpointError(
                f"state does not hold {len(names)} different instruments of this model: expected (shape, dtype) of "
                f"inputs and seen {expected.layout()}, got {given.layout()}."
            )
        self._hold(names, given.take(torch.arange(len(names), device=given.seen.device)).to(self.device))

    # ------------------------------------------------------------ names and checks
    def _hold(self, names: list[Name], state: _State) -> None:
        self._state, self._last = state, None
        plain = [str(name) if isinstance(name, str) else int(name) for name in names]  # NumPy's cannot be saved
        self._row_of = {name: row for row, name in enumerate(plain)}

    def _rows(self, names: list[Name]) -> Tensor:
        """int64 [N], where the state of these instruments stands."""
        if self._last is None or self._last[0] != names:
            rows = torch.tensor([self._row_of[name] for name in names], dtype=torch.int64, device=self.device)
            self._last = names, rows
        return self._last[1]

    def _names(self, instruments: Iterable[Name] | None, count: int) -> list[Name]:
        if instruments is None:
            if self._row_of and self._row_of.keys() != set(range(count)):
                raise DataError(
                    f"instruments must be given for {count} rows: the stream holds {len(self)} instruments "
                    f"({some(self.instruments, 3)}) and cannot tell whose rows these are."
                )
            return list(range(count))
        names = _as_list(instruments)
        if len(names) != count:
            raise DataError(f"instruments has {len(names)} names for {count} rows: give one for each row.")
        if len(set(names)) < count:
            twice = Counter(names).most_common(1)[0][0]
            raise DataError(f"instruments names {twice!r} more than once: an instrument has one row in a call.")
        return names

    def _check_given(self, name: str, axes: str, given: Tensor) -> None:
        features, dtype = self._network.features, self._network.dtype
        if not isinstance(given, Tensor):
            raise DataError(
                f"{name} must be a tensor {axes}, got {type(given).__name__}. Remedy: torch.as_tensor({name})."
            )
        if given.dim() != axes.count(",") + 1 or given.shape[1] != features or 0 in given.shape[2:]:
            raise DataError(
                f"{name} must be {axes} with F = num_input = {features} of the model, got shape {list(given.shape)}."
            )
        if given.dtype != dtype or given.device != self.device:
            raise DataError(
                f"{name} is {given.dtype} on {given.device} but the stream is {dtype} on {self.device}. Remedy: "
                f"{name}.to({str(self.device)!r}, {dtype})."
            )


def _as_list(instruments: Any) -> list[Name]:
    """Also of an array, a tensor or a pandas index: plain names, which can be compared and saved."""
    if isinstance(instruments, (str, Integral)):
        raise DataError(f"instruments must be a list of names, got {instruments!r}. Remedy: [{instruments!r}].")
    names = list(instruments.tolist() if hasattr(instruments, "tolist") else instruments)
    for name in names:
        if not isinstance(name, (str, Integral)):
            raise DataError(f"instruments holds {shown(name)}: a name must be str or int, so that it can be saved.")
    return names


def _lengths(lengths: Sequence[int] | Tensor | None, count: int, steps: int) -> Tensor:
    """int64 [N] on the CPU."""
    if lengths is None:
        return torch.full((count,), steps)
    known = torch.as_tensor(lengths).cpu()
    if known.is_floating_point() or known.shape != (count,) or not bool(((known >= 1) & (known <= steps)).all()):
        raise DataError(
            f"lengths must be {count} whole numbers in [1, {steps}], one for each instrument, got {shown(lengths)}. "
            "Remedy: leave out instruments that have no rows."
        )
    return known.long()


def _check_model(model: TCNModel) -> None:
    modules = list(model.modules())
    if any(module.training for module in modules):
        raise ConfigError("model is in training mode, and a stream has no dropout. Remedy: model.eval().")
    hooked = any(module._forward_hooks or module._forward_pre_hooks for module in modules)
    if hooked or type(model.linear) is not nn.Linear or not model.tcn.takes_operator():
        raise ConfigError(
            "model has hooks or modules that were replaced, which a stream would not call. Remedy: remove them, or "
            "score whole windows by model(x)."
        )


# ---------------------------------------------------------------- the network, one step at a time
class _State(NamedTuple):
    """What N instruments left behind."""

    inputs: list[Tensor]  # of each convolution [slots, N, C_in]: that of step t in slot t % slots, zeros before step 0
    seen: Tensor  # int64 [N], steps taken

    def take(self, rows: Tensor) -> _State:
        return _State([part.index_select(1, rows) for part in self.inputs], self.seen.index_select(0, rows))

    def joined(self, other: _State) -> _State:
        inputs = [torch.cat(parts, 1) for parts in zip(self.inputs, other.inputs, strict=True)]
        return _State(inputs, torch.cat((self.seen, other.seen)))

    def to(self, device: torch.device) -> _State:
        return _State([part.to(device) for part in self.inputs], self.seen.to(device))

    def layout(self) -> list[tuple[list[int], torch.dtype]]:
        return [(list(part.shape), part.dtype) for part in (*self.inputs, self.seen)]


class _Convolution(NamedTuple):
    """A causal convolution as a product of matrices."""

    matrix: Tensor  # [k * C_in, C], the oldest tap first
    bias: Tensor
    features: int  # C_in
    back: Tensor  # int64 [k], how many steps before the current one each tap looks
    slots: int  # steps of its input to keep: as far as a tap looks, and the current one

    @classmethod
    def of(cls, convolution: CausalConv1d) -> _Convolution:
        weight, taps, dilation = convolution.weight, convolution.kernel_size, convolution.dilation
        back = torch.arange(taps - 1, -1, -1, device=weight.device) * dilation
        matrix = weight.permute(2, 1, 0).reshape(-1, weight.shape[0])
        return cls(matrix, convolution.bias, weight.shape[1], back, (taps - 1) * dilation + 1)

    def step(self, inputs: Tensor, seen: Tensor, where: Tensor, x: Tensor) -> Tensor:
        """x [n, C_in] of the instruments `where` at their steps `seen` -> [n, C], past the ReLU.

        x takes the slot of an input that no tap reaches any more, so that all of this may be done twice.
        """
        of_taps = (seen.unsqueeze(1) - self.back) % self.slots * inputs.shape[1] + where.unsqueeze(1)
        flat = inputs.view(-1, inputs.shape[2])
        flat.index_copy_(0, of_taps[:, -1], x)
        reached = flat.index_select(0, of_taps.view(-1)).view(len(x), len(self.matrix))
        return torch.addmm(self.bias, reached, self.matrix).relu_()


class _Network:
    """A copy of a model with its weights folded."""

    def __init__(self, model: TCNModel) -> None:
        self.dtype, self.features, self.output_size = model.linear.weight.dtype, model.num_input, model.output_size
        self.digest = _digest(model)
        self._model = copy.deepcopy(model).requires_grad_(False)
        self._model.zero_grad()
        if self.dtype.itemsize < 4:
            self._model.float()
        self._fold()

    def _fold(self) -> None:
        self._blocks = [
            (_Convolution.of(block.conv1), _Convolution.of(block.conv2), block.downsample)
            for block in cast("list[TemporalBlock]", list(self._model.tcn.network))
        ]

    def to(self, device: torch.device) -> None:
        self._model.to(device)
        self._fold()

    @property
    def receptive_field(self) -> int:
        return 1 + sum(first.slots - 1 + second.slots - 1 for first, second, _ in self._blocks)

    def beginning(self, count: int) -> _State:
        """The state of instruments without a row."""
        convolutions = [part for block in self._blocks for part in block[:2]]
        inputs = [part.matrix.new_zeros(part.slots, count, part.features) for part in convolutions]
        return _State(inputs, torch.zeros(count, dtype=torch.int64, device=inputs[0].device))

    def step(self, state: _State, where: Tensor, rows: Tensor) -> Tensor:
        """Scores of rows [n, F], the next ones of the instruments `where`, whose state goes on."""
        seen, inputs = state.seen.index_select(0, where), iter(state.inputs)
        with torch.autocast(rows.device.type, enabled=False):
            x = rows.to(state.inputs[0].dtype)
            for first, second, down in self._blocks:
                h = first.step(next(inputs), seen, where, x)
                y = second.step(next(inputs), seen, where, h)
                beside = x if down is None else functional.linear(x, down.weight.squeeze(2), down.bias)
                x = y.add_(beside).relu_()
            scores: Tensor = self._model.linear(x).to(self.dtype)
        state.seen.index_copy_(0, where, seen + 1)
        return scores.squeeze(1) if self.output_size == 1 else scores


def _digest(model: TCNModel) -> str:
    """The same wherever the weights lie; tells models of the same weights and other dilations apart."""
    digest = hashlib.sha256(repr([block.dilation for block in model.tcn.network]).encode())
    for name, weight in model.named_parameters():
        digest.update(f"{name} {weight.dtype} {list(weight.shape)}".encode())
        digest.update(weight.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
