"""Incremental scoring with temporal convolutional networks: push one new row per instrument, get its score.

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
    """Run a method without gradients, and outside inference mode even if the caller is in it.

    Tensors created in inference mode cannot be changed outside it, so the stream could not update its state later.
    """
    return torch.inference_mode(False)(torch.no_grad()(method))


class TCNStream:
    """Score day by day: push the next row of each instrument and get its score.

    For every convolution and instrument the stream keeps the last (kernel_size - 1) * dilation + 1 inputs, which are
    all that later steps read. A push computes one step of each layer, whatever the length of the history. The method
    is Paine et al. 2016 (Fast Wavenet Generation Algorithm), here for residual blocks of two convolutions.

    Parameters
    ----------
    model : TCNModel
        In evaluation mode. The stream copies the weights, so training the model further does not change the stream:
        its saved inputs depend on the weights that computed them. `model.stream()` is the same as TCNStream(model).

    Raises
    ------
    ConfigError
        If the model is in training mode, or has hooks or replaced modules.

    Notes
    -----
    The n-th score of an instrument equals the network's score of its first n rows up to rounding. It therefore equals
    the score of every window of its last `receptive_field` rows or more. In a shorter window the network reads zeros
    where the stream still has rows, so that score differs. NaN in a row affects only the scores of its instrument,
    until `receptive_field` further rows were pushed.

    Scores are computed in the model's dtype (float16 and bfloat16 in float32), without gradients and without autocast.
    A push that raises or is interrupted can be repeated with the same rows.

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

    _last_lookup: tuple[list[Name], Tensor] | None = None  # the names of the last call and their rows

    @_without_autograd
    def __init__(self, model: TCNModel) -> None:
        _check_model(model)
        self._network = _Network(model)
        self._state = self._network.initial_state(0)
        self._row_of: dict[Name, int] = {}

    # ------------------------------------------------------------ day by day
    @_without_autograd
    def push(self, rows: Tensor, instruments: Iterable[Name] | None = None) -> Tensor:
        """Append the next row of each of these instruments and score it.

        Parameters
        ----------
        rows : Tensor [N, F]
            In the model's dtype, on the stream's device, any strides.
        instruments : N names (str or int), optional
            The instrument of each row, in any order. A new instrument starts without history, like a window that is
            padded with zeros. An instrument without a row in this call does not change. If None, row i belongs to
            instrument i, and every call must have a row for each instrument.

        Returns
        -------
        Tensor [N], or [N, output_size] if output_size is more than 1
            Scores, in the order of the rows.

        Raises
        ------
        DataError
            If `rows` does not fit the model, or `instruments` has the wrong length, repeats a name or has a name that
            is neither str nor int.
        """
        self._check_tensor("rows", "[N, F]", rows)
        names = self._names(instruments, len(rows))
        new = [name for name in names if name not in self._row_of]
        if new:
            self._replace([*self._row_of, *new], self._state.concatenated(self._network.initial_state(len(new))))
        return self._network.step(self._state, self._rows(names), rows)

    @_without_autograd
    def warm_start(
        self, history: Tensor, instruments: Iterable[Name] | None = None, lengths: Sequence[int] | Tensor | None = None
    ) -> Tensor:
        """Set the state of these instruments to the state after pushing all rows of their history.

        Any earlier state of these instruments is replaced. Only the last `receptive_field` rows affect the state, and
        only they are computed.

        Parameters
        ----------
        history : Tensor [N, F, T]
            Windows as the network reads them, the newest row last. Windows of datasets are [N, T, F]; pass
            `windows.transpose(1, 2)`.
        instruments : N names (str or int), optional
            As in `push`.
        lengths : N integers in [1, T], optional
            Number of rows of each instrument. They are the last ones of its window; earlier values are not read.
            T by default.

        Returns
        -------
        Tensor [N], or [N, output_size] if output_size is more than 1
            Scores of the newest rows.

        Raises
        ------
        DataError
            As in `push`, or if a length is outside [1, T].
        """
        self._check_tensor("history", "[N, F, T]", history)
        count, _, steps = history.shape
        row_counts = _row_counts(lengths, count, steps)
        names = self._names(instruments, count)
        warm_state = self._network.initial_state(count)
        warm_state.seen.copy_((row_counts - self.receptive_field).clamp(min=0))
        scores = history.new_empty(0)
        for back in range(min(steps, self.receptive_field), 0, -1):
            started = (row_counts >= back).nonzero().squeeze(1).to(self.device)
            scores = self._network.step(warm_state, started, history[:, :, -back].index_select(0, started))
        warm = set(names)
        others = [name for name in self._row_of if name not in warm]
        self._replace([*others, *names], self._state.selected(self._rows(others)).concatenated(warm_state))
        return scores

    @_without_autograd
    def forget(self, instruments: Iterable[Name]) -> None:
        """Remove these instruments and free their memory. If one is pushed again, it starts without history.

        Raises
        ------
        DataError
            If the stream has no instrument of that name.
        """
        removed = set(_as_list(instruments))
        for name in removed - self._row_of.keys():
            raise DataError(
                f"instruments: the stream has no instrument {name!r}, it has {len(self)} "
                f"({some(self.instruments, 3)}).{suggest(name, self._row_of)}"
            )
        remaining = [name for name in self._row_of if name not in removed]
        self._replace(remaining, self._state.selected(self._rows(remaining)))

    # ------------------------------------------------------------ properties
    @property
    def instruments(self) -> list[Name]:
        """Names of the instruments, in the order of `seen` and of the state."""
        return list(self._row_of)

    @property
    def seen(self) -> Tensor:
        """Number of rows pushed for each of `instruments`, int64 [N]."""
        return self._state.seen.clone()

    @property
    def receptive_field(self) -> int:
        """Number of rows that a score depends on."""
        return self._network.receptive_field

    @property
    def bytes_per_instrument(self) -> int:
        """Size of one instrument's state in bytes."""
        state = self._network.initial_state(1)
        return sum(part.nbytes for part in (*state.inputs, state.seen))

    @property
    def device(self) -> torch.device:
        """Device of the weights and the state."""
        return self._state.seen.device

    def __len__(self) -> int:
        """Return the number of instruments."""
        return len(self._row_of)

    def __repr__(self) -> str:
        """Return a summary: instruments, bytes per instrument, receptive field, dtype and device."""
        return (
            f"TCNStream({len(self)} instruments, {self.bytes_per_instrument} bytes each, receptive field "
            f"{self.receptive_field}, {self._network.dtype}, {self.device})"
        )

    @_without_autograd
    def to(self, device: torch.device | str) -> TCNStream:
        """Move the weights and the state to `device` in place and return the stream."""
        self._network.to(torch.device(device))
        self._replace(self.instruments, self._state.to(torch.device(device)))
        return self

    # ------------------------------------------------------------ saving
    def state_dict(self) -> dict[str, Any]:
        """Return a copy of the state. After `torch.save`, `torch.load` reads it with weights_only=True.

        Returns
        -------
        dict
            "instruments": the names. "seen": int64 [N]. "inputs": for each convolution a tensor [slots, N, C_in], with
            the input of step t in slot t % slots. "weights": a digest of the model's weights.
        """
        inputs = [part.clone() for part in self._state.inputs]
        return {"instruments": self.instruments, "seen": self.seen, "inputs": inputs, "weights": self._network.digest}

    @_without_autograd
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved state, which may be on any device.

        Raises
        ------
        CheckpointError
            If the state is incomplete or belongs to a model with other weights.
        """
        missing = {"instruments", "seen", "inputs", "weights"} - state.keys()
        if missing:
            raise CheckpointError(
                f"state has no {some(sorted(missing))}, it has {some(sorted(map(str, state)))}. Remedy: use a result "
                "of TCNStream.state_dict()."
            )
        if state["weights"] != self._network.digest:
            raise CheckpointError(
                f"state was computed with other weights than this stream's (digest {shown(state['weights'], 20)}, "
                f"expected {shown(self._network.digest, 20)}). Remedy: load the weights that computed the state before "
                "model.stream(), or call warm_start with the rows."
            )
        names, saved = list(state["instruments"]), _State(list(state["inputs"]), state["seen"])
        expected = self._network.initial_state(len(names))
        if saved.layout() != expected.layout() or len(set(names)) < len(names):
            raise CheckpointError(
                f"state does not contain {len(names)} different instruments of this model: expected (shape, dtype) of "
                f"inputs and seen {expected.layout()}, got {saved.layout()} for {some(names, 3)}. Remedy: use an "
                "unchanged result of TCNStream.state_dict()."
            )
        copied = saved.selected(torch.arange(len(names), device=saved.seen.device))
        self._replace(names, copied.to(self.device))

    # ------------------------------------------------------------ names and checks
    def _replace(self, names: list[Name], state: _State) -> None:
        """Replace the instruments and their state."""
        self._state, self._last_lookup = state, None
        # torch.load with weights_only=True does not read NumPy's str and int.
        plain = [str(name) if isinstance(name, str) else int(name) for name in names]
        self._row_of = {name: row for row, name in enumerate(plain)}

    def _rows(self, names: list[Name]) -> Tensor:
        """Return the rows of the state that belong to these instruments, int64 [N].

        The result is cached, because most streams push the same instruments every day.
        """
        if self._last_lookup is None or self._last_lookup[0] != names:
            rows = torch.tensor([self._row_of[name] for name in names], dtype=torch.int64, device=self.device)
            self._last_lookup = names, rows
        return self._last_lookup[1]

    def _names(self, instruments: Iterable[Name] | None, count: int) -> list[Name]:
        """Return the checked names of `count` rows, 0 to count - 1 if `instruments` is None."""
        if instruments is None:
            if self._row_of and self._row_of.keys() != set(range(count)):
                raise DataError(
                    f"instruments is None for {count} rows, but the stream has {len(self)} instruments "
                    f"({some(self.instruments, 3)}). Remedy: pass the instrument of each row."
                )
            return list(range(count))
        names = _as_list(instruments)
        if len(names) != count:
            raise DataError(f"instruments has {len(names)} names for {count} rows. Remedy: pass one name for each row.")
        if len(set(names)) < count:
            name, repetitions = Counter(names).most_common(1)[0]
            raise DataError(
                f"instruments contains {name!r} {repetitions} times, expected each name once. Remedy: push the rows of "
                "an instrument in separate calls."
            )
        return names

    def _check_tensor(self, name: str, axes: str, value: object) -> None:
        """Raise DataError unless `value` is a tensor with these axes and the stream's dtype and device."""
        features, dtype = self._network.features, self._network.dtype
        if not isinstance(value, Tensor):
            raise DataError(
                f"{name} must be a tensor {axes}, got {type(value).__name__}. Remedy: torch.as_tensor({name})."
            )
        if value.dim() != axes.count(",") + 1 or value.shape[1] != features or 0 in value.shape[2:]:
            is_window = value.dim() == 3 and axes == "[N, F, T]" and value.shape[2] == features
            raise DataError(
                f"{name} must be {axes} with F = num_input = {features} of the model, got shape {list(value.shape)}."
                + (f" Windows of datasets are [N, T, F]. Remedy: {name}.transpose(1, 2)." if is_window else "")
            )
        if value.dtype != dtype or value.device != self.device:
            raise DataError(
                f"{name} is {value.dtype} on {value.device} but the stream is {dtype} on {self.device}. Remedy: "
                f"{name}.to({str(self.device)!r}, {dtype})."
            )


