"""Which replica a request goes to. Policies only: no clock, no thread, no engine."""

from __future__ import annotations

import hashlib
import math
import struct
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from batchcore.errors import ConfigError, EngineError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = ["LeastOutstanding", "PrefixAware", "ReplicaLoad", "RoundRobin", "RoutingPolicy"]


@dataclass(frozen=True, slots=True)
class ReplicaLoad:
    """What a replica still has to do."""

    outstanding_tokens: int
    """Of its requests that have not ended: prompt tokens to compute and tokens to generate."""
    outstanding_requests: int
    """Requests that have not ended."""


@runtime_checkable
class RoutingPolicy(Protocol):
    """Chooses a replica for each request. Called by one thread at a time; must not block.

    Replicas are named by their index, which stays the same when one is rebuilt.
    """

    def choose(self, prompt_token_ids: Sequence[int], loads: Sequence[ReplicaLoad | None]) -> int:
        """The index of the replica that a request should go to.

        Args:
            prompt_token_ids: The request's prompt.
            loads: What each replica has to do; None where it is out of service, or has just
                refused this request.

        Raises:
            EngineError: There is none to choose from.
        """
        ...

    def record(self, prompt_token_ids: Sequence[int], replica: int) -> None:
        """A replica has taken a request, and will hold the cells of its prompt."""
        ...

    def forget(self, replica: int) -> None:
        """A replica was rebuilt: nothing of what it held is there any more."""
        ...


class RoundRobin:
    """Each replica in turn. Good where requests are alike and replicas too."""

    def __init__(self) -> None:
        """Start with the first replica."""
        self._next = 0

    def choose(
        self,
        prompt_token_ids: Sequence[int],  # noqa: ARG002
        loads: Sequence[ReplicaLoad | None],
    ) -> int:
        """The next one that is in service."""
        for step in range(len(loads)):
            replica = (self._next + step) % len(loads)
            if loads[replica] is not None:
                self._next = replica + 1
                return replica
        raise _none_in_service()

    def record(self, prompt_token_ids: Sequence[int], replica: int) -> None:
        """Nothing to remember."""

    def forget(self, replica: int) -> None:
        """Nothing to forget."""


class LeastOutstanding:
    """The replica with the fewest tokens to go; then the fewest requests, then the first.

    Counting tokens, not requests, keeps a few long requests from hiding behind their number.
    """

    def choose(
        self,
        prompt_token_ids: Sequence[int],  # noqa: ARG002
        loads: Sequence[ReplicaLoad | None],
    ) -> int:
        """The least loaded one."""
        return min(_in_service(loads))[-1]

    def record(self, prompt_token_ids: Sequence[int], replica: int) -> None:
        """Nothing to remember."""

    def forget(self, replica: int) -> None:
        """Nothing to forget."""


