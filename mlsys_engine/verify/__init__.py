"""Proves a plan against the unsharded model: the same step, in one process and on the plan's ranks."""

from mlsys_engine.verify.api import verify
from mlsys_engine.verify.first_step import FirstStep
from mlsys_engine.verify.verdict import Difference, Verdict

__all__ = ["Difference", "FirstStep", "Verdict", "verify"]
