"""Evaluation: the simple baselines that a model is measured against."""

from mlsys_engine.evaluation.ngram import ngram_baselines

__all__ = ["ngram_baselines"]
