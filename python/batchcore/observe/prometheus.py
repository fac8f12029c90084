"""An engine's counters as Prometheus metrics, read when they are scraped.

```python
import prometheus_client
from batchcore.observe.prometheus import register

register(engine)
prometheus_client.start_http_server(9464, "127.0.0.1")
```
"""

from __future__ import annotations

import importlib
import logging
import re
import threading
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from batchcore.errors import BatchcoreError, ConfigError
from batchcore.observe.families import FAMILIES, PREFIX, Family, HistogramFamily, Reading
from batchcore.observe.target import is_closed, model_name_of, tier_names_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from prometheus_client import CollectorRegistry
    from prometheus_client.metrics_core import Metric

    from batchcore.observe.target import HasStats

__all__ = ["EngineCollector", "register"]

_logger = logging.getLogger("batchcore")
_LABEL_NAME = re.compile(r"(?!__)[a-zA-Z_][a-zA-Z0-9_]*")
_TAKEN = {"le", "model_name"} | {label for family in FAMILIES for label in family.labels}


def _require_client() -> Any:
    try:
        return importlib.import_module("prometheus_client")
    except ImportError as error:
        raise ConfigError(
            "metrics are exported with prometheus_client: pip install 'batchcore[metrics]'"
        ) from error


@dataclass(frozen=True, slots=True, eq=False)
class _Entry:
    """One engine in a collector. The reference is weak: watching must not keep a model loaded."""

    target: weakref.ref[HasStats]
    model_name: str | None
    labels: dict[str, str]

    @property
    def is_gone(self) -> bool:
        target = self.target()
        return target is None or is_closed(target)

    def read(self) -> tuple[dict[str, str], Reading] | None:
        """Labels and values; None where there is nothing to read (any more)."""
        target = self.target()
        if target is None or is_closed(target):
            return None
        try:
            reading = Reading(target.stats(), tier_names_of(target))
        except BatchcoreError:
            return None  # not loaded yet, or a forked child, whose copy counts nothing
        except Exception:
            # The registry has metrics of others too, which an exception would take down.
            _logger.exception("an engine's counters could not be read")
            return None
        name = model_name_of(target) if self.model_name is None else self.model_name
        return {"model_name": name, **self.labels}, reading


class EngineCollector:
    """Metrics of one or more engines, for a registry of `prometheus_client`. Thread-safe.

    Nothing is counted here: a scrape copies the counters that the engines keep anyway. Engines are
    held weakly. One that is closed, gone or not loaded yet has no samples.

    A registry takes each name once, so engines that share a registry share a collector: `add` them,
    or let `register` do that.
    """

    def __init__(
        self,
        engine: HasStats | None = None,
        *,
        model_name: str | None = None,
        labels: Mapping[str, str] | None = None,
    ) -> None:
        """Watch an engine, or nothing yet; see `add`.

        Raises:
            ConfigError: prometheus_client is not installed, or as for `add`.
        """
        _require_client()
        self._lock = threading.Lock()  # guards _entries
        self._entries: list[_Entry] = []
        if engine is not None:
            self.add(engine, model_name=model_name, labels=labels)

    def add(
        self,
        engine: HasStats,
        *,
        model_name: str | None = None,
        labels: Mapping[str, str] | None = None,
    ) -> Callable[[], None]:
        """Watch one more engine. Returns a function that ends that.

        Args:
            engine: An Engine, an AsyncEngine (loaded or not), or anything else with `stats()`.
            model_name: Value of the label `model_name`; None means the model's file without folder
                and suffix.
            labels: Further labels of its samples. `engine`, which tells engines apart, is the
                lowest free number where it is not given.

        Raises:
            ConfigError: A label can't be used, or another engine has this value of `engine`.
        """
        given = {name: _clean(str(value)) for name, value in (labels or {}).items()}
        for label in given:
            if not _LABEL_NAME.fullmatch(label) or label in _TAKEN:
                raise ConfigError(f"a metric's label can't be named {label!r}")
        with self._lock:
            self._entries = [entry for entry in self._entries if not entry.is_gone]
            taken = {entry.labels["engine"] for entry in self._entries}
            free = next(str(i) for i in range(len(taken) + 1) if str(i) not in taken)
            if given.setdefault("engine", free) in taken:
                raise ConfigError(f"another engine has the label engine={given['engine']!r}")
            name = None if model_name is None else _clean(model_name)
            entry = _Entry(weakref.ref(engine), name, given)
            self._entries.append(entry)

        def remove() -> None:
            with self._lock:
                self._entries = [other for other in self._entries if other is not entry]

        return remove

    def describe(self) -> list[Metric]:
        """Every metric without a sample: a registry asks which names are taken."""
        return [_metric_class(family)(*_heading(family)) for family in FAMILIES]

    def collect(self) -> Iterator[Metric]:
        """Read all engines, each once, and yield the metrics."""
        with self._lock:
            entries = list(self._entries)
        found = [each for each in (entry.read() for entry in entries) if each is not None]
        if not found:
            return
        # Engines may have different labels. One that is empty is the same as one that is not there.
        names = sorted({name for labels, _ in found for name in labels})
        rows = [([_clean(labels.get(name, "")) for name in names], each) for labels, each in found]
        for family in FAMILIES:
            metric = _metric_class(family)(*_heading(family), labels=(*names, *family.labels))
            for values, reading in rows:
                _add_samples(metric, family, values, reading)
            yield metric


def _add_samples(
    metric: Any, family: Family | HistogramFamily, values: Sequence[str], reading: Reading
) -> None:
    if isinstance(family, HistogramFamily):
        histogram = family.read(reading.stats)
        metric.add_metric(values, family.buckets.cumulative(histogram), sum_value=histogram.sum)
        return
    for own, value in family.read(reading):
        metric.add_metric([*values, *map(_clean, own)], float(value))


def _heading(family: Family | HistogramFamily) -> tuple[str, str]:
    return PREFIX + family.name, family.help


def _metric_class(family: Family | HistogramFamily) -> Any:
    core = importlib.import_module("prometheus_client.core")
    return getattr(core, f"{family.kind.capitalize()}MetricFamily")


def _clean(value: str) -> str:
    """Without lone surrogates, as file names may have: one would make the whole scrape fail."""
    return value.encode("utf-8", "backslashreplace").decode()


# One collector per registry. Values don't refer to keys, so registries come and go as they like.
_collectors: weakref.WeakKeyDictionary[CollectorRegistry, EngineCollector] = (
    weakref.WeakKeyDictionary()
)
_collectors_lock = threading.Lock()


def register(
    engine: HasStats,
    registry: CollectorRegistry | None = None,
    *,
    model_name: str | None = None,
    labels: Mapping[str, str] | None = None,
) -> Callable[[], None]:
    """Export an engine's metrics; several engines may share a registry.

    Args:
        engine: As for `EngineCollector.add`; held weakly.
        registry: Of prometheus_client; None means its default one.
        model_name: As for `EngineCollector.add`.
        labels: As for `EngineCollector.add`.

    Returns:
        A function that takes the engine out again. Engines that are closed need none.

    Raises:
        ConfigError: prometheus_client is not installed, or as for `EngineCollector.add`.
        ValueError: The registry has metrics of these names from elsewhere.
    """
    registry = registry if registry is not None else _require_client().REGISTRY
    with _collectors_lock:
        collector = _collectors.get(registry)
        if collector is None:
            collector = EngineCollector()
            registry.register(collector)
            _collectors[registry] = collector
    return collector.add(engine, model_name=model_name, labels=labels)
