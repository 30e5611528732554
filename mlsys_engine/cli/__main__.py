"""`python -m mlsys_engine.cli`: the command without its script; local ranks are started this way."""

from mlsys_engine.cli.main import entry_point

entry_point()
