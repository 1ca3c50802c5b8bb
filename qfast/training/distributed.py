"""Data-parallel training: the instruments are spread over the ranks of a process group.

Every rank draws the same batches from the same seed and computes the samples of its own instruments. The predictions
of a batch are gathered, so every rank computes the same loss of the whole batch, with any loss function, and the same
scores. Each rank propagates the loss back to its own samples. The sum of the gradients over the ranks is that of one
process up to summation order, and every rank makes the same step. docs/distributed.md describes it for users.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

import qfast
from qfast.data.batching import Batches
from qfast.data.read_ahead import ReadAhead
from qfast.data.windows import FeatureTable, WindowSet
from qfast.errors import ConfigError, DataError
from qfast.ops import WindowIndex
from qfast.training.overrides import is_overridden, name_of
from qfast.training.ranks import Ranks

if TYPE_CHECKING:
    from qfast.training.estimator import Estimator

Method = TypeVar("Method", bound=Callable[..., Any])

PROBED_ROWS = 64  # feature rows that are part of a segment's digest
MAY_DIFFER = ("device", "GPU", "progress", "n_jobs")  # arguments of an estimator that may differ between ranks

__all__ = ["SharedWindows", "Sharing", "over_ranks"]


def over_ranks(method: Method) -> Method:
    """Decorator: a method that all ranks call together. An error on one rank ends all of them; only rank 0 logs."""

    @wraps(method)
    def call_over_ranks(self: Estimator, *args: Any, **kwargs: Any) -> Any:
        ranks = Ranks.current()
        if ranks is None:
            return method(self, *args, **kwargs)
        with ranks.session(), only_main_logs(ranks):
            return method(self, *args, **kwargs)

    return cast(Method, call_over_ranks)


@contextlib.contextmanager
def only_main_logs(ranks: Ranks) -> Iterator[None]:
    """Discard messages below ERROR on all ranks except rank 0."""
    loggers = [logging.getLogger("qfast"), logging.getLogger("qfast.data")]

    def is_error(record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR

    for logger in () if ranks.is_main else loggers:
        logger.addFilter(is_error)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(is_error)


# ---------------------------------------------------------------- the samples
@dataclass
class SharedWindows(WindowSet):
    """The n samples of all ranks. Labels, weights and keys are those of all samples, features only of this rank's.

    Attributes
    ----------
    ranks : Ranks
    own : WindowSet
        The samples of this rank, with their features.
    owner : Tensor
        int64 [n], the rank of each sample.
    number : Tensor
        int64 [n], the number of each sample in `own`, and -1 for samples of other ranks.
    """

    ranks: Ranks = field(kw_only=True)
    own: WindowSet = field(kw_only=True)
    owner: Tensor = field(kw_only=True)
    number: Tensor = field(kw_only=True)

    def to(self, device: torch.device, moved: dict[Any, Tensor] | None = None) -> SharedWindows:
        """As `WindowSet.to`. Only the features of this rank are moved."""
        if device == self.device:
            return self
        copies = {} if moved is None else moved
        whole = cast(SharedWindows, super().to(device, copies))
        own, owner, number = self.own.to(device, copies), self.owner.to(device), self.number.to(device)
        return replace(whole, own=own, owner=owner, number=number)

    def batch(self, samples: Tensor) -> Tensor:
        """Not available: no rank has the features of all samples."""
        raise DataError(
            f"the features of {len(samples)} samples are spread over {self.ranks.size} ranks. Remedy: read those of "
            "`windows.own`."
        )

    def request(self, samples: Tensor) -> None:
        """As in `WindowSet`, for the features of this rank."""
        self.own.request(self.number[samples[self.owner[samples] == self.ranks.rank]])

    @property
    def _reader(self) -> ReadAhead | None:
        return self.own._reader

    def require_finite_features(self) -> None:
        """As in `WindowSet`, for the features of this rank."""
        self.own.require_finite_features()


class Sharing:
    """Spreads the instruments of one fit or prediction over the ranks.

    Every rank receives consecutive instruments, in alphabetical order, with about the same number of samples of the
    first segment. Consecutive instruments are one range of a panel's rows, which is not copied.

    Parameters
    ----------
    ranks : Ranks
    is_training : bool
        Whether every rank needs at least one instrument.
    """

    def __init__(self, ranks: Ranks, *, is_training: bool) -> None:
        self.ranks, self.is_training = ranks, is_training
        self._starts: np.ndarray | None = None  # first instrument of each rank except rank 0

    def __call__(self, windows: WindowSet) -> SharedWindows:
        """Keep the features of this rank's instruments.

        Raises
        ------
        ConfigError
            The ranks have different data.
        DataError
            There are more ranks than instruments.
        """
        self.ranks.require_same(_digest(windows), "pass the same data to every rank")
        if self._starts is None:
            self._starts = self._first_instruments(windows)
        owner = self._owners(windows.keys())
        rank = self.ranks.rank
        is_own = owner == rank
        rows_of_rank = np.flatnonzero(self._owners(windows.keys_of(np.arange(_row_count(windows)))) == rank)
        number = np.where(is_own, np.cumsum(is_own) - 1, -1)
        own = _restricted(windows, torch.from_numpy(is_own), rows_of_rank)
        base: dict[str, Any] = {item.name: getattr(windows, item.name) for item in fields(windows)}
        base["features"] = own.features
        owners, numbers = torch.from_numpy(owner), torch.from_numpy(number)
        return SharedWindows(**base, ranks=self.ranks, own=own, owner=owners, number=numbers)

    def once(self, windows: WindowSet) -> SharedWindows:
        """`windows` itself if it is shared already, otherwise its shared form."""
        return windows if isinstance(windows, SharedWindows) else self(windows)

    def _owners(self, keys: pd.MultiIndex) -> np.ndarray:
        """int64: the rank of each (datetime, instrument)."""
        assert self._starts is not None
        rank_of = np.searchsorted(self._starts, _sortable(keys.levels[1]), side="right")
        return rank_of[np.asarray(keys.codes[1])]

    def _first_instruments(self, windows: WindowSet) -> np.ndarray:
        keys, size = windows.keys(), self.ranks.size
        counts = np.bincount(np.asarray(keys.codes[1]), minlength=len(keys.levels[1]))
        names = _sortable(keys.levels[1])
        order = np.argsort(names[counts > 0])
        names, counts = names[counts > 0][order], counts[counts > 0][order]
        if self.is_training and 0 < len(names) < size:
            raise DataError(
                f"{size} ranks cannot share the {len(names)} instruments of segment {windows.name!r}. Remedy: at most "
                f"{len(names)} processes (--nproc-per-node)."
            )
        if len(names) < size:  # the last ranks have nothing to predict
            return names[1:] if len(names) else names
        middles = np.cumsum(counts) - counts / 2  # an instrument belongs to the rank that its middle falls into
        firsts: list[int] = []
        for rank in range(1, size):
            first = int(np.searchsorted(middles, counts.sum() * rank / size))
            lowest = firsts[-1] + 1 if firsts else 1
            firsts.append(min(max(first, lowest), len(names) - (size - rank)))
        return names[firsts]


def _sortable(names: pd.Index) -> np.ndarray:
    return np.asarray(names.astype(str), dtype=object)


def _row_count(windows: WindowSet) -> int:
    return int(windows.features.shape[0])


def _restricted(windows: WindowSet, is_own: Tensor, kept: np.ndarray) -> WindowSet:
    """The samples `is_own`, over the feature rows `kept` (ascending) only."""
    is_range = len(kept) > 0 and kept[-1] - kept[0] + 1 == len(kept)
    rows: slice | Tensor = slice(int(kept[0]), int(kept[-1]) + 1) if is_range else torch.from_numpy(kept)
    place = torch.full((_row_count(windows),), -1)
    place[rows] = torch.arange(len(kept))
    before = windows.history
    part = replace(
        windows.select(is_own),
        features=_rows(windows.features, rows),
        keys_of=lambda numbers: windows.keys_of(kept[numbers]),
        # Consecutive rows of an instrument remain consecutive, so the distances in the index remain valid.
        index=None if windows.index is None else WindowIndex(*(table[rows] for table in windows.index)),
        label_table=None if windows.label_table is None else windows.label_table[rows],
        history=None if before is None else lambda: _places(place, before()),
    )
    part.rows = place[part.rows]
    return part


def _places(place: Tensor, rows: np.ndarray) -> np.ndarray:
    """The new numbers of those rows that remain."""
    places = place.numpy()[rows]
    return places[places >= 0]


def _rows(features: FeatureTable, rows: slice | Tensor) -> FeatureTable:
    """Some rows of a feature table, without a copy if they are a slice."""
    if isinstance(features, Tensor):
        return features[rows]
    return features.part(rows if isinstance(rows, slice) else rows.numpy())


def _digest(windows: WindowSet) -> dict[str, object]:
    """What must be equal on all ranks about a segment: keys, labels, weights, and some rows of the features."""
    keys = windows.keys()
    count = _row_count(windows)
    probed = np.unique(np.linspace(0, count - 1, PROBED_ROWS).astype(np.int64)) if count else np.empty(0, np.int64)
    table = windows.features
    probe = table[torch.from_numpy(probed)].numpy() if isinstance(table, Tensor) else table[probed]
    segment = f"segment {windows.name!r}"
    return {
        f"the number of samples of {segment}": len(windows),
        f"the feature columns of {segment}": [str(column) for column in windows.columns],
        f"the window length of {segment}": windows.step_len,
        f"the instruments of {segment}": _hash(keys.codes[1], *map(str, keys.levels[1])),
        f"the dates of {segment}": _hash(keys.get_level_values(0).to_numpy()),
        f"the labels of {segment}": None if windows.label is None else _hash(windows.label.numpy()),
        f"the sample weights of {segment}": None if windows.weight is None else _hash(windows.weight.numpy()),
        f"the features of {segment}": _hash(probe),
    }


def _hash(*parts: object) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode() if isinstance(part, str) else np.ascontiguousarray(cast(Any, part)).tobytes())
    return digest.hexdigest()[:16]


# ---------------------------------------------------------------- predictions
class Gathered(torch.autograd.Function):
    """Rows of all ranks. The gradient of this rank's rows is its part of the gradient, times `factor`.

    It needs no communication, because everything computed from the gathered rows is computed on every rank.
    """

    @staticmethod
    def forward(ctx: Any, local: Tensor, ranks: Ranks, owner: Tensor, factor: float) -> Tensor:
        """Gather the rows, see `Ranks.gather`."""
        ctx.is_own, ctx.factor = owner == ranks.rank, factor
        return ranks.gather(local.detach(), owner)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        """Select the gradient of this rank's rows."""
        own = grad[ctx.is_own]
        return own if ctx.factor == 1.0 else own * ctx.factor, None, None, None