def _as_list(instruments: Iterable[Name]) -> list[Name]:
    """Return a list of names, also from an array, a tensor or a pandas index."""
    if isinstance(instruments, (str, Integral)):
        raise DataError(f"instruments must be a list of names, got {instruments!r}. Remedy: [{instruments!r}].")
    names = list(instruments.tolist() if hasattr(instruments, "tolist") else instruments)
    for name in names:
        if not isinstance(name, (str, Integral)):
            raise DataError(
                f"instruments contains {shown(name)} of type {type(name).__name__}, expected str or int. "
                f"Remedy: str({shown(name)})."
            )
    return names


def _row_counts(lengths: Sequence[int] | Tensor | None, count: int, steps: int) -> Tensor:
    """Return the checked number of rows of each instrument, int64 [N] on the CPU."""
    if lengths is None:
        return torch.full((count,), steps)
    row_counts = torch.as_tensor(lengths).cpu()
    is_valid = (
        not row_counts.is_floating_point()
        and row_counts.shape == (count,)
        and bool(((row_counts >= 1) & (row_counts <= steps)).all())
    )
    if not is_valid:
        raise DataError(
            f"lengths must be {count} integers in [1, {steps}], one for each instrument, got {shown(lengths)}. "
            "Remedy: leave out instruments that have no rows."
        )
    return row_counts.long()


