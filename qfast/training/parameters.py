"""The conventions of scikit-learn for estimators: a readable `repr`, and `set_params`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qfast.errors import ConfigError, suggest
from qfast.registry import all_parameters
from qfast.training.overrides import name_of

if TYPE_CHECKING:
    from qfast.training.base import BaseEstimator

__all__ = ["description", "set_parameters"]

FIRST = ("device", "optimizer")  # arguments that can still fail after all others have been checked


def description(estimator: BaseEstimator) -> str:
    """The `repr` of an estimator: the arguments that are not defaults, and the state.

    Examples
    --------
    >>> from qfast.models import LSTM
    >>> description(LSTM(d_feat=3, hidden_size=4, device="cpu"))
    "<LSTM(d_feat=3, hidden_size=4, device='cpu'): 309 weights on cpu, not fitted>"
    """
    kind = type(estimator)
    name = f"ts.{kind.__name__}" if kind.__module__ == "qfast.models.ts" else kind.__name__
    state = estimator.__dict__
    if "network" not in state or "progress_" not in state:  # printed by a debugger inside __init__
        return f"<{name}: not built>"
    accepted = all_parameters(kind)
    defaults = {name: parameter.default for name, parameter in accepted.items()}
    changed = {k: v for k, v in estimator.get_params().items() if k not in defaults or not _is_equal(v, defaults[k])}
    arguments = ", ".join(f"{k}={name_of(v) if callable(v) else repr(v)}" for k, v in changed.items())
    weights = sum(parameter.numel() for parameter in estimator.network.parameters())
    epochs = len(estimator.progress_.records)
    fitted = "not fitted" if not estimator.fitted else f"fitted, {epochs} epochs" if epochs else "fitted"
    return f"<{name}({arguments}): {weights:,} weights on {estimator.device}, {fitted}>"


def _is_equal(value: Any, default: Any) -> bool:
    return value is default or (type(value) is type(default) and bool(value == default))


def set_parameters(estimator: BaseEstimator, values: dict[str, Any], needs_new_network: set[str]) -> None:
    """Change arguments of the constructor; all of them or, after an error, none.

    Parameters
    ----------
    estimator : BaseEstimator
    values : dict
        Names and new values.
    needs_new_network : set of str
        Arguments that determine the network or its initial weights.

    Raises
    ------
    ConfigError
        As in `BaseEstimator.set_params`.
    """
    current = estimator.get_params()
    if "weight_decay" in values and estimator.decay_name not in values:
        values = {estimator.decay_name if k == "weight_decay" else k: v for k, v in values.items()}
    kind = type(estimator).__name__
    for name in values:
        if name not in current:
            raise ConfigError(f"{kind} has no argument {name!r}." + suggest(name, current))
    changed = {name: value for name, value in values.items() if not _is_equal(value, current[name])}
    rebuilt = sorted(needs_new_network & set(changed))
    if not rebuilt:
        estimator._check_arguments({**current, **changed})
        for name in sorted(changed, key=lambda name: name not in FIRST):
            setattr(estimator, name, changed[name])
        return
    if estimator.fitted:
        raise ConfigError(
            f"this {kind} is fitted, and a new value of {', '.join(rebuilt)} needs a new network, so its weights would "
            f"be lost. Remedy: {kind}(**{{**model.get_params(), {rebuilt[0]!r}: {changed[rebuilt[0]]!r}}})."
        )
    fresh = type(estimator)(**{**current, **changed})
    estimator.__dict__.update(fresh.__dict__)
