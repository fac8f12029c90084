"""Answers and recommendations of the lab: from the figures of a document, and from nothing else."""

from __future__ import annotations

import copy
import itertools
import json
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
from batchcore.lab import wording
from batchcore.lab.answers import build_answers
from batchcore.lab.overview import build_facts, build_key_figures, build_state
from batchcore.lab.recommendations import build_recommendations
from batchcore.lab.sections import build_sections

sample_document = runpy.run_path(str(Path(__file__).with_name("lab_document.py")))[
    "sample_document"
]


@pytest.fixture(scope="module")
def sample() -> dict[str, Any]:
    return sample_document()


@pytest.fixture
def document(sample) -> dict[str, Any]:
    """One to change."""
    return copy.deepcopy(sample)


def steps(path: str) -> list[str | int]:
    """`a.b[3].c` as keys and indices."""
    return [name or int(index) for name, index in re.findall(r"([^.\[\]]+)|\[([0-9]+)\]", path)]


def at(document, path: str):
    for step in steps(path):
        document = document[step]
    return document


def put(document, path: str, value) -> None:
    *parents, last = steps(path)
    for step in parents:
        document = document[step]
    document[last] = value


def answer(document, number: int) -> dict[str, Any]:
    return build_answers(document)[number - 1]


def recommendation(document, title: str) -> str:
    return {one["title"]: one["text"] for one in build_recommendations(document)}.get(title, "")


# -- all of them ----------------------------------------------------------------------------------


def test_the_sample_answers_every_question(sample):
    answers = build_answers(sample)
    assert [one["number"] for one in answers] == list(range(1, 13))
    assert all(one["answered"] for one in answers)
    assert all(one["answer"] and one["question"] and one["reasoning"] for one in answers)
    assert all(set(one) == KEYS for one in answers)


KEYS = {"number", "question", "answer", "figures", "reasoning", "answered"}


def test_the_document_is_left_as_it_was(sample):
    before = copy.deepcopy(sample)
    build_answers(sample)
    build_recommendations(sample)
    assert sample == before


@pytest.mark.parametrize("build", [build_answers, build_recommendations])
def test_every_figure_is_in_the_document_at_its_path(sample, build):
    for one in build(sample):
        assert one["figures"]
        for path, value in one["figures"].items():
            assert at(sample, path) == value


