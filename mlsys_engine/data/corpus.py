"""A corpus that every machine has: the source text of Python's standard library, as bytes."""

from __future__ import annotations

import hashlib
import os
import platform
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mlsys_engine.errors import DataError

# Not the standard library, or written on each machine when Python was built there.
_EXCLUDED_FOLDERS = frozenset({"site-packages", "dist-packages", "__pycache__", "lib-dynload"})
_EXCLUDED_PREFIXES = ("config-", "_sysconfigdata", "sitecustomize", "usercustomize")
_VALIDATION_SHARE = 0.1


@dataclass(frozen=True, kw_only=True, eq=False)
class Corpus:
    """Text as bytes, split by file. `fingerprint` is the sha256 of both parts."""

    train: NDArray[np.uint8]
    validation: NDArray[np.uint8]
    fingerprint: str
    num_files: int
    description: str


def stdlib_corpus(max_bytes: int | None = None, root: str | os.PathLike[str] | None = None) -> Corpus:
    """Reads the .py files of this Python's standard library: 10 to 30 MB in about half a second.

    A file belongs to validation when a hash of its path inside the library falls into a tenth of the hash's
    range, so that a file keeps its side in every version of Python. The library's own tests are text as good
    as any other and are kept where they are installed (some distributions leave them out). Files follow each
    other in the order of their hashes. `max_bytes` limits both parts together, a tenth of it for validation:
    each keeps its first bytes, which come from all over the library. `root` is another folder of .py files.
    """
    folder = Path(root if root is not None else sysconfig.get_path("stdlib"))
    names = sorted(_python_files(folder), key=_order)
    limit = max_bytes if max_bytes is not None else 1 << 62
    validation_limit = int(limit * _VALIDATION_SHARE)
    train, num_train = _read(folder, [n for n in names if not _is_validation(n)], limit - validation_limit)
    validation, num_validation = _read(folder, [n for n in names if _is_validation(n)], validation_limit)
    num_files = num_train + num_validation
    if not train or not validation:
        raise DataError(
            f"{folder} with max_bytes={max_bytes} gives {len(train)} bytes to train on and "
            f"{len(validation)} to validate on.",
            "The text of .py files for both parts is needed.",
            "Raise max_bytes, or use a Python whose standard library is installed as source files.",
        )
    digest = hashlib.sha256(f"{len(train)}:".encode() + train)
    digest.update(validation)
    return Corpus(
        train=np.frombuffer(train, dtype=np.uint8),
        validation=np.frombuffer(validation, dtype=np.uint8),
        fingerprint=digest.hexdigest(),
        num_files=num_files,
        description=f"{num_files} files of the standard library of Python {platform.python_version()}",
    )


def _read(folder: Path, names: list[str], limit: int) -> tuple[bytes, int]:
    """The first `limit` bytes of the files one after the other, and how many files they come from."""
    texts: list[bytes] = []
    for name in names:
        if limit <= 0:
            break
        texts.append((folder / name).read_bytes()[:limit])
        limit -= len(texts[-1])
    return b"".join(texts), len(texts)


def _python_files(folder: Path) -> list[str]:
    """Paths relative to `folder`, with forward slashes."""
    found = []
    for parent, folders, files in os.walk(folder):
        folders[:] = [
            name
            for name in folders
            if name not in _EXCLUDED_FOLDERS and not name.startswith(_EXCLUDED_PREFIXES)
        ]
        relative = Path(parent).relative_to(folder)
        found += [
            (relative / name).as_posix()
            for name in files
            if name.endswith(".py") and not name.startswith(_EXCLUDED_PREFIXES)
        ]
    return found


def _is_validation(name: str) -> bool:
    return int.from_bytes(_path_hash(name)[:8], "big") < _VALIDATION_SHARE * 2**64


def _order(name: str) -> tuple[bytes, str]:
    # Other bytes of the hash than the split's, so that every prefix of the order holds both parts.
    return _path_hash(name)[8:16], name


def _path_hash(name: str) -> bytes:
    return hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()
