"""One tracker a file; the table of their names is mlsys_engine/tracking/registry.py."""
