"""How far a model's next-token distributions are from those of its own weights in F32.

The reference is the same file with every tensor dequantised to F32, run with ggml's kernels and an
F32 KV cache. Neither batchcore's quantised kernels nor ggml's take part in it, so that it favours
neither.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, BinaryIO

from batchcore.lowlevel import Batch, Context
from batchcore.testing.gguf_pairs import read_header
from batchcore.testing.vocab import require_gguf

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    import numpy as np
    import numpy.typing as npt

    from batchcore.model import Model
    from batchcore.testing.gguf_pairs import TensorInfo

__all__ = ["Divergence", "compare_distributions", "write_f32"]

_ROWS_AT_A_TIME = 32
_ELEMENTS_AT_A_TIME = 1 << 18


def write_f32(source: Path, target: Path) -> Path:
    """Write a copy of a GGUF whose tensors are all F32, and return its path.

    Raises:
        ConfigError: The `testing` extra is missing.
        ValueError: `source` is not a GGUF.
    """
    gguf = require_gguf()
    import numpy as np  # noqa: PLC0415

    pairs, tensors = read_header(source)
    arch = next(value for key, value, _, _ in pairs if key == "general.architecture")
    writer = gguf.GGUFWriter(target, arch)
    kinds = gguf.GGUFValueType
    # The writer has its own pairs for these two; the copy has no quantised tensors.
    skipped = {"general.architecture", "general.alignment", "general.quantization_version"}
    for key, value, kind, element in pairs:
        if key == "general.file_type":
            writer.add_file_type(gguf.LlamaFileType.ALL_F32)
        elif key not in skipped:
            writer.add_key_value(
                key, value, kinds(kind), None if element is None else kinds(element)
            )
    for tensor in tensors:
        shape = tensor.shape[::-1]
        writer.add_tensor_info(tensor.name, shape, np.dtype(np.float32), 4 * tensor.n_elements)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    # Written to its file, not through write_tensor_data, which takes a whole tensor.
    out = writer.fout[0]
    writer.write_padding(out, out.tell())
    with source.open("rb") as file:
        for tensor in tensors:
            file.seek(tensor.offset)
            for values in _dequantised(gguf, file, tensor):
                out.write(values.data)
            writer.write_padding(out, 4 * tensor.n_elements)
    writer.close()
    return target


def _dequantised(
    gguf: Any, file: BinaryIO, tensor: TensorInfo
) -> Iterator[npt.NDArray[np.float32]]:
    """Read a tensor in parts."""
    import numpy as np  # noqa: PLC0415

    kind = gguf.GGMLQuantizationType(tensor.kind)
    elements, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    stored = {"F32": np.float32, "F16": np.float16}.get(kind.name, np.uint8)
    n_blocks = tensor.n_elements // elements
    per_part = _ELEMENTS_AT_A_TIME // elements
    for begin in range(0, n_blocks, per_part):
        raw = file.read(min(per_part, n_blocks - begin) * block_bytes)
        values = gguf.quants.dequantize(np.frombuffer(raw, stored).reshape(1, -1), kind)
        yield np.ascontiguousarray(values, np.float32)


@dataclass
class Divergence:
    """One model's distributions beside the reference's, an entry per token of the text."""

    kl: list[float] = field(default_factory=list)
    """KL divergence from the reference to the model, in nats."""
    same_top: list[bool] = field(default_factory=list)
    """Whether both find the same token the likeliest."""
    squared_error: list[float] = field(default_factory=list)
    """Mean squared error of the log-probabilities, weighted by the reference's probabilities."""


def compare_distributions(
    reference: Model,
    models: Mapping[str, Model],
    tokens: Sequence[int],
    *,
    chunk: int = 256,
    n_threads: int = 1,
) -> dict[str, Divergence]:
    """Compare next-token distributions at every position of a text.

    The text is cut into chunks that are computed apart, each behind the token that begins a text.
    All computations on logits are in double precision.

    Args:
        reference: The model to compare with; see `write_f32`.
        models: Models with the same vocabulary.
        tokens: The text, without the token that begins it.
        chunk: Tokens that are computed in one call, beginning included.
        n_threads: Compute threads.
    """
    found = {name: Divergence() for name in models}
    options: dict[str, Any] = {
        "n_ctx": chunk,
        "n_batch": chunk,
        "n_ubatch": chunk,
        "n_threads": n_threads,
    }
    with Context(reference, type_k="f32", type_v="f32", flash_attn=False, **options) as exact:
        contexts = {
            name: Context(model, flash_attn=True, **options) for name, model in models.items()
        }
        try:
            for part in _chunks(reference, tokens, chunk):
                expected = _logits(exact, part)
                for name, context in contexts.items():
                    _add(found[name], expected, _logits(context, part))
        finally:
            for context in contexts.values():
                context.close()
    return found


def _chunks(model: Model, tokens: Sequence[int], chunk: int) -> Iterator[list[int]]:
    start = model.tokenize_prompt("")
    size = chunk - len(start)
    for begin in range(0, len(tokens), size):
        yield [*start, *tokens[begin : begin + size]]


def _logits(context: Context, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
    import numpy as np  # noqa: PLC0415

    context.clear()
    n = len(tokens)
    context.decode(Batch.from_arrays(tokens, range(n), [0] * n, [True] * n))
    return np.array(context.logits_all(), np.float32)


def _log_softmax(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    import numpy as np  # noqa: PLC0415

    shifted: npt.NDArray[np.float64] = logits.astype(np.float64)
    shifted -= shifted.max(axis=-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return shifted


def _add(
    to: Divergence, expected: npt.NDArray[np.float32], logits: npt.NDArray[np.float32]
) -> None:
    import numpy as np  # noqa: PLC0415

    for begin in range(0, len(expected), _ROWS_AT_A_TIME):
        p = _log_softmax(expected[begin : begin + _ROWS_AT_A_TIME])
        q = _log_softmax(logits[begin : begin + _ROWS_AT_A_TIME])
        weights = np.exp(p)
        to.kl += (weights * (p - q)).sum(axis=-1).tolist()
        to.squared_error += (weights * (p - q) ** 2).sum(axis=-1).tolist()
        to.same_top += (p.argmax(axis=-1) == q.argmax(axis=-1)).tolist()