def _check_model(model: TCNModel) -> None:
    """Raise ConfigError unless the model is in evaluation mode and as it was built."""
    training = [name or "model" for name, module in model.named_modules() if module.training]
    if training:
        raise ConfigError(
            f"model is in training mode ({some(training, 3)}), but a stream has no dropout. Remedy: model.eval()."
        )
    hooked = [
        name or "model" for name, module in model.named_modules() if module._forward_hooks or module._forward_pre_hooks
    ]
    if hooked:
        raise ConfigError(
            f"model has hooks ({some(hooked, 3)}), which a stream would not call. Remedy: remove them, or score whole "
            "windows with model(x)."
        )
    if type(model.linear) is not nn.Linear or not model.tcn.uses_operator():
        raise ConfigError(
            "model has modules that were replaced, or is a copy by to_reference(); a stream computes neither. Remedy: "
            "stream the original model, or score whole windows with model(x)."
        )


# ---------------------------------------------------------------- one step of the network
class _State(NamedTuple):
    """The state of N instruments."""

    inputs: list[Tensor]  # [slots, N, C_in] for each convolution: step t is in slot t % slots, zeros before step 0
    seen: Tensor  # int64 [N], number of steps computed

    def selected(self, rows: Tensor) -> _State:
        """Return a copy for the instruments at these rows."""
        return _State([part.index_select(1, rows) for part in self.inputs], self.seen.index_select(0, rows))

    def concatenated(self, other: _State) -> _State:
        """Return a state of these instruments followed by those of `other`."""
        inputs = [torch.cat(parts, 1) for parts in zip(self.inputs, other.inputs, strict=True)]
        return _State(inputs, torch.cat((self.seen, other.seen)))

    def to(self, device: torch.device) -> _State:
        """Return the state on `device`."""
        return _State([part.to(device) for part in self.inputs], self.seen.to(device))

    def layout(self) -> list[tuple[list[int], torch.dtype]]:
        """Return the shape and dtype of every tensor."""
        return [(list(part.shape), part.dtype) for part in (*self.inputs, self.seen)]


