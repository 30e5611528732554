"""torch.distributed.checkpoint's reader and planner without its two calls of plain pickle.

DCP 2.13 unpickles its `.metadata` file and every non-tensor value without restrictions. Here the metadata may
only name the classes that DCP itself writes into it, and values are loaded with `weights_only=True`.
"""

from __future__ import annotations

import enum
import io
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta
from torch.distributed.checkpoint.planner import ReadItem

from mlsys_engine.errors import CheckpointError
from mlsys_engine.memory.flat_shard import FlatShard

_METADATA_CLASSES = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch": {
        "Size",
        "device",
        "float32",
        "float64",
        "float16",
        "bfloat16",
        "uint8",
        "int8",
        "int16",
        "int32",
    }
    | {"int64", "bool", "complex64", "complex128", "float8_e4m3fn", "float8_e5m2", "strided"},
    "torch.serialization": {"_get_layout"},
    "pathlib": {"PosixPath", "WindowsPath"},
    "pathlib._local": {"PosixPath", "WindowsPath"},
    "collections": {"OrderedDict"},
}


def _member(kind: Any, name: str) -> enum.Enum:
    """What stands for `getattr`, by which Python 3.11.0 to 3.11.3 pickle the members of an enumeration."""
    if isinstance(kind, type) and issubclass(kind, enum.Enum) and name in kind.__members__:
        return kind[name]
    raise pickle.UnpicklingError(f"it asks for the attribute {name!r} of {kind!r}")


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _member
        if name not in _METADATA_CLASSES.get(module, ()):
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint metadata contains")
        return super().find_class(module, name)


class SafeReader(FileSystemReader):
    """A FileSystemReader whose metadata can construct nothing but DCP's own records."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The checkpoint's metadata. Raises CheckpointError when the file is not what DCP writes."""
        path = Path(self.path) / ".metadata"
        try:
            with path.open("rb") as stream:
                metadata: Metadata = _MetadataUnpickler(stream).load()
        except (pickle.UnpicklingError, EOFError, AttributeError, OSError, ValueError, IndexError) as error:
            raise CheckpointError(
                f"The metadata file {path} cannot be read: {error}.",
                "It must be the file that torch.distributed.checkpoint wrote.",
                "Restore it from a copy, or resume from another checkpoint.",
            ) from None
        if metadata.storage_meta is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class SafeLoadPlanner(DefaultLoadPlanner):
    """A planner for flat state dictionaries whose non-tensor values load with `weights_only=True`."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        """Called by DCP first; it replaces values of classes that it does not know by None."""
        shards = {key: value for key, value in state_dict.items() if isinstance(value, FlatShard)}
        super().set_up_planner(state_dict, metadata, is_coordinator)
        self.state_dict.update(shards)

    def lookup_tensor(self, index: MetadataIndex) -> torch.Tensor:
        """Called by DCP for every tensor to read into; it would not look for a FlatShard itself."""
        found = self.state_dict[index.fqn]
        if isinstance(found, FlatShard):
            return found.__get_tensor_shard__(index)
        return super().lookup_tensor(index)

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Called by DCP for every non-tensor value."""
        self.state_dict[read_item.dest_index.fqn] = torch.load(value, weights_only=True)
