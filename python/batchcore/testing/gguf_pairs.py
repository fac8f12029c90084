"""Reading the key-value pairs of a GGUF, and where its tensors are.

gguf's own reader makes numpy arrays of every string, which takes half a minute for a vocabulary of
262,144 tokens; this takes a fraction of a second.
"""

from __future__ import annotations

import math
import os
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["Pair", "TensorInfo", "read_header", "read_pairs"]

_MAGIC = b"GGUF"
_STRING, _ARRAY = 8, 9
_LARGE_BYTES = 1 << 20
_DEFAULT_ALIGNMENT = 32
# The struct codes of the value types that are numbers; 8 and 9 are strings and arrays.
_NUMBERS = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip

#: Key, value, type and, for an array, the type of its elements (gguf's numbers).
Pair = tuple[str, Any, int, int | None]


@dataclass(frozen=True)
class TensorInfo:
    """A tensor of a GGUF: its shape in ggml's order, gguf's number of its type, and its place."""

    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int
    """Bytes from the beginning of the file."""

    @property
    def n_elements(self) -> int:
        """Product of all dimensions."""
        return math.prod(self.shape)


def read_pairs(path: Path) -> Iterator[Pair]:
    """Yield key, value, type and, for an array, the type of its elements (gguf's numbers).

    Raises:
        ValueError: The file is not a GGUF of version 2 or 3, or it is truncated.
    """
    with path.open("rb") as file:
        _, n_pairs = _counts(file)
        yield from _pairs(file, n_pairs)


def read_header(path: Path) -> tuple[list[Pair], list[TensorInfo]]:
    """Read all pairs, and what tensors the file holds, in their order.

    Raises:
        ValueError: The file is not a GGUF of version 2 or 3, or it is truncated.
    """
    with path.open("rb") as file:
        n_tensors, n_pairs = _counts(file)
        pairs = list(_pairs(file, n_pairs))
        alignment = next((p[1] for p in pairs if p[0] == "general.alignment"), _DEFAULT_ALIGNMENT)
        found = []
        for _ in range(n_tensors):
            name = _string(file)
            shape = tuple(_number(file, "Q") for _ in range(_number(file, "I")))
            found.append((name, shape, _number(file, "I"), _number(file, "Q")))
        base = -(-file.tell() // alignment) * alignment
    return pairs, [TensorInfo(name, shape, kind, base + at) for name, shape, kind, at in found]


def _counts(file: BinaryIO) -> tuple[int, int]:
    """Read the header: how many tensors and how many pairs there are."""
    if file.read(4) != _MAGIC:
        raise ValueError("no GGUF magic")
    version = _number(file, "I")
    if version not in {2, 3}:
        raise ValueError(f"version {version} is not supported")
    return _number(file, "Q"), _number(file, "Q")


def _pairs(file: BinaryIO, count: int) -> Iterator[Pair]:
    for _ in range(count):
        key = _string(file)
        kind = _number(file, "I")
        if kind == _ARRAY:
            element = _number(file, "I")
            yield key, _array(file, element), kind, element
        else:
            yield key, _value(file, kind), kind, None


def _take(file: BinaryIO, n_bytes: int) -> bytes:
    # A damaged count must not become an attempt to allocate it.
    if n_bytes > _LARGE_BYTES and n_bytes > os.fstat(file.fileno()).st_size:
        raise ValueError("truncated")
    data = file.read(n_bytes)
    if len(data) != n_bytes:
        raise ValueError("truncated")
    return data


def _number(file: BinaryIO, code: str) -> Any:
    return struct.unpack(f"<{code}", _take(file, struct.calcsize(f"<{code}")))[0]


def _string(file: BinaryIO) -> str:
    return _take(file, _number(file, "Q")).decode("utf-8")


def _value(file: BinaryIO, kind: int) -> Any:
    if kind == _STRING:
        return _string(file)
    if kind not in _NUMBERS:
        raise ValueError(f"value type {kind} is not known")
    return _number(file, _NUMBERS[kind])


def _array(file: BinaryIO, element: int) -> list[Any]:
    count = _number(file, "Q")
    if element in _NUMBERS:
        code = f"<{count}{_NUMBERS[element]}"
        return list(struct.unpack(code, _take(file, struct.calcsize(code))))
    return [_value(file, element) for _ in range(count)]
