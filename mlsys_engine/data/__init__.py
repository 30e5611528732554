"""Data: text that every machine has, token files, and batches that can be resumed at any sample."""

from mlsys_engine.data.corpus import Corpus, stdlib_corpus
from mlsys_engine.data.evaluation import evaluation_shares
from mlsys_engine.data.fingerprints import fingerprint
from mlsys_engine.data.global_batches import GlobalBatches
from mlsys_engine.data.layout import BatchLayout, share
from mlsys_engine.data.sampler import SampleSampler
from mlsys_engine.data.token_dataset import TokenDataset
from mlsys_engine.data.token_file import TokenFile, write_token_file

__all__ = [
    "BatchLayout",
    "Corpus",
    "GlobalBatches",
    "SampleSampler",
    "TokenDataset",
    "TokenFile",
    "evaluation_shares",
    "fingerprint",
    "share",
    "stdlib_corpus",
    "write_token_file",
]
