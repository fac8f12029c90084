"""Writing a GGUF with random weights in chunks, so that its size is bound by the disk only."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batchcore.errors import ConfigError
from batchcore.testing.architectures import Blueprint, Shape, Tensor, blueprint
from batchcore.testing.vocab import load_vocab, require_gguf

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping

    from batchcore.testing.blocks import Format

__all__ = ["synthetic_gguf"]

_CHUNK_BYTES = 16 << 20

# What llama-quantize uses for a tensor whose rows are not a multiple of the format's block.
_FALLBACKS = {"q2_k": "q4_0", "q3_k": "q4_0", "q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0"}


def synthetic_gguf(
    path: str | os.PathLike[str],
    arch: str = "llama",
    *,
    n_layer: int = 2,
    n_embd: int = 64,
    n_head: int = 4,
    n_head_kv: int = 2,
    n_ff: int = 128,
    vocab: str | os.PathLike[str] | int = 512,
    quant: str = "f32",
    seed: int = 0,
    n_ctx_train: int = 2048,
    tie_embeddings: bool = False,
    metadata: Mapping[str, Any] | None = None,
    **arch_overrides: Any,
) -> Path:
    """Write a GGUF of random weights that llama.cpp loads and runs, and return its path.

    The same arguments give the same bytes. Weights are scaled so that activations stay of order
    one; what such a model says has no meaning.

    Args:
        path: Where to; replaced only once the file is complete.
        arch: One of `ARCHITECTURES`.
        n_layer: Layers (of encoder and decoder each, for t5).
        n_embd: Width; K-quants need multiples of 256, other quants of 32, else a finer one is used.
        n_head: Attention heads.
        n_head_kv: Heads of keys and values (bert and t5 use `n_head`).
        n_ff: Width of the feed-forward part.
        vocab: An int makes a vocabulary of that many tokens that spells any text in bytes, from
            nothing. Else the tokenizer of a GGUF: its path, a preset (`smollm2-135m`), or one of
            llama.cpp's vocabularies (`llama-spm`, `llama-bpe`, `qwen2`, `bert-bge`, ...).
        quant: `f32`, `f16`, `bf16`, `q8_0`, `q4_0`, `q4_1`, `q5_0`, `q5_1`, `iq4_nl`, `q2_k` to
            `q6_k`, or the mix `q4_k_m`. Norms, biases and convolutions stay f32, as in real files.
        seed: Of the weights.
        n_ctx_train: The context length that the file states.
        tie_embeddings: Use the token embeddings as the output head. Such random models tend to
            repeat their last token for ever.
        metadata: More key-value pairs, by full name (`llama.rope.freq_base`), that win over ours.
        **arch_overrides: Options of the architecture: `head_dim` (llama, qwen3, gemma3, falcon-h1),
            `n_expert` and `n_expert_used` (llama), `sliding_window` and `sliding_window_pattern`
            (gemma3), `ssm_inner`, `ssm_state`, `ssm_group` and `ssm_head_dim` (mamba2, falcon-h1),
            `attention_every` and `conv_cache` (lfm2), `n_buckets` and `decoder_start_token_id`
            (t5), `pooling_type` (bert).

    Raises:
        ConfigError: Arguments don't fit together, or the `testing` extra is missing.
        ModelLoadError: The vocabulary can't be found.
    """
    gguf = require_gguf()
    formats = _formats(quant)
    vocabulary = load_vocab(vocab)
    shape = Shape(
        n_vocab=vocabulary.n_tokens,
        n_layer=n_layer,
        n_embd=n_embd,
        n_head=n_head,
        n_head_kv=n_head_kv,
        n_ff=n_ff,
        n_ctx_train=n_ctx_train,
        tie_embeddings=tie_embeddings,
    )
    plan = blueprint(arch, shape, arch_overrides)
    pairs: dict[str, Any] = {
        "general.name": f"synthetic {arch}",
        "general.file_type": _file_type(gguf, quant),
        **{f"{arch}.{key}": value for key, value in plan.metadata.items()},
        **(metadata or {}),
    }
    if plan.token_type_count:
        pairs.setdefault("tokenizer.ggml.token_type_count", plan.token_type_count)

    target = Path(path)
    partial = target.with_name(target.name + ".partial")
    writer = gguf.GGUFWriter(partial, arch)
    try:
        vocabulary.write(writer, skip=pairs.keys())
        for key, value in pairs.items():
            _add_pair(gguf, writer, key, value)
        _write_tensors(gguf, writer, plan, formats, seed)
        writer.close()
        partial.replace(target)
    finally:
        writer.close()
        partial.unlink(missing_ok=True)
    return target


def _formats(quant: str) -> tuple[Format, bool]:
    from batchcore.testing.blocks import FORMATS  # noqa: PLC0415

    name = quant.lower()
    mixed = name == "q4_k_m"
    fmt = FORMATS.get("q4_k" if mixed else name)
    if fmt is None:
        raise ConfigError(f"unknown quant {quant!r}; known: {', '.join(FORMATS)}, q4_k_m")
    return fmt, mixed


def _file_type(gguf: Any, quant: str) -> int:
    names = [quant.upper(), f"MOSTLY_{quant.upper()}", f"MOSTLY_{quant.upper()}_M", "ALL_F32"]
    types = gguf.LlamaFileType.__members__
    return int(next(types[name] for name in names if name in types))


def _add_pair(gguf: Any, writer: Any, key: str, value: Any) -> None:
    if isinstance(value, list):
        writer.add_array(key, value)
        return
    # bool before int, which it is a subclass of
    kinds = ((bool, "BOOL"), (int, "UINT32"), (float, "FLOAT32"), (str, "STRING"))
    kind = next((name for cls, name in kinds if isinstance(value, cls)), None)
    if kind is None:
        raise ConfigError(f"metadata {key}: a {type(value).__name__} can't be stored")
    writer.add_key_value(key, value, gguf.GGUFValueType[kind])


def _format_of(tensor: Tensor, n_layer: int, chosen: Format, *, mixed: bool) -> Format:
    from batchcore.testing.blocks import FORMATS  # noqa: PLC0415

    if not tensor.quantised:
        return FORMATS["f32"]
    name = chosen.name
    if mixed:
        # llama-quantize's rule for Q4_K_M: more bits for the head, and for attn_v and ffn_down of
        # the first and last eighth of the layers and every third of those between.
        i, eighth = tensor.layer, n_layer // 8
        more = i < eighth or i >= 7 * n_layer // 8 or (i - eighth) % 3 == 2
        if tensor.role == "output" or (tensor.role in {"attn_v", "ffn_down"} and more):
            name = "q6_k"
    if tensor.shape[0] % FORMATS[name].elements:
        name = _FALLBACKS.get(name, "f16")
    return FORMATS[name] if tensor.shape[0] % FORMATS[name].elements == 0 else FORMATS["f16"]


def _write_tensors(
    gguf: Any, writer: Any, plan: Blueprint, formats: tuple[Format, bool], seed: int
) -> None:
    import numpy as np  # noqa: PLC0415

    from batchcore.testing.blocks import random_rows  # noqa: PLC0415

    chosen, mixed = formats
    layout: list[tuple[Tensor, Format, int]] = []
    for tensor in plan.tensors:
        fmt = _format_of(tensor, plan.shape.n_layer, chosen, mixed=mixed)
        n_rows = 1
        for n in tensor.shape[1:]:
            n_rows *= n
        n_blocks = n_rows * (tensor.shape[0] // fmt.elements)
        layout.append((tensor, fmt, n_blocks))
        # gguf takes numpy's order, and with a type other than uint8 the shape in elements.
        writer.add_tensor_info(
            tensor.name,
            tensor.shape[::-1],
            np.dtype(np.float32),
            n_blocks * fmt.block_bytes,
            raw_dtype=gguf.GGMLQuantizationType[fmt.name.upper()],
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    # Written to its file, not through write_tensor_data, which takes a whole tensor.
    out = writer.fout[0]
    writer.write_padding(out, out.tell())
    for tensor, fmt, n_blocks in layout:
        # Seeded by name, so that a tensor doesn't depend on what comes before it.
        rng = np.random.default_rng([seed, zlib.crc32(tensor.name.encode())])
        per_chunk = max(1, _CHUNK_BYTES // fmt.block_bytes)
        for start in range(0, n_blocks, per_chunk):
            n = min(per_chunk, n_blocks - start)
            out.write(random_rows(rng, fmt, n, tensor.std, tensor.mean).data)
        writer.write_padding(out, n_blocks * fmt.block_bytes)
