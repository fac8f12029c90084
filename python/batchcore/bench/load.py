"""Runs a workload over an engine in real time: open loop, every request at its arrival.

Open loop means that requests come when they come, however busy the engine is, as users do; unless
`max_concurrency` holds them back. The driver runs an event loop of its own: call it from a thread
that has none running.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from batchcore.async_engine import AsyncEngine
from batchcore.bench.metrics import RequestRecord, summarize
from batchcore.errors import BatchcoreError, ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

    from batchcore.bench.metrics import Slo, Summary
    from batchcore.bench.workload import Workload, WorkloadRequest
    from batchcore.engine import Engine
    from batchcore.handle import AsyncRequestHandle
    from batchcore.outputs import RequestOutput

__all__ = ["LoadResult", "run_load"]


@dataclass(slots=True)
class LoadResult:
    """What a run did, all of it or as far as it came."""

    num_requests: int
    """In the workload."""
    records: list[RequestRecord] = field(default_factory=list)
    """Of the requests that became due, in the order of the workload."""
    outputs: dict[int, RequestOutput] = field(default_factory=dict)
    """What those gave that were not refused, by index."""
    total_s: float = 0.0
    """From the start of the run until the last request ended."""
    interrupted: bool = False
    """Ended by Ctrl-C: some requests may be cut off, others missing."""

    def summarize(self, slo: Slo | None = None) -> Summary:
        """Figures of the run."""
        return summarize(self.records, self.total_s, num_requests=self.num_requests, slo=slo)

    def to_dict(self) -> dict[str, Any]:
        """Times and counts of every request, ready for JSON; not what was generated."""
        return {
            "num_requests": self.num_requests,
            "total_s": self.total_s,
            "interrupted": self.interrupted,
            "requests": [record.to_dict() for record in self.records],
        }


def run_load(
    engine: Engine,
    workload: Workload,
    *,
    max_concurrency: int | None = None,
    timeout: float | None = None,
    on_record: Callable[[RequestRecord], None] | None = None,
) -> LoadResult:
    """Submit every request at its arrival, and wait until the last has ended.

    A request that is refused or fails is recorded with its error, and the others go on. Ctrl-C ends
    the run, and the result says so and has what there was until then.

    Args:
        engine: Runs its own loop; it stays open.
        workload: What to submit.
        max_concurrency: Requests in flight at most; others wait, in the order of their arrival,
            and are due when one ends.
        timeout: Seconds for each request from its submit on.
        on_record: Called when a request has ended, on the thread of the caller.

    Raises:
        ConfigError: `max_concurrency` or `timeout` can't work, or the engine is stepped by hand.
    """
    if max_concurrency is not None and max_concurrency < 1:
        raise ConfigError(f"max_concurrency must be at least 1, not {max_concurrency}")
    if timeout is not None and not timeout > 0:
        raise ConfigError(f"timeout must be above 0 seconds, not {timeout}")
    result = LoadResult(num_requests=len(workload))
    driver = _Driver(engine, workload, max_concurrency, timeout, on_record, result)
    try:
        asyncio.run(driver.run())
    except KeyboardInterrupt:
        result.interrupted = True
    result.records.sort(key=lambda record: record.index)
    return result


class _Driver:
    def __init__(
        self,
        engine: Engine,
        workload: Workload,
        max_concurrency: int | None,
        timeout: float | None,
        on_record: Callable[[RequestRecord], None] | None,
        result: LoadResult,
    ) -> None:
        self._engine = engine
        self._requests = workload.requests
        self._max_concurrency = max_concurrency
        self._timeout = timeout
        self._on_record = on_record
        self._result = result
        self._start = 0.0

    def _now_s(self) -> float:
        return time.perf_counter() - self._start

    async def run(self) -> None:
        """Start each request in its turn; none is left running at the end, whatever happens."""
        gate = None if self._max_concurrency is None else asyncio.Semaphore(self._max_concurrency)
        order = sorted(range(len(self._requests)), key=lambda i: self._requests[i].arrival_s)
        tasks: list[asyncio.Task[None]] = []
        failed = asyncio.get_running_loop().create_future()

        def watch(task: asyncio.Task[None]) -> None:
            if not (task.cancelled() or task.exception() is None or failed.done()):
                failed.set_result(None)

        async with AsyncEngine(self._engine) as engine:
            self._start = time.perf_counter()
            try:
                for index in order:
                    due_s = self._requests[index].arrival_s
                    if (early_s := due_s - self._now_s()) > 0:
                        await asyncio.wait([failed], timeout=early_s)
                    if gate is not None:
                        is_held_back = gate.locked()
                        await gate.acquire()
                        due_s = self._now_s() if is_held_back else due_s
                    if failed.done():
                        break  # by a defect or by `on_record`: nobody wants the rest
                    tasks.append(asyncio.create_task(self._run_one(engine, index, due_s, gate)))
                    tasks[-1].add_done_callback(watch)
                await asyncio.gather(*tasks)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                self._result.total_s = self._now_s()

    async def _run_one(
        self, engine: AsyncEngine, index: int, due_s: float, gate: asyncio.Semaphore | None
    ) -> None:
        request = self._requests[index]
        watch = _Watch(index, request, due_s, submitted_s=self._now_s())
        try:
            watch.handle = await engine.submit(
                request.prompt,
                request.params,
                priority=request.priority,
                user=request.user or "",
                timeout=self._timeout,
            )
            async for delta in watch.handle:
                watch.take(delta.index, len(delta.token_ids), self._now_s())
            watch.ended_s = self._now_s()
        except BatchcoreError as error:
            watch.error = error
        finally:
            if gate is not None:
                gate.release()
            record = watch.record()
            self._result.records.append(record)
            if watch.handle is not None:
                self._result.outputs[index] = watch.handle.output
        if self._on_record is not None:
            self._on_record(record)


class _Watch:
    """Collects the times of one request, all from the start of the run."""

    def __init__(
        self, index: int, request: WorkloadRequest, due_s: float, submitted_s: float
    ) -> None:
        self._index = index
        self._request = request
        self._due_s = due_s
        self._submitted_s = submitted_s
        self._first_token_s: float | None = None
        self._last_token_s: dict[int, float] = {}
        self._itl_s: list[float] = []
        self.handle: AsyncRequestHandle | None = None
        self.ended_s: float | None = None
        self.error: BatchcoreError | None = None

    def take(self, completion: int, num_tokens: int, now_s: float) -> None:
        """Some tokens of a completion have come."""
        if num_tokens == 0:
            return
        if self._first_token_s is None:
            self._first_token_s = now_s
        if completion in self._last_token_s:
            self._itl_s.append(now_s - self._last_token_s[completion])
        self._itl_s += [0.0] * (num_tokens - 1)
        self._last_token_s[completion] = now_s

    def record(self) -> RequestRecord:
        prompt = self._request.prompt
        num_prompt_tokens = 0 if isinstance(prompt, str) else len(prompt)
        num_cached_tokens = 0
        completion_tokens: tuple[int, ...] = ()
        finish_reason = None
        if self.handle is not None:
            output = self.handle.output
            num_prompt_tokens = len(output.prompt_token_ids)
            num_cached_tokens = output.num_cached_tokens
            completion_tokens = tuple(len(one.token_ids) for one in output.outputs)
            reasons = [one.finish_reason for one in output.outputs]
            # Of several completions, the one that says what went wrong, if anything did.
            bad = (reason for reason in reasons if reason not in {"stop", "length"})
            finish_reason = next(bad, reasons[0])
        return RequestRecord(
            index=self._index,
            arrival_s=self._request.arrival_s,
            due_s=self._due_s,
            submitted_s=self._submitted_s,
            num_prompt_tokens=num_prompt_tokens,
            num_cached_tokens=num_cached_tokens,
            completion_tokens=completion_tokens,
            ttft_s=self._since_due(self._first_token_s),
            itl_s=tuple(self._itl_s),
            latency_s=self._since_due(self.ended_s),
            finish_reason=finish_reason,
            error=None if self.error is None else type(self.error).__name__,
            error_message=None if self.error is None else str(self.error),
            user=self._request.user,
            group=self._request.group,
        )

    def _since_due(self, at_s: float | None) -> float | None:
        return None if at_s is None else at_s - self._due_s
