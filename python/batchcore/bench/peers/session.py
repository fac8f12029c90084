"""One comparison: every peer once per round and workload, everything kept after every run."""

from __future__ import annotations

import json
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batchcore.bench.compare import interleaved_order
from batchcore.bench.environment import describe_environment, describe_model
from batchcore.bench.peers import kernel_bound
from batchcore.bench.peers.base import Setup
from batchcore.bench.peers.pairs import OURS
from batchcore.bench.peers.targets import peers_of_targets
from batchcore.bench.peers.workloads import SAMPLINGS, is_poisson, make_case, warm_up
from batchcore.bench.result import write_text_atomically
from batchcore.errors import BatchcoreError, ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from batchcore.bench.peers.base import Measurement, Peer
    from batchcore.bench.peers.registry import Found
    from batchcore.bench.peers.workloads import Case
    from batchcore.model import Model

__all__ = ["FORMAT", "Plan", "Session", "load_document"]

FORMAT = "batchcore-peers"
SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True)
class Plan:
    """What a comparison is to run."""

    models: Sequence[Model]
    workloads: Sequence[str]
    samplings: Sequence[str]
    pairs: int
    """Rounds: runs of each peer with each workload."""
    n_threads: int
    seed: int = 0
    capacity: float | None = None
    """Requests per second of `mixed` that batchcore can serve; None means that it is measured."""
    limit_s: float | None = None
    """No run begins after this time."""
    run_limit_s: float = 300.0
    """A start or a run is given up after this time."""
    only_targets: bool = False
    """Whether only what `targets.TARGETS` compare is run."""