class _Convolution(NamedTuple):
    """A causal convolution as a matrix product."""

    matrix: Tensor  # [k * C_in, C], the oldest tap first
    bias: Tensor
    features: int  # C_in
    lags: Tensor  # int64 [k], the number of steps between each tap and the current step
    slots: int  # number of inputs to keep: the current step and all steps that a tap can read

    @classmethod
    def of(cls, convolution: CausalConv1d) -> _Convolution:
        """Build the matrix from a module."""
        weight, kernel_size, dilation = convolution.weight, convolution.kernel_size, convolution.dilation
        lags = torch.arange(kernel_size - 1, -1, -1, device=weight.device) * dilation
        matrix = weight.permute(2, 1, 0).reshape(-1, weight.shape[0])
        return cls(matrix, convolution.bias, weight.shape[1], lags, (kernel_size - 1) * dilation + 1)

    def step(self, inputs: Tensor, seen: Tensor, rows: Tensor, x: Tensor) -> Tensor:
        """Compute one step and its ReLU for the instruments at `rows`, x [n, C_in] at steps `seen` -> [n, C].

        x overwrites the slot of an input that no tap reads any more. The step can therefore be repeated if a push is
        interrupted.
        """
        slots_of_taps = (seen.unsqueeze(1) - self.lags) % self.slots * inputs.shape[1] + rows.unsqueeze(1)
        flat_inputs = inputs.view(-1, inputs.shape[2])
        flat_inputs.index_copy_(0, slots_of_taps[:, -1], x)
        taps = flat_inputs.index_select(0, slots_of_taps.view(-1)).view(len(x), len(self.matrix))
        return torch.addmm(self.bias, taps, self.matrix).relu_()


