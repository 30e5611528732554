"""mlsys_engine: a distributed training engine with native kernels. Import it as `mls`."""

__version__ = "0.1.0"