@dataclass
class Session:
    """Runs a plan."""

    plan: Plan
    peers: Found
    path: Path | None = None
    """The JSON file, rewritten after every run."""
    say: Callable[[str], None] = lambda _: None
    """Called with a line of progress."""
    document: dict[str, Any] = field(default_factory=dict)
    """Everything so far, ready for JSON."""

    def run(self) -> dict[str, Any]:
        """Run all of it, or until the time is up or Ctrl-C; gives the document."""
        start = time.perf_counter()
        self.document = self._new_document()
        try:
            if any(map(is_poisson, self.plan.workloads)):
                self._find_capacities()
            for number, model, sampling, workload in self._parts():
                for name in self._whom(number, model, sampling, workload):
                    used_s = time.perf_counter() - start
                    if self.plan.limit_s is not None and used_s > self.plan.limit_s:
                        self._stop_early(f"the time was up after {used_s:.0f} s")
                        return self.document
                    self._run_one(number, model, sampling, workload, name)
                self._add_bound(number, model, sampling, workload)
        except KeyboardInterrupt:
            self._stop_early("interrupted")
        self.save()
        return self.document

    def save(self) -> None:
        """Write the document, if there is a file for it."""
        if self.path is not None:
            write_text_atomically(self.path, json.dumps(self.document, indent=1) + "\n")

    def _new_document(self) -> dict[str, Any]:
        plan = self.plan
        return {
            "format": FORMAT,
            "schema_version": SCHEMA_VERSION,
            "environment": describe_environment(),
            "commit": _commit(),
            "config": {
                "workloads": list(plan.workloads),
                "samplings": list(plan.samplings),
                "pairs": plan.pairs,
                "n_threads": plan.n_threads,
                "seed": plan.seed,
            },
            "models": {_name_of(model): describe_model(model) for model in plan.models},
            "peers": {},
            "skipped": dict(self.peers.skipped),
            "not_run": {},
            "capacity_requests_per_s": {},
            "stopped": None,
            "runs": [],
        }

    def _parts(self) -> list[tuple[int, Model, str, str]]:
        """Rounds outermost: when the time is up, everything has about as many pairs."""
        plan = self.plan
        return [
            (number, model, sampling, workload)
            for number in range(plan.pairs)
            for model in plan.models
            for sampling in plan.samplings
            for workload in plan.workloads
        ]

    def _order(self, number: int) -> list[str]:
        names = list(self.peers.makers)
        orders = interleaved_order(len(names), self.plan.pairs, seed=self.plan.seed)
        return [names[index] for index in orders[number]]

    def _whom(self, number: int, model: Model, sampling: str, workload: str) -> list[str]:
        """Who runs a workload, in the order of the round."""
        names = self._order(number)
        if not self.plan.only_targets:
            return names
        needed = peers_of_targets(_name_of(model), sampling, workload)
        return [name for name in names if name in needed]

    def _run_one(self, number: int, model: Model, sampling: str, workload: str, name: str) -> None:
        capacity = self.document["capacity_requests_per_s"].get(_name_of(model))
        if is_poisson(workload) and capacity is None:
            self.document["not_run"].setdefault(name, {})[workload] = "the capacity is not known"
            return
        case = make_case(
            workload, model, SAMPLINGS[sampling], seed=self.plan.seed + number, capacity=capacity
        )
        peer = self.peers.makers[name]()
        if reason := peer.why_not(case):
            self.document["not_run"].setdefault(name, {})[workload] = reason
            return
        head = f"{_name_of(model)} {sampling} {workload} {number + 1}/{self.plan.pairs} {name}"
        row: dict[str, Any] = {
            "round": number,
            "position": self._order(number).index(name),
            "model": _name_of(model),
            "sampling": sampling,
            "workload": workload,
            "peer": name,
            "metrics": {},
            "details": {},
            "error": None,
        }
        try:
            found = self._measure(peer, model, case)
            row |= {"metrics": found.metrics, "details": found.details}
            self.say(f"{head}: {_in_short(found)}")
        except Exception as error:
            # In whatever way a peer fails, e.g. by an answer that can't be read: the others go on.
            row["error"] = _describe(error)
            self.say(f"{head}: failed: {row['error']}")
        self.document["peers"][name] = {"version": peer.version}
        self.document["runs"].append(row)
        self.save()

    def _add_bound(self, number: int, model: Model, sampling: str, workload: str) -> None:
        """Work the kernel bound of our run out, where this round has both."""
        part = (number, _name_of(model), sampling, workload)
        runs = {
            run["peer"]: run
            for run in self.document["runs"]
            if (run["round"], run["model"], run["sampling"], run["workload"]) == part
        }
        shapes, ours = runs.get(kernel_bound.NAME), runs.get(OURS)
        if shapes is None or ours is None or shapes["error"] or ours["error"]:
            return
        table = kernel_bound.ShapeTable(
            1 / shapes["metrics"]["prefill_tokens_per_s"],
            shapes["details"]["attention_s_per_position"],
            {int(rows): seconds for rows, seconds in shapes["details"]["decode_s"].items()},
        )
        done = ours["metrics"]
        shapes["metrics"]["total_s"] = kernel_bound.bound_s(
            table,
            done["num_prompt_tokens"] - done["num_cached_tokens"],
            ours["details"]["sum_of_positions"],
            {int(rows): count for rows, count in ours["details"]["tokens_by_rows"].items()},
        )
        self.save()

    def _measure(self, peer: Peer, model: Model, case: Case) -> Measurement:
        setup = Setup(
            model=Path(model.path),
            n_threads=self.plan.n_threads,
            num_slots=case.num_slots,
            n_ctx=case.n_ctx,
            architecture=model.architecture,
            keeps_prefixes=case.keeps_prefixes,
            end_of_generation=tuple(model.end_of_generation),
            limit_s=self.plan.run_limit_s,
        )
        try:
            peer.start(setup)
            if peer.warms_up:
                peer.run(warm_up(model, case))
            return peer.run(case)
        finally:
            peer.stop()

    def _find_capacities(self) -> None:
        """Requests per second of `mixed`, greedy, in a closed loop on batchcore."""
        from batchcore.bench.peers.engine import BatchcorePeer  # noqa: PLC0415

        for model in self.plan.models:
            name, rate = _name_of(model), self.plan.capacity
            case = make_case("mixed", model, SAMPLINGS["greedy"], seed=self.plan.seed)
            try:
                if rate is None:
                    found = self._measure(BatchcorePeer(OURS), model, case)
                    rate = found.metrics["requests_per_s"]
            except BatchcoreError as error:
                self.say(f"{name}: the capacity can't be measured: {error}")
            else:
                self.document["capacity_requests_per_s"][name] = rate
                self.say(f"{name}: capacity {rate:.3f} requests/s")
        self.save()

    def _stop_early(self, reason: str) -> None:
        self.document["stopped"] = reason
        self.say(f"stopped: {reason}")
        self.save()


def load_document(path: Path) -> dict[str, Any]:
    """Read what a session wrote.

    Raises:
        ConfigError: It can't be read, or is something else.
    """
    try:
        document = json.loads(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"can't read {path}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise ConfigError(f"{path} is no comparison of peers")
    if document.get("schema_version") != SCHEMA_VERSION:
        raise ConfigError(
            f"{path} has schema version {document.get('schema_version')}, and this batchcore reads "
            f"{SCHEMA_VERSION}"
        )
    return document


def _commit() -> str | None:
    """Of the checkout that this runs from, with a mark where files differ; None elsewhere."""
    repository = Path(__file__).resolve().parents[4]
    if not (repository / ".git").exists():
        return None
    command = ["git", "-C", str(repository), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def _describe(error: Exception) -> str:
    is_ours = isinstance(error, BatchcoreError)
    return str(error) if is_ours else f"{type(error).__name__}: {error}"


def _name_of(model: Model) -> str:
    return Path(model.path).stem


def _in_short(found: Measurement) -> str:
    shown = {
        "output_tokens_per_s": "tok/s",
        "decode_tokens_per_s": "decode tok/s",
        "prompt_tokens_per_s": "prompt tok/s",
        "total_s": "s",
    }
    parts = [
        f"{value:.1f} {unit}"
        for name, unit in shown.items()
        if (value := found.metrics.get(name)) is not None
    ]
    failed = found.metrics.get("num_failed")
    return ", ".join([*parts, *([f"{failed:.0f} requests failed"] if failed else [])])