class _Network:
    """A copy of a model, with g v / ||v|| of each convolution computed once."""

    def __init__(self, model: TCNModel) -> None:
        self.dtype = model.linear.weight.dtype
        self.features = model.num_input
        self.output_size = model.output_size
        self.digest = _digest(model)
        self._model = copy.deepcopy(model).requires_grad_(False)
        self._model.zero_grad()
        if self.dtype.itemsize < 4:
            self._model.float()
        self._fold()

    def _fold(self) -> None:
        """Compute the matrices of all convolutions."""
        self._blocks = [
            (_Convolution.of(block.conv1), _Convolution.of(block.conv2), block.downsample)
            for block in cast("list[TemporalBlock]", list(self._model.tcn.network))
        ]

    def to(self, device: torch.device) -> None:
        """Move the weights in place."""
        self._model.to(device)
        self._fold()

    @property
    def receptive_field(self) -> int:
        """Number of rows that a score depends on."""
        return 1 + sum(first.slots - 1 + second.slots - 1 for first, second, _ in self._blocks)

    def initial_state(self, count: int) -> _State:
        """Return the state of `count` instruments without rows."""
        convolutions = [conv for block in self._blocks for conv in block[:2]]
        inputs = [conv.matrix.new_zeros(conv.slots, count, conv.features) for conv in convolutions]
        return _State(inputs, torch.zeros(count, dtype=torch.int64, device=inputs[0].device))

    def step(self, state: _State, rows: Tensor, x: Tensor) -> Tensor:
        """Score the next features x [n, F] of the instruments at `rows` of `state`, and update the state."""
        seen, inputs = state.seen.index_select(0, rows), iter(state.inputs)
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(state.inputs[0].dtype)
            for first, second, downsample in self._blocks:
                hidden = first.step(next(inputs), seen, rows, x)
                out = second.step(next(inputs), seen, rows, hidden)
                residual = x
                if downsample is not None:
                    residual = functional.linear(x, downsample.weight.squeeze(2), downsample.bias)
                x = out.add_(residual).relu_()
            scores: Tensor = self._model.linear(x).to(self.dtype)
        # Advance the step counter last: until then an interrupted step can be repeated.
        state.seen.index_copy_(0, rows, seen + 1)
        return scores.squeeze(1) if self.output_size == 1 else scores


def _digest(model: TCNModel) -> str:
    """Return a digest of the weights and dilations that does not depend on the device."""
    digest = hashlib.sha256(repr([block.dilation for block in model.tcn.network]).encode())
    for name, weight in model.named_parameters():
        digest.update(f"{name} {weight.dtype} {list(weight.shape)}".encode())
        digest.update(weight.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
