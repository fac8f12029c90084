"""One OpenTelemetry span per request, with its phases as children.

```python
from batchcore.observe.tracing import trace

stop = trace(engine)      # an Engine, or an AsyncEngine that is loaded
```

Attributes follow the semantic conventions for generative AI, and vLLM where those have no name.
Neither prompts nor outputs, nor names of users, are ever in a span.
"""

from __future__ import annotations

import importlib
import time
from typing import TYPE_CHECKING, Any, TypeAlias

from batchcore import __version__
from batchcore.errors import ConfigError
from batchcore.observe.target import model_name_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from opentelemetry.context import Context
    from opentelemetry.trace import Span, Tracer, TracerProvider
    from opentelemetry.util.types import AttributeValue

    from batchcore.async_engine import AsyncEngine
    from batchcore.engine import Engine
    from batchcore.handle import FinishedRequest

    Attributes: TypeAlias = dict[str, AttributeValue]

__all__ = ["trace"]

_OPERATION = "text_completion"
_MAX_INT64 = 2**63 - 1


def _require(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            "requests are traced with opentelemetry-api: pip install 'batchcore[tracing]'"
        ) from error


def trace(
    engine: Engine | AsyncEngine,
    tracer_provider: TracerProvider | None = None,
    *,
    model_name: str | None = None,
    phases: bool = True,
) -> Callable[[], None]:
    """Make a span of every request, once its end has been consumed.

    Its parent is the span that was current where the request was handed in; of requests that were
    handed in before, it has none. Times are the engine's, not those of the consumer.

    Args:
        engine: Whose requests. An AsyncEngine must be loaded.
        tracer_provider: Where spans go; None means OpenTelemetry's global provider, which may also
            be set later.
        model_name: `gen_ai.request.model`; None means the model's file without folder and suffix.
        phases: Make child spans `queue`, `prefill` and `decode`.

    Returns:
        A function that stops it.

    Raises:
        ConfigError: opentelemetry-api is not installed.
        EngineError: The AsyncEngine is not loaded yet.
    """
    tracer = _require("opentelemetry.trace").get_tracer("batchcore", __version__, tracer_provider)
    name = model_name if model_name is not None else model_name_of(engine)
    return engine.add_observer(_Tracing(tracer, name, phases))


class _Tracing:
    """The observer. Holds no engine."""

    def __init__(self, tracer: Tracer, model_name: str, phases: bool) -> None:
        self._tracer = tracer
        self._model_name = model_name
        self._phases = phases
        self._api = _require("opentelemetry.trace")
        self._context = _require("opentelemetry.context")

    def __call__(self, event: FinishedRequest) -> None:
        start_s = event.submitted_at
        metrics = event.output.metrics
        # A handle that was dropped has not seen the engine's times: it ends now.
        end_s = start_s + metrics.latency_s if metrics else max(time.time(), start_s)
        span = self._tracer.start_span(
            f"{_OPERATION} {self._model_name}".rstrip(),
            context=self._parent_of(event),
            kind=self._api.SpanKind.INTERNAL,  # the model runs in this process
            attributes=_request_attributes(event, self._model_name),
            start_time=_ns(start_s),
        )
        if span.is_recording():
            span.set_attributes(_response_attributes(event))
            self._set_status(span, event, end_s)
            if self._phases and metrics:
                inside = self._api.set_span_in_context(span)
                for name, begin, end in _phases_of(event, end_s):
                    child = self._tracer.start_span(name, context=inside, start_time=_ns(begin))
                    child.end(end_time=_ns(end))
        span.end(end_time=_ns(end_s))

    def _parent_of(self, event: FinishedRequest) -> Context:
        if event.context is not None:
            parent: Context = event.context.run(self._context.get_current)
            return parent
        # Not the consumer's: that span may have nothing to do with it.
        return self._context.Context()  # type: ignore[no-any-return]

    def _set_status(self, span: Span, event: FinishedRequest, end_s: float) -> None:
        error = event.error
        if error is not None:
            span.record_exception(error, timestamp=_ns(end_s))
            kind, text = type(error).__name__, str(error)
        elif "timeout" in _finish_reasons(event):
            kind, text = "timeout", "the request was not finished within its timeout"
        elif "error" in _finish_reasons(event):
            kind, text = "_OTHER", "the request failed"
        else:
            return  # who cancels gets what they asked for: `finish_reasons` says so
        span.set_attribute("error.type", kind)
        span.set_status(self._api.Status(self._api.StatusCode.ERROR, text))


def _request_attributes(event: FinishedRequest, model_name: str) -> Attributes:
    params = event.submission.params
    attributes: Attributes = {
        "gen_ai.operation.name": _OPERATION,
        "gen_ai.provider.name": "batchcore",
        "gen_ai.request.model": model_name,
        "gen_ai.request.max_tokens": params.max_tokens,
        "gen_ai.request.temperature": float(params.temperature),
        "gen_ai.request.top_p": float(params.top_p),
        "gen_ai.request.top_k": float(params.top_k),
        "batchcore.request.priority": event.submission.priority,
    }
    if params.frequency_penalty:
        attributes["gen_ai.request.frequency_penalty"] = float(params.frequency_penalty)
    if params.presence_penalty:
        attributes["gen_ai.request.presence_penalty"] = float(params.presence_penalty)
    # Exporters have signed integers of 64 bits only, and fail with a whole batch of spans.
    if params.seed is not None and params.seed <= _MAX_INT64:
        attributes["gen_ai.request.seed"] = params.seed
    if params.n != 1:
        attributes["gen_ai.request.choice.count"] = params.n
    return attributes


def _response_attributes(event: FinishedRequest) -> Attributes:
    output = event.output
    attributes: Attributes = {
        "gen_ai.response.id": str(output.request_id),
        "gen_ai.response.finish_reasons": _finish_reasons(event),
        "gen_ai.usage.input_tokens": len(output.prompt_token_ids),
        "gen_ai.usage.output_tokens": sum(len(each.token_ids) for each in output.outputs),
        "gen_ai.usage.cache_read.input_tokens": output.num_cached_tokens,
    }
    metrics = output.metrics
    if metrics is not None:
        attributes["gen_ai.latency.e2e"] = metrics.latency_s
        attributes["batchcore.request.num_preemptions"] = metrics.num_preemptions
        if metrics.queue_s is not None:
            attributes["gen_ai.latency.time_in_queue"] = metrics.queue_s
        if metrics.ttft_s is not None:
            attributes["gen_ai.latency.time_to_first_token"] = metrics.ttft_s
    return attributes


def _finish_reasons(event: FinishedRequest) -> list[str]:
    return [each.finish_reason for each in event.output.outputs if each.finish_reason is not None]


def _phases_of(event: FinishedRequest, end_s: float) -> Iterator[tuple[str, float, float]]:
    """Name, begin and end of the phases that it came to, in seconds since the epoch."""
    metrics, start_s = event.output.metrics, event.submitted_at
    assert metrics is not None
    admitted_s = end_s if metrics.queue_s is None else start_s + metrics.queue_s
    first_token_s = end_s if metrics.ttft_s is None else start_s + metrics.ttft_s
    yield "queue", start_s, admitted_s
    if metrics.queue_s is not None:
        yield "prefill", admitted_s, first_token_s
    if metrics.ttft_s is not None:
        yield "decode", first_token_s, end_s


def _ns(seconds: float) -> int:
    return int(seconds * 1e9)
