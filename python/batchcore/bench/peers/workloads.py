"""The workloads: what is asked for, when, and how much memory everybody gets for it.

Prompts are drawn from a seed, and each round of a comparison has a seed of its own: no cache of a
file system, a server or an allocator can answer for another run.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from batchcore.bench.arrivals import PromptWriter, generators
from batchcore.bench.workload import Workload, WorkloadRequest
from batchcore.errors import ConfigError
from batchcore.params import SamplingParams

if TYPE_CHECKING:
    from collections.abc import Mapping

    from batchcore.bench.arrivals import Tokenizer

__all__ = ["SAMPLINGS", "WORKLOADS", "Case", "check_workload", "is_poisson", "make_case", "warm_up"]

SAMPLINGS: Mapping[str, SamplingParams] = {
    "greedy": SamplingParams(temperature=0, ignore_eos=True, seed=0),
    "sampled": SamplingParams(temperature=0.8, top_k=40, top_p=0.95, ignore_eos=True, seed=0),
}
"""How tokens are chosen, by name. The end of a text is ignored, so that lengths are the same."""

DECODE_SIZES = (1, 2, 4, 8, 16, 32)
POISSON_LOADS = (0.5, 0.8, 1.1)

WORKLOADS: tuple[str, ...] = (
    *(f"decode-{size}" for size in DECODE_SIZES),
    "mixed",
    "shared-prefix",
    "long-arrivals",
    "burst",
    *(f"poisson-{load}" for load in POISSON_LOADS),
    "short-chat",
    "batch",
    "prefill",
    "single-stream",
)
"""All of them, in the order in which they run."""

NUM_SLOTS = 16
DECODE_PROMPT_TOKENS, DECODE_OUTPUT_TOKENS = 128, 64
STREAM_PROMPT_TOKENS, STREAM_OUTPUT_TOKENS = 64, 128
"""Of `single-stream`."""
_DECODE_CELLS = 256
_CELLS = 1024
STREAMS, ARRIVING = "streams", "arriving"
"""Groups of `long-arrivals`."""


@dataclass(frozen=True)
class Case:
    """A workload with the memory that it takes and the way that it is driven."""

    name: str
    workload: Workload
    num_slots: int
    n_ctx: int
    """KV cells of all slots together."""
    max_concurrency: int | None = None
    """Requests in flight at most."""
    group_concurrency: dict[str, int] = field(default_factory=dict)
    """The same for the requests of a group."""
    itl_group: str | None = None
    """The group whose inter-token latencies count; None means all."""
    ttft_group: str | None = None
    """The group whose times to the first token count; None means all."""
    keeps_prefixes: bool = False
    """Whether prompts start alike, so that a cache may help."""
    decode_size: int | None = None
    """Sequences of a batch that starts and decodes together."""


def check_workload(name: str) -> str:
    """Give the name of a workload back.

    Raises:
        ConfigError: There is none of that name.
    """
    if name not in WORKLOADS:
        raise ConfigError(f"there is no workload {name!r}; known: {', '.join(WORKLOADS)}")
    return name


def is_poisson(name: str) -> bool:
    """Whether a workload's rate depends on the capacity."""
    return name.startswith("poisson-")


def make_case(
    name: str,
    tokenizer: Tokenizer | int,
    params: SamplingParams,
    *,
    seed: int,
    capacity: float | None = None,
) -> Case:
    """Make the workload of a name; the same arguments give the same.

    Args:
        name: One of `WORKLOADS`.
        tokenizer: A model, or the size of a vocabulary.
        params: Everything but the number of tokens.
        seed: Of all that is drawn.
        capacity: Requests per second of `mixed` that can be served; for `poisson` only.

    Raises:
        ConfigError: The name is unknown, or the capacity missing.
    """
    kind, _, value = check_workload(name).partition("-")
    if kind == "decode":
        lengths = DECODE_PROMPT_TOKENS, DECODE_OUTPUT_TOKENS
        return _decode(name, int(value), lengths, tokenizer, params, seed)
    if name == "single-stream":
        lengths = STREAM_PROMPT_TOKENS, STREAM_OUTPUT_TOKENS
        return _decode(name, 1, lengths, tokenizer, params, seed)
    if name == "long-arrivals":
        return _long_arrivals(name, tokenizer, params, seed)
    if kind == "poisson":
        if capacity is None or not 0 < capacity < math.inf:
            raise ConfigError(f"{name} needs a capacity above 0 requests/s, not {capacity}")
        return _shaped(name, "poisson", tokenizer, params, seed, float(value) * capacity)
    return _shaped(name, name, tokenizer, params, seed)


