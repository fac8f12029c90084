"""Random weights, made directly in ggml's quantised formats.

Quantising floats would take minutes at 8B size. Instead the quants of a block are random bits, and
its scales are chosen so that the weights have mean 0 and the wanted standard deviation. Formats
that can't store a symmetric range get the offset that centres it, or a scale of random sign, since
a common mean of all weights would add up over the layers. Block layouts follow ggml-common.h.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    Bytes = NDArray[np.uint8]

__all__ = ["FORMATS", "Format", "random_rows"]


@dataclass(frozen=True)
class Format:
    """A tensor format of ggml.

    Attributes:
        name: As in ggml's type names, in lower case.
        elements: Weights per block.
        block_bytes: Bytes per block.
        fill: Sets the scales of blocks of random bytes, for weights of a standard deviation.
    """

    name: str
    elements: int
    block_bytes: int
    fill: Callable[[np.random.Generator, Bytes, float], None]

    def row_bytes(self, n: int) -> int:
        """Bytes of a row of `n` weights, `n` being a multiple of `elements`."""
        return n // self.elements * self.block_bytes


def random_rows(
    rng: np.random.Generator, fmt: Format, n_blocks: int, std: float, mean: float = 0.0
) -> Bytes:
    """Random blocks, shape (n_blocks, fmt.block_bytes). `mean` only works for float formats."""
    if fmt.elements == 1:
        # Uniform rather than normal: a fifth of the time, and it makes no difference to a test.
        values = rng.random(n_blocks, dtype=np.float32)
        values -= np.float32(0.5)
        values *= np.float32(std * 12**0.5)
        values += np.float32(mean)
        return _FROM_FLOAT[fmt.name](values).view(np.uint8).reshape(n_blocks, fmt.block_bytes)
    words = -(-n_blocks * fmt.block_bytes // 8)
    raw = rng.integers(0, 2**64, size=words, dtype=np.uint64).view(np.uint8)
    blocks = raw[: n_blocks * fmt.block_bytes].reshape(n_blocks, fmt.block_bytes)
    fmt.fill(rng, blocks, std)
    return blocks


def _to_bf16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    upper: NDArray[np.uint32] = values.view(np.uint32) >> np.uint32(16)
    return upper.astype(np.uint16)


_FROM_FLOAT: dict[str, Callable[[NDArray[np.float32]], NDArray[Any]]] = {
    "f32": lambda values: values,
    "f16": lambda values: values.astype(np.float16),
    "bf16": _to_bf16,
}


def _put_f16(blocks: Bytes, offset: int, values: NDArray[np.floating[Any]]) -> None:
    blocks[:, offset : offset + 2] = values.astype("<f2").view(np.uint8).reshape(-1, 2)


def _scales(rng: np.random.Generator, n: int, scale: float, *, signed: bool) -> NDArray[np.float32]:
    """Scales around `scale` (their mean square is its square), of random sign if `signed`."""
    spread: NDArray[np.float32] = rng.random(n, dtype=np.float32)
    spread *= np.float32(0.5)
    spread += np.float32(0.75)
    spread *= np.float32(scale / np.sqrt(1 + 0.25 / 12))
    if signed:
        np.negative(spread, out=spread, where=rng.random(n, dtype=np.float32) < 0.5)
    return spread


def _symmetric(rms: float, offset: int) -> Callable[[np.random.Generator, Bytes, float], None]:
    """Blocks with one f16 scale at `offset`; `rms` is that of the quants."""

    def fill(rng: np.random.Generator, blocks: Bytes, std: float) -> None:
        _put_f16(blocks, offset, _scales(rng, len(blocks), std / rms, signed=True))

    return fill


def _affine(levels: int) -> Callable[[np.random.Generator, Bytes, float], None]:
    """Blocks of f16 scale and f16 minimum: quants 0 to levels - 1, centred by the minimum."""

    def fill(rng: np.random.Generator, blocks: Bytes, std: float) -> None:
        scale = _scales(rng, len(blocks), std / _uniform_rms(levels), signed=False)
        _put_f16(blocks, 0, scale)
        _put_f16(blocks, 2, scale * np.float32(-(levels - 1) / 2))

    return fill


def _uniform_rms(levels: int) -> float:
    """Standard deviation of integers drawn evenly from `levels` neighbouring ones."""
    return float(np.sqrt((levels**2 - 1) / 12))


# Sub-block scales of K-quants are drawn from 32 to 63, all that is needed to make them differ.
_SUB_SCALES = np.arange(32, 64)
_SUB_SCALE_RMS = float(np.sqrt(np.mean(_SUB_SCALES.astype(np.float64) ** 2)))


def _k_affine(levels: int) -> Callable[[np.random.Generator, Bytes, float], None]:
    """Q4_K and Q5_K: d, dmin, then eight 6-bit scales and minima in 12 bytes.

    The weight is d * scale * q - dmin * min: with min = scale, dmin = d * (levels - 1) / 2 centres.
    """

    def fill(rng: np.random.Generator, blocks: Bytes, std: float) -> None:
        rms = _uniform_rms(levels) * _SUB_SCALE_RMS
        d = _scales(rng, len(blocks), std / rms, signed=False)
        _put_f16(blocks, 0, d)
        _put_f16(blocks, 2, d * np.float32((levels - 1) / 2))
        low = rng.integers(32, 64, size=(len(blocks), 4), dtype=np.uint8)
        high = rng.integers(32, 64, size=(len(blocks), 4), dtype=np.uint8)
        # Scales 0 to 3 take six bits of bytes 0 to 3, minima those of bytes 4 to 7; scales and
        # minima 4 to 7 share bytes 8 to 11, their two upper bits are on top of the first eight.
        first = low | (high >> 4) << 6
        blocks[:, 4:8] = first
        blocks[:, 8:12] = first
        blocks[:, 12:16] = (high & 0xF) | (high & 0xF) << 4

    return fill


def _q2_k(rng: np.random.Generator, blocks: Bytes, std: float) -> None:
    # scales[16] (scale and minimum in half a byte each), qs[64], d, dmin
    nibbles = rng.integers(8, 16, size=(len(blocks), 16), dtype=np.uint8)
    blocks[:, :16] = nibbles | nibbles << 4
    sub_rms = float(np.sqrt(np.mean(np.arange(8, 16) ** 2.0)))
    d = _scales(rng, len(blocks), std / (_uniform_rms(4) * sub_rms), signed=False)
    _put_f16(blocks, 80, d)
    _put_f16(blocks, 82, d * np.float32(1.5))


def _q6_k(rng: np.random.Generator, blocks: Bytes, std: float) -> None:
    # ql[128], qh[64], scales[16] as int8, d; the quants are -32 to 31
    sub = rng.integers(32, 64, size=(len(blocks), 16), dtype=np.int8)
    np.negative(sub, out=sub, where=rng.random(sub.shape, dtype=np.float32) < 0.5)
    blocks[:, 192:208] = sub.view(np.uint8)
    rms = float(np.sqrt(np.mean(np.arange(-32, 32) ** 2.0))) * _SUB_SCALE_RMS
    _put_f16(blocks, 208, _scales(rng, len(blocks), std / rms, signed=True))


def _nothing(_rng: np.random.Generator, _blocks: Bytes, _std: float) -> None:
    pass


def _rms(low: int, high: int) -> float:
    """Root mean square of the integers from `low` to `high`."""
    return float(np.sqrt(np.mean(np.arange(low, high + 1) ** 2.0)))


# Root mean square of the 16 values of IQ4_NL's codebook.
_IQ4_NL_RMS = 69.4

FORMATS: dict[str, Format] = {
    fmt.name: fmt
    for fmt in (
        Format("f32", 1, 4, _nothing),
        Format("f16", 1, 2, _nothing),
        Format("bf16", 1, 2, _nothing),
        Format("q8_0", 32, 34, _symmetric(_rms(-128, 127), 0)),
        Format("q4_0", 32, 18, _symmetric(_rms(-8, 7), 0)),
        Format("q4_1", 32, 20, _affine(16)),
        Format("q5_0", 32, 22, _symmetric(_rms(-16, 15), 0)),
        Format("q5_1", 32, 24, _affine(32)),
        Format("iq4_nl", 32, 18, _symmetric(_IQ4_NL_RMS, 0)),
        Format("q2_k", 256, 84, _q2_k),
        # All bits random: quants -4 to 3 times 6-bit scales -32 to 31, and d at the end.
        Format("q3_k", 256, 110, _symmetric(_rms(-4, 3) * _rms(-32, 31), 108)),
        Format("q4_k", 256, 144, _k_affine(16)),
        Format("q5_k", 256, 176, _k_affine(32)),
        Format("q6_k", 256, 210, _q6_k),
    )
}
