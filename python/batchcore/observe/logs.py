"""What an engine did, as a log line now and then, and a line for each slow request.

```python
import logging
from batchcore.observe.logs import log_stats

logging.basicConfig(level=logging.INFO)
with log_stats(engine, interval_s=10, slow_request_s=5):
    serve(engine)
```

Every record has the values of its line in `record.batchcore`, a dict that is ready for JSON.
"""

from __future__ import annotations

import contextlib
import logging
import math
import threading
import time
import weakref
from typing import TYPE_CHECKING

from batchcore.errors import BatchcoreError, ConfigError
from batchcore.observe.lines import interval_line, interval_values, request_line, request_values
from batchcore.observe.target import inner_engine, is_closed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from typing_extensions import Self

    from batchcore.handle import FinishedRequest
    from batchcore.observe.target import HasStats
    from batchcore.stats import EngineStats

__all__ = ["StatsLogger", "log_stats"]

_logger = logging.getLogger("batchcore.stats")

# An engine does not tell when it is closed, so the thread looks this often.
_CLOSED_CHECK_S = 1.0
_JOIN_TIMEOUT_S = 10.0


def log_stats(
    engine: HasStats,
    *,
    interval_s: float = 10.0,
    slow_request_s: float | None = None,
    logger: logging.Logger | None = None,
) -> StatsLogger:
    """Log what the engine does, from a thread of its own, until `stop` or the engine is closed.

    A line comes every `interval_s` seconds in which there was something to do, and one at the end.
    The engine is held weakly. Nothing that goes wrong here reaches the engine or its callers.

    Args:
        engine: An Engine, an AsyncEngine, or anything else with `stats()`.
        interval_s: Seconds between lines (level INFO).
        slow_request_s: Requests that took longer, from submit to end, get a line each (level
            WARNING) once their end is consumed; None means none do. Needs an Engine, or an
            AsyncEngine that is loaded.
        logger: Where to; None means `batchcore.stats`.

    Raises:
        ConfigError: A value can't work.
        EngineError: `slow_request_s` is given and the AsyncEngine is not loaded yet.
    """
    return StatsLogger(engine, interval_s, slow_request_s, logger or _logger)


class StatsLogger:
    """The running logger that `log_stats` gives. A context manager."""

    def __init__(
        self,
        engine: HasStats,
        interval_s: float,
        slow_request_s: float | None,
        logger: logging.Logger,
    ) -> None:
        """See `log_stats`."""
        if not 0 < interval_s < threading.TIMEOUT_MAX:
            raise ConfigError(f"interval_s must be above 0 seconds, not {interval_s}")
        if slow_request_s is not None and not 0 <= slow_request_s < math.inf:
            raise ConfigError(f"slow_request_s must be at least 0 seconds, not {slow_request_s}")
        self._logger = logger
        self._interval_s = interval_s
        self._slow_request_s = slow_request_s
        self._stopping = threading.Event()
        self._engine = weakref.ref(engine, _setter(self._stopping))
        self._before: EngineStats | None = _read(engine)
        self._before_s = time.monotonic()
        if slow_request_s is not None:
            if not hasattr(engine, "add_observer"):
                raise ConfigError("slow_request_s needs an engine that can be observed")
            # What it returns refers to the engine, so it is not kept: see _stop_observing.
            engine.add_observer(self._observe)
        self._thread = threading.Thread(target=self._run, name="batchcore-stats", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        """Nothing to do: it runs since it was made."""
        return self

    def __exit__(self, *_: object) -> None:
        """Stop."""
        self.stop()

    def stop(self) -> None:
        """Log what there is since the last line, and end the thread. May be called again."""
        self._stopping.set()
        self._stop_observing()
        if threading.current_thread() is not self._thread:
            self._thread.join(_JOIN_TIMEOUT_S)  # bounded: a handler of the logger may hang

    def _run(self) -> None:
        next_s = time.monotonic() + self._interval_s
        while not self._is_over():
            left_s = next_s - time.monotonic()
            if self._stopping.wait(max(0.0, min(left_s, _CLOSED_CHECK_S))):
                break
            if time.monotonic() >= next_s:
                self._log_interval()
                next_s = max(next_s + self._interval_s, time.monotonic())
        self._log_interval()
        self._stop_observing()

    def _is_over(self) -> bool:
        engine = self._engine()
        return engine is None or is_closed(engine)

    def _log_interval(self) -> None:
        with _nothing_raised():
            engine = self._engine()
            now = _read(engine) if engine is not None else None
            # Not held while handlers run: the last reference should not be a logger's.
            del engine
            now_s = time.monotonic()
            if now is None:
                return
            before, before_s = self._before, self._before_s
            self._before, self._before_s = now, now_s
            values = interval_values(before, now, now_s - before_s)
            if values is not None:
                self._logger.info("%s", interval_line(values), extra={"batchcore": values})

    def _observe(self, event: FinishedRequest) -> None:
        if self._stopping.is_set() or self._slow_request_s is None:
            return
        with _nothing_raised():
            values = request_values(event)
            if values["latency_s"] > self._slow_request_s:
                self._logger.warning("%s", request_line(values), extra={"batchcore": values})

    def _stop_observing(self) -> None:
        engine = inner_engine(self._engine())
        if engine is not None:
            # Comparing by ==, as every look at a bound method makes a new one.
            engine._observers = tuple(one for one in engine._observers if one != self._observe)


def _setter(event: threading.Event) -> Callable[[object], None]:
    """For a weak reference, to call when the engine is gone."""
    return lambda _: event.set()


def _read(engine: HasStats) -> EngineStats | None:
    try:
        return engine.stats()
    except BatchcoreError:
        return None  # not loaded yet


@contextlib.contextmanager
def _nothing_raised() -> Iterator[None]:
    try:
        yield
    except Exception:
        with contextlib.suppress(Exception):  # it may be the logging that is broken
            logging.getLogger("batchcore").exception("statistics could not be logged")
