"""What requests give back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

__all__ = [
    "CompletionOutput",
    "FinishReason",
    "RequestMetrics",
    "RequestOutput",
    "RequestPadding",
    "StreamDelta",
    "TokenLogprobs",
]

FinishReason = Literal["stop", "length", "cancelled", "timeout", "error"]
"""The terminal states; every request reaches exactly one."""


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities at one generated position, natural, before any option."""

    token: int
    """The token that was chosen."""
    logprob: float
    """Its log-probability."""
    top: list[tuple[int, float]]
    """The most likely tokens with theirs, most likely first, as many as were asked for."""


@dataclass(frozen=True, slots=True)
class RequestMetrics:
    """Times of one request in seconds; None where it ended before."""

    queue_s: float | None
    """From submit until it had a slot."""
    ttft_s: float | None
    """From submit until its first token."""
    latency_s: float
    """From submit until it ended."""
    tpot_s: float | None
    """Mean time per output token behind the first (of the longest completion)."""
    num_preemptions: int
    """How often it had to give way and was resumed."""


@dataclass(frozen=True, slots=True)
class RequestPadding:
    """Key positions of one request's rows, summed over the layers with attention."""

    attention_needed: int
    """That they attended to."""
    attention_computed: int
    """Key positions that attention went over for its rows, as in `PaddingStats`."""


@dataclass(slots=True)
class CompletionOutput:
    """One completion of a prompt."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    """What was generated, a stop token included."""
    logprobs: list[TokenLogprobs] | None = None
    """One entry per token, where asked for."""
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    """The stop token or stop string; None where the model ended by itself."""

    @property
    def cumulative_logprob(self) -> float | None:
        """Sum of the chosen tokens' log-probabilities, where asked for."""
        if self.logprobs is None:
            return None
        return sum(position.logprob for position in self.logprobs)


@dataclass(slots=True)
class RequestOutput:
    """Everything about one request; complete once `finished` is true."""

    request_id: int
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool = False
    num_cached_tokens: int = 0
    """Prompt tokens that were not computed because a cached prefix had them."""
    metrics: RequestMetrics | None = None
    """Set once finished."""
    padding: RequestPadding | None = None
    """Set once finished."""

    @property
    def text(self) -> str:
        """The text of the first completion."""
        return self.outputs[0].text


@dataclass(frozen=True, slots=True)
class StreamDelta:
    """What one completion gained since the delta before."""

    request_id: int
    index: int
    """Of the completion, where `n` is more than 1."""
    text: str
    """Whole characters only, and never part of a stop string; may be empty."""
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None
    finish_reason: FinishReason | None
    """Set in the last delta of the completion."""
    stop_reason: int | str | None
