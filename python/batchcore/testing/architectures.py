"""Which metadata and tensors llama.cpp requires of each architecture.

Read from src/models/*.cpp of the pinned llama.cpp (load_arch_hparams and load_arch_tensors). Shapes
are written in ggml's order, the length of a row first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from batchcore.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["ARCHITECTURES", "LLAMA_8B", "Blueprint", "Shape", "Tensor", "blueprint"]

#: Arguments of `synthetic_gguf` that give a model the shape of Llama 3 8B.
LLAMA_8B: dict[str, Any] = {
    "arch": "llama",
    "n_layer": 32,
    "n_embd": 4096,
    "n_head": 32,
    "n_head_kv": 8,
    "n_ff": 14336,
    "vocab": 128256,
    "n_ctx_train": 8192,
}


@dataclass(frozen=True)
class Shape:
    """The sizes that all architectures share; an architecture ignores what it has no use for."""

    n_vocab: int
    n_layer: int
    n_embd: int
    n_head: int
    n_head_kv: int
    n_ff: int
    n_ctx_train: int
    tie_embeddings: bool


@dataclass(frozen=True)
class Tensor:
    """One tensor: its shape in ggml's order, and the distribution of its random values.

    `quantised` says that llama.cpp's tools would quantise it; `role` that a mix treats it apart.
    """

    name: str
    shape: tuple[int, ...]
    std: float
    mean: float = 0.0
    quantised: bool = False
    role: str = ""
    layer: int = 0


@dataclass
class Blueprint:
    """What a file of one architecture holds, apart from its vocabulary.

    Keys of `metadata` are written with the architecture as prefix.
    """

    arch: str
    shape: Shape
    metadata: dict[str, Any] = field(default_factory=dict)
    tensors: list[Tensor] = field(default_factory=list)
    token_type_count: int = 0

    def matrix(
        self, name: str, n_in: int, *n_out: int, gain: float = 1.0, role: str = "", layer: int = 0
    ) -> None:
        """A weight matrix: inputs of unit variance give outputs of `gain` squared."""
        std = gain / math.sqrt(n_in)
        self.tensors.append(Tensor(f"{name}.weight", (n_in, *n_out), std, 0.0, True, role, layer))

    def norm(self, name: str, *shape: int) -> None:
        """The weight of a normalisation: around 1."""
        self.tensors.append(Tensor(f"{name}.weight", shape, 0.1, 1.0))

    def plain(self, name: str, *shape: int, std: float, mean: float = 0.0) -> None:
        """A tensor that always stays f32."""
        self.tensors.append(Tensor(name, shape, std, mean))

    def embeddings(self, output_norm: str = "output_norm", gain: float = 1.0) -> None:
        """Token embeddings, the last norm, and the output head unless it is tied."""
        s = self.shape
        std = gain / math.sqrt(s.n_embd)
        self.tensors.append(
            Tensor("token_embd.weight", (s.n_embd, s.n_vocab), std, 0.0, True, "embedding")
        )
        self.norm(output_norm, s.n_embd)
        if not s.tie_embeddings:
            self.matrix("output", s.n_embd, s.n_vocab, gain=2.0, role="output")


def _residual_gain(shape: Shape) -> float:
    # Two branches per layer add to the residual stream; scaled so that it doesn't grow with depth.
    return 1 / math.sqrt(2 * max(1, shape.n_layer))


def _attention(
    b: Blueprint, i: int, head_dim: int, *, n_head_kv: int | None = None, qk_norm: bool = False
) -> None:
    s, p = b.shape, f"blk.{i}"
    kv = head_dim * (s.n_head_kv if n_head_kv is None else n_head_kv)
    b.matrix(f"{p}.attn_q", s.n_embd, head_dim * s.n_head)
    b.matrix(f"{p}.attn_k", s.n_embd, kv)
    b.matrix(f"{p}.attn_v", s.n_embd, kv, role="attn_v", layer=i)
    b.matrix(f"{p}.attn_output", head_dim * s.n_head, s.n_embd, gain=_residual_gain(s))
    if qk_norm:
        b.norm(f"{p}.attn_q_norm", head_dim)
        b.norm(f"{p}.attn_k_norm", head_dim)


def _ffn(b: Blueprint, prefix: str, i: int = 0, *, gate: bool = True) -> None:
    s = b.shape
    if gate:
        b.matrix(f"{prefix}.ffn_gate", s.n_embd, s.n_ff)
    b.matrix(f"{prefix}.ffn_up", s.n_embd, s.n_ff)
    gain = _residual_gain(s)
    b.matrix(f"{prefix}.ffn_down", s.n_ff, s.n_embd, gain=gain, role="ffn_down", layer=i)


def _experts(b: Blueprint, i: int, n_expert: int) -> None:
    s, p = b.shape, f"blk.{i}"
    b.plain(f"{p}.ffn_gate_inp.weight", s.n_embd, n_expert, std=1 / math.sqrt(s.n_embd))
    b.matrix(f"{p}.ffn_gate_exps", s.n_embd, s.n_ff, n_expert)
    b.matrix(f"{p}.ffn_up_exps", s.n_embd, s.n_ff, n_expert)
    gain = _residual_gain(s)
    b.matrix(f"{p}.ffn_down_exps", s.n_ff, s.n_embd, n_expert, gain=gain, role="ffn_down", layer=i)


def _common(b: Blueprint, head_dim: int = 0) -> None:
    s = b.shape
    b.metadata.update(
        {
            "context_length": s.n_ctx_train,
            "embedding_length": s.n_embd,
            "block_count": s.n_layer,
            "feed_forward_length": s.n_ff,
            "vocab_size": s.n_vocab,
            "attention.layer_norm_rms_epsilon": 1e-5,
        }
    )
    if head_dim:
        b.metadata.update(
            {
                "attention.head_count": s.n_head,
                "attention.head_count_kv": s.n_head_kv,
                "attention.key_length": head_dim,
                "attention.value_length": head_dim,
                "rope.dimension_count": head_dim,
                "rope.freq_base": 10000.0,
            }
        )


def _head_dim(shape: Shape, head_dim: int) -> int:
    return head_dim or shape.n_embd // shape.n_head


def _llama(b: Blueprint, *, head_dim: int = 0, n_expert: int = 0, n_expert_used: int = 2) -> None:
    s, head_dim = b.shape, _head_dim(b.shape, head_dim)
    _common(b, head_dim)
    if n_expert:
        b.metadata |= {"expert_count": n_expert, "expert_used_count": n_expert_used}
    b.embeddings()
    for i in range(s.n_layer):
        b.norm(f"blk.{i}.attn_norm", s.n_embd)
        _attention(b, i, head_dim)
        b.norm(f"blk.{i}.ffn_norm", s.n_embd)
        if n_expert:
            _experts(b, i, n_expert)
        else:
            _ffn(b, f"blk.{i}", i)


def _qwen2(b: Blueprint) -> None:
    s = b.shape
    head_dim = s.n_embd // s.n_head
    _llama(b)
    for i in range(s.n_layer):
        for name, heads in (("q", s.n_head), ("k", s.n_head_kv), ("v", s.n_head_kv)):
            b.plain(f"blk.{i}.attn_{name}.bias", heads * head_dim, std=0.1)


def _qwen3(b: Blueprint, *, head_dim: int = 0) -> None:
    s, head_dim = b.shape, _head_dim(b.shape, head_dim)
    _common(b, head_dim)
    b.embeddings()
    for i in range(s.n_layer):
        b.norm(f"blk.{i}.attn_norm", s.n_embd)
        _attention(b, i, head_dim, qk_norm=True)
        b.norm(f"blk.{i}.ffn_norm", s.n_embd)
        _ffn(b, f"blk.{i}", i)


def _gemma3(
    b: Blueprint, *, head_dim: int = 0, sliding_window: int = 32, sliding_window_pattern: int = 2
) -> None:
    s, head_dim = b.shape, _head_dim(b.shape, head_dim)
    _common(b, head_dim)
    # With a pattern of n, every n-th layer sees all tokens and the others only the window.
    b.metadata |= {
        "attention.sliding_window": sliding_window,
        "attention.sliding_window_pattern": sliding_window_pattern,
    }
    b.embeddings()
    for i in range(s.n_layer):
        p = f"blk.{i}"
        b.norm(f"{p}.attn_norm", s.n_embd)
        _attention(b, i, head_dim, qk_norm=True)
        b.norm(f"{p}.post_attention_norm", s.n_embd)
        b.norm(f"{p}.ffn_norm", s.n_embd)
        _ffn(b, p, i)
        b.norm(f"{p}.post_ffw_norm", s.n_embd)


def _mamba2_mixer(b: Blueprint, i: int, d_inner: int, d_state: int, n_group: int) -> None:
    s, p = b.shape, f"blk.{i}"
    n_head = b.metadata["ssm.time_step_rank"]
    d_conv = b.metadata["ssm.conv_kernel"]
    conv_dim = d_inner + 2 * n_group * d_state
    b.matrix(f"{p}.ssm_in", s.n_embd, d_inner + conv_dim + n_head)
    b.plain(f"{p}.ssm_conv1d.weight", d_conv, conv_dim, std=1 / math.sqrt(d_conv))
    b.plain(f"{p}.ssm_conv1d.bias", conv_dim, std=0.1)
    # After softplus steps of 0.005 to 0.06; with decays of 0.5 to 7.5, memories of tens of tokens.
    b.plain(f"{p}.ssm_dt.bias", n_head, std=0.7, mean=-4.0)
    b.plain(f"{p}.ssm_a", 1, n_head, std=2.0, mean=-4.0)
    b.plain(f"{p}.ssm_d", 1, n_head, std=0.1, mean=1.0)
    b.norm(f"{p}.ssm_norm", d_inner // n_group, n_group)
    b.matrix(f"{p}.ssm_out", d_inner, s.n_embd, gain=_residual_gain(s))


def _ssm_metadata(b: Blueprint, d_inner: int, d_state: int, n_group: int, head_dim: int) -> None:
    if d_inner % head_dim:
        raise ConfigError(f"ssm_inner ({d_inner}) is not a multiple of ssm_head_dim ({head_dim})")
    b.metadata |= {
        "ssm.conv_kernel": 4,
        "ssm.inner_size": d_inner,
        "ssm.state_size": d_state,
        "ssm.time_step_rank": d_inner // head_dim,
        "ssm.group_count": n_group,
    }


# The CUDA kernel for Mamba-2 knows states of 128 and 256 and heads of multiples of 16.
def _mamba2(
    b: Blueprint,
    *,
    ssm_inner: int = 0,
    ssm_state: int = 128,
    ssm_group: int = 1,
    ssm_head_dim: int = 32,
) -> None:
    s = b.shape
    d_inner = ssm_inner or 2 * s.n_embd
    _common(b)
    b.metadata["feed_forward_length"] = 0
    b.metadata["attention.head_count"] = 0
    _ssm_metadata(b, d_inner, ssm_state, ssm_group, ssm_head_dim)
    b.embeddings()
    for i in range(s.n_layer):
        b.norm(f"blk.{i}.attn_norm", s.n_embd)
        _mamba2_mixer(b, i, d_inner, ssm_state, ssm_group)


def _falcon_h1(
    b: Blueprint,
    *,
    head_dim: int = 0,
    ssm_inner: int = 0,
    ssm_state: int = 128,
    ssm_group: int = 1,
    ssm_head_dim: int = 32,
) -> None:
    s, head_dim = b.shape, _head_dim(b.shape, head_dim)
    d_inner = ssm_inner or 2 * s.n_embd
    _common(b, head_dim)
    _ssm_metadata(b, d_inner, ssm_state, ssm_group, ssm_head_dim)
    b.embeddings()
    for i in range(s.n_layer):
        b.norm(f"blk.{i}.attn_norm", s.n_embd)
        _mamba2_mixer(b, i, d_inner, ssm_state, ssm_group)
        _attention(b, i, head_dim)
        # llama.cpp loads this one under a name without the usual suffix.
        b.plain(f"blk.{i}.ffn_norm", s.n_embd, std=0.1, mean=1.0)
        _ffn(b, f"blk.{i}", i)


def _lfm2(b: Blueprint, *, attention_every: int = 2, conv_cache: int = 3) -> None:
    s = b.shape
    head_dim = s.n_embd // s.n_head
    is_attention = [(i + 1) % attention_every == 0 for i in range(s.n_layer)]
    _common(b, head_dim)
    # A layer without KV heads is a short convolution.
    b.metadata["attention.head_count_kv"] = [s.n_head_kv if each else 0 for each in is_attention]
    b.metadata["shortconv.l_cache"] = conv_cache
    b.embeddings(output_norm="token_embd_norm")
    for i in range(s.n_layer):
        p = f"blk.{i}"
        b.norm(f"{p}.attn_norm", s.n_embd)
        if is_attention[i]:
            _attention(b, i, head_dim, qk_norm=True)
        else:
            b.plain(f"{p}.shortconv.conv.weight", conv_cache, s.n_embd, std=conv_cache**-0.5)
            b.matrix(f"{p}.shortconv.in_proj", s.n_embd, 3 * s.n_embd)
            b.matrix(f"{p}.shortconv.out_proj", s.n_embd, s.n_embd, gain=_residual_gain(s))
        b.norm(f"{p}.ffn_norm", s.n_embd)
        _ffn(b, p, i)


def _t5_attention(b: Blueprint, prefix: str) -> None:
    s = b.shape
    head_dim = s.n_embd // s.n_head
    # T5 doesn't scale the products of queries and keys, its query weights are small instead.
    b.matrix(f"{prefix}_q", s.n_embd, s.n_embd, gain=head_dim**-0.5)
    b.matrix(f"{prefix}_k", s.n_embd, s.n_embd)
    b.matrix(f"{prefix}_v", s.n_embd, s.n_embd)
    b.matrix(f"{prefix}_o", s.n_embd, s.n_embd, gain=_residual_gain(s))


def _t5(b: Blueprint, *, n_buckets: int = 32, decoder_start_token_id: int = 0) -> None:
    s = b.shape
    _common(b, s.n_embd // s.n_head)
    b.metadata |= {
        "attention.head_count_kv": s.n_head,
        "attention.relative_buckets_count": n_buckets,
        "decoder_start_token_id": decoder_start_token_id,
        "decoder_block_count": s.n_layer,
    }
    b.embeddings(output_norm="enc.output_norm")
    b.norm("dec.output_norm", s.n_embd)
    for i in range(s.n_layer):
        for side in ("enc", "dec"):
            p = f"{side}.blk.{i}"
            b.norm(f"{p}.attn_norm", s.n_embd)
            _t5_attention(b, f"{p}.attn")
            b.plain(f"{p}.attn_rel_b.weight", s.n_head, n_buckets, std=0.5)
            b.norm(f"{p}.ffn_norm", s.n_embd)
            _ffn(b, p, i)
        b.norm(f"dec.blk.{i}.cross_attn_norm", s.n_embd)
        _t5_attention(b, f"dec.blk.{i}.cross_attn")


def _bert(b: Blueprint, *, pooling_type: int = 1) -> None:
    s = b.shape
    if s.n_head_kv != s.n_head:
        b.shape = s = Shape(**{**s.__dict__, "n_head_kv": s.n_head})
    head_dim = s.n_embd // s.n_head
    _common(b, head_dim)
    b.metadata |= {
        "attention.layer_norm_epsilon": 1e-12,
        "attention.causal": False,
        "pooling_type": pooling_type,
    }
    b.token_type_count = 2
    b.tensors.append(
        Tensor("token_embd.weight", (s.n_embd, s.n_vocab), 1.0, 0.0, True, "embedding")
    )
    b.plain("token_types.weight", s.n_embd, 2, std=0.1)
    b.plain("position_embd.weight", s.n_embd, s.n_ctx_train, std=0.3)
    b.norm("token_embd_norm", s.n_embd)
    b.plain("token_embd_norm.bias", s.n_embd, std=0.1)
    for i in range(s.n_layer):
        p = f"blk.{i}"
        _attention(b, i, head_dim)
        _ffn(b, p, i, gate=False)
        b.plain(f"{p}.ffn_up.bias", s.n_ff, std=0.1)
        for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_down"):
            b.plain(f"{p}.{name}.bias", s.n_embd, std=0.1)
        for name in ("attn_output_norm", "layer_output_norm"):
            b.norm(f"{p}.{name}", s.n_embd)
            b.plain(f"{p}.{name}.bias", s.n_embd, std=0.1)


_BUILDERS: dict[str, Callable[..., None]] = {
    "llama": _llama,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "gemma3": _gemma3,
    "mamba2": _mamba2,
    "falcon-h1": _falcon_h1,
    "lfm2": _lfm2,
    "t5": _t5,
    "bert": _bert,
}

#: Architectures that can be made, with what is special about each.
ARCHITECTURES: dict[str, str] = {
    "llama": "decoder; grouped-query attention; experts with n_expert=",
    "qwen2": "decoder; attention biases",
    "qwen3": "decoder; normalised queries and keys",
    "gemma3": "decoder; sliding-window attention (interleaved)",
    "mamba2": "recurrent; no KV cells",
    "falcon-h1": "hybrid; attention and Mamba-2 in every layer",
    "lfm2": "hybrid; short convolutions and attention in turn",
    "t5": "encoder-decoder",
    "bert": "encoder only; embeddings",
}


def blueprint(arch: str, shape: Shape, overrides: dict[str, Any]) -> Blueprint:
    """Metadata and tensors of a model.

    Raises:
        ConfigError: The architecture or one of its options is unknown, or sizes don't fit together.
    """
    builder = _BUILDERS.get(arch)
    if builder is None:
        raise ConfigError(f"unknown architecture {arch!r}; known: {', '.join(_BUILDERS)}")
    options = dict(builder.__kwdefaults__ or {})
    if unknown := sorted(overrides.keys() - options.keys()):
        known = ", ".join(options) or "none"
        raise ConfigError(f"{arch} has no option {', '.join(unknown)}; its options: {known}")
    if "head_dim" not in overrides and shape.n_embd % shape.n_head:
        raise ConfigError(f"n_embd ({shape.n_embd}) is not a multiple of n_head ({shape.n_head})")
    if shape.n_head % shape.n_head_kv:
        raise ConfigError(f"n_head ({shape.n_head}) is not a multiple of n_head_kv")
    result = Blueprint(arch, shape)
    builder(result, **overrides)
    return result
