"""The metadata and the list of tensors of a GGUF, without its data.

gguf's own reader takes 13 seconds for a vocabulary of 262,144 tokens; this takes a fraction of one.
From the gguf package come only the sizes of the tensor types.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batchcore.errors import ConfigError, ModelLoadError
from batchcore.testing.gguf_pairs import _array, _number, _string, _value

if TYPE_CHECKING:
    import os

__all__ = ["TensorInfo", "read_header", "require_gguf", "type_bytes"]

_ARRAY = 9


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a file."""

    name: str
    shape: tuple[int, ...]
    """In ggml's order, the length of a row first."""
    type_name: str
    """ggml's, e.g. `Q4_K`."""
    num_bytes: int

    @property
    def num_elements(self) -> int:
        """Weights in it."""
        return math.prod(self.shape)


def require_gguf() -> Any:
    """The gguf package, or an error that says how to get it."""
    try:
        import gguf  # noqa: PLC0415
    except ImportError as error:
        raise ConfigError(
            "the cost of a model is read with the gguf package: pip install 'batchcore[lab]'"
        ) from error
    return gguf


def type_bytes(type_name: str, num_elements: int) -> int:
    """Bytes of so many elements of a ggml type, e.g. 34 of 32 in `q8_0`.

    Raises:
        ConfigError: There is no such type, or the elements don't fill its blocks.
    """
    gguf = require_gguf()
    kind = gguf.GGMLQuantizationType.__members__.get(type_name.upper())
    if kind is None:
        raise ConfigError(f"unknown tensor type {type_name!r}")
    block_elements, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    if num_elements % block_elements:
        raise ConfigError(f"{num_elements} elements don't fill {type_name} blocks")
    return int(num_elements // block_elements * block_bytes)


def read_header(path: str | os.PathLike[str]) -> tuple[dict[str, Any], list[TensorInfo]]:
    """Metadata by key, and the tensors; of a split model those of all its files.

    Args:
        path: The file, or the first one of a split model.

    Raises:
        ModelLoadError: A file is missing, damaged, or not a GGUF of version 2 or 3.
        ConfigError: The gguf package is missing.
    """
    require_gguf()
    first = Path(path)
    pairs, tensors = _read_file(first)
    for i in range(1, int(pairs.get("split.count", 1))):
        part = first.name.replace("-00001-of-", f"-{i + 1:05d}-of-")
        if part == first.name:
            raise ModelLoadError(f"{first} is not the first file of its model")
        tensors += _read_file(first.with_name(part))[1]
    return pairs, tensors


def _read_file(path: Path) -> tuple[dict[str, Any], list[TensorInfo]]:
    try:
        with path.open("rb") as file:
            if file.read(4) != b"GGUF" or _number(file, "I") not in {2, 3}:
                raise ValueError("not a GGUF of version 2 or 3")
            num_tensors, num_pairs = _number(file, "Q"), _number(file, "Q")
            pairs: dict[str, Any] = {}
            for _ in range(num_pairs):
                key, kind = _string(file), _number(file, "I")
                is_array = kind == _ARRAY
                pairs[key] = _array(file, _number(file, "I")) if is_array else _value(file, kind)
            return pairs, [_read_tensor(file) for _ in range(num_tensors)]
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"{path}: {error}") from error


def _read_tensor(file: Any) -> TensorInfo:
    name = _string(file)
    shape = tuple(_number(file, "Q") for _ in range(_number(file, "I")))
    type_name = require_gguf().GGMLQuantizationType(_number(file, "I")).name
    _number(file, "Q")  # where its data is
    return TensorInfo(name, shape, type_name, type_bytes(type_name, math.prod(shape)))
