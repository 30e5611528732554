"""A part of an unchanged model's forward: every stage runs the whole of it and computes its own "
"units alone."""

from mlsys_engine.pipeline.partial.refusals import PartialForwardError
from mlsys_engine.pipeline.partial.signatures import Form, signature_of
from mlsys_engine.pipeline.partial.stage_part import Crossings, Cuts, PartResult, StagePart
from mlsys_engine.pipeline.partial.units import Units, find_units, parameter_stages

__all__ = [
    "Crossings",
    "Cuts",
    "Form",
    "PartResult",
    "PartialForwardError",
    "StagePart",
    "Units",
    "find_units",
    "parameter_stages",
    "signature_of",
]
