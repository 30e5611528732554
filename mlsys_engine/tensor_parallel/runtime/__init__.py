"""Runs an unchanged model whose parameters are cut over the ranks of a model axis."""

from mlsys_engine.tensor_parallel.runtime.collectives import gather
from mlsys_engine.tensor_parallel.runtime.mode import TensorParallel
from mlsys_engine.tensor_parallel.runtime.values import CutTensor

__all__ = ["CutTensor", "TensorParallel", "gather"]
