"""The ratios that batchcore is to reach, and whether a comparison shows them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from batchcore.bench.peers.llama_server import VARIANTS as SERVERS
from batchcore.bench.peers.pairs import OURS, Table

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from batchcore.bench.compare import PairedRatio

__all__ = ["TARGETS", "Bound", "Outcome", "Target", "check_targets", "peers_of_targets"]

BEST_SERVER = "the best llama-server"


@dataclass(frozen=True, slots=True)
class Bound:
    """What the median of a figure's paired ratios must be."""

    metric: str
    at_least: float | None = None
    at_most: float | None = None

    def is_met(self, ratio: PairedRatio) -> bool:
        """Whether it is."""
        if self.at_least is not None:
            return ratio.median >= self.at_least
        assert self.at_most is not None
        return ratio.median <= self.at_most

    def __str__(self) -> str:
        """As it is shown."""
        if self.at_least is not None:
            return f"{self.metric} ≥ {self.at_least}"
        return f"{self.metric} ≤ {self.at_most}"


@dataclass(frozen=True, slots=True)
class Target:
    """One row: all of its bounds must be met, against the same peer."""

    number: str
    workload: str
    peer: str
    """A name, or the llama-server with the highest throughput in this comparison."""
    bounds: tuple[Bound, ...]
    sampling: str | None = None
    """None means any."""
    model: str | None = None
    """What the name of the model must have in it; None means any."""

    def is_for(self, model: str, sampling: str) -> bool:
        """Whether it says anything about a model and a way of sampling."""
        return self.sampling in {None, sampling} and (self.model is None or self.model in model)


TARGETS: tuple[Target, ...] = (
    *(
        Target(
            "1",
            f"decode-{size}",
            "llama-batched-bench",
            # The other decodes in lock-step: all of its calls have as many rows as there are
            # sequences, while ours start and end one after another.
            (Bound("full_decode_tokens_per_s", at_least=share),),
            sampling,
            model,
        )
        # Sampled, it is about the vocabulary of 262,144 tokens.
        for sampling, share, model in (("greedy", 0.97, None), ("sampled", 0.95, "gemma-3-270m"))
        for size in (8, 16, 32)
    ),
    Target("2", "mixed", BEST_SERVER, (Bound("output_tokens_per_s", at_least=1.25),)),
    Target("2b", "mixed", "kernel-bound", (Bound("total_s", at_most=1.08),), "greedy"),
    Target(
        "3",
        "mixed",
        BEST_SERVER,
        (
            Bound("p99_itl_ms", at_most=0.4),
            Bound("p95_ttft_ms", at_most=0.7),
            Bound("output_tokens_per_s", at_least=1.1),
        ),
    ),
    Target("4", "shared-prefix", BEST_SERVER, (Bound("total_s", at_most=0.4),), "greedy"),
    Target(
        "5",
        "long-arrivals",
        BEST_SERVER,
        (Bound("p99_itl_ms", at_most=0.2), Bound("output_tokens_per_s", at_least=0.95)),
        "greedy",
    ),
    Target(
        "6",
        "mixed",
        "llama-cpp-python",
        (Bound("output_tokens_per_s", at_least=2.5),),
        sampling="greedy",
        model="gemma-3-270m",
    ),
)
"""Those that a comparison of peers can show. Where sampling makes no difference, greedy will do."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """A target for one model and one way of sampling."""

    target: Target
    model: str
    sampling: str
    peer: str
    """Whom it was compared with."""
    ratios: tuple[PairedRatio, ...]
    """In the order of the bounds."""

    @property
    def is_reached(self) -> bool:
        """Whether every bound is met."""
        pairs = zip(self.target.bounds, self.ratios, strict=True)
        return all(bound.is_met(ratio) for bound, ratio in pairs)


def check_targets(document: Mapping[str, Any]) -> Iterator[Outcome]:
    """Every target whose workload and peer are in a document, for each model and sampling."""
    keys = dict.fromkeys((run["model"], run["sampling"]) for run in document["runs"])
    for target in TARGETS:
        for model, sampling in keys:
            if not target.is_for(model, sampling):
                continue
            table = Table(document, model, sampling, target.workload)
            servers = list(SERVERS)
            peer = table.best(servers) if target.peer == BEST_SERVER else target.peer
            if peer is None:
                continue
            ratios = [table.ratio(peer, bound.metric) for bound in target.bounds]
            known = tuple(ratio for ratio in ratios if ratio is not None)
            if len(known) == len(ratios):
                yield Outcome(target, model, sampling, peer, known)


def peers_of_targets(model: str, sampling: str, workload: str) -> frozenset[str]:
    """Whom the targets compare there, batchcore among them; empty where there is no target."""
    names: set[str] = set()
    for target in TARGETS:
        if target.workload == workload and target.is_for(model, sampling):
            names |= {OURS, *(SERVERS if target.peer == BEST_SERVER else (target.peer,))}
    return frozenset(names)
