"""Names the content of a dataset, so that a run record can say what was trained on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sized
from typing import Any

import numpy as np
import torch
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset

from mlsys_engine.data.corpus import Corpus
from mlsys_engine.data.token_dataset import TokenDataset
from mlsys_engine.data.token_file import TokenFile


def fingerprint(dataset: object) -> str:
    """`sha256:<hex>` of the content where its kind is known, `description-sha256:<hex>` of a description
    otherwise.

    Known are this package's corpus, token files and datasets, tensors, numpy arrays, and torch's
    TensorDataset, Subset and ConcatDataset of known ones. A token file's hash is read from its header. Of
    anything else only the class, its length and its own `fingerprint` or `_fingerprint` (Hugging Face
    datasets have one) are hashed: equal descriptions do not prove equal content, hence the other prefix.
    """
    content = _content(dataset)
    if content is not None:
        return f"sha256:{content}"
    described = {
        "class": f"{type(dataset).__module__}.{type(dataset).__qualname__}",
        "length": _length(dataset),
        "fingerprint": _own_fingerprint(dataset),
    }
    return f"description-sha256:{_hash_text(described)}"


def _content(dataset: object) -> str | None:
    """The hash of a known kind's content; None when it, or something inside it, is of no known kind."""
    match dataset:
        case Corpus():
            found: str | None = dataset.fingerprint
        case TokenFile():
            found = dataset.sha256
        case np.ndarray() | torch.Tensor():
            found = _hash_array(dataset)
        case TokenDataset():
            found = _combined("windows", [dataset.source], dataset.context_length)
        case TensorDataset():
            found = _combined("tensors", list(dataset.tensors))
        case Subset():
            indices = np.asarray(dataset.indices, dtype=np.int64)
            found = _combined("subset", [dataset.dataset, indices])
        case ConcatDataset():
            found = _combined("concatenation", list(dataset.datasets))
        case _:
            found = None
    return found


def _combined(kind: str, parts: list[Any], *settings: int) -> str | None:
    contents = [_content(part) for part in parts]
    return None if None in contents else _hash_text([kind, contents, settings])


def _hash_array(array: np.ndarray[Any, Any] | torch.Tensor) -> str:
    if isinstance(array, torch.Tensor):
        name, shape = str(array.dtype), list(array.shape)
        body = array.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    else:
        name, shape = array.dtype.str, list(array.shape)
        body = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    digest = hashlib.sha256(_hash_text([name, shape]).encode())
    digest.update(body.data)
    return digest.hexdigest()


def _length(dataset: object) -> int | None:
    try:
        return len(dataset) if isinstance(dataset, Sized) else None
    except TypeError:  # an IterableDataset may define __len__ and refuse to answer
        return None


def _own_fingerprint(dataset: Dataset[Any] | object) -> str | None:
    own = getattr(dataset, "fingerprint", None) or getattr(dataset, "_fingerprint", None)
    return own if isinstance(own, str) else None


def _hash_text(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
