"""The engine for threads: blocking calls, iterators and manual stepping."""

from __future__ import annotations

import atexit
import operator
import os
import warnings
import weakref
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from batchcore import _core, _log
from batchcore.batching import plan_batches, progress_bar
from batchcore.errors import ConfigError, InvalidRequestError
from batchcore.handle import RequestHandle, SteppedRequestHandle, _Handle
from batchcore.model import Model
from batchcore.params import SamplingParams
from batchcore.pinned import PinnedPrefix
from batchcore.profile import Profile
from batchcore.stats import EngineStats

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from typing_extensions import Self

    from batchcore.batching import Bucketing
    from batchcore.outputs import RequestOutput, StreamDelta

    Prompt = str | Sequence[int]

__all__ = ["Engine"]

_MAX_SLOTS = 256  # llama.cpp's LLAMA_MAX_SEQ
HandleT = TypeVar("HandleT", bound=_Handle)

# Engines still open when the interpreter exits. Their threads must be gone before it tears down.
_open_engines: weakref.WeakSet[Engine] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    for engine in list(_open_engines):
        engine.close()


class Engine:
    """Batches requests over one model. Thread-safe; a context manager.

    One thread runs the loop: at every step it decodes one token for each running sequence, takes in
    chunks of waiting prompts, and refills the slots of sequences that ended.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | Model,
        *,
        max_num_seqs: int | None = None,
        n_ctx: int = 8192,
        max_sequence_tokens: int | None = None,
        n_ubatch: int | None = None,
        kv_layout: Literal["auto", "unified", "streams"] | None = None,
        prefix_caching: bool = True,
        prefill_policy: Literal["latency", "balanced", "throughput"] = "balanced",
        target_itl_ms: float | None = None,
        preemption: Literal["auto", "recompute", "save"] = "auto",
        max_saved_bytes: int = 1 << 30,
        host_cache_bytes: int = 0,
        max_queued_requests: int = 10_000,
        max_queued_tokens: int = 10_000_000,
        n_threads: int | None = None,
        n_gpu_layers: int = -1,
        flash_attn: Literal["auto", "on", "off"] | None = None,
        type_k: str = "f16",
        type_v: str = "f16",
        swa_full: bool = True,
        offload_kqv: bool = True,
        profile: Profile | str | os.PathLike[str] | None = None,
        autostart: bool = True,
        check_integrity: bool = False,
    ) -> None:
        """Load the model, allocate the KV memory and start the loop.

        Args:
            model: A path, the name of a preset, `hf:owner/repo/file.gguf`, or a loaded Model, which
                several engines may share.
            max_num_seqs: Sequences that run at the same time; 16 where nothing is said.
            n_ctx: KV cells, shared by all sequences; with `streams` each gets an equal part.
            max_sequence_tokens: Prompt and output of one sequence together, at most; None means
                what the model was trained with. Never more than its part of `n_ctx`.
            n_ubatch: Tokens per decode call at most; 512 where nothing is said.
            kv_layout: `unified`: one pool of cells, prefixes are shared without a copy. `streams`:
                a fixed part per sequence, which decodes faster on a CPU, but wastes what a sequence
                does not use and caps its length. `auto`, the default, is `unified` with prefix
                caching, else `streams`.
            prefix_caching: Reuse the cells of requests that start with the same tokens.
            prefill_policy: How much prompts may slow down sequences that decode.
            target_itl_ms: Time between tokens that prompt chunks are sized for; None lets a step
                with a prompt take 2.5 times as long as one without.
            preemption: What becomes of a sequence whose cells are needed by others: its cells are
                saved to host memory, or recomputed when it goes on; `auto` takes what is faster.
            max_saved_bytes: Host memory for saved cells at most; beyond, they are recomputed.
            host_cache_bytes: Host memory for prefixes whose cells were needed by others: they are
                copied back when a request starts with them, where that is faster than to compute
                them again (with `preemption="save"`, always).
            max_queued_requests: Requests that wait for a slot at most; beyond, QueueFullError.
            max_queued_tokens: Prompt tokens of those at most.
            n_threads: CPU threads; None means one per usable core.
            n_gpu_layers: Layers in GPU memory, negative means all (for a model loaded here).
            flash_attn: Flash attention; `auto`, the default, where the device has it.
            type_k: ggml type of the K cache; quantised types save memory.
            type_v: ggml type of the V cache; quantised types need flash attention.
            swa_full: Keep all cells of sliding-window layers, so that prefixes can be reused.
            offload_kqv: KV cells in GPU memory.
            profile: What `batchcore tune` found for this machine, or the file that it wrote; for
                options that are not given here.
            autostart: Run the loop in a thread; otherwise call `step`.
            check_integrity: Prove the accounting after every step; slow, for tests.

        Raises:
            ModelLoadError: The model can't be loaded.
            ConfigError: A value can't work, or the model can't generate text.
            EngineError: Not enough memory.
        """
        found = Profile.of(profile).options
        max_num_seqs = _first(max_num_seqs, found.get("max_num_seqs"), 16)
        n_ubatch = _first(n_ubatch, found.get("n_ubatch"), 512)
        n_threads = _first(n_threads, found.get("n_threads"), None)
        kv_layout = _first(kv_layout, found.get("kv_layout"), "auto")
        flash_attn = _first(flash_attn, found.get("flash_attn"), "auto")
        _check_positive(max_num_seqs=max_num_seqs, n_ctx=n_ctx, n_ubatch=n_ubatch)
        _check_positive(max_queued_requests=max_queued_requests)
        _check_positive(max_queued_tokens=max_queued_tokens)
        if max_num_seqs > _MAX_SLOTS:
            raise ConfigError(f"max_num_seqs must be at most {_MAX_SLOTS}, not {max_num_seqs}")
        for name, value in (
            ("n_threads", n_threads),
            ("max_sequence_tokens", max_sequence_tokens),
            ("max_saved_bytes", max_saved_bytes + 1),
            ("host_cache_bytes", host_cache_bytes + 1),
        ):
            if value is not None:
                _check_positive(**{name: value})
        if target_itl_ms is not None and not 0 < target_itl_ms < float("inf"):
            raise ConfigError(f"target_itl_ms must be above 0, not {target_itl_ms}")
        self.model = model if isinstance(model, Model) else Model(model, n_gpu_layers=n_gpu_layers)
        """The model it runs."""
        if kv_layout == "auto":
            kv_layout = "unified" if prefix_caching else "streams"
        self.kv_layout = kv_layout
        """The KV layout in use."""
        self.max_num_seqs = max_num_seqs
        """Sequences that run at the same time."""
        self.n_threads = threads = n_threads or usable_cores()
        """CPU threads that compute."""
        self._stepped: weakref.WeakValueDictionary[int, RequestHandle] = (
            weakref.WeakValueDictionary()
        )
        self.autostart = autostart
        """Whether it runs its own loop; otherwise `step` does."""
        try:
            self._native = _core.Engine(
                self.model._native,
                {
                    "n_ctx": n_ctx,
                    "num_slots": _num_slots(
                        max_num_seqs, kv_layout, prefix_caching, min(n_ubatch, n_ctx)
                    ),
                    "n_ubatch": n_ubatch,
                    "n_threads": threads,
                    "n_threads_batch": threads,
                    "kv_layout": kv_layout,
                    "type_k": type_k,
                    "type_v": type_v,
                    "flash_attn": flash_attn,
                    "swa_full": swa_full,
                    "offload_kqv": offload_kqv,
                },
                {
                    "max_num_seqs": max_num_seqs,
                    "max_sequence_tokens": max_sequence_tokens or self.model.n_ctx_train,
                    "prefill_policy": prefill_policy,
                    "target_itl_s": (target_itl_ms or 0.0) / 1e3,
                    "prefix_caching": prefix_caching,
                    "preemption": preemption,
                    "max_saved_bytes": max_saved_bytes,
                    "host_cache_bytes": host_cache_bytes,
                    "max_queued_requests": max_queued_requests,
                    "max_queued_tokens": max_queued_tokens,
                    "num_sampler_threads": threads,
                    "check_integrity": check_integrity,
                },
            )
        finally:
            _log.forward()
        if self.max_sequence_tokens > self.model.n_ctx_train:
            warnings.warn(
                f"sequences may grow to {self.max_sequence_tokens} tokens, but the model was "
                f"trained with {self.model.n_ctx_train}",
                stacklevel=2,
            )
        _open_engines.add(self)
        if autostart:
            self._native.start()

    def __repr__(self) -> str:
        """The model and the size of the engine."""
        return f"Engine({self.model.path!r}, max_num_seqs={self.max_num_seqs}, n_ctx={self.n_ctx})"

    def __enter__(self) -> Self:
        """Nothing to do: the engine runs since it was made."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close."""
        self.close()

    @property
    def n_ctx(self) -> int:
        """KV cells in all, in tokens."""
        return self._native.num_cells

    @property
    def max_sequence_tokens(self) -> int:
        """Prompt and output of one sequence together, at most."""
        return self._native.cells_per_slot

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        priority: int = 0,
        timeout: float | None = None,
        batching: Literal["continuous", "static"] = "continuous",
        batch_size: int | None = None,
        bucketing: Bucketing | None = None,
        order: Literal["given", "longest_first", "prefix_groups"] = "given",
        progress: bool = False,
    ) -> list[RequestOutput]:
        """Complete prompts, all of them batched, and return outputs in their order.

        Args:
            prompts: One text or list of tokens, or several of them. Control tokens in a text, as
                chat templates write them, are read as such.
            params: One for all, or one for each; None means the defaults.
            priority: Lower goes first.
            timeout: Seconds until each must be finished, from when it is handed in.
            batching: `continuous` refills a slot as soon as a sequence ends. `static` runs batches
                that start together, decode in lock-step and end with their longest sequence: the
                baseline that the other is measured against (`stats().padding` counts its idle
                slots).
            batch_size: Prompts of a static batch; None means `max_num_seqs`.
            bucketing: How prompts are grouped by length before static batches are cut: the name of
                a strategy of `batchcore.bucketing` or a function from lengths to lists of indices;
                None keeps them as they are.
            order: In which order continuous batching takes prompts. `longest_first` starts what
                takes longest (prompt and `max_tokens`) first, so that the end is not one long
                sequence alone; `prefix_groups` puts prompts that start alike next to each other.
            progress: Show a bar.

        Raises:
            InvalidRequestError: A prompt or parameter can't be served; then none of its batch is.
            QueueFullError: More prompts than the queue may hold.
            RequestTimeoutError: `timeout` passed; the others have finished or are cancelled.
            EngineError: A request failed; DecodeError and EngineClosedError say how.
        """
        tokens = [self.tokenize(prompt) for prompt in as_prompts(prompts)]
        each = as_params(params, len(tokens))
        batches = plan_batches(
            tokens,
            each,
            batching=batching,
            batch_size=batch_size or self.max_num_seqs,
            bucketing=bucketing,
            order=order,
        )
        outputs: list[RequestOutput | None] = [None] * len(tokens)
        with progress_bar(len(tokens), progress) as advance:
            for batch in batches:
                handles = self._submit(
                    [tokens[index] for index in batch],
                    [each[index] for index in batch],
                    priority=priority,
                    timeout=timeout,
                    streams=False,
                    in_lock_step=batching == "static",
                )
                try:
                    for index, handle in zip(batch, handles, strict=True):
                        outputs[index] = handle.result()
                        advance()
                finally:
                    for handle in handles:
                        handle.cancel()
        return outputs  # type: ignore[return-value]

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        priority: int = 0,
        timeout: float | None = None,
    ) -> Iterator[StreamDelta]:
        """Complete one prompt and yield text and tokens as they come.

        Closing the iterator, or leaving the loop, cancels the request. The last delta of a
        completion has its `finish_reason`.

        Raises:
            InvalidRequestError: At the first delta, as all others; see `generate`.
        """
        yield from self.submit(prompt, params, priority=priority, timeout=timeout)

    def submit(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        priority: int = 0,
        timeout: float | None = None,
    ) -> RequestHandle:
        """Queue one prompt and return at once. A handle that is dropped cancels its request.

        Raises:
            InvalidRequestError: The prompt or a parameter can't be served.
            QueueFullError: The queue is at its bound.
            EngineClosedError: The engine is closed.
        """
        tokens = self.tokenize(prompt)
        return self._submit(
            [tokens],
            [params or SamplingParams()],
            priority=priority,
            timeout=timeout,
            streams=True,
        )[0]

    def warm(self, prompt: Prompt) -> PinnedPrefix:
        """Compute a prompt and keep it, so that requests which start with it are spared that.

        For system prompts. Returns when it is there. Prefixes are shared token by token: a text
        ends best where a token surely ends, as at the end of a turn of a chat template. Recurrent
        and hybrid models share a prefix only as a whole.

        Raises:
            InvalidRequestError: The prompt can't be served, prefixes are not cached, or half of the
                engine's slots keep one already.
            EngineError: As `generate`.
        """
        tokens = self.tokenize(prompt)
        once = [SamplingParams(max_tokens=1)]
        handle = self._submit([tokens], once, priority=0, timeout=None, streams=False, pins=True)[0]
        handle.result()
        return PinnedPrefix(self._native, handle.id, len(tokens))

    def abort(self, request_id: int) -> None:
        """End a request as `cancelled` within one step; nothing happens where it has ended."""
        self._native.abort(request_id)

    def step(self) -> list[RequestOutput]:
        """Run one step and return what the requests with news have given so far.

        For engines with `autostart=False`: deterministic, on the calling thread. What it returns
        counts as consumed; the handle's `output` is the same object.

        Raises:
            EngineError: The engine runs its own loop, or is closed.
        """
        handles = [self._stepped.get(request_id) for request_id in self._native.step()]
        live = [handle for handle in handles if handle is not None]
        for handle in live:
            handle._take()
        return [handle.output for handle in live]

    @property
    def has_work(self) -> bool:
        """Whether a request has not ended yet."""
        return self._native.has_work

    def stats(self) -> EngineStats:
        """A consistent copy of the counters, as of the last step."""
        return EngineStats.from_native(self._native.stats())

    def close(self) -> None:
        """End every request with EngineClosedError and stop the loop.

        Returns once the loop has stopped; calling it again does nothing. The KV memory is freed
        with the engine and the last of its handles.
        """
        native = getattr(self, "_native", None)  # missing where __init__ failed
        if native is not None:
            native.close()
            _log.forward()
        _open_engines.discard(self)

    def __del__(self) -> None:
        """Close: an engine that nobody holds has no requests that anybody waits for."""
        self.close()

    def tokenize(self, prompt: Prompt) -> list[int]:
        """The tokens of a prompt, as `generate` makes them.

        Raises:
            InvalidRequestError: The prompt is neither a text nor tokens.
        """
        if isinstance(prompt, str):
            return self.model.tokenize_prompt(prompt)
        if isinstance(prompt, (bytes, bytearray)):
            raise InvalidRequestError("a prompt is a text or a list of tokens, not bytes")
        try:
            tokens = [operator.index(token) for token in prompt]
        except TypeError as error:
            raise InvalidRequestError(
                f"a prompt is a text or a list of tokens, not {prompt!r:.80}"
            ) from error
        for token in tokens:
            if not 0 <= token < self.model.n_vocab:
                raise InvalidRequestError(
                    f"prompt token {token} is not in the vocabulary of {self.model.n_vocab}"
                )
        return tokens

    def _submit(
        self,
        prompts: Sequence[list[int]],
        params: Sequence[SamplingParams],
        *,
        priority: int,
        timeout: float | None,
        streams: bool,
        pins: bool = False,
        in_lock_step: bool = False,
    ) -> list[RequestHandle]:
        handles = submit_to(
            self,
            prompts,
            params,
            RequestHandle if self.autostart else SteppedRequestHandle,
            priority=priority,
            timeout=timeout,
            streams=streams,
            pins=pins,
            in_lock_step=in_lock_step,
        )
        if not self.autostart:
            self._stepped.update((handle.id, handle) for handle in handles)
        return handles


