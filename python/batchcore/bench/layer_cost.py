"""What the layers of a model keep between steps: KV cells, and the state of recurrent layers."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from batchcore.bench.gguf_header import type_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from batchcore.bench.gguf_header import TensorInfo

__all__ = ["AttentionLayer", "CostMetadata", "layer_of"]

# Every n-th layer sees all tokens and the others only the window: n where the file doesn't say it,
# and whether the layers that see all come first. From load_swa_pattern's callers in llama.cpp's
# src/models; of other architectures it ignores the window.
_SWA_PERIODS = {
    "afmoe": (4, False),
    "cohere2": (4, False),
    "cohere2moe": (4, True),
    "exaone-moe": (4, False),
    "exaone4": (4, False),
    "gemma2": (2, False),
    "gemma3": (6, False),
    "gemma3n": (5, False),
    "gpt-oss": (2, False),
    "laguna": (4, True),
    "lfm2": (0, False),
    "mellum": (4, False),
    "muse-glimmer": (4, False),
    "olmo2": (4, False),
    "plamo3": (8, False),
    "smallthinker": (4, True),
}


@dataclass(frozen=True, slots=True)
class AttentionLayer:
    """What the context of a sequence costs in one layer."""

    bytes_per_token: int
    """Keys and values of one token, in the KV cache."""
    flops_per_token: int
    """Operations of one row for each token that it attends to."""
    window_tokens: int | None
    """Tokens that it attends to at most; None means all."""

    def visible(self, context_tokens: float) -> float:
        """Tokens of the context that are within the window."""
        return min(context_tokens, self.window_tokens or context_tokens)


class CostMetadata:
    """The pairs of a file that say what its attention and recurrent layers keep."""

    def __init__(self, pairs: dict[str, Any]) -> None:
        """Take the pairs of a file by their full names."""
        self.arch: str = pairs.get("general.architecture", "")
        self._pairs = pairs
        self.num_layers: int = self.get("block_count", 0) - self.get("nextn_predict_layers", 0)

    def names_by_layer(self, tensors: Iterable[TensorInfo]) -> list[set[str]]:
        """Names of the tensors in each layer, without the layer."""
        names: list[set[str]] = [set() for _ in range(self.num_layers)]
        for tensor in tensors:
            layer = layer_of(tensor)
            if layer is not None and layer < self.num_layers:
                names[layer].add(tensor.name.split(".", 2)[2])
        return names

    def get(self, key: str, default: Any) -> Any:
        """A value by its key without the architecture."""
        return self._pairs.get(f"{self.arch}.{key}", default)

    def of_layer(self, key: str, layer: int, default: int) -> int:
        """A value that may be an array with one for each layer."""
        value = self.get(key, default)
        return int(value[layer] if isinstance(value, list) else value)

    def has_kv(self, layer: int, names: set[str]) -> bool:
        """Whether a layer has attention. Linear attention may have `attn_qkv`, but no cells."""
        is_recurrent = any(name.startswith(("ssm_", "time_mix_")) for name in names)
        has_keys = bool(names & {"attn_k.weight", "attn_kv_a_mqa.weight"}) or (
            "attn_qkv.weight" in names and not is_recurrent
        )
        return has_keys and self._num_kv_heads(layer) > 0

    def attention(self, layer: int, type_k: str, type_v: str) -> AttentionLayer:
        """The cost of a layer that has attention."""
        num_heads = self.of_layer("attention.head_count", layer, 0)
        num_kv_heads = self._num_kv_heads(layer)
        window = self._window_tokens(layer)
        default = self.get("embedding_length", 0) // max(num_heads, 1)
        k_dim = self.of_layer("attention.key_length", layer, default)
        v_dim = self.of_layer("attention.value_length", layer, default)
        if window is not None:
            k_dim = self.of_layer("attention.key_length_swa", layer, k_dim)
            v_dim = self.of_layer("attention.value_length_swa", layer, v_dim)
        num_bytes = type_bytes(type_k, num_kv_heads * k_dim)
        if self.get("attention.key_length_mla", 0) == 0:  # else values are part of the keys
            num_bytes += type_bytes(type_v, num_kv_heads * v_dim)
        return AttentionLayer(
            bytes_per_token=num_bytes,
            flops_per_token=2 * num_heads * (k_dim + v_dim),
            window_tokens=window,
        )

    def state_bytes(self, names: set[str]) -> int:
        """The f32 state of one sequence in a layer of Mamba or short convolutions."""
        num_elements = 0
        if any(name.startswith("ssm_") for name in names):
            inner, state = self.get("ssm.inner_size", 0), self.get("ssm.state_size", 0)
            conv_dim = inner + 2 * self.get("ssm.group_count", 0) * state
            num_elements = state * inner + (self.get("ssm.conv_kernel", 1) - 1) * conv_dim
        elif any(name.startswith("shortconv.") for name in names):
            num_elements = self.get("embedding_length", 0) * (self.get("shortconv.l_cache", 1) - 1)
        return 4 * num_elements

    def _num_kv_heads(self, layer: int) -> int:
        default = self.of_layer("attention.head_count", layer, 0)
        return self.of_layer("attention.head_count_kv", layer, default)

    def _window_tokens(self, layer: int) -> int | None:
        window = int(self.get("attention.sliding_window", 0))
        period, dense_first = _SWA_PERIODS.get(self.arch, (1, False))
        pattern: Sequence[Any] | int = self.get("attention.sliding_window_pattern", period)
        if isinstance(pattern, int):
            dense = 0 if dense_first else pattern - 1
            is_windowed = pattern == 0 or layer % pattern != dense
        else:
            is_windowed = bool(pattern[layer])
        return window if window and is_windowed else None


def layer_of(tensor: TensorInfo) -> int | None:
    """The layer that a tensor belongs to; None where it is of no layer."""
    block = re.match(r"blk\.(\d+)\.", tensor.name)
    return int(block[1]) if block else None
