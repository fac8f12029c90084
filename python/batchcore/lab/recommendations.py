"""What a run suggests for production; each with the figures that it rests on.

One whose figures are missing is left out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from batchcore.lab.answers_bound import decode_points, say_verdict
from batchcore.lab.answers_dynamic import SAME, change_of
from batchcore.lab.answers_lengths import best_strategy, sorted_slot
from batchcore.lab.answers_sizes import RECOMMENDED, ROWS, has_gpu, keep, measured_sizes
from batchcore.lab.paths import Figures, MissingFigureError, is_number
from batchcore.lab.wording import count, digits, listed, percent, points, rate, ratio, seconds, size

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["build_recommendations"]

LOADS = "parts.scheduler.loads"

_FULL = 1.0


def build_recommendations(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Recommend; the result is what a document has under `recommendations`."""
    makers: tuple[tuple[str, Callable[[Figures], str | None]], ...] = (
        ("Batch size", _batch_size),
        ("Static or dynamic", _static_or_dynamic),
        ("Requests of differing lengths", _lengths),
        ("When static is the better choice", _static),
        ("KV memory", _kv_memory),
        ("Latency and load", _load),
        ("Where more speed would come from", _bound),
        ("Before deciding on these figures", _caveats),
    )
    found = []
    for title, make in makers:
        figures = Figures(document)
        if text := figures.sentences(make):
            found.append({"title": title, "text": text, "figures": figures.used})
    return found


def _batch_size(figures: Figures) -> str:
    best = figures.number(RECOMMENDED)
    row = figures.find(ROWS, "batch_size", best)
    per_s = figures.number(f"{row}.output_tokens_per_s")

    def against_one(figures: Figures) -> str | None:
        one = measured_sizes(figures)[0]
        if one.batch_size != 1 or one.path == row:
            return None
        keep(figures, one)
        return f"One at a time it is {rate(one.tokens_per_s, 'output tokens/s')}."

    def latency(figures: Figures) -> str:
        return (
            f"With all slots taken the p95 latency is "
            f"{seconds(figures.number(f'{row}.p95_latency_s'))}; take a smaller one where that is "
            "too long."
        )

    return (
        f"Set `max_num_seqs={best:.0f}`: {rate(per_s, 'output tokens/s')}. "
        f"{figures.sentences(against_one, latency)}"
    ).strip()


def _static_or_dynamic(figures: Figures) -> str:
    changes = [change_of(figures, name) for name in ("throughput", "mean_latency")]
    verdicts = {change.verdict for change in changes}
    said = f"{listed([str(change) for change in changes])} of static batches"
    if verdicts == {"better"}:
        return f"Use continuous (dynamic) batching, which is the engine's default: {said}."
    doubt = "is worse in some respect here" if "worse" in verdicts else "is not clearly better here"
    return (
        "Use continuous (dynamic) batching, the engine's default, for requests that arrive over "
        f"time. For a pile of requests like that of part 5 it {doubt} ({said}): measure with yours."
    )


def _lengths(figures: Figures) -> str:
    def buckets(figures: Figures) -> str | None:
        none, best = best_strategy(figures)
        if best == none:
            return None
        before, after = (figures.number(f"{path}.waste_pct") for path in (none, best))
        return (
            "Where a program needs rectangles, bucket the prompts first: "
            f"`batchcore.bucketing.{figures.text(f'{best}.strategy')}` pads {points(after)}% "
            f"instead of {points(before)}%."
        )

    def slots(figures: Figures) -> str:
        waste = figures.number("parts.dynamic.slot_waste.static")
        kept = figures.number("parts.dynamic.slot_waste.continuous")
        return (
            "With this engine hand requests in as they come: prompts are packed without padding, "
            f"and slots that are refilled idle {percent(kept)} of their steps, those of static "
            f"batches {percent(waste)}."
        )

    text = figures.sentences(slots, buckets)
    if not text:
        raise MissingFigureError("parts.padding")
    return text


def _static(figures: Figures) -> str:
    path = sorted_slot(figures)
    name = figures.text(f"{path}.strategy")
    static = figures.number(f"{path}.output_tokens_per_s")
    continuous = figures.positive("parts.padding.continuous.output_tokens_per_s")
    share = (
        f"({name}: {digits(static)} against {rate(continuous, 'output tokens/s')}, "
        f"{percent(static / continuous)})"
    )
    if SAME * static >= continuous:
        return (
            "For offline jobs whose output lengths are known and all of whose requests are there, "
            f"static batches of similar outputs lose nothing {share}."
        )
    return (
        "Only for offline jobs that need every batch to start and end as one: even batches of "
        f"similar outputs stay behind continuous batching here {share}."
    )


