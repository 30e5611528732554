"""Native optimizers: drop-in torch.optim.Optimizers; norm and clipped step are two sweeps over memory."""

from mlsys_engine.optim import schedules
from mlsys_engine.optim.averaging import averaged_weights
from mlsys_engine.optim.base import NativeOptimizer
from mlsys_engine.optim.formats import Precision
from mlsys_engine.optim.in_backward import StepInBackward, step_in_backward
from mlsys_engine.optim.loss_scaler import LossScaler
from mlsys_engine.optim.noise_scale import GradientNoiseScale
from mlsys_engine.optim.norms import clip_scale, sum_of_squares
from mlsys_engine.optim.registry import OPTIMIZERS, optimizer_class
from mlsys_engine.optim.rules.adafactor import Adafactor
from mlsys_engine.optim.rules.adagrad import Adagrad
from mlsys_engine.optim.rules.adam import Adam
from mlsys_engine.optim.rules.adamw import AdamW
from mlsys_engine.optim.rules.lamb import LAMB
from mlsys_engine.optim.rules.lars import LARS
from mlsys_engine.optim.rules.lion import Lion
from mlsys_engine.optim.rules.muon import Muon
from mlsys_engine.optim.rules.schedule_free_adamw import ScheduleFreeAdamW
from mlsys_engine.optim.rules.sgd import SGD

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
