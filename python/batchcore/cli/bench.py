"""`batchcore bench`: latency, throughput under load, batch sizes, and the comparison of results."""

from __future__ import annotations

import math
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from batchcore.cli.errors import reported
from batchcore.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from batchcore.bench.result import BenchmarkResult, BenchmarkRun
    from batchcore.engine import Engine
    from batchcore.model import Model

__all__ = ["app"]

app = typer.Typer(help="Measure latency and throughput; compare results.", no_args_is_help=True)

ModelArgument = Annotated[str, typer.Argument(help="Path, preset or hf:owner/repo/file.gguf.")]
SeqsOption = Annotated[
    int | None, typer.Option("--max-num-seqs", min=1, help="Sequences at a time.")
]
CtxOption = Annotated[int, typer.Option("--n-ctx", min=256, help="KV cells.")]
ThreadsOption = Annotated[
    int | None, typer.Option("--n-threads", min=1, show_default="one per usable core")
]
LayoutOption = Annotated[Literal["auto", "unified", "streams"], typer.Option("--kv-layout")]
SpeculativeOption = Annotated[
    int,
    typer.Option(
        "--num-speculative-tokens", min=0, help="Guessed tokens per sequence and step, at most."
    ),
]
ProfileOption = Annotated[
    Path | None, typer.Option("--profile", help="What `batchcore tune` wrote.")
]
SaveOption = Annotated[bool, typer.Option("--save-result", help="Write a JSON file.")]
DirOption = Annotated[Path, typer.Option("--result-dir", help="Where to.")]
SeedOption = Annotated[int, typer.Option("--seed")]


