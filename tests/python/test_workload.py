"""Workloads: what is drawn, that prompts have exactly so many tokens, and traces in files."""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import sys
from itertools import pairwise

import batchcore as bc
import numpy as np
import pytest
from batchcore.bench import Distribution, Workload, WorkloadRequest, arrival_times
from batchcore.bench.arrivals import PromptWriter
from batchcore.errors import ConfigError, InvalidRequestError
from hypothesis import given, settings
from hypothesis import strategies as st


def draw(text, n=1000, seed=0):
    return Distribution.parse(text).sample(np.random.default_rng(seed), n)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("fixed:128", Distribution("fixed", 128, 128)),
        ("128", Distribution("fixed", 128, 128)),
        (128, Distribution("fixed", 128, 128)),
        ("uniform:20:800", Distribution("uniform", 20, 800)),
        ("loguniform:20:800", Distribution("loguniform", 20, 800)),
        ("lognormal:300:0.8", Distribution("lognormal", 1, 2**31 - 1, 300.0, 0.8)),
        ("lognormal:300:0.8:20", Distribution("lognormal", 20, 2**31 - 1, 300.0, 0.8)),
        ("lognormal:300:0.8:20:2000", Distribution("lognormal", 20, 2000, 300.0, 0.8)),
    ],
)
def test_distributions_are_read(text, expected):
    assert Distribution.parse(text) == expected
    assert Distribution.parse(str(expected)) == expected
    assert Distribution.parse(expected) is expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must be one of: fixed:TOKENS, uniform"),
        ("normal:3:4", "unknown distribution 'normal:3:4'"),
        ("fixed", "not of the form fixed:TOKENS"),
        ("fixed:1:2", "not of the form fixed:TOKENS"),
        ("fixed:0", "needs 1 <= MIN <= MAX"),
        ("fixed:1.5", "not of the form"),
        ("uniform:20", "not of the form uniform:MIN:MAX"),
        ("uniform:20:10", "not 20 and 10"),
        ("uniform:1:99999999999", "needs 1 <= MIN <= MAX"),
        ("lognormal:300", r"not of the form lognormal:MEDIAN:SIGMA\[:MIN\[:MAX\]\]"),
        ("lognormal:300:1:2:3:4", "not of the form"),
        ("lognormal:0:1", "needs a median of 1 to"),
        ("lognormal:nan:1", "needs a median of 1 to"),
        ("lognormal:300:-1", "needs a sigma of 0 to 20"),
        ("lognormal:300:inf", "needs a sigma of 0 to 20"),
        ("-5", "unknown distribution"),
    ],
)
def test_other_texts_are_refused(text, message):
    with pytest.raises(ConfigError, match=message):
        Distribution.parse(text)


@given(
    st.sampled_from(["uniform:{}:{}", "loguniform:{}:{}", "lognormal:50:2.5:{}:{}"]),
    st.integers(1, 3000),
    st.integers(0, 3000),
    st.integers(0, 2**32),
)
def test_samples_stay_in_their_range_and_repeat(form, low, width, seed):
    text = form.format(low, low + width)
    drawn = draw(text, 50, seed)
    assert len(drawn) == 50
    assert all(type(value) is int and low <= value <= low + width for value in drawn)
    assert drawn == draw(text, 50, seed)


def test_samples_have_the_shape_that_the_name_says():
    assert draw("fixed:7", 3) == [7, 7, 7]
    assert set(draw("uniform:1:4")) == set(draw("loguniform:1:4")) == {1, 2, 3, 4}
    # The middle of uniform:10:1000 is 505; of loguniform it is the root of 10 * 1000.
    assert 470 < statistics.median(draw("uniform:10:1000")) < 540
    assert 85 < statistics.median(draw("loguniform:10:1000")) < 115
    drawn = draw("lognormal:300:0.5")
    assert 285 < statistics.median(drawn) < 315
    assert 0.47 < statistics.stdev(math.log(value) for value in drawn) < 0.53
    assert draw("lognormal:300:0", 2) == [300, 300]