def warm_up(tokenizer: Tokenizer | int, case: Case) -> Case:
    """A few small requests that go before a case, so that nobody's first step is measured."""
    workload = Workload.generate(
        tokenizer,
        num_prompts=min(4, case.num_slots),
        prompt_tokens=32,
        output_tokens=8,
        seed=2**31,  # no round has it: its prompts are of no use to a cache
        params=case.workload.requests[0].params,
    )
    return dataclasses.replace(
        case, name="warm-up", workload=workload, itl_group=None, ttft_group=None, decode_size=None
    )


def _decode(
    name: str,
    size: int,
    lengths: tuple[int, int],
    tokenizer: Tokenizer | int,
    params: SamplingParams,
    seed: int,
) -> Case:
    """Sequences that start together; `lengths` are the tokens of a prompt and of an output."""
    workload = Workload.generate(
        tokenizer,
        num_prompts=size,
        prompt_tokens=lengths[0],
        output_tokens=lengths[1],
        seed=seed,
        params=params,
    )
    return Case(name, workload, size, size * _DECODE_CELLS, decode_size=size)


def _long_arrivals(
    name: str, tokenizer: Tokenizer | int, params: SamplingParams, seed: int
) -> Case:
    (rng,) = generators(seed, 1)
    writer = PromptWriter(tokenizer, rng)
    decoding = dataclasses.replace(params, max_tokens=160)
    arriving = dataclasses.replace(params, max_tokens=8)
    requests = [WorkloadRequest(writer.write(64), decoding, group=STREAMS) for _ in range(8)]
    # A second is enough for eight short prompts; then one long prompt comes after the other.
    requests += [
        WorkloadRequest(writer.write(2000), arriving, arrival_s=1.0, group=ARRIVING)
        for _ in range(4)
    ]
    return Case(
        name,
        Workload(tuple(requests)),
        num_slots=12,
        n_ctx=12 * 2560,
        group_concurrency={ARRIVING: 1},
        itl_group=STREAMS,
        ttft_group=ARRIVING,
    )


@dataclass(frozen=True)
class _Shape:
    num_prompts: int
    prompt_tokens: str
    output_tokens: str
    shared_prefix_tokens: int = 0
    cells: int = _CELLS
    is_closed: bool = True
    """Whether no more are in flight than there are slots."""


_SHAPES = {
    "mixed": _Shape(48, "loguniform:20:800", "uniform:16:96"),
    # Requests as those of `mixed`, whose capacity the rates are shares of.
    "poisson": _Shape(40, "loguniform:20:800", "uniform:16:96", is_closed=False),
    "shared-prefix": _Shape(48, "uniform:16:64", "fixed:32", 1000, 2048),
    "burst": _Shape(4 * NUM_SLOTS, "uniform:64:256", "uniform:16:32", is_closed=False),
    "short-chat": _Shape(128, "uniform:16:24", "fixed:20"),
    "batch": _Shape(2 * NUM_SLOTS, "fixed:128", "fixed:64", cells=_DECODE_CELLS),
    "prefill": _Shape(NUM_SLOTS, "fixed:512", "fixed:1"),
}


def _shaped(
    name: str,
    kind: str,
    tokenizer: Tokenizer | int,
    params: SamplingParams,
    seed: int,
    request_rate: float = math.inf,
) -> Case:
    shape = _SHAPES[kind]
    workload = Workload.generate(
        tokenizer,
        num_prompts=shape.num_prompts,
        prompt_tokens=shape.prompt_tokens,
        output_tokens=shape.output_tokens,
        shared_prefix_tokens=shape.shared_prefix_tokens,
        request_rate=request_rate,
        seed=seed,
        params=params,
    )
    return Case(
        name,
        workload,
        NUM_SLOTS,
        NUM_SLOTS * shape.cells,
        max_concurrency=NUM_SLOTS if shape.is_closed else None,
        keeps_prefixes=shape.shared_prefix_tokens > 0,
    )
