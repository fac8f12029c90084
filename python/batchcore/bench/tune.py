"""Finding good engine options for a machine and a model, one option at a time."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from batchcore.bench.compare import interleave
from batchcore.bench.environment import describe_environment, describe_model
from batchcore.engine import Engine
from batchcore.errors import ConfigError, EngineError
from batchcore.params import SamplingParams
from batchcore.profile import Profile

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from batchcore.bench.workload import Workload
    from batchcore.model import Model

__all__ = ["Trial", "TuneResult", "tune"]

# A value replaces the one before it only where it is this much faster: less is noise.
_LEAST_GAIN = 1.03


@dataclass(frozen=True, slots=True)
class Trial:
    """One value of one option, with all others as they were best until then."""

    option: str
    value: Any
    total_tokens_per_s: float | None
    """Prompt and output tokens, median over rounds; None where it does not work."""
    note: str = ""
    """Why it does not work."""


@dataclass(frozen=True, slots=True)
class TuneResult:
    """What was tried, and what came of it."""

    profile: Profile
    trials: list[Trial] = field(default_factory=list)


def tune(
    model: Model,
    *,
    candidates: Mapping[str, Sequence[Any]],
    workload: Workload,
    n_ctx: int,
    rounds: int = 3,
    on_trial: Callable[[Trial], None] | None = None,
) -> TuneResult:
    """Try every value of each option in turn, in interleaved rounds, and keep the fastest.

    Speed is prompt and output tokens per second of the workload, all of it handed in at once.
    The first value of an option is what it is compared with; another must be 3% faster to win.

    Args:
        model: What to run.
        candidates: Values by option of `Profile`, in the order in which they are decided.
        workload: What it should be fast at.
        n_ctx: As for `Engine`.
        rounds: Runs of each value; medians count.
        on_trial: Called after each value.

    Raises:
        ConfigError: An option is unknown, or none of its values works.
    """
    best: dict[str, Any] = {}
    trials: list[Trial] = []
    for option, values in candidates.items():
        Profile({option: values[0]})  # refuses unknown ones
        found = _try_values(model, option, values, best, workload, n_ctx, rounds)
        for trial in found:
            if on_trial is not None:
                on_trial(trial)
        trials += found
        best[option] = _winner(option, found)
    evidence = {
        "environment": describe_environment(),
        "model": describe_model(model),
        "workload": workload.config,
        "n_ctx": n_ctx,
        "rounds": rounds,
        "trials": [
            {"option": t.option, "value": t.value, "total_tokens_per_s": t.total_tokens_per_s}
            for t in trials
        ],
    }
    return TuneResult(Profile(best, evidence), trials)


def _try_values(
    model: Model,
    option: str,
    values: Sequence[Any],
    best: dict[str, Any],
    workload: Workload,
    n_ctx: int,
    rounds: int,
) -> list[Trial]:
    broken: dict[int, str] = {}

    def run(index: int) -> float:
        if index in broken:
            return 0.0
        try:
            options = {**best, option: values[index]}
            return _tokens_per_s(model, options, workload, n_ctx)
        except (ConfigError, EngineError) as error:
            broken[index] = str(error)
            return 0.0

    each = [lambda i=i: run(i) for i in range(len(values))]
    speeds = interleave(each, rounds)
    return [
        Trial(
            option,
            value,
            None if index in broken else statistics.median(speeds[index]),
            broken.get(index, ""),
        )
        for index, value in enumerate(values)
    ]


def _winner(option: str, trials: Sequence[Trial]) -> Any:
    working = [trial for trial in trials if trial.total_tokens_per_s is not None]
    if not working:
        raise ConfigError(f"no value of {option} works: {trials[0].note}")
    best = working[0]
    for trial in working[1:]:
        assert trial.total_tokens_per_s is not None
        assert best.total_tokens_per_s is not None
        if trial.total_tokens_per_s > _LEAST_GAIN * best.total_tokens_per_s:
            best = trial
    return best.value


def _tokens_per_s(model: Model, options: dict[str, Any], workload: Workload, n_ctx: int) -> float:
    prompts = [request.prompt for request in workload]
    params = [request.params for request in workload]
    with Engine(model, n_ctx=n_ctx, prefix_caching=False, **options) as engine:
        engine.generate(prompts[:4], SamplingParams(max_tokens=4, ignore_eos=True))
        start = time.perf_counter()
        outputs = engine.generate(prompts, params)
        seconds = time.perf_counter() - start
    tokens = sum(len(out.prompt_token_ids) + len(out.outputs[0].token_ids) for out in outputs)
    return tokens / seconds