def test_arrivals():
    def times(n=4000, seed=0, **options):
        return arrival_times(np.random.default_rng(seed), n, **options)

    assert times(3) == [0.0, 0.0, 0.0]
    assert times(0, request_rate=2.0) == []
    assert times(1, request_rate=2.0) == [0.0]
    for burstiness in (0.5, 1.0, 4.0):
        gaps = [b - a for a, b in pairwise(times(request_rate=2.0, burstiness=burstiness))]
        assert min(gaps) >= 0
        assert statistics.mean(gaps) == pytest.approx(0.5, rel=0.05)
        # A gamma distribution with this shape: 1 over the square of the relative deviation.
        shape = (statistics.mean(gaps) / statistics.stdev(gaps)) ** 2
        assert shape == pytest.approx(burstiness, rel=0.1)
    assert times(5, request_rate=2.0) == times(5, request_rate=2.0)
    assert times(5, request_rate=2.0) != times(5, request_rate=2.0, seed=1)
    for bad in ({"request_rate": 0.0}, {"request_rate": math.nan}, {"burstiness": 0.0}):
        with pytest.raises(ConfigError, match=next(iter(bad))):
            times(3, **bad)


def generate(tokenizer=1000, **options):
    return Workload.generate(
        tokenizer,
        **{
            "num_prompts": 40,
            "prompt_tokens": "uniform:5:30",
            "output_tokens": "uniform:1:9",
            **options,
        },
    )


def test_generated_for_a_simulation():
    workload = generate(request_rate=10.0, seed=3)
    assert len(workload) == 40
    assert workload == generate(request_rate=10.0, seed=3)
    assert workload != generate(request_rate=10.0, seed=4)
    assert workload.duration_s == workload.requests[-1].arrival_s > 0
    for request in workload:
        assert 5 <= len(request.prompt) <= 30
        assert all(0 <= token < 1000 for token in request.prompt)
        assert 1 <= request.params.max_tokens <= 9
        assert request.params.ignore_eos
        assert request.params.temperature == 0
        assert request.group is None
    assert len({request.prompt[0] for request in workload}) == 40
    json.dumps(workload.config)
    assert workload.config["prompt_tokens"] == "uniform:5:30"


def test_what_is_drawn_does_not_depend_on_the_rest():
    prompts = [request.prompt for request in generate()]
    assert prompts == [request.prompt for request in generate(request_rate=5.0, burstiness=2.0)]
    assert prompts == [request.prompt for request in generate(output_tokens=3)]
    assert prompts == [request.prompt for request in generate(num_prompts=50)][:40]


def test_prompts_differ_at_once_even_if_the_vocabulary_is_small():
    prompts = [request.prompt for request in generate(7, num_prompts=49, prompt_tokens=4)]
    assert len({prompt[0] for prompt in prompts[:7]}) == 7
    assert len({prompt[:2] for prompt in prompts[7:49]}) == 42


def test_shared_prefixes():
    workload = generate(shared_prefix_tokens=8, num_prefix_groups=4)
    by_group = {}
    for request in workload:
        by_group.setdefault(request.group, []).append(request.prompt)
    assert sorted(by_group) == ["prefix-0", "prefix-1", "prefix-2", "prefix-3"]
    assert [len(prompts) for prompts in by_group.values()] == [10, 10, 10, 10]
    for prompts in by_group.values():
        assert len({prompt[:8] for prompt in prompts}) == 1
        assert len({prompt[8] for prompt in prompts}) == 10
        assert all(13 <= len(prompt) <= 38 for prompt in prompts)
    assert len({prompts[0][0] for prompts in by_group.values()}) == 4


class WordTokenizer:
    """A token per different word, between BOS = 1 and EOS = 2."""

    def __init__(self):
        self.known = {}

    def tokenize_prompt(self, text):
        words = (self.known.setdefault(word, 3 + len(self.known)) for word in text.split())
        return [1, *words, 2]


def test_bos_is_in_front_once_and_eos_nowhere():
    workload = generate(WordTokenizer(), shared_prefix_tokens=4, prompt_tokens="uniform:1:900")
    for request in workload:
        assert request.prompt[0] == 1
        assert not {1, 2} & set(request.prompt[1:])
    assert [r.prompt for r in generate(WordTokenizer(), prompt_tokens=1)] == [(1,)] * 40


