"""Measuring: workloads, ways to run them, figures, results in files, and paired comparisons."""

from __future__ import annotations

from batchcore.bench.arrivals import Distribution, arrival_times
from batchcore.bench.compare import (
    MetricComparison,
    PairedRatio,
    compare_pairs,
    compare_results,
    find_differences,
    interleave,
)
from batchcore.bench.environment import describe_environment, describe_model
from batchcore.bench.load import LoadResult, run_load
from batchcore.bench.metrics import Quantiles, RequestRecord, Slo, Summary, summarize
from batchcore.bench.result import BenchmarkResult, BenchmarkRun
from batchcore.bench.workload import Workload, WorkloadRequest

__all__ = [
    "BenchmarkResult",
    "BenchmarkRun",
    "Distribution",
    "LoadResult",
    "MetricComparison",
    "PairedRatio",
    "Quantiles",
    "RequestRecord",
    "Slo",
    "Summary",
    "Workload",
    "WorkloadRequest",
    "arrival_times",
    "compare_pairs",
    "compare_results",
    "describe_environment",
    "describe_model",
    "find_differences",
    "interleave",
    "run_load",
    "summarize",
]
