"""Checks of an estimator's training arguments."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Real

from qfast.errors import ConfigError, whole_number
from qfast.training.losses import loss_function, metric_function

__all__ = ["check_training_arguments"]


def check_training_arguments(params: Mapping[str, object], decay_name: str) -> None:
    """Check the values of the training arguments.

    Parameters
    ----------
    params : dict
        Arguments of an estimator, by name.
    decay_name : str
        Name of the weight decay in `params`.

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
    if params["progress"] not in (True, False, "auto"):
        raise ConfigError(f"progress must be True, False or 'auto', got {params['progress']!r}.")
    if not isinstance(params["cuda_graphs"], bool):
        raise ConfigError(f"cuda_graphs must be True or False, got {params['cuda_graphs']!r}.")
    if params["compat"] not in (None, "qlib"):
        raise ConfigError(f"compat must be None or 'qlib', got {params['compat']!r}.")
    loss_function(params["loss"])
    metric_function(params["metric"])
