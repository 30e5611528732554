"""Native optimizers: drop-in torch.optim.Optimizers; norm and clipped step are two sweeps over memory."""

from mlsys_engine.optim import schedules
from mlsys_engine.optim.adafactor import Adafactor
from mlsys_engine.optim.adagrad import Adagrad
from mlsys_engine.optim.adam import Adam
from mlsys_engine.optim.adamw import AdamW
from mlsys_engine.optim.averaging import averaged_weights
from mlsys_engine.optim.base import NativeOptimizer
from mlsys_engine.optim.formats import Precision
from mlsys_engine.optim.in_backward import StepInBackward, step_in_backward
from mlsys_engine.optim.lamb import LAMB
from mlsys_engine.optim.lars import LARS
from mlsys_engine.optim.lion import Lion
from mlsys_engine.optim.loss_scaler import LossScaler
from mlsys_engine.optim.muon import Muon
from mlsys_engine.optim.noise_scale import GradientNoiseScale
from mlsys_engine.optim.norms import clip_scale, sum_of_squares
from mlsys_engine.optim.registry import OPTIMIZERS, optimizer_class
from mlsys_engine.optim.schedule_free_adamw import ScheduleFreeAdamW
from mlsys_engine.optim.sgd import SGD

__all__ = [
    "LAMB",
    "LARS",
    "OPTIMIZERS",
    "SGD",
    "Adafactor",
    "Adagrad",
    "Adam",
    "AdamW",
    "GradientNoiseScale",
    "Lion",
    "LossScaler",
    "Muon",
    "NativeOptimizer",
    "Precision",
    "ScheduleFreeAdamW",
    "StepInBackward",
    "averaged_weights",
    "clip_scale",
    "optimizer_class",
    "schedules",
    "step_in_backward",
    "sum_of_squares",
]
