"""What an estimator's training arguments may be."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Real

from qfast.errors import ConfigError, whole_number
from qfast.training.losses import loss_function, metric_function

__all__ = ["check_training_arguments"]


def check_training_arguments(params: Mapping[str, object], decay_name: str) -> None:
    """Names the first argument of `Estimator` that cannot be meant; `decay_name`: what weight decay is called there.

    Raises
    ------
    ConfigError
        With the argument, its value and what is allowed.
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
        raise ConfigError(f"seed must be below 2**32 (NumPy's generator takes no more), got {seed!r}.")
    if params["progress"] not in (True, False, "auto"):
        raise ConfigError(f"progress must be True, False or 'auto', got {params['progress']!r}.")
    if not isinstance(params["cuda_graphs"], bool):
        raise ConfigError(f"cuda_graphs must be True or False, got {params['cuda_graphs']!r}.")
    if params["compat"] not in (None, "qlib"):
        raise ConfigError(f"compat must be None or 'qlib', got {params['compat']!r}.")
    loss_function(params["loss"])
    metric_function(params["metric"])