def other(value):
    """Something else of the same type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, str):
        return f"other {value}"
    if isinstance(value, list):
        return [other(one) for one in value]
    return 3 * value + 1


@pytest.mark.parametrize(
    ("build", "names"),
    [(build_answers, ("answer", "reasoning")), (build_recommendations, ("text",))],
)
def test_every_figure_shows_in_the_words(sample, build, names):
    for index, one in enumerate(build(sample)):
        for path in one["figures"]:
            changed = copy.deepcopy(sample)
            put(changed, path, other(at(sample, path)))
            now = build(changed)[index : index + 1] or [dict.fromkeys(names, "")]
            assert any(now[0][name] != one[name] for name in names), path


@pytest.mark.parametrize(
    ("build", "names"),
    [(build_answers, ("answer", "reasoning")), (build_recommendations, ("text",))],
)
def test_the_words_rest_on_nothing_but_the_figures(sample, build, names):
    """All else is changed, by so little that no other row becomes the best or the largest."""
    for index, one in enumerate(build(sample)):
        changed = copy.deepcopy(sample)
        for path, value in leaves(sample):
            in_a_list = re.sub(r"\[[0-9]+\]$", "", path)
            if isinstance(value, float) and not {path, in_a_list} & one["figures"].keys():
                put(changed, path, value * 1.01)
        now = build(changed)[index]
        assert [now[name] for name in names] == [one[name] for name in names]


def leaves(value, path: str = "", limit: int | None = None):
    """Paths and values of all that is not a container; of lists only the first few."""
    if isinstance(value, dict):
        for name, one in value.items():
            yield from leaves(one, f"{path}.{name}" if path else name, limit)
    elif isinstance(value, list) and value:
        for index, one in enumerate(value[:limit]):
            yield from leaves(one, f"{path}[{index}]", limit)
    else:
        yield path, value


def test_no_value_of_any_kind_breaks_it(sample):
    """A document may be of another version, or half of one."""
    values = itertools.cycle([None, "x", -1, 0, [], {}, True, 1e300])
    for (path, _), value in zip(leaves(sample, limit=1), values, strict=False):
        changed = copy.copy(sample)
        head = steps(path)[0]
        changed[head] = copy.deepcopy(sample[head])
        put(changed, path, value)
        everything = (
            build_answers(changed),
            build_recommendations(changed),
            build_state(changed),
            build_facts(changed),
            build_key_figures(changed),
        )
        json.dumps(everything, allow_nan=False)
        build_sections(changed)


@pytest.mark.parametrize("value", [None, {}, [], "x"])
@pytest.mark.parametrize("name", ["parts", "monitor", "roofline", "environment", "model", "config"])
def test_no_missing_section_breaks_it(document, name, value):
    document[name] = value
    build_answers(document)
    build_recommendations(document)
    build_sections(document)
    build_facts(document)
    build_state(document)


# -- what is missing ------------------------------------------------------------------------------


def test_an_empty_document_answers_nothing():
    answers = build_answers({"schema": 1})
    assert not any(one["answered"] or one["figures"] or one["reasoning"] for one in answers)
    assert answers[0]["answer"] == (
        "Not answered. Part 1: One request at a time is not part of this run."
    )
    assert build_recommendations({"schema": 1}) == []


@pytest.mark.parametrize(
    ("part", "numbers"),
    [
        ("sequential", {1, 2, 3}),
        ("static", {3, 4}),
        ("batch_sizes", {6, 7, 8}),
        ("padding", {9, 10}),
        ("dynamic", {11, 12}),
        ("scheduler", set()),
    ],
)
def test_a_part_that_was_not_run_leaves_its_questions_open(document, part, numbers):
    document["parts"][part] = None
    document["interrupted"] = True
    answers = build_answers(document)
    assert {one["number"] for one in answers if not one["answered"]} == numbers
    for one in answers:
        if not one["answered"]:
            assert one["answer"].startswith("Not answered. Part ")
            assert one["answer"].endswith("is not part of this run (it was interrupted).")


def test_a_missing_figure_is_named(document):
    document["parts"]["sequential"]["median"]["total_s"] = None
    assert answer(document, 1)["answer"] == (
        "Not answered. This run has no figure `parts.sequential.median.total_s`."
    )


# -- single questions -----------------------------------------------------------------------------


def test_total_time_and_throughput(document):
    document["parts"]["sequential"].update(
        runs=[{"total_s": 10.0}, {"total_s": 12.5}],
        single_s=1.5,
        median={
            "total_s": 12.5,
            "num_requests": 8,
            "num_output_tokens": 800,
            "output_tokens_per_s": 64.0,
        },
    )
    assert answer(document, 1)["answer"] == "8 requests one after another took 12.5 s."
    assert "2 runs took 10.0 s to 12.5 s" in answer(document, 1)["reasoning"]
    assert "8 times that is 12.0 s, 0.96x of the total" in answer(document, 1)["reasoning"]
    assert answer(document, 2)["answer"] == "64.0 output tokens/s: 800 output tokens in 12.5 s."
    assert answer(document, 2)["reasoning"] == ""


def test_a_speedup_of_less_than_one_is_called_so(document):
    document["parts"]["static"]["speedup"].update(median=0.9, low=0.8, high=1.1)
    found = answer(document, 3)
    assert "brings nothing here, it makes them 0.90x as fast" in found["answer"]
    assert "does not exclude that there is none" in found["reasoning"]


def test_why_not_ideal_by_the_steps_of_the_roofline(document):
    document["roofline"]["points"] = [
        {"rows": 1, "outputs": 1, "seconds_per_step": 0.010, "intensity_flops_per_byte": 2.0},
        {"rows": 8, "outputs": 1, "seconds_per_step": 9.0, "intensity_flops_per_byte": 9.0},
        {"rows": 8, "outputs": 8, "seconds_per_step": 0.020, "intensity_flops_per_byte": 16.0},
    ]
    document["parts"]["static"]["speedup"]["median"] = 3.2
    found = answer(document, 4)
    assert found["answer"].startswith("3.20x is 40.0% of the ideal 8x. With 8 rows a decode step ")
    assert "2.00x the 10.0 ms of one with 1 row" in found["answer"]
    assert found["answer"].endswith("that allows 8 / 2.00 = 4.00x.")
    assert "2.00 operations per byte with 1 row, 16.0 with 8" in found["reasoning"]


def test_why_not_ideal_by_batch_sizes_where_there_is_no_roofline(document):
    document["roofline"] = None
    rows = document["parts"]["batch_sizes"]["rows"]
    rows[0]["output_tokens_per_s"], rows[3]["output_tokens_per_s"] = 50.0, 200.0
    found = answer(document, 4)
    assert "takes 40.0 ms, 2.00x the 20.0 ms of one with 1 row" in found["answer"]
    assert "Roofline" not in found["reasoning"]


def test_outputs_of_differing_lengths_are_not_said_to_leave_no_slot_idle(document):
    assert "Idle slots: none" in answer(document, 4)["reasoning"]
    document["parts"]["static"]["median"]["num_output_tokens"] -= 1
    assert "Idle slots" not in answer(document, 4)["reasoning"]


def test_what_bounds_the_cpu(document):
    found = answer(document, 5)
    assert found["answer"].startswith("No GPU is used in this run. The CPU is, by its roofline, ")
    assert "memory-bound with 1 row (76.6% of the memory peak" in found["answer"]
    assert "A prefill is compute-bound with 256 rows" in found["reasoning"]


def test_a_roofline_that_is_not_known_says_why(document):
    document["roofline"] = {"peaks": None, "points": [], "verdict": "not known: no peaks"}
    assert answer(document, 5)["answer"] == "Not answered. The roofline is not known: no peaks."


def test_what_bounds_a_gpu(document):
    document["environment"]["devices"].append({"name": "CUDA0", "type": "gpu"})
    document["parts"]["static"]["utilisation"]["gpu_utilisation_percent"] = 91.0
    rows = document["parts"]["batch_sizes"]["rows"]
    rows[0]["output_tokens_per_s"], rows[1]["output_tokens_per_s"] = 100.0, 190.0
    found = answer(document, 5)
    assert found["answer"].startswith("The GPU is memory-bound with few rows: from batch size 1 to")
    assert "95.0% of linear" in found["answer"]
    assert found["reasoning"] == "The GPU had work 91.0% of the time."
    assert not any(path.startswith("roofline") for path in found["figures"])
    rows[1]["output_tokens_per_s"] = 120.0
    assert "The GPU is not memory-bound alone" in answer(document, 5)["answer"]


def sizes(document, *rates: tuple[int, float]) -> None:
    document["parts"]["batch_sizes"]["rows"] = [
        {"batch_size": size, "fits": True, "output_tokens_per_s": per_s} for size, per_s in rates
    ]


def test_efficiency_by_batch_size(document):
    # Steps of 5 ms and 5 ms per row: B / (5 ms + 5 ms x B).
    sizes(document, (1, 100.0), (2, 2 / 0.015), (4, 4 / 0.025), (8, 8 / 0.045))
    found = answer(document, 7)
    assert found["answer"] == (
        "No: with 8 sequences throughput is 1.78x that of one, 22.2% of linear; the efficiency "
        "falls under 50% at batch size 4."
    )
    assert "66.7% with 2, 40.0% with 4, 22.2% with 8" in found["reasoning"]
    assert "about 5.00 ms + B x 5.00 ms" in found["reasoning"]
    assert "towards 200 output tokens/s" in found["reasoning"]


def test_efficiency_that_stays_high(document):
    sizes(document, (1, 100.0), (2, 198.0))
    assert answer(document, 7)["answer"] == (
        "Nearly: with 2 sequences throughput is 1.98x that of one, 99.0% of linear, and the "
        "efficiency stays above 50% for all that were measured."
    )


def test_linearity_needs_a_batch_size_of_one(document):
    sizes(document, (2, 100.0), (4, 198.0))
    assert not answer(document, 7)["answered"]


def test_a_batch_size_that_does_not_fit_is_the_limit(document):
    rows = document["parts"]["batch_sizes"]["rows"]
    rows[-1].update(fits=False, output_tokens_per_s=None, note="needs 9 GB, and 6 GB are free")
    found = answer(document, 8)
    assert found["answer"] == ("Memory: 32 does not fit, 16 does: needs 9 GB, and 6 GB are free.")
    assert "from 9.00 MiB with 1 to 144 MiB with 16" in found["reasoning"]


def test_the_limit_where_all_fit(document):
    found = answer(document, 8)
    assert "all up to 32 fit" in found["answer"]
    assert "KV memory grows by 9.00 MiB with each sequence" in found["reasoning"]
    assert "the KV cells of about 841 more" in found["reasoning"]


def test_padding_by_the_formula_and_as_counted(document):
    part = document["parts"]["padding"]
    part["lab_formula_waste_pct"], part["lengths"] = 39.4, [12, 40, 7, 100]
    part["slot"][0]["counted"]["waste"] = 0.25
    found = answer(document, 9)
    assert found["answer"].startswith("39.4% by the lab's formula, ")
    assert found["answer"].endswith("in order of arrival, 25.0% of the slot steps were idle.")
    assert found["reasoning"].startswith("The 4 prompts have 7 to 100 tokens.")


def test_what_bucketing_saves(document):
    document["parts"]["padding"]["prompt_strategies"] = [
        {"strategy": "none", "waste_pct": 40.0, "num_batches": 1, "saved_pct_points": 0.0},
        {"strategy": "optimal", "waste_pct": 10.0, "num_batches": 3, "saved_pct_points": 30.0},
    ]
    assert answer(document, 10)["answer"] == (
        "By 30.0 percentage points, 75.0% of it: `optimal` takes prompt padding from 40.0% to "
        "10.0%, in 3 rectangles."
    )


def test_bucketing_that_saves_nothing(document):
    document["parts"]["padding"]["prompt_strategies"] = [
        {"strategy": "none", "waste_pct": 5.0},
        {"strategy": "optimal", "waste_pct": 6.0},
    ]
    assert answer(document, 10)["answer"].startswith("Not at all: 5.0% ")


def test_a_count_that_differs_from_the_formula_is_told(document):
    assert "counted is what the formula gives" in answer(document, 10)["reasoning"]
    document["parts"]["padding"]["slot"][1]["agree"] = False
    assert "not what the formula gives in every case" in answer(document, 10)["reasoning"]


def change(document, name: str, median: float, low: float, high: float) -> None:
    """Continuous over static."""
    document["parts"]["dynamic"]["improvement"][name] = {"median": median, "low": low, "high": high}


BETTER, UNCLEAR, WORSE = (0.8, 0.7, 0.9), (0.9, 0.8, 1.1), (1.2, 1.1, 1.3)


@pytest.mark.parametrize(
    ("mean", "p95", "start"),
    [
        (BETTER, BETTER, "Because a request takes a slot as soon as another one ends"),
        (BETTER, WORSE, "In this run only the mean latency is better, the p95 is not"),
        (WORSE, BETTER, "In this run only the p95 latency is better, the mean is not"),
        (WORSE, WORSE, "In this run it does not"),
        (UNCLEAR, BETTER, "This run does not show that it does"),
        (WORSE, UNCLEAR, "This run does not show that it does"),
    ],
)
def test_latency_of_dynamic_batching(document, mean, p95, start):
    change(document, "mean_latency", *mean)
    change(document, "p95_latency", *p95)
    found = answer(document, 11)
    assert found["answer"].startswith(start)
    assert f"mean latency {mean[0]:.2f}x ({mean[1]:.2f}x to {mean[2]:.2f}x)" in found["answer"]
    explains = "prompts which come in between delay" in found["reasoning"]
    assert explains == ((mean, p95) != (BETTER, BETTER))


def test_latency_without_pairs_is_that_of_the_median_runs(document):
    dynamic = document["parts"]["dynamic"]
    dynamic["improvement"] = None
    dynamic["static"]["latency_s"].update(mean=4.0, p95=5.0)
    dynamic["continuous"]["latency_s"].update(mean=3.0, p95=6.0)
    assert answer(document, 11)["answer"] == (
        "In this run only the mean latency is better, the p95 is not: mean latency 0.75x and p95 "
        "latency 1.20x of that of static batches."
    )


def test_idle_slots_explain_the_latency(document):
    document["parts"]["dynamic"]["slot_waste"] = {"static": 0.04, "continuous": 0.03}
    assert "were 4.0% static and 3.0% continuous" in answer(document, 11)["reasoning"]


def test_static_is_preferable_where_it_loses_nothing(document):
    change(document, "throughput", 1.02, 0.95, 1.10)
    found = answer(document, 12)["answer"]
    assert found.startswith("For work like that of this run: continuous batching has, of that of ")
    assert "throughput 1.02x (0.95x to 1.10x), on which the repeats don't agree" in found
    change(document, "throughput", 1.5, 1.4, 1.6)
    found = answer(document, 12)["answer"]
    assert found.startswith("When all requests are there at once")
    assert found.endswith("throughput 1.50x (1.40x to 1.60x).")


# -- recommendations ------------------------------------------------------------------------------


def test_recommendations_of_the_sample(sample):
    found = build_recommendations(sample)
    assert [one["title"] for one in found] == [
        "Batch size",
        "Static or dynamic",
        "Requests of differing lengths",
        "When static is the better choice",
        "KV memory",
        "Latency and load",
        "Where more speed would come from",
        "Before deciding on these figures",
    ]
    assert recommendation(sample, "Batch size").startswith("Set `max_num_seqs=16`: 222 output")


def test_dynamic_is_recommended_as_far_as_it_is_better(document):
    title = "Static or dynamic"
    change(document, "throughput", 1.2, 1.1, 1.3)
    change(document, "mean_latency", *BETTER)
    assert recommendation(document, title).startswith("Use continuous (dynamic) batching, which")
    change(document, "mean_latency", *UNCLEAR)
    assert "it is not clearly better here" in recommendation(document, title)
    change(document, "mean_latency", *WORSE)
    assert "it is worse in some respect here" in recommendation(document, title)


def test_static_is_recommended_by_its_throughput(document):
    title = "When static is the better choice"
    assert "lose nothing" in recommendation(document, title)
    document["parts"]["padding"]["continuous"]["output_tokens_per_s"] = 500.0
    assert "stay behind continuous batching" in recommendation(document, title)


@pytest.mark.parametrize(
    ("verdict", "advice"),
    [
        ("memory-bound", "a smaller quantisation or faster memory"),
        ("compute-bound", "more or faster cores"),
        ("neither (overhead)", "look at threads"),
    ],
)
def test_advice_by_the_roofline(document, verdict, advice):
    document["roofline"]["points"][4]["verdict"] = verdict
    assert advice in recommendation(document, "Where more speed would come from")


def test_a_quick_interrupted_busy_run_comes_with_caveats(document):
    document["interrupted"] = document["config"]["quick"] = True
    document["environment"]["load_average_1min"] = 3.0
    text = recommendation(document, "Before deciding on these figures")
    assert "quick run" in text
    assert "interrupted" in text
    assert "load 3.00 on 2 usable cores" in text


def test_loads_are_read_in_the_order_of_their_rate(document):
    document["parts"]["scheduler"]["loads"].reverse()
    text = recommendation(document, "Latency and load")
    assert "Keep arrivals below 80% of it" in text
    assert text.index("at 50%") < text.index("at 80%") < text.index("at 110%")


# -- words ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 ms"),
        (0.0000123, "0.0123 ms"),
        (0.085, "85.0 ms"),
        (0.9996, "1.00 s"),
        (1.234, "1.23 s"),
        (9.996, "10.0 s"),
        (123.4, "123 s"),
        (12345, "12,345 s"),
        (-2.5, "-2.50 s"),
    ],
)
def test_seconds(value, text):
    assert wording.seconds(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.50 KiB"), (5 << 30, "5.00 GiB")],
)
def test_size(value, text):
    assert wording.size(value) == text


def test_other_words():
    assert wording.count(1, "row") == "1 row"
    assert wording.count(1200, "row") == "1,200 rows"
    assert wording.percent(0.358) == "35.8%"
    assert wording.span(["1.00x", "1.00x"]) == "1.00x"
    assert wording.listed(["a"]) == "a"
    assert wording.listed(["a", "b", "c"]) == "a, b and c"
