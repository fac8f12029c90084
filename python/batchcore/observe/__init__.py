"""Watching an engine in production: metrics, traces and log lines.

All three read what the engine counts anyway, so nothing is added to its loop. What they need beyond
the standard library (`prometheus_client`, `opentelemetry-api`) is imported when it is first used.
"""

from __future__ import annotations

from batchcore.observe.logs import StatsLogger, log_stats
from batchcore.observe.prometheus import EngineCollector, register
from batchcore.observe.tracing import trace

__all__ = ["EngineCollector", "StatsLogger", "log_stats", "register", "trace"]
