"""Arguments, network, optimizer and state of an estimator. Training and prediction are in estimator.py."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from qfast.device import choose_device
from qfast.errors import ConfigError, NotFittedError, suggest
from qfast.nn.plain import PlainTorch
from qfast.precision import available_products
from qfast.training import checkpoint
from qfast.training.arguments import check_attribute_name, check_training_arguments
from qfast.training.callbacks import Callback
from qfast.training.daily_losses import DAILY_METRICS
from qfast.training.optim import ClippedAdam
from qfast.training.overrides import as_number
from qfast.training.parameters import description, set_parameters
from qfast.training.whole_model import save_estimator

if TYPE_CHECKING:
    from typing_extensions import Self

GRADIENT_LIMIT = 3.0  # every gradient element is clipped to +-3, as in Qlib
# Columns of the history that the training loop records.
RECORDED = (
    *("epoch", "train_loss", "train", "valid", "valid_all", "train_seconds", "seconds"),
    *(f"{segment}_{metric}" for metric in DAILY_METRICS for segment in ("train", "valid")),
)
FIXED = ("seed", "GPU", "compat")  # arguments that, like those of the network, are used up when the model is built

__all__ = ["GRADIENT_LIMIT", "BaseEstimator", "FitProgress", "network_alias"]


@dataclass
class FitProgress:
    """State of a running fit. A checkpoint contains it, together with the weights and the optimizer's state.

    Attributes
    ----------
    records : list of dict
        One record per finished epoch, the rows of `Estimator.history_`.
    best_score, best_epoch, best_weights
        The best validation score so far, its epoch and the weights after that epoch.
    stop_steps : int
        Consecutive epochs without a better score.
    finished : bool
        True after early stopping: a resumed fit trains no further epoch.
    logged : dict or None
        Where `Estimator.log` stores values: the record of the current epoch, None outside of a fit.
    """

    records: list[dict[str, float]] = field(default_factory=list)
    best_score: float = -float("inf")
    best_epoch: int | None = None
    best_weights: dict[str, Tensor] | None = None
    stop_steps: int = 0
    finished: bool = False
    logged: dict[str, float] | None = None


def network_alias() -> property:
    """Property with Qlib's name of the network. Assigning to it replaces the network."""

    def replace(model: BaseEstimator, network: nn.Module) -> None:
        model.network = network

    return property(lambda model: model.network, replace, doc="The network, under Qlib's name.")


