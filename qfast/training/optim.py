"""Adam with gradient clipping in the same pass over the parameters."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from qfast import _backend
from qfast.errors import DataError
from qfast.ops import clipped_adam_

__all__ = ["ClippedAdam"]

_Tensors: TypeAlias = tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor], list[Tensor]]
"""Parameters, gradients, exp_avg, exp_avg_sq and steps."""


class ClippedAdam(torch.optim.Adam):
    """torch.optim.Adam that first clips every gradient element to [-limit, limit].

    `step` modifies the gradients in place, like torch.nn.utils.clip_grad_value_ before torch.optim.Adam.

    Parameters
    ----------
    params : iterable of Tensor or of dict
        Parameters or parameter groups, as in torch.optim.Adam.
    lr : float or Tensor
        Learning rate.
    *args, **kwargs
        Further arguments of torch.optim.Adam (betas, eps, weight_decay, ...). Where torch supports them, `fused` and
        `capturable` default to True: the step count is then a float32 tensor on the parameter's device, and a CUDA
        graph can capture the step.
    limit : float
        Positive; infinity for no limit. It is not part of `state_dict`, which equals that of torch.optim.Adam.

    Raises
    ------
    DataError
        `limit` is not a positive number. It is a ValueError, which torch.optim.Adam raises for other arguments.

    Notes
    -----
    A step is one call of the operator `qfast.ops.clipped_adam_` if the native library supports the device, and if
    parameters, gradients and states are dense float32 or float64 tensors with one dtype per group. In all other cases
    torch's clip_grad_value_ and Adam make the step: other dtypes, `amsgrad`, `maximize`, `decoupled_weight_decay`,
    `differentiable`, `foreach=True`, `fused=False`, and a learning rate that is a tensor on CUDA. A GradScaler unscales
    the gradients before they are clipped.

    Examples
    --------
    >>> weight = torch.nn.Parameter(torch.zeros(1))
    >>> optimizer = ClippedAdam([weight], lr=0.1, limit=3.0)
    >>> weight.grad = torch.tensor([7.0])
    >>> optimizer.step()
    >>> weight.data, weight.grad
    (tensor([-0.1000]), tensor([3.]))
    """

    def __init__(
        self, params: ParamsT, lr: float | Tensor = 1e-3, *args: Any, limit: float = 3.0, **kwargs: Any
    ) -> None:
        if isinstance(limit, bool) or not isinstance(limit, (int, float)) or not limit > 0:
            raise DataError(
                f"ClippedAdam: limit: expected a positive number, got {limit!r}. Remedy: float('inf') for no limit."
            )
        self.limit = float(limit)
        self._tickets: dict[torch.device, Tensor] = {}
        super().__init__(params, lr, *args, **kwargs)
        self._step_supports_amp_scaling = False  # a GradScaler must unscale the gradients before they are clipped

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters with its own settings, as in torch.optim.Adam."""
        # torch's decorator of this method imports torch._dynamo, which takes as long as importing torch.
        inspect.unwrap(torch.optim.Adam.add_param_group)(self, param_group)
        _prefer_fused(self.param_groups[-1])

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients, as in torch.optim.Adam."""
        if set_to_none and not torch._C._autograd._profiler_enabled():  # torch's method records an event
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.grad = None
            return
        # torch's decorator of this method imports torch._dynamo, which needs 100 MB of memory.
        inspect.unwrap(torch.optim.Adam.zero_grad)(self, set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """The settings and the states of all parameters, as in torch.optim.Adam."""
        state: dict[str, Any] = inspect.unwrap(torch.optim.Adam.state_dict)(self)  # without torch._dynamo, as above
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the `state_dict` of a ClippedAdam or of a torch.optim.Adam."""
        inspect.unwrap(torch.optim.Adam.load_state_dict)(self, state_dict)  # without torch._dynamo, as above
        for group in self.param_groups:
            _prefer_fused(group)
            for parameter in group["params"] if group["fused"] else ():
                state = self.state.get(parameter)
                if state:  # an Adam that was not fused has its step counts on the CPU
                    state["step"] = state["step"].to(parameter.device, torch.float32)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "limit": self.limit}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._tickets = {}

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Clip the gradients in place and make one step.

        Parameters
        ----------
        closure : callable, optional
            Computes the loss and the gradients again.

        Returns
        -------
        object
            The result of `closure`, None without one.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self._step_by_operator():
            self._step_by_torch()
        return loss

    @torch.no_grad()
    def _step_by_operator(self) -> bool:
        """Make the step with the operator. Returns False, without any effect, if it does not support all groups."""
        if torch.compiler.is_compiling() or not all(map(_is_plain, self.param_groups)):
            return False
        calls = []
        for group in self.param_groups:
            tensors = self._tensors(group)
            if tensors[0]:
                if not _is_supported(*tensors, group["lr"]):
                    return False
                calls.append((group, tensors))
        for group, tensors in calls:
            beta1, beta2 = group["betas"]
            clipped_adam_(
                *tensors,
                lr=float(group["lr"]),
                beta1=beta1,
                beta2=beta2,
                eps=group["eps"],
                weight_decay=group["weight_decay"],
                limit=self.limit,
                ticket=self._ticket(tensors[0][0].device),
            )
        return True

    def _tensors(self, group: dict[str, Any]) -> _Tensors:
        """Parameters with gradients, their gradients and their states, which are created where necessary."""
        if type(self)._init_group is torch.optim.Adam._init_group:
            tensors = _existing_tensors(group["params"], self.state)
            if tensors is not None:
                return tensors
        lists: tuple[list[Tensor], ...] = ([], [], [], [], [], [])
        self._init_group(group, *lists)
        parameters, gradients, exp_avg, exp_avg_sq, _, steps = lists
        return parameters, gradients, exp_avg, exp_avg_sq, steps

    def _step_by_torch(self) -> None:
        nn.utils.clip_grad_value_([p for group in self.param_groups for p in group["params"]], self.limit)
        strided = [group for group in self.param_groups if group["fused"] and not _is_contiguous(group["params"])]
        for group in strided:  # torch's fused CPU kernel ignores strides
            group["fused"] = None
        try:
            _adam_step(self)
        finally:
            for group in strided:
                group["fused"] = True

    def _ticket(self, device: torch.device) -> Tensor | None:
        """Counter of finished blocks for the CUDA kernel. Optimizers on different streams must not share it."""
        if device.type == "cpu":
            return None
        if device not in self._tickets:
            self._tickets[device] = torch.zeros(1, dtype=torch.int32, device=device)
        return self._tickets[device]