class Replicated(torch.autograd.Function):
    """A value that every rank computes with the same weights: its gradient is divided by the number of ranks.

    The sum over the ranks is then the gradient of those weights.
    """

    @staticmethod
    def forward(ctx: Any, value: Tensor, size: int) -> Tensor:
        """Return the value."""
        ctx.size = size
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """Divide the gradient."""
        return grad / ctx.size, None


def run_own_samples(estimator: Estimator, windows: SharedWindows, samples: Tensor) -> Tensor:
    """Compute this rank's samples of a batch and gather the predictions.

    Parameters
    ----------
    estimator : Estimator
    windows : SharedWindows
    samples : Tensor
        int64 [B], the same on every rank.

    Returns
    -------
    Tensor
        [B], on every rank.
    """
    owner = windows.owner[samples]
    own = windows.number[samples[owner == windows.ranks.rank]]
    # A layer of torch may refuse an empty batch.
    prediction = estimator.run_network(windows.own, own) if len(own) else _nothing(estimator)
    return cast(Tensor, Gathered.apply(prediction, windows.ranks, owner, 1.0))


def shared_predictions(estimator: Estimator, windows: SharedWindows, batches: Batches) -> Tensor:
    """Predictions of the samples in `batches.order`, in that order, on every rank."""
    owner = windows.owner[batches.order]
    is_own = owner == windows.ranks.rank
    ends = torch.cat((torch.zeros(1, dtype=torch.int64), is_own.cpu().cumsum(0)))[batches.bounds]
    bounds = torch.cat((ends[:1], ends[1:][ends.diff() > 0]))  # without batches that have no sample of this rank
    own = Batches(windows.number[batches.order[is_own]], bounds, len(bounds) - 1)
    predictions = estimator._predictions(windows.own, own) if len(own) else _nothing(estimator)
    return windows.ranks.gather(predictions.detach(), owner)


