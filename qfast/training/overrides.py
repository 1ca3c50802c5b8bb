"""Which functions of Qlib's models a user has overridden, and how many arguments they accept.

Qlib calls `train_epoch`, `test_epoch`, `loss_fn`, `metric_fn` and `mse` as methods of the model. A subclass can
override them, and they can be replaced on one model: `model.train_epoch = wrapper(model.train_epoch)`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from torch import Tensor

from qfast.errors import ConfigError, shown

Function = TypeVar("Function", bound=Callable[..., Any])

FUNCTIONS = ("train_epoch", "test_epoch", "loss_fn", "metric_fn", "mse")

_defaults: set[Any] = set()

__all__ = ["FUNCTIONS", "accepts", "as_number", "default", "is_overridden", "name_of", "require_arguments"]


def default(function: Function) -> Function:
    """Decorator: mark a method of qfast as the default of a function that users override.

    The functions themselves are recorded, because functools.wraps copies attributes and names to a user's wrapper.
    """
    _defaults.add(function)
    return function


def is_overridden(owner: object, name: str) -> bool:
    """Whether method `name` of `owner` is not qfast's own, in its class or on the object.

    >>> from qfast.models import LSTM
    >>> model = LSTM(d_feat=3, hidden_size=4)
    >>> is_overridden(model, "metric_fn")
    False
    >>> model.metric_fn = lambda pred, label: pred.mean()
    >>> is_overridden(model, "metric_fn")
    True
    """
    replaced = owner.__dict__.get(name)
    if replaced is None:
        return getattr(type(owner), name) not in _defaults
    # Undoing a replacement often sets the bound method that the class has anyway.
    is_own = getattr(replaced, "__self__", None) is owner and getattr(replaced, "__func__", None) in _defaults
    return not is_own


def accepts(function: Callable[..., Any], count: int, *names: str) -> bool:
    """Whether a function can be called with `count` positional arguments and these keyword arguments.

    >>> accepts(lambda pred, label: None, 2), accepts(lambda pred, label: None, 3)
    (True, False)
    """
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # written in C, without a signature
        return True
    try:
        signature.bind(*[None] * count, **dict.fromkeys(names))
    except TypeError:
        return False
    return True


def require_arguments(owner: object, name: str, arguments: tuple[str, ...]) -> None:
    """Raise a ConfigError unless method `name` of `owner` can be called with these positional arguments."""
    function = getattr(owner, name)
    if not accepts(function, len(arguments)):
        raise ConfigError(
            f"{name_of(function)} is called as {name}({', '.join(arguments)}), as in Qlib, but it has the signature "
            f"{name}{inspect.signature(function)}. Remedy: accept these {len(arguments)} arguments."
        )


def name_of(function: object) -> str:
    """Module and qualified name of a function, or those of the class of another callable.

    >>> name_of(accepts)
    'qfast.training.overrides.accepts'
    """
    described = function if hasattr(function, "__qualname__") else type(function)
    return f"{getattr(described, '__module__', '?')}.{getattr(described, '__qualname__', '?')}"


def as_number(value: Any, what: str) -> float:
    """Convert a value that a user's code has computed to a float.

    Raises
    ------
    ConfigError
        It is not a number, or an array of several. The message begins with `what`.
    """
    try:
        return float(value.detach() if isinstance(value, Tensor) else value)
    except (TypeError, ValueError, RuntimeError):
        got = f"of shape {tuple(value.shape)}" if isinstance(value, (Tensor, np.ndarray)) else shown(value)
        raise ConfigError(f"{what} must be a number, got {type(value).__name__} {got}.") from None
