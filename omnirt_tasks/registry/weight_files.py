"""The safetensors files of a model's folder: which there are, what they hold, and whether they are sound.

Only their headers are read (a length of 8 bytes, then JSON), so a model of many gigabytes takes milliseconds, without
torch and before it.
"""

import json
import math
import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PIPELINE_INDEX = "model_index.json"
SUFFIX = ".safetensors"
# Formats that may run code when they are read; none is ever opened.
UNSAFE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
# No model's header comes near it; a file that is none may claim any length.
HEADER_BYTES_MAX = 100_000_000

_LENGTH = struct.Struct("<Q")
# model.fp16.safetensors, model.fp16-00001-of-00002.safetensors, model-00001-of-00002.fp16.safetensors
_VARIANT = re.compile(r"\.([A-Za-z]\w*)(?:-\d+-of-\d+)?\.safetensors$")
# model.safetensors.index.json, model.safetensors.index.fp16.json
_SHARD_INDEX = re.compile(r"\.safetensors\.index(?:\.([A-Za-z]\w*))?\.json$")
_TENSOR_BYTES = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "I8", "U8", "BOOL"), 1),
}


class UnsoundWeights(ValueError):
    """Files that cannot be loaded: not safetensors, not whole, or not there. The words hold no path."""


@dataclass(frozen=True)
class TensorCount:
    """What a file's tensors come to: numbers that take the dtype asked for, and bytes of those that keep their own."""

    floats: int = 0
    other_bytes: int = 0

    def __add__(self, other: "TensorCount") -> "TensorCount":
        return TensorCount(self.floats + other.floats, self.other_bytes + other.other_bytes)


def count_tensors(folder: Path) -> TensorCount:
    """What all tensors of the model in this folder come to.

    Raises UnsoundWeights when it holds no safetensors, or a file of its is cut off, corrupt or missing.
    """
    total = TensorCount()
    found = False
    for component in _component_folders(folder):
        name = "the model" if component == folder else f"the component {component.name!r}"
        for file in _files(component, name):
            found = True
            total += _count(file, name)
    if not found:
        raise UnsoundWeights(f"The model's folder holds no file *{SUFFIX}.")
    return total


def lone_variant(component: Path) -> str | None:
    """The variant ("fp16") that the component's weights are in; None where plain ones lie there too, or several."""
    found = [_VARIANT.search(file.name) for file in component.glob(f"*{SUFFIX}")]
    variants = {match[1] for match in found if match}
    return variants.pop() if len(variants) == 1 and all(found) else None


def _component_folders(folder: Path) -> Sequence[Path]:
    """The folders that the pipeline's index names; the folder itself where there is no index."""
    try:
        index = json.loads((folder / PIPELINE_INDEX).read_bytes())
    except FileNotFoundError:
        return (folder,)
    except (ValueError, OSError):
        raise UnsoundWeights(f"The file {PIPELINE_INDEX} is no JSON.") from None
    if not isinstance(index, dict):
        raise UnsoundWeights(f"The file {PIPELINE_INDEX} holds no components.")
    # A component is [library, class]; one that was left out is [null, null].
    named = [name for name, value in index.items() if isinstance(value, list) and len(value) == 2 and value[0]]
    return [part for name in sorted(named) if _is_plain(name) and (part := folder / name).is_dir()]


def _files(component: Path, name: str) -> Sequence[Path]:
    """The files that hold the component's weights; none for a tokenizer. Raises UnsoundWeights."""
    held = sorted(path for path in component.iterdir() if path.is_file())
    everything = [path for path in held if path.name.endswith(SUFFIX)]
    # Another number format of the same weights lies beside the plain one.
    plain = [path for path in everything if not _VARIANT.search(path.name)] or everything
    if not plain:
        if unsafe := next((path for path in held if path.suffix in UNSAFE_SUFFIXES), None):
            raise UnsoundWeights(f"The weights of {name} are not safetensors ({unsafe.name}).")
        return ()
    variant = lone_variant(component)
    for index in held:
        if (match := _SHARD_INDEX.search(index.name)) and match[1] == variant:
            for shard in _shards(index, name):
                if not (component / shard).is_file():
                    raise UnsoundWeights(f"The file {shard} of {name} is missing.")
    return plain


def _shards(index: Path, name: str) -> Iterator[str]:
    try:
        placed = json.loads(index.read_bytes())["weight_map"].values()
        shards = sorted({str(shard) for shard in placed})
    except (ValueError, TypeError, KeyError, AttributeError, OSError):
        raise _corrupt(index, name) from None
    yield from (shard for shard in shards if _is_plain(shard))


def _count(file: Path, name: str) -> TensorCount:
    """What the file's header says. Raises UnsoundWeights for one that does not agree with the file."""
    try:
        size_bytes = file.stat().st_size
        with file.open("rb") as stream:
            (header_bytes,) = _LENGTH.unpack(stream.read(_LENGTH.size))
            if header_bytes > min(HEADER_BYTES_MAX, size_bytes - _LENGTH.size):
                raise _corrupt(file, name)
            header = json.loads(stream.read(header_bytes))
        tensors = [value for key, value in header.items() if key != "__metadata__"]
        total, end = TensorCount(), 0
        for tensor in tensors:
            count, tensor_end = _tensor(tensor)
            total += count
            end = max(end, tensor_end)
    except UnsoundWeights:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, struct.error, OSError):
        raise _corrupt(file, name) from None
    if size_bytes != _LENGTH.size + header_bytes + end:
        raise _corrupt(file, name)
    return total


def _tensor(entry: Any) -> tuple[TensorCount, int]:
    """What one tensor comes to, and where its data ends. Raises ValueError, KeyError or TypeError if it cannot be."""
    numbers = math.prod(int(side) for side in entry["shape"])
    begin, end = (int(offset) for offset in entry["data_offsets"])
    size_bytes = numbers * _TENSOR_BYTES[entry["dtype"]]
    if begin < 0 or end - begin != size_bytes:
        raise ValueError("offsets and shape disagree")
    if str(entry["dtype"]).startswith(("F", "BF")):
        return TensorCount(floats=numbers), end
    return TensorCount(other_bytes=size_bytes), end


def _corrupt(file: Path, name: str) -> UnsoundWeights:
    return UnsoundWeights(f"The file {file.name} of {name} is corrupt or cut off.")


def _is_plain(name: str) -> bool:
    """Whether it names an entry of the folder itself."""
    return name == Path(name).name and name not in {"", ".", ".."}