def _nothing(estimator: Estimator) -> Tensor:
    like = next(estimator.network.parameters())
    return torch.empty(0, dtype=like.dtype, device=like.device)


# ---------------------------------------------------------------- training
def sum_gradients(network: nn.Module, ranks: Ranks) -> None:
    """Replace all gradients by their sums over the ranks, in one exchange.

    A parameter that has a gradient on one rank has one on all ranks afterwards.
    """
    parameters = [p for p in network.parameters() if p.requires_grad]
    has_gradient = torch.tensor([float(p.grad is not None) for p in parameters], device=parameters[0].device)
    parts = [torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in parameters]
    flat = torch.cat([has_gradient.to(parts[0].dtype), *parts])
    ranks.sum_(flat)
    exists = flat[: len(parts)].cpu() > 0
    position = len(parts)
    for parameter, present in zip(parameters, exists.tolist(), strict=True):
        total = flat[position : position + parameter.numel()].view_as(parameter)
        position += parameter.numel()
        if present:
            parameter.grad = total.to(parameter.dtype)


@contextlib.contextmanager
def own_random_numbers(windows: SharedWindows, epoch: int) -> Iterator[None]:
    """Let every rank draw other dropout masks, and restore the generators that the ranks have in common afterwards.

    The seed depends on the common state, the epoch and the rank. Without dropout, the generators advance as in one
    process.
    """
    devices = [windows.device] if windows.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        common = int(torch.randint(2**62, ()).item())
        torch.manual_seed((common + 0x9E3779B97F4A7C15 * (epoch * windows.ranks.size + windows.ranks.rank + 1)) % 2**63)
        yield


