"""A hash of the native sources, so that a stale build is noticed. setup.py uses it: no import of ours."""

from __future__ import annotations

import hashlib
from pathlib import Path


def hash_sources(csrc: Path) -> str:
    """SHA-256 over the relative names and contents of all native sources below `csrc`."""
    digest = hashlib.sha256()
    for path in sorted(csrc.rglob("*")):
        if path.suffix in {".h", ".cpp", ".cu", ".cuh"}:
            digest.update(str(path.relative_to(csrc)).encode() + b"\0")
            digest.update(path.read_bytes() + b"\0")
    return digest.hexdigest()
