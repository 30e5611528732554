"""Explains what ranks were doing when they hung, from the dumps of their recorders."""

from mlsys_engine.comm.hang.diagnosis import Diagnosis, diagnose
from mlsys_engine.comm.hang.dumps import PREFIX, Dump, Operation, read_dumps

__all__ = ["PREFIX", "Diagnosis", "Dump", "Operation", "diagnose", "read_dumps"]