def test_prompts_of_a_real_model_have_exactly_so_many_tokens(smollm2):
    workload = generate(smollm2, prompt_tokens="uniform:1:60", output_tokens=5, seed=1)
    lengths = Distribution.parse("uniform:1:60")
    assert {len(request.prompt) for request in workload} <= set(range(1, 61))
    assert len({len(request.prompt) for request in workload}) > 15
    assert generate(smollm2, prompt_tokens=lengths, output_tokens=5, seed=1) == workload
    assert len({request.prompt[0] for request in workload}) == 40
    special = set(smollm2.end_of_generation)
    for request in workload:
        assert not special & set(request.prompt)
        assert smollm2.detokenize(request.prompt).isascii()
    other = generate(smollm2, prompt_tokens=20, seed=2)
    assert not {r.prompt[:2] for r in other} & {r.prompt[:2] for r in workload}


@pytest.mark.parametrize(
    "bad",
    [
        {"num_prompts": 0},
        {"num_prefix_groups": 0},
        {"shared_prefix_tokens": -1},
        {"seed": -1},
        {"request_rate": 0},
        {"output_tokens": "often"},
        {"tokenizer": 1},
    ],
)
def test_misuse_of_generate_is_refused(bad):
    with pytest.raises(ConfigError):
        generate(**bad)


def test_a_tokenizer_without_tokens_is_refused():
    class Nothing:
        def tokenize_prompt(self, text):
            return [1]

    with pytest.raises(ConfigError, match="no tokens"):
        PromptWriter(Nothing(), np.random.default_rng(0))


def test_from_prompts():
    params = [bc.SamplingParams(max_tokens=3), bc.SamplingParams(max_tokens=4)]
    workload = Workload.from_prompts(["a", [1, 2]], params)
    assert workload.requests == (
        WorkloadRequest("a", params[0]),
        WorkloadRequest((1, 2), params[1]),
    )
    assert [request.prompt for request in Workload.from_prompts("one text")] == ["one text"]
    assert Workload.from_prompts([]).duration_s == 0
    assert Workload.from_prompts(["a", "b"], request_rate=1.0).duration_s > 0
    with pytest.raises(InvalidRequestError, match="2 sets of parameters for 1"):
        Workload.from_prompts(["a"], params)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"prompt": [1, -1]}, "list of tokens"),
        ({"prompt": ["a"]}, "list of tokens"),
        ({"arrival_s": -1.0}, "arrival_s must be 0 or more"),
        ({"arrival_s": math.nan}, "arrival_s"),
        ({"arrival_s": math.inf}, "arrival_s"),
        ({"arrival_s": "0"}, "arrival_s"),
        ({"priority": 1.0}, "priority must be an integer"),
        ({"user": 5}, "user must be a text"),
        ({"group": 5}, "group must be a text"),
    ],
)
def test_requests_are_checked(values, message):
    with pytest.raises(ConfigError, match=message):
        WorkloadRequest(**{"prompt": "a", **values})


texts = st.text(max_size=20)
requests = st.builds(
    WorkloadRequest,
    prompt=texts | st.lists(st.integers(0, 10**6), max_size=5),
    params=st.builds(
        bc.SamplingParams,
        max_tokens=st.integers(5, 2**31 - 1),
        min_tokens=st.integers(0, 5),
        temperature=st.floats(0, 10),
        seed=st.none() | st.integers(0, 2**64 - 1),
        stop=st.lists(st.text(min_size=1, max_size=5), max_size=2),
        stop_token_ids=st.lists(st.integers(0, 100), max_size=2),
        ignore_eos=st.booleans(),
        logit_bias=st.dictionaries(st.integers(0, 100), st.floats(-9, 9), max_size=2),
        n=st.integers(1, 4),
    ),
    arrival_s=st.floats(0, 1e9),
    user=st.none() | texts,
    priority=st.integers(-9, 9),
    group=st.none() | texts,
)


@settings(deadline=None)  # writes files
@given(st.lists(requests, min_size=1, max_size=4))
def test_a_saved_workload_is_read_back_as_it_was(tmp_path_factory, drawn):
    file = tmp_path_factory.getbasetemp() / "round-trip.jsonl"
    Workload(tuple(drawn)).save(file)
    # Parameters of the reader must not get into lines that have their own.
    reader = bc.SamplingParams(temperature=3.0, top_k=7)
    assert Workload.from_trace(file, params=reader).requests == tuple(drawn)