def _existing_tensors(
    all_parameters: Iterable[Tensor], states: Mapping[Tensor, Mapping[str, Tensor]]
) -> _Tensors | None:
    """What Adam._init_group collects, in half of its time. None if it must create a state or may raise an error."""
    parameters: list[Tensor] = []
    gradients: list[Tensor] = []
    exp_avg: list[Tensor] = []
    exp_avg_sq: list[Tensor] = []
    steps: list[Tensor] = []
    for parameter in all_parameters:
        gradient = parameter.grad
        if gradient is None:
            continue
        state = states.get(parameter)
        if not state or gradient.layout is not torch.strided:
            return None
        parameters.append(parameter)
        gradients.append(gradient)
        exp_avg.append(state["exp_avg"])
        exp_avg_sq.append(state["exp_avg_sq"])
        steps.append(state["step"])
    return parameters, gradients, exp_avg, exp_avg_sq, steps


def _prefer_fused(group: dict[str, Any]) -> None:
    """Set `fused` and `capturable` where torch supports them, which puts the step counts on the parameter's device."""
    supported = all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in group["params"])
    if supported and group["fused"] is None and not group["foreach"] and not group["differentiable"]:
        group["fused"] = True
    if any(p.is_cuda for p in group["params"]) and not group["differentiable"]:
        group["capturable"] = True


def _is_plain(group: dict[str, Any]) -> bool:
    """Whether the operator implements the settings of a group."""
    unsupported = ("amsgrad", "maximize", "differentiable", "decoupled_weight_decay", "foreach")
    return group["fused"] is not False and not any(group.get(name) for name in unsupported)


def _is_contiguous(parameters: list[Tensor]) -> bool:
    return all(p.is_contiguous() and p.grad.is_contiguous() for p in parameters if p.grad is not None)


def _is_supported(
    parameters: list[Tensor],
    gradients: list[Tensor],
    exp_avg: list[Tensor],
    exp_avg_sq: list[Tensor],
    steps: list[Tensor],
    lr: float | Tensor,
) -> bool:
    """Whether one call of a native kernel can process these tensors."""
    device, dtype = parameters[0].device, parameters[0].dtype
    if not _backend.is_loaded(device) or dtype not in (torch.float32, torch.float64):
        return False
    if isinstance(lr, Tensor) and (lr.device.type != "cpu" or device.type != "cpu"):
        return False
    # torch creates states with the dtype and device of their parameter and requires the same of gradients. It is
    # therefore enough to check one tensor of each list; the operator checks all of them.
    if any(part[0].dtype != dtype or part[0].device != device for part in (gradients, exp_avg, exp_avg_sq)):
        return False
    for parameter, gradient, step in zip(parameters, gradients, steps, strict=True):
        if type(parameter) not in (nn.Parameter, Tensor):
            return False  # a subclass may redefine arithmetic
        if parameter.dtype is not dtype or parameter.device != device or gradient.layout is not torch.strided:
            return False
        if step.dtype is not torch.float32 or step.device != device:
            return False
    return True


def _adam_step(optimizer: torch.optim.Adam) -> None:
    """Adam's step without its hooks, which already run around ClippedAdam's step."""
    step: Any = torch.optim.Adam.step
    inner = step.__wrapped__ if getattr(step, "hooked", False) else step
    inner(optimizer)
