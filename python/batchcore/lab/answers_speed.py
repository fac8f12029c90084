"""Questions 1 to 4: what batching brings over one request at a time, and why it is not more."""

from __future__ import annotations

from typing import TYPE_CHECKING

from batchcore.lab.answers_bound import POINTS, RIDGE, decode_points
from batchcore.lab.answers_sizes import ROWS
from batchcore.lab.paths import MissingFigureError
from batchcore.lab.wording import count, digits, percent, rate, ratio, seconds, span

if TYPE_CHECKING:
    from batchcore.lab.paths import Figures

__all__ = ["speedup", "throughput", "total_time", "why_not_ideal"]

SEQUENTIAL = "parts.sequential.median"
STATIC = "parts.static.median"

_NEARLY = 0.9


def total_time(figures: Figures) -> tuple[str, str]:
    """Question 1."""
    total_s = figures.positive(f"{SEQUENTIAL}.total_s")
    requests = figures.positive(f"{SEQUENTIAL}.num_requests")

    def spread(figures: Figures) -> str:
        totals = figures.column("parts.sequential.runs", "total_s")
        ends = span((seconds(min(totals)), seconds(max(totals))))
        return f"{count(len(totals), 'run')} took {ends}; the median counts."

    def alone(figures: Figures) -> str:
        single_s = figures.positive("parts.sequential.single_s")
        return (
            f"One request alone took {seconds(single_s)}, and {requests:.0f} times that is "
            f"{seconds(requests * single_s)}, {ratio(requests * single_s / total_s)} of the total: "
            "each request waits until the one before it has ended, so the times add up."
        )

    return (
        f"{count(requests, 'request')} one after another took {seconds(total_s)}.",
        figures.sentences(spread, alone),
    )


def throughput(figures: Figures) -> tuple[str, str]:
    """Question 2."""
    total_s = figures.number(f"{SEQUENTIAL}.total_s")
    tokens = figures.number(f"{SEQUENTIAL}.num_output_tokens")
    per_s = figures.number(f"{SEQUENTIAL}.output_tokens_per_s")

    def with_prompts(figures: Figures) -> str:
        prompt_tokens = figures.number(f"{SEQUENTIAL}.num_prompt_tokens")
        all_per_s = figures.number(f"{SEQUENTIAL}.total_tokens_per_s")
        return (
            f"With the {count(prompt_tokens, 'prompt token')} counted too it is {rate(all_per_s)}; "
            "these are computed many at a time, and so cost less each."
        )

    return (
        f"{rate(per_s, 'output tokens/s')}: {count(tokens, 'output token')} in {seconds(total_s)}.",
        figures.sentences(with_prompts),
    )


def speedup(figures: Figures) -> tuple[str, str]:
    """Question 3."""
    gain = figures.number("parts.static.speedup.median")
    batch = figures.number("parts.static.batch_size")
    rates = [figures.number(f"{run}.output_tokens_per_s") for run in (SEQUENTIAL, STATIC)]

    def spread(figures: Figures) -> str:
        ends = [figures.number(f"parts.static.speedup.{end}") for end in ("low", "high")]
        clear = "" if ends[0] > 1 or ends[1] < 1 else ", which does not exclude that there is none"
        return (
            "It is the median of what each repeat gave for itself, which was "
            f"{span([ratio(end) for end in ends])}{clear}."
        )

    verb = "makes them" if gain > 1 else "brings nothing here, it makes them"
    return (
        f"Batching the {batch:.0f} requests {verb} {ratio(gain)} as fast: "
        f"{rate(rates[1], 'output tokens/s')} against {digits(rates[0])}.",
        figures.sentences(spread),
    )


def why_not_ideal(figures: Figures) -> tuple[str, str]:
    """Question 4."""
    gain = figures.number("parts.static.speedup.median")
    ideal = figures.positive("parts.static.parallel_ideal")
    batch = round(figures.positive("parts.static.batch_size"))
    share = f"{ratio(gain)} is {percent(gain / ideal)} of the ideal {ideal:.0f}x"

    def by_points(figures: Figures) -> str:
        one, many = (
            figures.positive(f"{_decode_point(figures, rows)}.seconds_per_step")
            for rows in (1, batch)
        )
        return _step_cost(batch, one, many, "a decode step")

    def by_sizes(figures: Figures) -> str:
        one, many = (
            rows / figures.positive(f"{figures.find(ROWS, 'batch_size', rows)}.output_tokens_per_s")
            for rows in (1, batch)
        )
        return _step_cost(batch, one, many, "a step (with its part of the prompts)")

    cause = figures.first(by_points, by_sizes)
    rest = figures.sentences(_prompt_share, _idle_slots, lambda figures: _ridge(figures, batch))
    if not cause and not rest:
        raise MissingFigureError(ROWS)
    answer = f"It nearly is: {share}." if gain >= _NEARLY * ideal else f"{share}."
    return f"{answer} {cause}".strip(), rest


def _decode_point(figures: Figures, rows: int) -> str:
    for path in decode_points(figures):
        if figures.peek(f"{path}.rows") == rows:
            return path
    raise MissingFigureError(POINTS)


def _step_cost(batch: int, one_s: float, many_s: float, what: str) -> str:
    return (
        f"With {count(batch, 'row')} {what} takes {seconds(many_s)}, {ratio(many_s / one_s)} the "
        f"{seconds(one_s)} of one with 1 row, since only reading the weights is shared and every "
        f"row has its own arithmetic: that allows {batch} / {many_s / one_s:.2f} = "
        f"{ratio(batch * one_s / many_s)}."
    )


def _prompt_share(figures: Figures) -> str | None:
    if figures.peek("parts.static.batch_size") != figures.peek(f"{STATIC}.num_requests"):
        return None  # later batches wait, and their first tokens say nothing of prompts
    first_s = figures.number(f"{STATIC}.ttft_s.p95")
    total_s = figures.positive(f"{STATIC}.total_s")
    return (
        f"Prompts: {seconds(first_s)} of the {seconds(total_s)} ({percent(first_s / total_s)}) had "
        "passed when 95% of the requests had their first token; a prompt alone has many rows "
        "already, so batching speeds that up little."
    )


def _idle_slots(figures: Figures) -> str | None:
    tokens = figures.number(f"{STATIC}.num_output_tokens")
    requests = figures.number(f"{STATIC}.num_requests")
    each = figures.number("config.max_tokens")
    if tokens != requests * each:
        return None
    return (
        f"Idle slots: none, since all {count(requests, 'output')} have {count(each, 'token')} "
        f"({tokens:,.0f} in all)."
    )


def _ridge(figures: Figures, batch: int) -> str:
    one, many = (
        figures.number(f"{_decode_point(figures, rows)}.intensity_flops_per_byte")
        for rows in (1, batch)
    )
    ridge = figures.number(RIDGE)
    if many >= ridge:
        end = "above it steps don't wait for the weights, and further rows are not free"
    else:
        end = "below it steps wait for the weights, and what is lost beyond that is overhead"
    return (
        f"Roofline: {digits(one)} operations per byte with 1 row, {digits(many)} with {batch}, and "
        f"the ridge point of this machine is {digits(ridge)}; {end}."
    )