def test_a_trace_of_others(tmp_path):
    file = tmp_path / "trace.jsonl"
    file.write_text(
        '\ufeff{"arrival_s": 0.5, "prompt_tokens": 6, "output_tokens": 3}\n'
        "\n"
        '{"prompt": "café", "output_tokens": 2, "user": "u", "priority": 1, "group": "g"}\r\n'
        '{"prompt": [4, 5], "output_tokens": 9, "params": {"seed": 1}, "arrival_s": 2}',
        encoding="utf-8",
    )
    workload = Workload.from_trace(file, 100, params=bc.SamplingParams(top_k=3))
    one, two, three = workload
    assert (one.arrival_s, len(one.prompt)) == (0.5, 6)
    assert one.params == bc.SamplingParams(max_tokens=3, top_k=3)
    params = bc.SamplingParams(max_tokens=2, top_k=3)
    assert two == WorkloadRequest("café", params, 0.0, "u", 1, "g")
    assert three == WorkloadRequest((4, 5), bc.SamplingParams(max_tokens=9, seed=1), 2)
    assert Workload.from_trace(file, 100, params=bc.SamplingParams(top_k=3)) == workload
    assert Workload.from_trace(file, 100, seed=1) != workload
    assert workload.config["num_prompts"] == 3


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("3", "not a JSON object"),
        ('{"prompt": "a"}', "output_tokens is missing"),
        ('{"prompt": "a", "output_tokens": 0}', "max_tokens must be 1 to"),
        ('{"prompt": "a", "output_tokens": "3"}', "max_tokens must be an integer"),
        (
            '{"prompt": "a", "output_tokens": 3, "arival_s": 1}',
            "unknown key 'arival_s'; known: arr",
        ),
        ('{"prompt": "a", "output_tokens": 3, "arrival_s": NaN}', "arrival_s must be 0 or more"),
        ('{"prompt": "a", "output_tokens": 3, "priority": "x"}', "priority must be an integer"),
        ('{"prompt": "a", "output_tokens": 3, "params": 3}', "params must be an object"),
        ('{"prompt": "a", "output_tokens": 3, "params": {"topk": 3}}', "params must be an object"),
        ('{"prompt": "a", "output_tokens": 3, "params": {"top_p": 3}}', "top_p must be a number"),
        ('{"prompt": "a", "output_tokens": 3, "params": {"min_tokens": 4}}', "min_tokens = 4"),
        ('{"prompt": "a", "output_tokens": 3, "params": {"logit_bias": {"x": 1}}}', "invalid"),
        ('{"output_tokens": 3}', "needs either prompt or prompt_tokens"),
        ('{"prompt": "a", "prompt_tokens": 3, "output_tokens": 3}', "needs either"),
        ('{"prompt": {}, "output_tokens": 3}', "prompt must be a text or a list"),
        ('{"prompt": [true], "output_tokens": 3}', "list of tokens"),
        ('{"prompt_tokens": 1.5, "output_tokens": 3}', "prompt_tokens must be a positive integer"),
        ('{"prompt_tokens": 0, "output_tokens": 3}', "prompt_tokens must be a positive integer"),
        ('{"prompt_tokens": 3, "output_tokens": 3}', "a model is needed"),
    ],
)
def test_a_wrong_line_is_named(tmp_path, line, message):
    file = tmp_path / "trace.jsonl"
    file.write_text(f'{{"prompt": "a", "output_tokens": 1}}\n\n{line}\n', encoding="utf-8")
    with pytest.raises(ConfigError, match=rf"trace.jsonl, line 3: .*{message}"):
        Workload.from_trace(file)


def test_files_that_are_no_traces(tmp_path):
    with pytest.raises(ConfigError, match=r"can't read .*missing: No such file"):
        Workload.from_trace(tmp_path / "missing")
    (tmp_path / "empty").write_text("\n \n")
    with pytest.raises(ConfigError, match="no requests in"):
        Workload.from_trace(tmp_path / "empty")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="is not UTF-8"):
        Workload.from_trace(tmp_path / "binary")


def test_saving_where_nothing_can_be_written(tmp_path):
    workload = Workload.from_prompts(["a"])
    with pytest.raises(ConfigError, match="can't write"):
        workload.save(tmp_path / "no folder" / "trace.jsonl")
    assert list(tmp_path.iterdir()) == []


def test_importing_the_package_is_light():
    code = (
        "import sys, batchcore.bench; "
        "print(sorted({'numpy', 'rich', 'matplotlib', 'jinja2'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