def begin(estimator: Estimator, ranks: Ranks) -> None:
    """Require that all ranks fit the same model with the same versions, in a way that works over several ranks."""
    _require_supported(estimator)
    arguments = {name: _text(value) for name, value in estimator.get_params().items() if name not in MAY_DIFFER}
    facts = {"the version of qfast": qfast.__version__, "the version of torch": torch.__version__}
    facts |= {"the version of NumPy": np.__version__, "the class of the model": name_of(type(estimator))}
    facts |= {f"the argument {name!r} of the model": value for name, value in arguments.items()}
    facts["the number of weights"] = str(sum(p.numel() for p in estimator.network.parameters()))
    ranks.require_same(facts, "the same environment and workflow on every rank")


def align(estimator: Estimator, ranks: Ranks) -> None:
    """Give all ranks the weights and the states of the random generators of rank 0."""
    for tensor in (*estimator.network.parameters(), *estimator.network.buffers()):
        ranks.broadcast_(tensor.data)
    device = ranks.message_device
    state = torch.get_rng_state().to(device)
    ranks.broadcast_(state)
    torch.set_rng_state(state.cpu())
    kind, keys, position, has_gauss, gauss = np.random.get_state()  # noqa: NPY002 - the source of batch orders
    numbers = torch.tensor([*np.asarray(keys).tolist(), position, has_gauss, gauss], dtype=torch.float64, device=device)
    ranks.broadcast_(numbers)
    *values, position, has_gauss, gauss = numbers.tolist()
    np.random.set_state(  # noqa: NPY002
        (kind, np.array(values).astype(np.uint32), int(position), int(has_gauss), gauss)
    )


def _require_supported(estimator: Estimator) -> None:
    """Raise a ConfigError if the model uses something that works in one process only."""
    remedy = "Remedy: train in one process, or override loss_fn, metric_fn, mse or run_network, which work over ranks."
    replaced = [name for name in ("train_epoch", "test_epoch") if is_overridden(estimator, name)]
    whole_batch = ("train_step", "run_network") if estimator.mixes_samples else ("train_step",)
    replaced += [name for name in whole_batch if not _is_of_qfast(getattr(estimator, name))]
    if replaced:
        raise ConfigError(
            f"{name_of(getattr(estimator, replaced[0]))} replaces {replaced[0]}, which reads whole batches, but "
            f"several ranks share each batch. {remedy}"
        )
    if estimator.mixes_samples and not _is_of_qfast(type(estimator.network)):
        raise ConfigError(
            f"{name_of(type(estimator.network))} replaces the network of {type(estimator).__name__}, whose hidden "
            "states the ranks exchange. Remedy: train it in one process."
        )
    if estimator.get_params()["cuda_graphs"]:
        raise ConfigError("cuda_graphs=True works in one process only. Remedy: cuda_graphs=False over several ranks.")
    mixing = [
        name for name, part in estimator.network.named_modules() if isinstance(part, nn.modules.batchnorm._NormBase)
    ]
    if mixing:
        raise ConfigError(
            f"the network normalizes over the samples of a batch ({mixing[:3]}), which several ranks share. {remedy}"
        )


def _is_of_qfast(value: object) -> bool:
    return str(getattr(value, "__module__", "")).startswith("qfast.")


def _text(value: object) -> str:
    return name_of(value) if callable(value) else str(value)
