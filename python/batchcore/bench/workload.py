"""What a benchmark asks of an engine: requests, and when each of them arrives.

Needs no engine: with the size of a vocabulary instead of a model, the prompts are token ids for
simulations. The same seed gives the same workload; prompts, lengths and arrivals are drawn apart,
so that another rate leaves the prompts as they are.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batchcore.bench.arrivals import Distribution, PromptWriter, arrival_times, generators
from batchcore.bench.result import write_text_atomically
from batchcore.errors import ConfigError
from batchcore.params import SamplingParams
from batchcore.submission import as_params, as_prompts

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator, Sequence

    from batchcore.bench.arrivals import Tokenizer
    from batchcore.submission import Prompt

__all__ = ["Workload", "WorkloadRequest"]

# Every output is as long as asked for, and the same in every run.
_DEFAULT_PARAMS = SamplingParams(temperature=0, ignore_eos=True)

_PARAMS = frozenset(field.name for field in dataclasses.fields(SamplingParams))
_KEYS = frozenset(
    ("arrival_s", "prompt", "prompt_tokens", "output_tokens", "params", "user", "priority", "group")
)


@dataclass(frozen=True, slots=True)
class WorkloadRequest:
    """One request."""

    prompt: str | tuple[int, ...]
    """Text or tokens."""
    params: SamplingParams = _DEFAULT_PARAMS
    arrival_s: float = 0.0
    """From the start of the run."""
    user: str | None = None
    """Who asks, for fairness between users."""
    priority: int = 0
    """Lower goes first."""
    group: str | None = None
    """What it has in common with others, e.g. the prefix of its prompt."""

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ConfigError: One can't work.
        """
        if not isinstance(self.prompt, str):
            object.__setattr__(self, "prompt", tuple(self.prompt))
            if not all(type(token) is int and token >= 0 for token in self.prompt):
                raise ConfigError("a prompt is a text or a list of tokens")
        if not (isinstance(self.arrival_s, int | float) and 0 <= self.arrival_s < math.inf):
            raise ConfigError(f"arrival_s must be 0 or more, not {self.arrival_s!r}")
        if not isinstance(self.priority, int):
            raise ConfigError(f"priority must be an integer, not {self.priority!r}")
        for name in ("user", "group"):
            value = getattr(self, name)
            if not (value is None or isinstance(value, str)):
                raise ConfigError(f"{name} must be a text, not {value!r}")


