"""Token files: one header of 64 bytes, then the tokens, memory-mapped so that no rank reads what it does not
use.

Header, little-endian: 8 bytes magic, uint32 version, uint32 bytes a token, uint64 number of tokens, 32 bytes
sha256 of the tokens, 8 bytes of zero.
"""

from __future__ import annotations

import hashlib
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from mlsys_engine.errors import DataError

MAGIC = b"MLSYSTOK"
VERSION = 1
HEADER_BYTES = 64
_HEADER = struct.Struct("<8sIIQ32s8x")
_DTYPES: dict[int, np.dtype[Any]] = {2: np.dtype("<u2"), 4: np.dtype("<u4")}


def write_token_file(
    path: str | os.PathLike[str], tokens: ArrayLike, dtype: DTypeLike = np.uint16
) -> TokenFile:
    """Writes tokens as uint16 or uint32, so that a reader sees the whole file or none, and opens it.

    Raises DataError for another dtype, for tokens that are not a row of integers, or that the dtype cannot
    hold.
    """
    target = Path(path)
    stored = np.dtype(dtype).newbyteorder("<")
    values = np.asarray(tokens)
    if stored not in _DTYPES.values():
        raise DataError(
            f"dtype={np.dtype(dtype).name} for the token file {target}.",
            "Tokens are stored as uint16 or uint32.",
            "Use uint16 up to 65536 tokens in the vocabulary, uint32 beyond.",
        )
    if values.ndim != 1 or (values.size and not np.issubdtype(values.dtype, np.integer)):
        raise DataError(
            f"Tokens of shape {values.shape} and dtype {values.dtype} for {target}.",
            "A token file holds one row of integers.",
            "Concatenate the documents, with a separator token if the model has one.",
        )
    if values.size and not 0 <= int(values.min()) <= int(values.max()) <= np.iinfo(stored).max:
        raise DataError(
            f"Tokens from {int(values.min())} to {int(values.max())} for {target}.",
            f"{stored.name} holds 0 to {np.iinfo(stored).max}.",
            "Use dtype=uint32, or check the tokenizer.",
        )
    body = np.ascontiguousarray(values, dtype=stored)
    header = _HEADER.pack(MAGIC, VERSION, stored.itemsize, body.size, hashlib.sha256(body.data).digest())
    temporary = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        with temporary.open("wb") as file:
            file.write(header)
            file.write(body.data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    return TokenFile(target)


class TokenFile:
    """A token file opened for reading. Indexing gives numpy arrays that are views of the file's pages.

    Attributes: `path`, `dtype`, `sha256` (hexadecimal, of the tokens, as the header states it), `tokens`.
    Sent to a worker process it is opened there again; the tokens are never copied.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        num_bytes = _file_size(self.path)
        with self.path.open("rb") as file:
            header = file.read(HEADER_BYTES)
        if len(header) < HEADER_BYTES or not header.startswith(MAGIC):
            raise _corrupt(self.path, f"is not a token file: it does not begin with {MAGIC.decode()}")
        _, version, itemsize, length, digest = _HEADER.unpack(header)
        if version != VERSION or itemsize not in _DTYPES:
            raise _corrupt(self.path, f"has version {version} and {itemsize} bytes a token")
        expected_bytes = HEADER_BYTES + length * itemsize
        if num_bytes != expected_bytes:
            raise _corrupt(
                self.path, f"has {num_bytes} bytes where its header ({length} tokens) says {expected_bytes}"
            )
        self.dtype: np.dtype[Any] = _DTYPES[itemsize]
        self.sha256: str = digest.hex()
        # An empty file cannot be mapped.
        self.tokens: NDArray[Any] = (
            np.memmap(self.path, dtype=self.dtype, mode="r", offset=HEADER_BYTES, shape=(length,))
            if length
            else np.empty(0, dtype=self.dtype)
        )

    def verify(self) -> None:
        """Reads the whole file and raises DataError unless its tokens have the header's sha256."""
        if hashlib.sha256(np.ascontiguousarray(self.tokens).data).hexdigest() != self.sha256:
            raise _corrupt(self.path, "has tokens that do not match the sha256 in its header")

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, key: Any) -> Any:
        return self.tokens[key]

    def __reduce__(self) -> tuple[type[TokenFile], tuple[str]]:
        return type(self), (str(self.path),)

    def __repr__(self) -> str:
        return f"TokenFile({str(self.path)!r}, {len(self)} tokens, {self.dtype.name})"


def _file_size(path: Path) -> int:
    if not path.is_file():
        raise DataError(
            f"The token file {path} {'is not a file' if path.exists() else 'does not exist'}.",
            "A file that mlsys_engine.data.write_token_file wrote is needed.",
            "Check the path (relative paths start at the working directory of the rank), or write the file "
            "first.",
        )
    return path.stat().st_size


def _corrupt(path: Path, finding: str) -> DataError:
    return DataError(
        f"{path} {finding}.",
        "A token file is a header of 64 bytes and exactly the tokens that it announces.",
        "Write it again with mlsys_engine.data.write_token_file; an interrupted copy is the usual cause.",
    )
