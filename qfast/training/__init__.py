"""The training loop and its parts: callbacks, losses, the optimizer, checkpoints and CUDA graphs of training steps."""

from qfast.training.callbacks import Callback, Checkpoint, EarlyStopping, Progress
from qfast.training.estimator import Estimator, FitProgress
from qfast.training.losses import masked_mse
from qfast.training.optim import ClippedAdam
from qfast.training.trackers import MLflowCallback, TensorBoardCallback

__all__ = [
    "Callback",
    "Checkpoint",
    "ClippedAdam",
    "EarlyStopping",
    "Estimator",
    "FitProgress",
    "MLflowCallback",
    "Progress",
    "TensorBoardCallback",
    "masked_mse",
]
