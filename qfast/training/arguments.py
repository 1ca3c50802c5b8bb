"""Checks of an estimator's training arguments."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from numbers import Real

from qfast.errors import ConfigError, suggest, whole_number
from qfast.precision import check_products
from qfast.training.daily_losses import DAILY_LOSSES, DAILY_METRICS
from qfast.training.losses import loss_function, metric_function
from qfast.training.overrides import FUNCTIONS, accepts, name_of

PROGRESS = (True, False, "auto", "lines")
BATCH_BY = (None, "sample", "day")
TRAIN_SCORE = ("pass", "running", "never")
# Names that other libraries have for these arguments.
SYNONYMS = {
    "learning_rate": "lr",
    "epochs": "n_epochs",
    "num_epochs": "n_epochs",
    "max_epochs": "n_epochs",
    "patience": "early_stop",
    "early_stopping": "early_stop",
    "early_stopping_rounds": "early_stop",
    "criterion": "loss",
    "loss_function": "loss_fn",
}

__all__ = ["check_attribute_name", "check_training_arguments"]


def check_training_arguments(params: Mapping[str, object], decay_name: str, batches_are_days: bool = False) -> None:
    """Check the values of the training arguments.

    Parameters
    ----------
    params : dict
        Arguments of an estimator, by name.
    decay_name : str
        Name of the weight decay in `params`.
    batches_are_days : bool
        Whether every batch of the model is a day, whatever its arguments.

    Raises
    ------
    ConfigError
        A value is not allowed. The message contains the argument, its value and the allowed values.
    """
    for name, least in {"n_epochs": 0, "batch_size": 1, "early_stop": 0}.items():
        if name in params:
            whole_number(name, params[name], least)
    for name in ("lr", decay_name):
        value = params[name]
        if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= float(value) < float("inf"):
            raise ConfigError(f"{name} must be a number of at least 0, got {value!r}.")
    seed = params["seed"]
    if seed is not None and whole_number("seed", seed, 0) >= 2**32:
        raise ConfigError(f"seed must be below 2**32 (the limit of NumPy's generator), got {seed!r}.")
    if params["progress"] not in PROGRESS:
        raise ConfigError(f"progress must be True, False, 'auto' or 'lines', got {params['progress']!r}.")
    if not isinstance(params["cuda_graphs"], bool):
        raise ConfigError(f"cuda_graphs must be True or False, got {params['cuda_graphs']!r}.")
    if params["compat"] not in (None, "qlib"):
        raise ConfigError(f"compat must be None or 'qlib', got {params['compat']!r}.")
    check_products(params.get("precision", "float32"))
    if params.get("precision", "float32") != "float32" and params["compat"] == "qlib":
        raise ConfigError(
            f"precision={params['precision']!r} is not available with compat='qlib', because Qlib computes in float32. "
            "Remedy: omit one of the two."
        )
    if params["train_score"] not in TRAIN_SCORE:
        hint = suggest(params["train_score"], TRAIN_SCORE)
        raise ConfigError(f"train_score must be 'pass', 'running' or 'never', got {params['train_score']!r}.{hint}")
    _check_function("loss", params["loss"], ("pred, label", "pred, label, weight"))
    _check_function("metric", params["metric"], ("pred, label",))
    _check_batch_by(params, batches_are_days)


def _check_function(name: str, value: object, arguments: tuple[str, ...]) -> None:
    """Check `loss` or `metric`: a known name, or a function of these arguments."""
    if isinstance(value, str) and value in (DAILY_LOSSES if name == "loss" else DAILY_METRICS):
        return
    if not callable(value):
        _ = loss_function(value) if name == "loss" else metric_function(value)
    elif not any(accepts(value, len(names.split(","))) for names in arguments):
        expected = " or ".join(f"({names})" for names in arguments)
        raise ConfigError(f"{name} must be a name or a function of {expected}, got {name_of(value)}.")


def _check_batch_by(params: Mapping[str, object], batches_are_days: bool) -> None:
    """Check `batch_by`, and that a loss of whole days has batches of whole days."""
    batch_by, loss = params["batch_by"], params["loss"]
    if batch_by not in BATCH_BY:
        hint = suggest(batch_by, ("sample", "day"))
        raise ConfigError(f"batch_by must be 'sample', 'day' or None (the model's own), got {batch_by!r}.{hint}")
    if batch_by == "sample" and batches_are_days:
        raise ConfigError("batch_by='sample' is not available: every batch of this model is a day. Remedy: omit it.")
    is_daily = isinstance(loss, str) and loss in DAILY_LOSSES
    for name, value, is_extension in (("batch_by", batch_by, batch_by == "day"), ("loss", loss, is_daily)):
        if is_extension and params["compat"] == "qlib":
            raise ConfigError(f"{name}={value!r} is not available with compat='qlib', because Qlib does not have it.")
    if is_daily and batch_by != "day" and not batches_are_days:
        raise ConfigError(
            f"loss={loss!r} compares the stocks of a day, but the batches are shuffled samples (batch_by={batch_by!r})"
            ", in which a day has few stocks. Remedy: batch_by='day'."
        )


def check_attribute_name(owner: type, name: str, params: Iterable[str]) -> None:
    """Check the name of an attribute that a class of estimators does not have, before it is set on a model.

    Classes of qfast accept no new attributes: a misspelled argument would otherwise be ignored. Classes of users accept
    them, except for misspelled names of arguments.

    Raises
    ------
    ConfigError
        The name is not accepted. The message contains the most similar one.

    Examples
    --------
    >>> from qfast.models import LSTM
    >>> check_attribute_name(LSTM, "n_epoch", ["n_epochs", "lr"])
    Traceback (most recent call last):
    ...
    qfast.errors.ConfigError: LSTM has no attribute 'n_epoch'. Did you mean 'n_epochs'? ...
    """
    known = [*params, *FUNCTIONS, "device", "train_optimizer", "network"]
    if owner.__module__.partition(".")[0] == "qfast":
        synonym = SYNONYMS.get(name.lower())
        hint = f" Did you mean {synonym!r}?" if synonym else suggest(name, known)
        raise ConfigError(
            f"{owner.__name__} has no attribute {name!r}.{hint} Remedy: to store a value of your own on the model, "
            "use a name that starts with an underscore, or a subclass."
        )
    intended = next((other for other in known if _is_misspelled(name, other)), None)
    if intended is not None:
        raise ConfigError(
            f"{owner.__name__} has no attribute {name!r}. Did you mean {intended!r}? Remedy: if not, use a name that "
            "starts with an underscore."
        )


def _is_misspelled(name: str, other: str) -> bool:
    """Whether `name` is `other` with a letter missing, replaced or swapped, or with other capitals or underscores.

    A letter more is not a mistake: subclasses have attributes such as `losses`, `metrics` and `dropout2`.

    >>> [_is_misspelled(name, "n_epochs") for name in ("n_epoch", "nEpochs", "n_epohcs", "n_epochs2", "epochs_done")]
    [True, True, True, False, False]
    """
    if name.replace("_", "").lower() == other.replace("_", "").lower():
        return True
    if len(other) < 5:
        return False
    if len(name) == len(other):
        differing = [(a, b) for a, b in zip(name, other, strict=True) if a != b]
        swapped = len(differing) == 2 and differing[0] == differing[1][::-1]
        return swapped or (len(differing) == 1 and differing[0][0].isalpha())
    return len(name) == len(other) - 1 and any(name == other[:j] + other[j + 1 :] for j in range(len(other)))