def _kv_memory(figures: Figures) -> str:
    best = figures.positive(RECOMMENDED)
    row = figures.find(ROWS, "batch_size", best)
    kv = figures.number(f"{row}.kv_bytes")

    def whole(figures: Figures) -> str:
        total = figures.positive(f"{row}.memory_bytes")
        return f"All memory in use is then {size(total)}, {percent(kv / total)} of it KV."

    return (
        f"Plan {size(kv)} of KV cells for batch size {best:.0f}, {size(kv / best)} for each "
        f"sequence of the lengths that were measured; longer contexts take more. "
        f"{figures.sentences(whole)}"
    ).strip()


def _load(figures: Figures) -> str:
    fractions = {
        index: figures.peek(f"{LOADS}[{index}].capacity_fraction")
        for index in range(figures.length(LOADS))
    }
    order = sorted(
        (index for index, value in fractions.items() if is_number(value)),
        key=lambda index: fractions[index],
    )
    if not order:
        raise MissingFigureError(LOADS)
    capacity = figures.number("parts.scheduler.capacity_requests_per_s")
    parts = []
    for index in order:
        fraction = figures.number(f"{LOADS}[{index}].capacity_fraction")
        p95_s = figures.number(f"{LOADS}[{index}].summary.p95_ttft_ms") / 1e3
        parts.append(f"{seconds(p95_s)} at {100 * fraction:.0f}%")
    below = [index for index in order if fractions[index] < _FULL]
    advice = (
        f"Keep arrivals below {100 * fractions[below[-1]]:.0f}% of it"
        if below
        else "Keep arrivals well below it"
    )
    return (
        f"The capacity is {rate(capacity, 'requests/s')} for requests like those measured. "
        f"{advice} and bound the queue: the p95 time to the first token is {', '.join(parts)}."
    )


def _bound(figures: Figures) -> str:
    best = figures.number(RECOMMENDED)
    if has_gpu(figures):
        raise MissingFigureError("roofline")  # the peaks are those of the CPU
    decode = decode_points(figures)
    path = next((one for one in decode if figures.peek(f"{one}.rows") == best), None)
    if path is None:
        raise MissingFigureError("roofline.points")
    rows = figures.number(f"{path}.rows")
    verdict = say_verdict(figures, path)
    memory, compute = (figures.number(f"{path}.{roof}_fraction") for roof in ("memory", "compute"))
    advice = {
        "memory-bound": (
            "a smaller quantisation or faster memory helps, more cores hardly do; a larger batch "
            "is nearly free"
        ),
        "compute-bound": (
            "more or faster cores, or a quantisation with faster kernels help; a larger batch "
            "only makes each request slower"
        ),
    }.get(
        verdict, "look at threads, small kernels and sampling first: neither memory nor cores limit"
    )
    return (
        f"With {count(rows, 'row')} a step is {verdict} ({percent(memory)} of the memory peak, "
        f"{percent(compute)} of the compute peak): {advice}."
    )


def _caveats(figures: Figures) -> str | None:
    def quick(figures: Figures) -> str | None:
        if figures.peek("config.quick") is not True:
            return None
        figures.need("config.quick")
        return "This was a quick run: measure again without `--quick`."

    def interrupted(figures: Figures) -> str | None:
        if figures.peek("interrupted") is not True:
            return None
        figures.need("interrupted")
        return "It was interrupted: what is missing here may change the picture."

    def busy(figures: Figures) -> str | None:
        load = figures.number("environment.load_average_1min")
        cores = figures.number("environment.num_usable_cores")
        if load < cores / 2:
            return None
        return (
            f"The machine was not quiet when it began (load {digits(load)} on {cores:.0f} usable "
            "cores)."
        )

    def repeats(figures: Figures) -> str:
        gain = [figures.number(f"parts.static.speedup.{end}") for end in ("low", "high")]
        return (
            f"From one repeat to another the speed-up of static batches was {ratio(gain[0])} to "
            f"{ratio(gain[1])}: read smaller differences than that as none."
        )

    return figures.sentences(quick, interrupted, busy, repeats)
