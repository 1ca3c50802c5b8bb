"""Access to the recurrent layer of a network that also works while torch.compile traces the network."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from qfast.nn.plain import PlainTorch

__all__ = ["HasRecurrentLayer", "RecurrentArguments"]

RecurrentArguments = tuple[list[list[Tensor]], float, bool]
"""Weights of each layer, probability of dropout and training mode: what the recurrent operators need of a layer."""

WEIGHTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")  # of a layer, in the order that the operators expect


class HasRecurrentLayer(PlainTorch):
    """Network with a recurrent layer of torch under the name `rnn`.

    Dynamo, the tracer of torch.compile, breaks its graph at every mention of an nn.LSTM or nn.GRU. It does accept the
    dictionary of the module's attributes, so a traced network reads weights and settings from `_rnn_attributes`.
    """

    if TYPE_CHECKING:  # TorchScript evaluates annotations and does not know this one
        _rnn_attributes: Mapping[str, Any]

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute, and follow a replaced `rnn`."""
        super().__setattr__(name, value)
        if name == "rnn":
            self._follow_layer()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_rnn_attributes"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._follow_layer()

    def _follow_layer(self) -> None:
        # Not nn.Module.__setattr__, which looks for modules and parameters in the value.
        object.__setattr__(self, "_rnn_attributes", vars(self.rnn))

    def _is_built_layer(self, rnn: nn.Module) -> bool:
        """Return whether `rnn` is still the kind of layer that __init__ built; the operator computes no other."""
        raise NotImplementedError

    def _layer_is_built(self) -> bool:
        """`_is_built_layer` for the current layer."""
        if torch.compiler.is_compiling() and not torch.compiler.is_exporting():
            return self._traced_layer_is_built()
        return self._is_built_layer(cast(nn.Module, self.rnn))

    def _traced_layer_is_built(self) -> bool:
        # False if a library has replaced an entry of `_modules` without __setattr__. Tracing then mentions `rnn`.
        return self._rnn_attributes is vars(self.rnn) and self._is_built_layer(cast(nn.Module, self.rnn))

    # Dynamo calls the method instead of tracing it. torch.compiler.assume_constant_result sets the same attribute, but
    # imports all of Dynamo.
    _traced_layer_is_built._dynamo_marked_constant = True  # type: ignore[attr-defined]

    def _layer_dtype_source(self) -> Tensor:
        """A weight of `rnn`, whose dtype and device x must have."""
        if torch.compiler.is_compiling():
            weight: Tensor = self._rnn_attributes["_parameters"]["weight_ih_l0"]
            return weight
        return cast(Tensor, cast(nn.RNNBase, self.rnn).weight_ih_l0)

    def _layer_arguments(self) -> RecurrentArguments:
        """Arguments of the recurrent operators for `rnn`."""
        if torch.compiler.is_compiling():
            attributes = self._rnn_attributes
            parameters = attributes["_parameters"]
            layers = range(attributes["num_layers"])
            weights = [[parameters[f"{name}_l{layer}"] for name in WEIGHTS] for layer in layers]
            return weights, attributes["dropout"], attributes["training"]
        rnn = cast(nn.RNNBase, self.rnn)
        weights = [[getattr(rnn, f"{name}_l{layer}") for name in WEIGHTS] for layer in range(rnn.num_layers)]
        return weights, rnn.dropout, rnn.training
