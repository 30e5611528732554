"""The training loop: steps, evaluation, checkpoints, signals, records. It knows Runners, not parallelism."""

from mlsys_engine.trainer.events import EVENTS
from mlsys_engine.trainer.loop import FitResult
from mlsys_engine.trainer.options import SaveEvery
from mlsys_engine.trainer.stopping import Control, TrainingInterrupted
from mlsys_engine.trainer.trainer import Trainer

__all__ = ["EVENTS", "Control", "FitResult", "SaveEvery", "Trainer", "TrainingInterrupted"]
