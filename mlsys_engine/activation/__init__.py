"""Activation checkpointing: what a model keeps between forward and backward, and what it computes again."""

from mlsys_engine.activation.blocks import POLICIES
from mlsys_engine.activation.budget import ActivationPlan, plan
from mlsys_engine.activation.checkpointing import apply_actions, uncheckpoint
from mlsys_engine.activation.policies import check_budget, checkpoint, resolve
from mlsys_engine.activation.recompute import RecomputeMismatchError

__all__ = [
    "POLICIES",
    "ActivationPlan",
    "RecomputeMismatchError",
    "apply_actions",
    "check_budget",
    "checkpoint",
    "plan",
    "resolve",
    "uncheckpoint",
]
