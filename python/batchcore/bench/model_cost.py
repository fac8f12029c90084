"""What a decode call must read and compute, from the tensors of a GGUF.

Bytes are those of weights and of the KV cache: activations, attention masks and logits are left
out, and so is what a cache saves. Operations count a multiplication and an addition as two, as
peaks do; norms, softmax and other work per element are left out.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batchcore.bench.gguf_header import read_header
from batchcore.bench.layer_cost import AttentionLayer, CostMetadata, layer_of
from batchcore.errors import ConfigError

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

    from batchcore.bench.gguf_header import TensorInfo

__all__ = ["AttentionLayer", "ModelCost"]

# Tables of which a token reads one row.
_TOKEN_TABLE = "token_embd.weight"
_OTHER_TABLES = {"per_layer_token_embd.weight", "position_embd.weight", "token_types.weight"}


@dataclass(frozen=True, slots=True)
class ModelCost:
    """Bytes and operations of decode calls of one model."""

    name: str
    """Of the file."""
    architecture: str
    tensor_bytes: int
    """All tensors of the file."""
    layer_bytes: int
    """Tensors that every call reads as a whole: all but the head, experts and embeddings."""
    layer_flops_per_row: int
    """Operations of those."""
    head_bytes: int
    """The output head, read by calls in which a row asks for logits."""
    head_flops_per_output: int
    """Operations for the logits of one row."""
    has_tied_head: bool
    """Whether the table of token embeddings is the output head too."""
    embedding_bytes_per_row: int
    """The row of the table of token embeddings that one token reads."""
    lookup_bytes_per_row: int
    """Rows of other tables that one token reads."""
    expert_bytes: int
    """All experts of all layers."""
    expert_flops_per_row: int
    """Operations of the experts that one row goes through."""
    expert_count: int
    expert_used_count: int
    state_bytes_per_sequence: int
    """State of recurrent layers, which every call reads."""
    attention: tuple[AttentionLayer, ...] = field(repr=False)

    @classmethod
    def from_gguf(
        cls, path: str | os.PathLike[str], *, type_k: str = "f16", type_v: str = "f16"
    ) -> ModelCost:
        """Read the shapes and types of a file's tensors; takes a fraction of a second.

        Args:
            path: The file; of a split model the first one.
            type_k: ggml type of the K cache.
            type_v: ggml type of the V cache.

        Raises:
            ConfigError: The `lab` extra is missing, a type is unknown, or the model has an encoder.
            ModelLoadError: The file is missing or damaged.
        """
        pairs, tensors = read_header(path)
        meta = CostMetadata(pairs)
        if meta.get("attention.causal", True) is False or any(
            tensor.name.startswith("enc.") for tensor in tensors
        ):
            raise ConfigError(f"{Path(path).name} has an encoder: only decoders have a cost here")
        layers = meta.names_by_layer(tensors)
        return cls(
            name=Path(path).name,
            architecture=meta.arch,
            expert_count=meta.get("expert_count", 0),
            expert_used_count=meta.get("expert_used_count", 0),
            state_bytes_per_sequence=sum(meta.state_bytes(names) for names in layers),
            attention=tuple(
                meta.attention(i, type_k, type_v)
                for i, names in enumerate(layers)
                if meta.has_kv(i, names)
            ),
            **_sum_tensors(tensors, meta),
        )

    def weight_bytes(self, rows: int = 1, *, outputs: int | None = None) -> float:
        """Bytes of weights that one call of so many rows must read.

        Of a mixture of experts each row takes `expert_used_count` in every layer; how many
        different ones that makes is the expectation for routers without a preference.

        Args:
            rows: Tokens in the call.
            outputs: Rows that ask for logits; None means all of them.
        """
        outputs = _check_outputs(rows, outputs)
        total = self.layer_bytes + rows * self.lookup_bytes_per_row
        if outputs:
            total += self.head_bytes
        if not (outputs and self.has_tied_head):  # else the head has them
            total += rows * self.embedding_bytes_per_row
        share = 0.0
        if self.expert_count:
            share = 1 - (1 - self.expert_used_count / self.expert_count) ** rows
        return total + share * self.expert_bytes

    def context_bytes(self, context_tokens: float) -> float:
        """Bytes that the context of one sequence takes to read: KV cells and recurrent state."""
        return self.state_bytes_per_sequence + sum(
            layer.bytes_per_token * layer.visible(context_tokens) for layer in self.attention
        )

    def step_bytes(
        self,
        rows: int,
        context_tokens: float = 0,
        *,
        outputs: int | None = None,
        sequences: int | None = None,
    ) -> float:
        """Bytes that one call must read.

        Args:
            rows: Tokens in the call.
            context_tokens: Tokens of each sequence, on average, that its rows attend to.
            outputs: Rows that ask for logits; None means all of them.
            sequences: Sequences that the rows belong to; None means one each, as in decode.
        """
        sequences = rows if sequences is None else sequences
        weights = self.weight_bytes(rows, outputs=outputs)
        return weights + sequences * self.context_bytes(context_tokens)

    def step_flops(self, rows: int, outputs: int | None = None, context_tokens: float = 0) -> float:
        """Operations of one call.

        Args:
            rows: Tokens in the call.
            outputs: Rows that ask for logits; None means all of them.
            context_tokens: Tokens that a row attends to, on average.
        """
        outputs = _check_outputs(rows, outputs)
        per_row = self.layer_flops_per_row + self.expert_flops_per_row
        attention = sum(
            layer.flops_per_token * layer.visible(context_tokens) for layer in self.attention
        )
        return rows * (per_row + attention) + outputs * self.head_flops_per_output

    def intensity(
        self, rows: int, context_tokens: float = 0, *, outputs: int | None = None
    ) -> float:
        """Operations per byte of a call with one row for each of `rows` sequences."""
        flops = self.step_flops(rows, outputs, context_tokens)
        return flops / self.step_bytes(rows, context_tokens, outputs=outputs)

    def to_dict(self) -> dict[str, Any]:
        """All figures, ready for JSON."""
        return asdict(self)


def _sum_tensors(tensors: Sequence[TensorInfo], meta: CostMetadata) -> dict[str, Any]:
    """The fields of ModelCost that are sums over tensors."""
    is_tied = all(tensor.name != "output.weight" for tensor in tensors)
    head = _TOKEN_TABLE if is_tied else "output.weight"
    expert_flops = 0
    sums = {
        "tensor_bytes": sum(tensor.num_bytes for tensor in tensors),
        "has_tied_head": is_tied,
        "layer_bytes": 0,
        "layer_flops_per_row": 0,
        "head_bytes": 0,
        "head_flops_per_output": 0,
        "embedding_bytes_per_row": 0,
        "lookup_bytes_per_row": 0,
        "expert_bytes": 0,
    }
    for tensor in tensors:
        flops = 2 * tensor.num_elements if _is_matrix(tensor) else 0
        if (layer := layer_of(tensor)) is not None and layer >= meta.num_layers:
            continue  # predicts further tokens, which plain decoding doesn't use
        if tensor.name == head:
            sums["head_bytes"] = tensor.num_bytes
            sums["head_flops_per_output"] = 2 * tensor.num_elements
        if tensor.name == _TOKEN_TABLE:
            sums["embedding_bytes_per_row"] = tensor.num_bytes // tensor.shape[1]
        elif tensor.name in _OTHER_TABLES:
            sums["lookup_bytes_per_row"] += tensor.num_bytes // tensor.shape[1]
        elif "_exps." in tensor.name:
            sums["expert_bytes"] += tensor.num_bytes
            expert_flops += flops
        elif tensor.name != head:
            sums["layer_bytes"] += tensor.num_bytes
            sums["layer_flops_per_row"] += flops
    num_experts = meta.get("expert_count", 0)
    used = expert_flops * meta.get("expert_used_count", 0) // num_experts if num_experts else 0
    return {**sums, "expert_flops_per_row": used}


def _is_matrix(tensor: TensorInfo) -> bool:
    return len(tensor.shape) > 1 and tensor.name.endswith(".weight") and "norm" not in tensor.name


def _check_outputs(rows: int, outputs: int | None) -> int:
    outputs = rows if outputs is None else outputs
    if not 0 <= outputs <= rows or rows < 1:
        raise ConfigError(f"a call has at least one row, and {outputs} of {rows} can't be outputs")
    return outputs
