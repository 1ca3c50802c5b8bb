"""Scoring of whole periods: what windows that follow each other in the panel have in common is computed once."""

from __future__ import annotations

import torch
from torch import Tensor

from qfast import _backend
from qfast.data.batching import Batches
from qfast.data.windows import WindowSet
from qfast.training.estimator import Estimator

__all__ = ["WholePeriod"]


class WholePeriod(Estimator):
    """An estimator whose network, without a gradient, makes use of windows that overlap in memory.

    Samples are scored in the order of the panel's rows: a stretch of windows that follow each other goes to the network
    as a view of the panel, x.stride(0) == x.stride(1), and the rest gathered, `batch_size` at a time at the most. A
    subclass says from how many windows on that is worth a call. A network, or a hook of it, must not write to its
    input: it is the panel.
    """

    def fewest_in_call(self, features: int, steps: int) -> int:
        """Windows of T steps and F features that follow each other from which on a call of their own is faster."""
        raise NotImplementedError

    def _predictions(self, windows: WindowSet, batches: Batches) -> Tensor:
        if not self._shares(windows):
            return super()._predictions(windows, batches)
        # Of all samples: without those of a tail that was drawn and left out, few windows would follow each other.
        stretches = windows.consecutive(self.fewest_in_call(windows.features.shape[1], windows.step_len or 1))
        views = windows.with_views()
        left = torch.zeros(len(windows), dtype=torch.bool)
        left[batches.order] = True
        for samples in stretches:
            left[samples] = False
        out = torch.empty(len(windows), dtype=windows.features.dtype)
        for part in filter(len, (*stretches, left.nonzero()[:, 0])):
            for samples in part.split(self._params["batch_size"]):
                out[samples] = self.run_network(views, samples)
        return out[batches.order]

    def _shares(self, windows: WindowSet) -> bool:
        """Whether windows that follow each other cost less together: only the operators on the CPU make use of it."""
        if torch.is_grad_enabled() or windows.index is None or windows.device.type != "cpu":
            return False
        if _backend.native is None:
            return False
        return windows.features.shape[1] == self._params["d_feat"] and self._params["compat"] != "qlib"