class BaseEstimator:
    """A network and its optimizer, the arguments that they were built from, and the state of a fit.

    `Estimator` documents the parameters and adds `fit` and `predict`.
    """

    network_class: ClassVar[type[nn.Module]]
    options: ClassVar[tuple[str, ...]] = (
        *("n_epochs", "lr", "metric", "batch_size", "early_stop", "loss", "optimizer", "GPU", "seed"),
        *("weight_decay", "device", "compat", "progress", "cuda_graphs", "batch_by", "train_score"),
        "precision",
    )
    """Keyword arguments that every model accepts, also if its constructor has only `**options` for them."""
    batches_are_days: ClassVar[bool] = False
    """Whether every batch is a day, whatever the arguments."""
    decay_name: ClassVar[str] = "weight_decay"
    """Name of the argument `weight_decay` in the subclass's constructor."""

    def __init__(
        self,
        network: Mapping[str, object],
        *,
        n_epochs: int = 200,
        lr: float = 0.001,
        metric: str | Callable[..., Any] = "",
        batch_size: int | None = None,
        early_stop: int = 20,
        loss: str | Callable[..., Any] = "mse",
        optimizer: str = "adam",
        GPU: int | None = 0,
        seed: int | None = None,
        weight_decay: float = 0.0,
        device: str | torch.device = "auto",
        compat: str | None = None,
        progress: bool | str = "auto",
        cuda_graphs: bool = False,
        batch_by: str | None = None,
        train_score: str = "pass",
        precision: str = "float32",
        extra: Mapping[str, object] | None = None,
        **unknown: object,
    ) -> None:
        self._params: dict[str, Any] = {
            **network,
            "n_epochs": n_epochs,
            "lr": lr,
            "metric": metric,
            **({} if batch_size is None else {"batch_size": batch_size}),
            "early_stop": early_stop,
            "loss": loss,
            "optimizer": optimizer,
            "GPU": GPU,
            "seed": seed,
            **(extra or {}),
            self.decay_name: weight_decay,
            "device": device,
            "compat": compat,
            "progress": progress,
            "cuda_graphs": cuda_graphs,
            "batch_by": batch_by,
            "train_score": train_score,
            "precision": precision,
        }
        if unknown:
            name = next(iter(unknown))
            raise ConfigError(f"{type(self).__name__} has no argument {name!r}." + suggest(name, self._params))
        self._check_arguments(self._params)
        self._network_names = tuple(network)
        self.__dict__.update({name: value for name, value in self._params.items() if name != "device"})
        self.logger = logging.getLogger("qfast")
        self.device = choose_device(device, GPU)
        self._create_network(network)
        self._choose_precision()
        self.train_optimizer = self._build_optimizer(optimizer, lr, weight_decay)
        self._start_state()
        self._is_built = True

    def _start_state(self) -> None:
        """The state of a model that has not been fitted."""
        self.fitted = False
        self.stop_training = False
        self.epoch_ = 0
        self.data_: dict[str, Any] = {}
        self.progress_ = FitProgress()
        self.origin_: dict[str, str] = {}
        self.callbacks_: list[Callback] = []
        self.evals_result_: dict[str, Any] = {}

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute. Arguments of the constructor are checked and take effect, or raise an error.

        Raises
        ------
        ConfigError
            A wrong value, an argument that has no effect any more, or an unknown name: see `check_attribute_name`.
        """
        if not self.__dict__.get("_is_built"):
            object.__setattr__(self, name, value)
        elif name in self._params and name != "device":
            self._set_argument(name, value)
        elif name == "weight_decay":
            self._set_argument(self.decay_name, value)
        elif name == "device":
            self._move(value)
        else:
            if not (name in self.__dict__ or hasattr(type(self), name) or "_" in (name[0], name[-1])):
                check_attribute_name(type(self), name, self._params)
            object.__setattr__(self, name, value)

    def _set_argument(self, name: str, value: Any) -> None:
        """Change an argument of the constructor on a finished model."""
        if name in FIXED or name in self._network_names:
            if value != self._params[name]:
                raise ConfigError(
                    f"the model has been built with {name}={self._params[name]!r}, so {name}={value!r} would have no "
                    f"effect. Remedy: {type(self).__name__}({name}={value!r}, ...)."
                )
            return
        self._check_arguments({**self._params, name: value})
        if name == "precision":
            self._params[name] = value
            self._choose_precision()
        if name == "optimizer":
            self.train_optimizer = self._build_optimizer(value, self._params["lr"], self._params[self.decay_name])
        self._params[name] = value
        object.__setattr__(self, name, value)
        settings = {"lr": "lr", self.decay_name: "weight_decay"}
        for group in self.train_optimizer.param_groups if name in settings else ():
            group[settings[name]] = value

    def _check_arguments(self, params: Mapping[str, Any]) -> None:
        """Check the values of all arguments that may change after the constructor."""
        check_training_arguments(params, self.decay_name, self.batches_are_days)

    def _move(self, device: str | torch.device) -> None:
        """Move the network and the state of the optimizer to another device."""
        chosen = choose_device(device, self._params["GPU"])
        object.__setattr__(self, "device", chosen)
        self._params["device"] = str(device)
        self.network.to(chosen)
        self._choose_precision()
        self.train_optimizer.load_state_dict(self.train_optimizer.state_dict())

    def _choose_precision(self) -> None:
        """Choose the precision of the operators' products from the argument `precision` and the device.

        Raises
        ------
        BackendError, ConfigError
            "bf16" is not available.
        """
        requested = self._params.get("precision", "float32")
        effective, reason = available_products(requested, self.device)
        if reason:
            self.logger.warning("%s computes in float32: %s", type(self).__name__, reason)
        self._products = effective
        self._apply_precision()

    def _apply_precision(self) -> None:
        """Pass the precision to the network, which may be another one than when it was chosen."""
        for part in self.network.modules():
            if isinstance(part, PlainTorch):
                part.precision = self._products

    def _require_float32_training(self) -> None:
        """Raise a ConfigError if weights or the state of the optimizer are not float32 although products are bf16."""
        if self._products == "float32":
            return
        tensors = [("weights", part) for group in self.train_optimizer.param_groups for part in group["params"]]
        for state in self.train_optimizer.state.values():
            tensors += [("state", part) for part in state.values() if isinstance(part, Tensor)]
        for what, tensor in tensors:
            if tensor.is_floating_point() and tensor.dtype != torch.float32:
                raise ConfigError(
                    f"precision={self._params['precision']!r} needs float32 weights and optimizer, because small steps "
                    f"would be lost in fewer bits, but the {what} of train_optimizer are {tensor.dtype}. Remedy: "
                    "model.network.float() before the optimizer is created, or precision='float32'."
                )

    def _create_network(self, arguments: Mapping[str, object]) -> None:
        """Seed the generators, build the network and move it to the device."""
        seed = self._params["seed"]
        if seed is not None:
            np.random.seed(seed)  # noqa: NPY002 - as Qlib: batch orders come from the global generator
            torch.manual_seed(seed)
        network = self.build_network(**arguments)
        if self._params["compat"] == "qlib" and isinstance(network, PlainTorch) and arguments.get("dropout"):
            network = network.to_reference()  # torch's own dropout, which draws Qlib's masks
        self.network: nn.Module = network.to(self.device)

    def build_network(self, **network: Any) -> nn.Module:
        """Build the network on the CPU. Override it if the network's arguments have different names.

        Parameters
        ----------
        **network
            The mapping `network` of the constructor.
        """
        return self.network_class(**network)

    # ---------------------------------------------------------------- state
    @property
    def history_(self) -> pd.DataFrame:
        """One row per epoch of the last fit.

        Columns: `train_loss`; the scores `train` and `valid` (mean of the full batches) and `valid_all` (all samples),
        higher is better. With metric "ic" or "rank_ic" the scores are means over days, `train_ic` and `valid_ic`, or
        `train_rank_ic` and `valid_rank_ic`, repeat them, and there is no `valid_all`. With train_score="running",
        `train` is minus `train_loss`; with "never" it is missing. Further columns: `train_seconds`
        of the training pass and `seconds` of the whole epoch; then the values that `log` has recorded. With functions
        of the user, columns that cannot be computed are missing.
        """
        frame = pd.DataFrame(self.progress_.records)
        frame.index.name = "epoch"
        return frame

    def log(self, **values: float) -> None:
        """Record values of the current epoch. They become columns of `history_`, and survive resuming.

        Call it during `fit`, from a callback or from an overridden function. The last value of an epoch counts.

        Parameters
        ----------
        **values
            Name and number, or 0-d tensor.

        Raises
        ------
        ConfigError
            No fit is running, a name is used by the training loop, or a value is not a number.

        Examples
        --------
        >>> from qfast import Callback
        >>> from qfast.data import DatasetH, synthetic
        >>> from qfast.models import LSTM
        >>> class LogNorm(Callback):
        ...     def on_epoch_end(self, estimator):
        ...         estimator.log(norm=estimator.network.fc_out.weight.norm())
        >>> dataset = DatasetH(handler=synthetic.factors(8, 40, 3, missing=0.0), segments={"train": (None, None)})
        >>> model = LSTM(d_feat=3, hidden_size=4, n_epochs=2, batch_size=64).fit(dataset, callbacks=[LogNorm()])
        >>> "norm" in model.history_
        True
        """
        record = self.progress_.logged
        if record is None:
            raise ConfigError(f"log({', '.join(values)}) records values of an epoch, but no fit is running.")
        for name, value in values.items():
            if name in RECORDED:
                raise ConfigError(f"log: {name!r} is recorded by the training loop. Remedy: another name.")
            record[name] = as_number(value, f"log: {name}")

    @property
    def best_epoch_(self) -> int | None:
        """The epoch whose weights the model has after `fit`; None without a validation segment."""
        return self.progress_.best_epoch

    @property
    def use_gpu(self) -> bool:
        """Whether the network is on a GPU."""
        return self.device.type != "cpu"

    def __repr__(self) -> str:
        """The arguments that are not defaults, the number of weights, the device and the state."""
        return description(self)

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The constructor's arguments, by name.

        Parameters
        ----------
        deep : bool
            As in scikit-learn. It has no effect, because no argument is an estimator.
        """
        return dict(self._params)

    def set_params(self, **params: Any) -> Self:
        """Change arguments of the constructor; after an error, none has changed.

        Arguments of the network and `seed`, `GPU` and `compat` build a new network with new initial weights, so a
        fitted model does not accept them. Weights and the optimizer's state remain otherwise.

        Parameters
        ----------
        **params
            Names and values.

        Returns
        -------
        Estimator
            The estimator itself.

        Raises
        ------
        ConfigError
            An unknown argument, a value that is not allowed, or an argument that would discard trained weights.

        Examples
        --------
        >>> from qfast.models import LSTM
        >>> LSTM(d_feat=3).set_params(hidden_size=8, lr=0.01).get_params()["hidden_size"]
        8
        """
        set_parameters(self, params, {*FIXED, *self._network_names})
        return self

    def save(self, path: str | Path) -> None:
        """Write the whole estimator to a file, which appears complete or not at all. `qfast.load` reads it.

        The file contains the class, the arguments, the weights, the optimizer's state and the history. It is in the
        safetensors format and contains no code. `device` and `model_path` are not stored, nor are functions passed as
        `loss` or `metric`, which reading reports.

        Parameters
        ----------
        path : path

        Raises
        ------
        ConfigError
            An argument has a type that the file cannot contain, or the path cannot be written to.

        Examples
        --------
        >>> import tempfile, qfast
        >>> from qfast.models import LSTM
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     LSTM(d_feat=3, hidden_size=4).save(f"{folder}/model.qfast")
        ...     qfast.load(f"{folder}/model.qfast", device="cpu")
        <LSTM(d_feat=3, hidden_size=4, device='cpu'): 309 weights on cpu, not fitted>
        """
        save_estimator(self, Path(path))

    def save_weights(self, path: str | Path) -> None:
        """Write the network's weights to a file, which appears complete or not at all.

        Parameters
        ----------
        path : path
            The format is safetensors if it ends in .safetensors, otherwise torch's.
        """
        checkpoint.save_weights(self.network, Path(path))

    def load_weights(self, path: str | Path) -> Self:
        """Read weights that qfast or Qlib has written, without running code from the file.

        Parameters
        ----------
        path : path
            A .safetensors file or a state dict in torch's format (.pkl, .pt, .bin).

        Returns
        -------
        Estimator
            The estimator itself, which can predict now.

        Raises
        ------
        CheckpointError
            The file is missing or damaged, or belongs to another network.
        """
        checkpoint.load_weights(self.network, Path(path))
        self.fitted = True
        return self

    def save_checkpoint(self, path: Path) -> None:
        """Write the state of the fit to one file, which appears complete or not at all.

        It contains the weights, the best weights, the optimizer's state, the states of the random generators and the
        records of all epochs.
        """
        checkpoint.save_fit(self, path)

    def load_checkpoint(self, path: Path) -> None:
        """Restore the state that `save_checkpoint` has written, including the global random generators.

        Raises
        ------
        CheckpointError
            The file is missing or damaged, or was written by another model, with other arguments or on other data.
        """
        checkpoint.load_fit(self, path)

    def checkpoint_facts(self) -> dict[str, Any]:
        """Further state that a model adds to its checkpoints, as JSON values."""
        return {}

    def restore_facts(self, facts: dict[str, Any]) -> None:
        """Restore the result of `checkpoint_facts` from a checkpoint."""

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "callbacks_": [], "_graphed_step": None, "_sharing": None}

    def _build_optimizer(self, name: str, lr: float, weight_decay: float) -> torch.optim.Optimizer:
        parameters = self.network.parameters()
        if str(name).lower() == "adam":
            return ClippedAdam(parameters, lr=lr, weight_decay=weight_decay, limit=GRADIENT_LIMIT)
        if str(name).lower() == "gd":
            return torch.optim.SGD(parameters, lr=lr, weight_decay=weight_decay)
        hint = suggest(name, ("adam", "gd"))
        raise ConfigError(
            f"optimizer must be 'adam' or 'gd', got {name!r}.{hint} Remedy: assign an optimizer of your own to "
            "train_optimizer."
        )

    def _require_trained_network(self) -> None:
        """Raise a ConfigError if the optimizer has none of the network's parameters, so nothing would be trained."""
        trained = {id(p) for group in self.train_optimizer.param_groups for p in group["params"]}
        parameters = [p for p in self.network.parameters() if p.requires_grad]
        if parameters and not any(id(p) in trained for p in parameters):
            raise ConfigError(
                f"train_optimizer has none of the parameters of {type(self.network).__name__}, because the network was "
                "replaced. Remedy: model.train_optimizer = torch.optim.Adam(model.network.parameters(), lr=model.lr)."
            )

    def _require_fitted(self) -> None:
        if not self.fitted:
            raise NotFittedError(
                f"model is not fitted yet! Remedy: call fit(dataset) or load_weights(path) of {type(self).__name__}."
            )