class PrefixAware:
    """The replica that holds most of the prompt's beginning, unless it has far more to do.

    What replicas hold is guessed from what they were sent: their caches are not asked. Prompts are
    cut into blocks, each named by a hash of itself and all before it, and per replica the blocks
    used last are remembered. The idea is that of SGLang's cache-aware load balancing (Zheng et al.,
    arXiv 2312.07104), with hashed blocks in place of a tree.
    """

    def __init__(
        self,
        *,
        block_tokens: int = 64,
        max_blocks: int = 4096,
        max_imbalance_tokens: int = 4096,
        max_imbalance_ratio: float = 1.5,
    ) -> None:
        """Set the bounds.

        Args:
            block_tokens: Tokens per block; what is shared beyond whole blocks is not seen.
            max_blocks: Blocks remembered per replica, about 150 bytes each. Beyond `n_ctx` /
                `block_tokens` they are surely no longer in its KV cells, but maybe in its host
                cache.
            max_imbalance_tokens: A replica is passed over where its outstanding tokens exceed the
                least by more than this,
            max_imbalance_ratio: and are more than the least times this, at least 1.

        Raises:
            ConfigError: A value can't work.
        """
        counts = {
            "block_tokens": (block_tokens, 1),
            "max_blocks": (max_blocks, 1),
            "max_imbalance_tokens": (max_imbalance_tokens, 0),
        }
        for name, (value, least) in counts.items():
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ConfigError(f"{name} must be an integer of at least {least}, not {value!r}")
        if not 1 <= max_imbalance_ratio < math.inf:
            raise ConfigError(
                f"max_imbalance_ratio must be at least 1 and finite, not {max_imbalance_ratio}"
            )
        self.block_tokens = block_tokens
        self.max_blocks = max_blocks
        self.max_imbalance_tokens = max_imbalance_tokens
        self.max_imbalance_ratio = max_imbalance_ratio
        # Ordered from the block used longest ago; a block always outlives those behind it.
        self._known: dict[int, OrderedDict[bytes, None]] = {}

    def choose(self, prompt_token_ids: Sequence[int], loads: Sequence[ReplicaLoad | None]) -> int:
        """The longest match among those that are not overloaded; ties as LeastOutstanding."""
        by_load = sorted(_in_service(loads))
        bound = max(
            by_load[0][0] + self.max_imbalance_tokens, by_load[0][0] * self.max_imbalance_ratio
        )
        best = [replica for tokens, _, replica in by_load if tokens <= bound]
        for block in self._blocks(prompt_token_ids):
            holders = [replica for replica in best if block in self._known.get(replica, ())]
            if not holders:
                break
            best = holders
        return best[0]

    def record(self, prompt_token_ids: Sequence[int], replica: int) -> None:
        """Remember what the replica will hold, and that it was used just now."""
        known = self._known.setdefault(replica, OrderedDict())
        # The first block last, so that ends of prompts are forgotten before their beginnings.
        for block in reversed(list(self._blocks(prompt_token_ids))):
            known[block] = None
            known.move_to_end(block)
        while len(known) > self.max_blocks:
            known.popitem(last=False)

    def forget(self, replica: int) -> None:
        """Forget all that the replica held."""
        self._known.pop(replica, None)

    def num_matching_tokens(self, prompt_token_ids: Sequence[int], replica: int) -> int:
        """How much of a prompt's beginning the replica is believed to hold, in tokens."""
        known, count = self._known.get(replica, ()), 0
        for block in self._blocks(prompt_token_ids):
            if block not in known:
                break
            count += self.block_tokens
        return count

    @property
    def num_blocks(self) -> int:
        """Blocks remembered, over all replicas."""
        return sum(len(known) for known in self._known.values())

    def _blocks(self, tokens: Sequence[int]) -> Iterator[bytes]:
        """Names of the whole blocks: the same in every process, unlike those by `hash`."""
        size, name = self.block_tokens, b""
        # More could not be remembered, and so the time that a prompt takes is bounded too.
        num_blocks = min(len(tokens) // size, self.max_blocks)
        layout = struct.Struct(f"<{size}q")
        for block in range(num_blocks):
            content = layout.pack(*tokens[block * size : (block + 1) * size])
            name = hashlib.blake2b(name + content, digest_size=16).digest()
            yield name


_BY_NAME: dict[str, type[RoutingPolicy]] = {
    "prefix": PrefixAware,
    "least_outstanding": LeastOutstanding,
    "round_robin": RoundRobin,
}


def policy_of(routing: RoutingPolicy | str) -> RoutingPolicy:
    """A policy, or a new one of that name: `prefix`, `least_outstanding` or `round_robin`.

    Raises:
        ConfigError: There is none of that name.
    """
    if not isinstance(routing, str):
        return routing
    if routing not in _BY_NAME:
        raise ConfigError(f"routing must be one of {', '.join(_BY_NAME)}, not {routing!r:.80}")
    return _BY_NAME[routing]()


def _in_service(loads: Sequence[ReplicaLoad | None]) -> list[tuple[int, int, int]]:
    """Tokens, requests and index of every replica in service."""
    found = [
        (load.outstanding_tokens, load.outstanding_requests, replica)
        for replica, load in enumerate(loads)
        if load is not None
    ]
    if not found:
        raise _none_in_service()
    return found


def _none_in_service() -> EngineError:
    return EngineError("no replica is in service")
