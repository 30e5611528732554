"""Activation checkpointing: what a model keeps between forward and backward, and what it computes again."""

from mlsys_engine.activation.blocks import resolve
from mlsys_engine.activation.checkpointing import apply_actions, checkpoint, uncheckpoint
from mlsys_engine.activation.recompute import RecomputeMismatchError

__all__ = ["RecomputeMismatchError", "apply_actions", "checkpoint", "resolve", "uncheckpoint"]
