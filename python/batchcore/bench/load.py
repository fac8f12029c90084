"""Runs a workload over an engine in real time: open loop, every request at its arrival.

Open loop means that requests come when they come, however busy the engine is, as users do; unless
`max_concurrency` holds them back. The driver runs an event loop of its own: call it from a thread
that has none running.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from batchcore.async_engine import AsyncEngine
from batchcore.bench.metrics import RequestRecord, summarize
from batchcore.errors import BatchcoreError, ConfigError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
    from contextlib import AbstractAsyncContextManager

    from batchcore.bench.metrics import Slo, Summary
    from batchcore.bench.workload import Workload, WorkloadRequest
    from batchcore.engine import Engine
    from batchcore.handle import AsyncRequestHandle
    from batchcore.outputs import RequestOutput

    Serve = Callable[[WorkloadRequest, "_Watch"], Awaitable[None]]

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
    if timeout is not None and not timeout > 0:
        raise ConfigError(f"timeout must be above 0 seconds, not {timeout}")
    client = _engine_client(engine, timeout)
    return _drive(workload, client, max_concurrency=max_concurrency, on_record=on_record)


def _drive(
    workload: Workload,
    client: AbstractAsyncContextManager[Serve],
    *,
    max_concurrency: int | None = None,
    group_concurrency: Mapping[str, int] | None = None,
    on_record: Callable[[RequestRecord], None] | None = None,
) -> LoadResult:
    """Run a workload over anything that serves requests; see `run_load`.

    Args:
        workload: What to submit.
        client: Entered before the clock starts. Gives what serves one request and tells its watch
            about every token; a BatchcoreError of it is recorded.
        max_concurrency: Requests in flight at most.
        group_concurrency: The same for the requests of a group, by its name.
        on_record: Called when a request has ended.
    """
    if max_concurrency is not None and max_concurrency < 1:
        raise ConfigError(f"max_concurrency must be at least 1, not {max_concurrency}")
    result = LoadResult(num_requests=len(workload))
    driver = _Driver(
        client, workload, max_concurrency, dict(group_concurrency or {}), on_record, result
    )
    try:
        asyncio.run(driver.run())
    except KeyboardInterrupt:
        result.interrupted = True
    result.records.sort(key=lambda record: record.index)
    return result


@asynccontextmanager
async def _engine_client(engine: Engine, timeout: float | None) -> AsyncIterator[Serve]:
    async with AsyncEngine(engine) as async_engine:

        async def serve(request: WorkloadRequest, watch: _Watch) -> None:
            watch.handle = await async_engine.submit(
                request.prompt,
                request.params,
                priority=request.priority,
                user=request.user or "",
                timeout=timeout,
            )
            async for delta in watch.handle:
                watch.take(delta.index, len(delta.token_ids), watch.now_s())

        yield serve


class _Driver:
    def __init__(
        self,
        client: AbstractAsyncContextManager[Serve],
        workload: Workload,
        max_concurrency: int | None,
        group_concurrency: dict[str, int],
        on_record: Callable[[RequestRecord], None] | None,
        result: LoadResult,
    ) -> None:
        self._client = client
        self._requests = workload.requests
        self._max_concurrency = max_concurrency
        self._group_concurrency = group_concurrency
        self._on_record = on_record
        self._result = result
        self._start = 0.0

    def _now_s(self) -> float:
        return time.perf_counter() - self._start

    async def run(self) -> None:
        """Start each request in its turn; none is left running at the end, whatever happens."""
        gate = None if self._max_concurrency is None else _Gate(self._max_concurrency)
        groups = {name: _Gate(n) for name, n in self._group_concurrency.items()}
        order = sorted(range(len(self._requests)), key=lambda i: self._requests[i].arrival_s)
        tasks: list[asyncio.Task[None]] = []
        failed = asyncio.get_running_loop().create_future()

        def watch(task: asyncio.Task[None]) -> None:
            if not (task.cancelled() or task.exception() is None or failed.done()):
                failed.set_result(None)

        async with self._client as serve:
            self._start = time.perf_counter()
            try:
                for index in order:
                    request = self._requests[index]
                    due_s = request.arrival_s
                    if (early_s := due_s - self._now_s()) > 0:
                        await asyncio.wait([failed], timeout=early_s)
                    gates = [one for one in (groups.get(request.group or ""), gate) if one]
                    for one in gates:
                        due_s = max(due_s, await one.enter())
                    if failed.done():
                        break  # by a defect or by `on_record`: nobody wants the rest
                    tasks.append(asyncio.create_task(self._run_one(serve, index, due_s, gates)))
                    tasks[-1].add_done_callback(watch)
                await asyncio.gather(*tasks)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                self._result.total_s = self._now_s()

    async def _run_one(self, serve: Serve, index: int, due_s: float, gates: list[_Gate]) -> None:
        request = self._requests[index]
        watch = _Watch(index, request, due_s, submitted_s=self._now_s(), origin=self._start)
        try:
            await serve(request, watch)
            watch.ended_s = self._now_s()
        except BatchcoreError as error:
            watch.error = error
        finally:
            for gate in gates:
                gate.leave(self._now_s())
            record = watch.record()
            self._result.records.append(record)
            if watch.handle is not None:
                self._result.outputs[index] = watch.handle.output
        if self._on_record is not None:
            self._on_record(record)


class _Gate:
    """Lets so many in at a time, and knows since when there was room for each."""

    def __init__(self, size: int) -> None:
        self._semaphore = asyncio.Semaphore(size)
        self._free_since_s = deque([0.0] * size)

    async def enter(self) -> float:
        """Wait for room; gives the time at which it came."""
        await self._semaphore.acquire()
        return self._free_since_s.popleft()

    def leave(self, now_s: float) -> None:
        self._free_since_s.append(now_s)
        self._semaphore.release()


class _Watch:
    """Collects the times of one request, all from the start of the run."""

    def __init__(
        self,
        index: int,
        request: WorkloadRequest,
        due_s: float,
        submitted_s: float,
        *,
        origin: float = 0.0,
    ) -> None:
        self.origin = origin
        """When the run started, on the clock of `time.perf_counter`."""
        self._index = index
        self._request = request
        self._due_s = due_s
        self._submitted_s = submitted_s
        self._first_token_s: float | None = None
        self._last_token_s: dict[int, float] = {}
        self._num_tokens: Counter[int] = Counter()
        self._itl_s: list[float] = []
        self.handle: AsyncRequestHandle | None = None
        """Of an engine; others say `num_cached_tokens` and `finish_reason` themselves."""
        self.num_cached_tokens = 0
        self.finish_reason: str | None = None
        self.ended_s: float | None = None
        self.error: BatchcoreError | None = None

    def now_s(self) -> float:
        """From the start of the run."""
        return time.perf_counter() - self.origin

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
        self._num_tokens[completion] += num_tokens

    def record(self) -> RequestRecord:
        prompt = self._request.prompt
        num_prompt_tokens = 0 if isinstance(prompt, str) else len(prompt)
        num_cached_tokens = self.num_cached_tokens
        completion_tokens = tuple(self._num_tokens.values())
        finish_reason = self.finish_reason
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
