"""From what a caller asks for to requests of the C++ engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias, TypeVar

from batchcore.errors import InvalidRequestError
from batchcore.handle import _Handle
from batchcore.params import SamplingParams
from batchcore.policy import check_timeout, check_user, encode_user

if TYPE_CHECKING:
    from batchcore import _core
    from batchcore.engine import Engine

__all__ = ["AdmissionHook", "Submission"]

HandleT = TypeVar("HandleT", bound=_Handle)
Prompt: TypeAlias = str | Sequence[int]


@dataclass(frozen=True, slots=True)
class Submission:
    """A request as it is handed in, for admission hooks and observers."""

    prompt_token_ids: list[int]
    params: SamplingParams
    priority: int | str = 0
    """A number, lower first, or the name of a tier."""
    user: str = ""
    """Whose share of the engine it counts against."""
    timeout: float | None = None
    """Seconds until it must be finished."""
    queue_timeout: float | None = None
    """Seconds until it must have a slot."""


AdmissionHook = Callable[[Submission], "Submission | None"]
"""Called in the submitting thread with every request before it is queued. It returns the request to
queue in its place (`dataclasses.replace` makes one), or None for the same; it raises to refuse it,
and what it raises reaches the caller."""


def submit_to(
    engine: Engine,
    submissions: Sequence[Submission],
    kind: type[HandleT],
    *,
    streams: bool,
    pins: bool = False,
    in_lock_step: bool = False,
    notifier: _core.Notifier | None = None,
) -> list[HandleT]:
    """Queue requests, all or none, and wrap their channels in handles of `kind`."""
    if engine.on_submit is not None and not pins:
        submissions = [engine.on_submit(one) or one for one in submissions]
    channels = engine._native.submit(
        [_to_native(engine, one) for one in submissions], streams, pins, in_lock_step, notifier
    )
    return [
        kind(engine, channel, submission)
        for channel, submission in zip(channels, submissions, strict=True)
    ]


def _to_native(
    engine: Engine, one: Submission
) -> tuple[list[int], _core.SamplingParams, int, bytes, float | None, float | None]:
    check_user(one.user)
    check_timeout("timeout", one.timeout)
    check_timeout("queue_timeout", one.queue_timeout)
    return (
        one.prompt_token_ids,
        one.params._to_native(),
        engine.policy.priority_of(one.priority),
        encode_user(one.user),
        one.timeout,
        one.queue_timeout,
    )


def as_prompts(prompts: Prompt | Sequence[Prompt]) -> Sequence[Prompt]:
    """One prompt as a list of one."""
    if isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int)):
        return [prompts]  # type: ignore[list-item]
    return prompts  # type: ignore[return-value]


def as_params(
    params: SamplingParams | Sequence[SamplingParams] | None, count: int
) -> Sequence[SamplingParams]:
    """One set of parameters for each of `count` prompts."""
    if params is None:
        params = SamplingParams()
    if isinstance(params, SamplingParams):
        return [params] * count
    if len(params) != count:
        raise InvalidRequestError(f"{len(params)} sets of parameters for {count} prompts")
    return params