@app.command()
@reported()
def latency(
    model: ModelArgument,
    *,
    input_len: Annotated[int, typer.Option(min=1, help="Prompt tokens.")] = 32,
    output_len: Annotated[int, typer.Option(min=1, help="Output tokens.")] = 64,
    batch_size: Annotated[int, typer.Option(min=1, help="Requests at once.")] = 8,
    num_iters: Annotated[int, typer.Option(min=1, help="Measured batches.")] = 5,
    num_iters_warmup: Annotated[int, typer.Option(min=0)] = 1,
    n_threads: ThreadsOption = None,
    kv_layout: LayoutOption = "auto",
    profile: ProfileOption = None,
    seed: SeedOption = 0,
    save_result: SaveOption = False,
    result_dir: DirOption = Path(),
) -> None:
    """Time batches of equal requests from handing them in until the last one has ended."""
    from batchcore.bench.result import BenchmarkRun  # noqa: PLC0415
    from batchcore.bench.workload import Workload  # noqa: PLC0415
    from batchcore.params import SamplingParams  # noqa: PLC0415

    loaded = _load(model)
    runs = []
    with _engine(
        loaded,
        max_num_seqs=batch_size,
        n_ctx=batch_size * (-(-(input_len + output_len) // 256) * 256),
        n_threads=n_threads,
        kv_layout=kv_layout,
        profile=profile,
    ) as engine:
        params = SamplingParams(max_tokens=output_len, temperature=0, ignore_eos=True)
        for index in _track(range(-num_iters_warmup, num_iters), "batches"):
            workload = Workload.generate(
                loaded,
                num_prompts=batch_size,
                prompt_tokens=input_len,
                output_tokens=output_len,
                seed=seed + 1000 + index,
            )
            start = time.perf_counter()
            outputs = engine.generate([request.prompt for request in workload], params)
            seconds = time.perf_counter() - start
            if index >= 0:
                runs.append(BenchmarkRun(_latency_metrics(outputs, seconds)))
    options = {"input_len": input_len, "output_len": output_len, "batch_size": batch_size}
    _finish("latency", loaded, engine, {**options, "seed": seed}, runs, save_result, result_dir)


def _latency_metrics(outputs: list[Any], seconds: float) -> dict[str, float | None]:
    times = [out.metrics for out in outputs]
    ttft = [one.ttft_s for one in times if one is not None and one.ttft_s is not None]
    tpot = [one.tpot_s for one in times if one is not None and one.tpot_s is not None]
    num_tokens = sum(len(out.outputs[0].token_ids) for out in outputs)
    return {
        "batch_latency_s": seconds,
        "mean_ttft_ms": 1e3 * sum(ttft) / len(ttft) if ttft else None,
        "mean_tpot_ms": 1e3 * sum(tpot) / len(tpot) if tpot else None,
        "output_tokens_per_s": num_tokens / seconds,
    }


@app.command()
@reported()
def throughput(
    model: ModelArgument,
    *,
    num_prompts: Annotated[int, typer.Option(min=1)] = 64,
    prompt_tokens: Annotated[
        str, typer.Option(help="fixed:N, uniform:A:B, loguniform:A:B, lognormal:MEDIAN:SIGMA")
    ] = "loguniform:20:400",
    output_tokens: Annotated[str, typer.Option(help="The same for outputs.")] = "uniform:16:64",
    trace: Annotated[
        Path | None, typer.Option(help="Requests from JSON lines instead of made-up ones.")
    ] = None,
    shared_prefix_tokens: Annotated[int, typer.Option(min=0)] = 0,
    request_rate: Annotated[
        float, typer.Option(help="Requests per second; inf: all at once.")
    ] = math.inf,
    burstiness: Annotated[float, typer.Option(help="Shape of the gaps; 1: Poisson.")] = 1.0,
    max_concurrency: Annotated[int | None, typer.Option(min=1)] = None,
    goodput: Annotated[
        list[str] | None, typer.Option(help="Bounds in ms, e.g. ttft:500 (repeatable).")
    ] = None,
    percentile_metrics: Annotated[
        str, typer.Option(help="Which of ttft,tpot,itl,e2el to show.")
    ] = "ttft,tpot,itl,e2el",
    num_runs: Annotated[int, typer.Option(min=1)] = 1,
    temperature: Annotated[float, typer.Option(min=0)] = 0.0,
    max_num_seqs: SeqsOption = None,
    n_ctx: CtxOption = 8192,
    n_threads: ThreadsOption = None,
    kv_layout: LayoutOption = "auto",
    prefix_caching: Annotated[bool, typer.Option()] = True,
    prefill_policy: Annotated[
        Literal["latency", "balanced", "throughput"], typer.Option()
    ] = "balanced",
    num_speculative_tokens: SpeculativeOption = 0,
    profile: ProfileOption = None,
    seed: SeedOption = 0,
    save_result: SaveOption = False,
    result_dir: DirOption = Path(),
) -> None:
    """Send requests as they would arrive, and measure rates and waiting times."""
    from batchcore.bench.load import run_load  # noqa: PLC0415
    from batchcore.bench.metrics import Slo  # noqa: PLC0415
    from batchcore.bench.result import BenchmarkRun  # noqa: PLC0415
    from batchcore.bench.runners import warm_up  # noqa: PLC0415
    from batchcore.bench.workload import Workload  # noqa: PLC0415
    from batchcore.params import SamplingParams  # noqa: PLC0415

    slo = Slo.parse(goodput) if goodput else None
    shown = [name.strip() for name in percentile_metrics.split(",") if name.strip()]
    if unknown := set(shown) - {"ttft", "tpot", "itl", "e2el"}:
        raise ConfigError(f"there is no percentile metric {min(unknown)!r}")
    loaded = _load(model)
    params = SamplingParams(temperature=temperature, ignore_eos=True, seed=seed)
    runs = []
    with _engine(
        loaded,
        max_num_seqs=max_num_seqs,
        n_ctx=n_ctx,
        n_threads=n_threads,
        kv_layout=kv_layout,
        prefix_caching=prefix_caching,
        prefill_policy=prefill_policy,
        num_speculative_tokens=num_speculative_tokens,
        profile=profile,
    ) as engine:
        warm_up(engine, ["Warming up takes a few tokens only."] * 4)
        for index in _track(range(num_runs), "runs"):
            # New prompts each time, so that no cache answers for the run before.
            workload = (
                Workload.from_trace(trace, tokenizer=loaded, seed=seed + index, params=params)
                if trace is not None
                else Workload.generate(
                    loaded,
                    num_prompts=num_prompts,
                    prompt_tokens=prompt_tokens,
                    output_tokens=output_tokens,
                    request_rate=request_rate,
                    burstiness=burstiness,
                    seed=seed + index,
                    shared_prefix_tokens=shared_prefix_tokens,
                    params=params,
                )
            )
            result = run_load(engine, workload, max_concurrency=max_concurrency)
            summary = result.summarize(slo)
            runs.append(BenchmarkRun(summary.to_metrics(), {"errors": summary.errors}))
            if result.interrupted:
                break
    config = {**workload.config, "max_concurrency": max_concurrency, "temperature": temperature}
    hidden = {"ttft", "tpot", "itl", "e2el", "lag"} - set(shown)
    _finish("throughput", loaded, engine, config, runs, save_result, result_dir, hidden)


@app.command()
@reported()
def sweep(
    model: ModelArgument,
    *,
    batch_sizes: Annotated[str, typer.Option(help="Requests at a time.")] = "1,2,4,8,16,32",
    input_len: Annotated[int, typer.Option(min=1, help="Prompt tokens.")] = 64,
    output_len: Annotated[int, typer.Option(min=1, help="Output tokens.")] = 32,
    latency_target: Annotated[
        float | None, typer.Option(help="Longest p95 latency of a request in seconds.")
    ] = None,
    n_threads: ThreadsOption = None,
    seed: SeedOption = 0,
    save_result: SaveOption = False,
    result_dir: DirOption = Path(),
) -> None:
    """Measure batch sizes, those that don't fit too, and recommend one."""
    from rich.console import Console  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415

    from batchcore.bench.environment import describe_model  # noqa: PLC0415
    from batchcore.bench.model_cost import ModelCost  # noqa: PLC0415
    from batchcore.bench.result import BenchmarkResult, BenchmarkRun  # noqa: PLC0415
    from batchcore.bench.sweep import recommend, sweep_batch_sizes  # noqa: PLC0415

    try:
        sizes = [int(part) for part in batch_sizes.split(",")]
    except ValueError:
        raise ConfigError(f"--batch-sizes must be like 1,2,4, not {batch_sizes!r}") from None
    loaded = _load(model)
    console = Console(highlight=False)
    columns = [f"{name}_tokens_per_s" for name in ("output", "total")]
    columns = ["total_s", *columns, "mean_latency_s", "p95_latency_s"]
    table = Table("batch size", *columns, "memory MiB", "notes", title=loaded.description)
    for column in table.columns[:-1]:
        column.justify = "right"
    try:
        cost = ModelCost.from_gguf(loaded.path)
    except ConfigError:  # the extra is not installed, or the shapes are of no known kind
        cost = None
    rows = sweep_batch_sizes(
        loaded,
        sizes,
        input_len=input_len,
        output_len=output_len,
        n_threads=n_threads,
        cost=cost,
        seed=seed,
        on_row=lambda row: Console(stderr=True).print(f"batch size {row['batch_size']} done"),
    )
    for row in rows:
        used = row["memory_bytes"]
        figures = [_number(row[name]) for name in columns]
        mebibytes = f"{used / 2**20:.0f}" if used else ""
        table.add_row(str(row["batch_size"]), *figures, mebibytes, row["note"])
    console.print(table)
    advice = recommend(rows, latency_target)
    console.print(f"recommended: {advice['batch_size']} ({advice['reason']})", soft_wrap=True)
    if save_result:
        config = {"input_len": input_len, "output_len": output_len, "seed": seed}
        best = {row["batch_size"]: row for row in rows}.get(advice["batch_size"], {})
        metrics = {name: best.get(name) for name in columns}
        run = BenchmarkRun(metrics, {"rows": rows, "recommended": advice})
        result = BenchmarkResult("sweep", config, (run,), describe_model(loaded))
        _save(result, result_dir, console)


@app.command()
@reported()
def compare(
    baseline: Annotated[Path, typer.Argument(help="A result file.")],
    candidate: Annotated[Path, typer.Argument(help="Another of the same benchmark.")],
) -> None:
    """Compare two results, run by run, as ratios with an interval."""
    from rich.console import Console  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415

    from batchcore.bench.compare import compare_results, find_differences  # noqa: PLC0415
    from batchcore.bench.result import BenchmarkResult  # noqa: PLC0415

    one, two = BenchmarkResult.load(baseline), BenchmarkResult.load(candidate)
    console = Console(highlight=False)
    table = Table("metric", "baseline", "candidate", "ratio", "95% interval", "", title=one.kind)
    for column in table.columns[1:5]:
        column.justify = "right"
    for row in compare_results(one, two):
        ratio = row.ratio
        table.add_row(
            row.metric,
            _number(row.baseline),
            _number(row.candidate),
            f"{ratio.median:.3f}" if ratio else "",
            f"{ratio.ci_low:.3f} to {ratio.ci_high:.3f}" if ratio else "",
            row.verdict,
        )
    console.print(table)
    if len(one.runs) < 6:  # as PairedRatio.has_enough_pairs
        console.print("fewer than 6 runs: the intervals are hints", style="yellow")
    for name, (old, new) in find_differences(one, two).items():
        console.print(f"differs: {name}: {old} / {new}")


def _load(name: str) -> Model:
    from batchcore.model import Model  # noqa: PLC0415

    return Model(name, progress=True)


def _engine(model: Model, **options: Any) -> Engine:
    from batchcore.engine import Engine  # noqa: PLC0415

    if options.get("kv_layout") == "auto":
        del options["kv_layout"]  # leaves it to the profile
    return Engine(model, **options)


def _track(steps: range, what: str) -> Any:
    from rich.console import Console  # noqa: PLC0415
    from rich.progress import track  # noqa: PLC0415

    return track(steps, description=what, console=Console(stderr=True))


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _finish(
    kind: str,
    model: Model,
    engine: Engine,
    config: dict[str, Any],
    runs: list[BenchmarkRun],
    save: bool,
    folder: Path,
    hidden: set[str] | frozenset[str] = frozenset(),
) -> None:
    """Print a result, and save it where asked for."""
    from rich.console import Console  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415

    from batchcore.bench.environment import describe_model  # noqa: PLC0415
    from batchcore.bench.result import BenchmarkResult  # noqa: PLC0415

    settings = {
        "max_num_seqs": engine.max_num_seqs,
        "n_ctx": engine.n_ctx,
        "n_threads": engine.n_threads,
        "kv_layout": engine.kv_layout,
    }
    result: BenchmarkResult = BenchmarkResult(
        kind, {**settings, **config}, tuple(runs), describe_model(model)
    )
    title = f"{kind}: {model.description}, median of {len(runs)}" if len(runs) > 1 else kind
    table = Table("metric", "value", title=title, title_justify="left")
    table.columns[1].justify = "right"
    for name, value in result.metrics.items():
        if value is not None and not any(f"_{one}_" in name for one in hidden):
            table.add_row(name, _number(value))
    console = Console(highlight=False)
    console.print(table)
    if save:
        _save(result, folder, console)


def _save(result: BenchmarkResult, folder: Path, console: Console) -> None:
    stamp = datetime.now(timezone.utc).strftime("%Y%m%dT%H%M%SZ")
    path = folder / f"{result.kind}-{stamp}.json"
    result.save(path)
    console.print(f"written to {path}", soft_wrap=True)
