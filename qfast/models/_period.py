"""Scoring of whole periods on the CPU: work that consecutive windows share is done once."""

from __future__ import annotations

import torch
from torch import Tensor

from qfast import _backend
from qfast.data.batching import Batches
from qfast.data.windows import WindowSet
from qfast.training.estimator import Estimator

__all__ = ["WholePeriod"]


class WholePeriod(Estimator):
    """Base class of models whose network is faster on windows that overlap in memory, when no gradient is needed.

    Samples are scored in the order of the panel's rows. The network receives consecutive windows as a view of the panel
    with x.stride(0) == x.stride(1), and gathered copies of all other windows, at most `batch_size` at a time. A network
    and its hooks must not write to their input, because it is the panel.
    """

    def min_consecutive(self, features: int, steps: int) -> int:
        """Smallest number of consecutive windows for which a separate network call is faster.

        Parameters
        ----------
        features, steps : int
            F and T of the windows.
        """
        raise NotImplementedError

    def min_joined(self, features: int, steps: int) -> int | None:
        """Smallest number of consecutive windows that may share a network call with others, None for no joined calls.

        Between two sequences the network then also receives `steps` - 1 windows whose scores are discarded.

        Parameters
        ----------
        features, steps : int
            F and T of the windows.
        """
        return None

    def _predictions(self, windows: WindowSet, batches: Batches) -> Tensor:
        if not self._uses_views(windows):
            return super()._predictions(windows, batches)
        table = windows.features
        assert isinstance(table, Tensor)  # see _uses_views
        shape = table.shape[1], windows.step_len or 1
        size = self._params["batch_size"]
        out = torch.empty(len(windows), dtype=table.dtype)
        remaining = torch.zeros(len(windows), dtype=torch.bool)
        remaining[batches.order] = True
        fewest, joined = self.min_consecutive(*shape), self.min_joined(*shape)
        # Search all samples, not only those of the batches: a shuffled pass without its incomplete batch leaves random
        # gaps, which would leave few consecutive windows.
        for call in windows.consecutive_calls(joined or fewest, size, join=joined is not None):
            if joined is not None and len(call) < fewest:
                continue
            scores = self.run_network(call.windows(), torch.arange(len(call)))
            for begin, samples in call.parts:
                out[samples] = scores[begin : begin + len(samples)]
                remaining[samples] = False
        views = windows.with_views()
        for samples in remaining.nonzero()[:, 0].split(size):
            if len(samples):
                out[samples] = self.run_network(views, samples)
        return out[batches.order]

    def _uses_views(self, windows: WindowSet) -> bool:
        """Whether consecutive windows share work. Only the native CPU operators implement this.

        A `run_network` or a network outside of qfast may write to its windows, so it always receives copies.
        """
        own_code = self.run_network.__module__, type(self.network).__module__
        if any(not str(name).startswith("qfast.") for name in own_code) or "run_network" in self.__dict__:
            return False
        if type(self).features_of is not Estimator.features_of:
            return False
        if torch.is_grad_enabled() or windows.index is None or windows.device.type != "cpu":
            return False
        if not isinstance(windows.features, Tensor):  # windows of prices are computed, so they cannot be views
            return False
        if _backend.native is None:
            return False
        return windows.features.shape[1] == self._params["d_feat"] and self._params["compat"] != "qlib"