def submit_to(
    engine: Engine,
    prompts: Sequence[list[int]],
    params: Sequence[SamplingParams],
    kind: type[HandleT],
    *,
    priority: int,
    timeout: float | None,
    streams: bool,
    pins: bool = False,
    in_lock_step: bool = False,
    notifier: _core.Notifier | None = None,
) -> list[HandleT]:
    """Queue requests, all or none, and wrap their channels in handles of `kind`."""
    rank: object = priority
    if not isinstance(rank, int) or not -(2**31) <= rank < 2**31:
        raise InvalidRequestError(f"priority must be a 32-bit integer, not {priority!r}")
    if timeout is not None and not timeout > 0:
        raise InvalidRequestError(f"timeout must be above 0 seconds, not {timeout}")
    channels = engine._native.submit(
        prompts,
        [one._to_native() for one in params],
        priority,
        timeout,
        streams,
        pins,
        in_lock_step,
        notifier,
    )
    return [
        kind(engine, channel, prompt, n=one.n, logprobs=one.logprobs is not None)
        for channel, prompt, one in zip(channels, prompts, params, strict=True)
    ]


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


def _first(given: Any, found: Any, default: Any) -> Any:
    if given is not None:
        return given
    return default if found is None else found


def _check_positive(**values: Any) -> None:
    for name, value in values.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(f"{name} must be a positive integer, not {value!r}")


def _num_slots(max_num_seqs: int, kv_layout: str, prefix_caching: bool, most: int) -> int:
    """Sequences that the KV memory can tell apart.

    Beyond those that run, `unified` slots only hold cached prefixes and cost next to nothing; in
    `streams` each would take its part of the cells away from the running ones.
    """
    if kv_layout == "unified" and prefix_caching:
        return max(max_num_seqs, min(2 * max_num_seqs, _MAX_SLOTS, most))
    return max_num_seqs


def usable_cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