@dataclass(frozen=True)
class Workload:
    """Requests of a run. They may be in any order; `run_load` goes by `arrival_s`."""

    requests: tuple[WorkloadRequest, ...]
    config: dict[str, Any] = field(default_factory=dict, compare=False)
    """How it was made, ready for JSON."""

    def __post_init__(self) -> None:
        """Keep the requests as a tuple."""
        object.__setattr__(self, "requests", tuple(self.requests))

    def __len__(self) -> int:
        """Number of requests."""
        return len(self.requests)

    def __iter__(self) -> Iterator[WorkloadRequest]:
        """The requests in their order."""
        return iter(self.requests)

    @property
    def duration_s(self) -> float:
        """From the start of the run until the last request arrives."""
        return max((request.arrival_s for request in self.requests), default=0.0)

    @classmethod
    def generate(
        cls,
        tokenizer: Tokenizer | int,
        *,
        num_prompts: int,
        prompt_tokens: Distribution | str | int,
        output_tokens: Distribution | str | int,
        request_rate: float = math.inf,
        burstiness: float = 1.0,
        seed: int = 0,
        shared_prefix_tokens: int = 0,
        num_prefix_groups: int = 1,
        params: SamplingParams = _DEFAULT_PARAMS,
    ) -> Workload:
        """Make up prompts with exactly as many tokens as are drawn.

        Args:
            tokenizer: A model, or the size of a vocabulary for token ids without meaning.
            num_prompts: Number of requests.
            prompt_tokens: Tokens of each prompt, BOS included. Prompts start with different tokens
                behind BOS, as far as the vocabulary has different ones, so that no prefix cache
                can spare any of it.
            output_tokens: Tokens to generate for each.
            request_rate: Requests per second on average; infinite means all at once.
            burstiness: Shape of the gamma distribution of the gaps; 1 is a Poisson process.
            seed: Of everything that is drawn.
            shared_prefix_tokens: Tokens in front of those of `prompt_tokens`, the same for all
                requests of a group.
            num_prefix_groups: Groups that have a prefix of their own, of equal size.
            params: Everything but `max_tokens`.

        Raises:
            ConfigError: A value can't work.
        """
        if num_prompts < 1 or num_prefix_groups < 1 or shared_prefix_tokens < 0:
            raise ConfigError(
                "num_prompts and num_prefix_groups must be at least 1, shared_prefix_tokens 0; not "
                f"{num_prompts}, {num_prefix_groups} and {shared_prefix_tokens}"
            )
        inputs, outputs = Distribution.parse(prompt_tokens), Distribution.parse(output_tokens)
        num_prefixes = num_prefix_groups if shared_prefix_tokens else 0
        for_inputs, for_outputs, for_arrivals, for_texts, for_groups = generators(seed, 5)
        writer = PromptWriter(tokenizer, for_texts)
        prefixes = [writer.write(shared_prefix_tokens) for _ in range(num_prefixes)]
        groups = [int(rank) % num_prefix_groups for rank in for_groups.permutation(num_prompts)]
        rows = zip(
            inputs.sample(for_inputs, num_prompts),
            outputs.sample(for_outputs, num_prompts),
            arrival_times(
                for_arrivals, num_prompts, request_rate=request_rate, burstiness=burstiness
            ),
            groups,
            strict=True,
        )
        requests = [
            WorkloadRequest(
                prefixes[group] + writer.write(num_in, bos=False)
                if prefixes
                else writer.write(num_in),
                dataclasses.replace(params, max_tokens=num_out),
                arrival_s,
                group=f"prefix-{group}" if prefixes else None,
            )
            for num_in, num_out, arrival_s, group in rows
        ]
        config = {
            "source": "generated",
            "num_prompts": num_prompts,
            "prompt_tokens": str(inputs),
            "output_tokens": str(outputs),
            "request_rate": request_rate,
            "burstiness": burstiness,
            "seed": seed,
            "shared_prefix_tokens": shared_prefix_tokens,
            "num_prefix_groups": num_prefix_groups,
        }
        return cls(tuple(requests), config)

    @classmethod
    def from_prompts(
        cls,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] = _DEFAULT_PARAMS,
        *,
        request_rate: float = math.inf,
        burstiness: float = 1.0,
        seed: int = 0,
    ) -> Workload:
        """Give prompts an arrival each, in their order; see `generate`.

        Raises:
            ConfigError: A value can't work.
            InvalidRequestError: There are not as many sets of parameters as prompts.
        """
        prompts = as_prompts(prompts)
        (rng,) = generators(seed, 1)
        times = arrival_times(rng, len(prompts), request_rate=request_rate, burstiness=burstiness)
        rows = zip(prompts, as_params(params, len(prompts)), times, strict=True)
        config = {"source": "prompts", "num_prompts": len(prompts), "seed": seed}
        config |= {"request_rate": request_rate, "burstiness": burstiness}
        return cls(
            tuple(
                WorkloadRequest(
                    prompt if isinstance(prompt, str) else tuple(prompt), one, arrival_s
                )
                for prompt, one, arrival_s in rows
            ),
            config,
        )

    @classmethod
    def from_trace(
        cls,
        path: str | os.PathLike[str],
        tokenizer: Tokenizer | int | None = None,
        *,
        params: SamplingParams = _DEFAULT_PARAMS,
        seed: int = 0,
    ) -> Workload:
        """Read a trace: one JSON object per line, one line per request. `save` writes such files.

        Keys: `output_tokens`; `prompt`, a text or a list of tokens, or else `prompt_tokens`, the
        number of tokens to make up; and optionally `arrival_s`, `user`, `priority`, `group` and
        `params`, an object of SamplingParams that replaces `params` below.

        Args:
            path: The file. Empty lines are skipped.
            tokenizer: As for `generate`, for lines with `prompt_tokens`.
            params: Everything but `max_tokens`, for lines without parameters of their own.
            seed: Of prompts that are made up.

        Raises:
            ConfigError: The file can't be read or has no requests, or a line is not what it should
                be; the message says which and why.
        """
        name = str(path)
        writer = None if tokenizer is None else PromptWriter(tokenizer, *generators(seed, 1))
        requests = []
        for number, line in enumerate(_read_text(path).split("\n"), start=1):
            if line.strip():
                try:
                    requests.append(_parse_line(line, writer, params))
                except ValueError as error:
                    raise ConfigError(f"{name}, line {number}: {error}") from error
        if not requests:
            raise ConfigError(f"no requests in {name}")
        config = {"source": "trace", "path": name, "num_prompts": len(requests), "seed": seed}
        return cls(tuple(requests), config)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a trace that `from_trace` makes the same requests from, or nothing.

        Raises:
            ConfigError: The path can't be written.
            OSError: The disk is full or broken.
        """
        lines = [json.dumps(_to_row(request), allow_nan=False) for request in self.requests]
        write_text_atomically(path, "".join(f"{line}\n" for line in lines))


def _read_text(path: str | os.PathLike[str]) -> str:
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError(f"can't read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8") from error


def _parse_line(line: str, writer: PromptWriter | None, params: SamplingParams) -> WorkloadRequest:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"not JSON: {error}") from error
    if not isinstance(row, dict):
        raise ConfigError("not a JSON object")
    if unknown := sorted(row.keys() - _KEYS):
        raise ConfigError(f"unknown key {unknown[0]!r}; known: {', '.join(sorted(_KEYS))}")
    if "output_tokens" not in row:
        raise ConfigError("output_tokens is missing")
    options = row.get("params")
    if options is not None:
        params = _parse_params(options)
    return WorkloadRequest(
        _parse_prompt(row, writer),
        dataclasses.replace(params, max_tokens=row["output_tokens"]),
        row.get("arrival_s", 0.0),
        row.get("user"),
        row.get("priority", 0),
        row.get("group"),
    )


def _parse_prompt(row: dict[str, Any], writer: PromptWriter | None) -> str | tuple[int, ...]:
    if ("prompt" in row) == ("prompt_tokens" in row):
        raise ConfigError("needs either prompt or prompt_tokens")
    if "prompt" in row:
        prompt = row["prompt"]
        if isinstance(prompt, str):
            return prompt
        if not isinstance(prompt, list):
            raise ConfigError("prompt must be a text or a list of tokens")
        return tuple(prompt)
    count = row["prompt_tokens"]
    if type(count) is not int or count < 1:
        raise ConfigError(f"prompt_tokens must be a positive integer, not {count!r}")
    if writer is None:
        raise ConfigError("has prompt_tokens: a model is needed to make up a prompt")
    return writer.write(count)


def _parse_params(options: Any) -> SamplingParams:
    if not isinstance(options, dict) or not options.keys() <= _PARAMS - {"max_tokens"}:
        raise ConfigError("params must be an object of SamplingParams without max_tokens")
    if isinstance(bias := options.get("logit_bias"), dict):  # JSON's keys are texts
        options = {**options, "logit_bias": {int(token): value for token, value in bias.items()}}
    # The bound of min_tokens comes later, with the line's output_tokens.
    return SamplingParams(max_tokens=2**31 - 1, **options)


def _to_row(request: WorkloadRequest) -> dict[str, Any]:
    defaults = SamplingParams()
    options = {
        name: value
        for name in sorted(_PARAMS - {"max_tokens"})
        if (value := getattr(request.params, name)) != getattr(defaults, name)
    }
    row = {
        "arrival_s": request.arrival_s,
        "prompt": request.prompt,
        "output_tokens": request.params.max_tokens,
        "params": options,
        "user": request.user,
        "priority": request.priority,
        "group": request.group,
    }
    # `params` stays where it is empty: without it the reader's would be taken.
    return {key: value for key, value in row.items() if value is not None}
