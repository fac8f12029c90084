"""The engine for threads: blocking calls, iterators and manual stepping."""

from __future__ import annotations

import atexit
import math
import operator
import threading
import time
import warnings
import weakref
from typing import TYPE_CHECKING, Literal

from batchcore import _core, _log, engine_options
from batchcore.batching import plan_batches, progress_bar
from batchcore.errors import InvalidRequestError
from batchcore.handle import RequestHandle, SteppedRequestHandle
from batchcore.model import Model
from batchcore.params import SamplingParams
from batchcore.pinned import PinnedPrefix
from batchcore.policy import SchedulingPolicy, check_timeout, check_user, encode_user
from batchcore.profile import Profile
from batchcore.stats import EngineStats
from batchcore.submission import Submission, as_params, as_prompts, submit_to

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterator, Sequence

    from typing_extensions import Self

    from batchcore.batching import Bucketing
    from batchcore.handle import Observer
    from batchcore.outputs import RequestOutput, StreamDelta
    from batchcore.submission import AdmissionHook, Prompt

__all__ = ["Engine"]

# A thread that waits in C++ comes up this often to let Python handle signals such as Ctrl-C.
_SIGNAL_CHECK_S = 0.2

_observers_lock = threading.Lock()

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
        max_num_seqs: int | Literal["auto"] | None = None,
        n_ctx: int = 8192,
        max_sequence_tokens: int | None = None,
        n_ubatch: int | None = None,
        kv_layout: Literal["auto", "unified", "streams"] | None = None,
        prefix_caching: bool = True,
        prefill_policy: Literal["latency", "balanced", "throughput"] = "balanced",
        target_itl_ms: float | None = None,
        num_speculative_tokens: int = 0,
        max_wait_ms: float = 0.0,
        policy: SchedulingPolicy | None = None,
        on_submit: AdmissionHook | None = None,
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
            max_num_seqs: Sequences that run at the same time; 16 where nothing is said. With `auto`
                the engine finds out: no more than add to the throughput, by what steps are measured
                to take, and no more than `target_itl_ms` allows where that is given.
            n_ctx: KV cells, shared by all sequences; with `streams` each gets an equal part.
            max_sequence_tokens: Prompt and output of one sequence together, at most; None means
                what the model was trained with. Never more than its part of `n_ctx`.
            n_ubatch: Tokens per decode call at most; 512 where nothing is said.
            kv_layout: `unified`: one pool of cells; any sequence may use any cell, and prefixes are
                shared without a copy. `streams`: each sequence has a fixed part of the cells, which
                limits its length; with ggml's kernels this decodes faster on a CPU. `auto`
                (default) picks `unified` where batchcore's kernels compute the attention (on a CPU,
                `Model.kernels` is not `ggml`, `flash_attn` is not `off`). Elsewhere it picks
                `streams` if prefix caching is off, or on a CPU if `n_ctx` has room for
                `max_num_seqs` sequences of `max_sequence_tokens`; otherwise `unified`.
            prefix_caching: Reuse the cells of requests that start with the same tokens.
            prefill_policy: How much prompts may slow down sequences that decode.
            target_itl_ms: Time between tokens that prompt chunks are sized for; None lets a step
                with a prompt take 4 times as long as one in which everybody decodes, or as long as
                128 tokens of the prompt take.
            num_speculative_tokens: Tokens that a step may guess for each sequence, from what came
                after the same tokens before in its prompt and output, to verify them together: up
                to 16, 0 means none. For outputs that repeat or quote. The engine guesses only as
                many as pay, by what steps are measured to take and how often guesses were right.
                Outputs stay what they are. Recurrent and hybrid models ignore it.
            max_wait_ms: How long an idle engine holds requests back for its batch to fill; with
                continuous batching whoever comes next joins at the next step anyway.
            policy: Tiers, fair share between users, bounds per user, shedding.
            on_submit: Called with every `Submission` before it is queued, to change or refuse it.
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
        first_given, check = engine_options.first_given, engine_options.check_positive
        max_num_seqs = first_given(max_num_seqs, found.get("max_num_seqs"), 16)
        n_ubatch = first_given(n_ubatch, found.get("n_ubatch"), 512)
        n_threads = first_given(n_threads, found.get("n_threads"), engine_options.usable_cores())
        kv_layout = first_given(kv_layout, found.get("kv_layout"), "auto")
        flash_attn = first_given(flash_attn, found.get("flash_attn"), "auto")
        check(n_ctx=n_ctx, n_ubatch=n_ubatch, n_threads=n_threads)
        check(max_queued_requests=max_queued_requests, max_queued_tokens=max_queued_tokens)
        if max_sequence_tokens is not None:
            check(max_sequence_tokens=max_sequence_tokens)
        engine_options.check_not_negative(
            max_saved_bytes=max_saved_bytes, host_cache_bytes=host_cache_bytes
        )
        engine_options.check_speculative_tokens(num_speculative_tokens)
        if target_itl_ms is not None:
            engine_options.check_milliseconds("target_itl_ms", target_itl_ms, above_zero=True)
        engine_options.check_milliseconds("max_wait_ms", max_wait_ms, above_zero=False)
        num_seqs = engine_options.sequences_that_run(max_num_seqs, n_ctx)
        self.policy = policy or SchedulingPolicy()
        """Tiers, fair share and bounds per user."""
        self.on_submit = on_submit
        """Called with every request before it is queued; may be set at any time."""
        self._observers: tuple[Observer, ...] = ()
        self.model = model if isinstance(model, Model) else Model(model, n_gpu_layers=n_gpu_layers)
        """The model it runs."""
        if kv_layout == "auto":
            on_cpu = not (offload_kqv and self.model._native.uses_gpu)
            kv_layout = engine_options.layout_for(
                on_cpu=on_cpu,
                skips_others=on_cpu and self.model.kernels != "ggml" and flash_attn != "off",
                memory_kind=self.model._native.memory_kind,
                prefix_caching=prefix_caching,
                cells_per_sequence=n_ctx // num_seqs,
                max_sequence_tokens=max_sequence_tokens,
            )
        self.kv_layout = kv_layout
        """The KV layout in use."""
        self.max_num_seqs = num_seqs
        """Sequences that run at the same time, at most."""
        self.n_threads = threads = n_threads
        """CPU threads that compute."""
        self._stepped: weakref.WeakValueDictionary[int, RequestHandle] = (
            weakref.WeakValueDictionary()
        )
        self.autostart = autostart
        """Whether it runs its own loop; otherwise `step` does."""
        n_rows = min(n_ubatch, n_ctx)
        num_slots = engine_options.num_slots(num_seqs, kv_layout, prefix_caching, n_rows)
        try:
            self._native = _core.Engine(
                self.model._native,
                {
                    "n_ctx": n_ctx,
                    "num_slots": num_slots,
                    "max_outputs": engine_options.max_outputs(
                        num_slots, num_seqs, num_speculative_tokens, n_rows
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
                    "max_num_seqs": num_seqs,
                    "adaptive": max_num_seqs == "auto",
                    "max_wait_s": max_wait_ms / 1e3,
                    **self.policy.native_options(),
                    "max_sequence_tokens": max_sequence_tokens or self.model.n_ctx_train,
                    "prefill_policy": prefill_policy,
                    "target_itl_s": (target_itl_ms or 0.0) / 1e3,
                    "num_speculative_tokens": num_speculative_tokens,
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
        priority: int | str = 0,
        user: str = "",
        timeout: float | None = None,
        queue_timeout: float | None = None,
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
            priority: A number, lower goes first, or the name of a tier of the engine's policy.
            user: Whose share of the engine this counts against.
            timeout: Seconds until each must be finished, from when it is handed in.
            queue_timeout: Seconds until each must have a slot.
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
            RequestTimeoutError: A timeout passed; the others have finished or are cancelled.
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
                    [
                        Submission(
                            tokens[index], each[index], priority, user, timeout, queue_timeout
                        )
                        for index in batch
                    ],
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
        priority: int | str = 0,
        user: str = "",
        timeout: float | None = None,
        queue_timeout: float | None = None,
    ) -> Iterator[StreamDelta]:
        """Complete one prompt and yield text and tokens as they come.

        Closing the iterator, or leaving the loop, cancels the request. The last delta of a
        completion has its `finish_reason`.

        Raises:
            InvalidRequestError: At the first delta, as all others; see `generate`.
        """
        yield from self.submit(
            prompt,
            params,
            priority=priority,
            user=user,
            timeout=timeout,
            queue_timeout=queue_timeout,
        )

    def submit(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        priority: int | str = 0,
        user: str = "",
        timeout: float | None = None,
        queue_timeout: float | None = None,
    ) -> RequestHandle:
        """Queue one prompt and return at once. A handle that is dropped cancels its request.

        Raises:
            InvalidRequestError: The prompt or a parameter can't be served.
            QueueFullError: The queue is at its bound; its `retry_after_s` says when to try again.
            EngineClosedError: The engine is closed, or drained.
        """
        submission = Submission(
            self.tokenize(prompt),
            params or SamplingParams(),
            priority,
            user,
            timeout,
            queue_timeout,
        )
        return self._submit([submission], streams=True)[0]

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
        submission = Submission(self.tokenize(prompt), SamplingParams(max_tokens=1))
        handle = self._submit([submission], streams=False, pins=True)[0]
        try:
            handle.result()
        except BaseException:
            # It may have been kept already, and nobody else knows how to let go of it.
            self._native.unpin(handle.id)
            raise
        return PinnedPrefix(self._native, handle.id, len(submission.prompt_token_ids))

    def abort(self, request_id: int) -> None:
        """End a request as `cancelled` within one step; nothing happens where it has ended."""
        self._native.abort(request_id)

    def pause(self) -> None:
        """Give no slot to requests that wait, until `resume`; what runs goes on, timeouts too.

        Raises:
            EngineError: This process did not make the engine.
        """
        self._native.pause()

    def resume(self) -> None:
        """End `pause` and `drain`."""
        self._native.resume()

    def drain(self, timeout: float | None = None) -> bool:
        """Take no more requests and wait for those that there are; False where `timeout` passed.

        From then on, until `resume`, what is submitted is refused with EngineClosedError. A paused
        engine is resumed, since nothing would ever end.
        """
        check_timeout("timeout", timeout)
        self._native.drain()
        return self._wait(self._native.wait_until_idle, timeout)

    def wait_for_capacity(
        self, num_tokens: int = 0, *, user: str = "", timeout: float | None = None
    ) -> bool:
        """Wait until the queue has room for a prompt of `num_tokens`; False where `timeout` passed.

        Several callers may wait for the same room, so `submit` may still raise QueueFullError.

        Raises:
            EngineClosedError: The engine takes no more requests.
        """
        engine_options.check_not_negative(num_tokens=num_tokens)
        check_user(user)
        check_timeout("timeout", timeout)
        name = encode_user(user)
        return self._wait(
            lambda seconds: self._native.wait_for_room(name, 1, num_tokens, seconds), timeout
        )

    def _wait(self, wait: Callable[[float], bool], timeout: float | None) -> bool:
        """Call `wait`, which takes seconds, until it is true."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            left = math.inf if deadline is None else deadline - time.monotonic()
            if self.autostart:
                done = wait(max(0.0, min(left, _SIGNAL_CHECK_S)))
            else:
                done = wait(0.0)
                if not done:
                    self._native.step()
            if done or left <= 0:
                return done

    def add_observer(self, observer: Observer) -> Callable[[], None]:
        """Call `observer` with a `FinishedRequest` whenever a handle has consumed a request's end.

        It is called where the handle is used, so it should be quick; what it raises is logged.
        Returns a function that removes it.
        """
        with _observers_lock:
            self._observers = (*self._observers, observer)
        reference = weakref.ref(self)

        def remove() -> None:
            engine = reference()
            if engine is None:
                return
            with _observers_lock:
                engine._observers = tuple(one for one in engine._observers if one is not observer)

        return remove

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
    def closed(self) -> bool:
        """Whether it takes no more requests for good: after `close`, or a failure of its own."""
        return self._native.is_closed

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
        submissions: Sequence[Submission],
        *,
        streams: bool,
        pins: bool = False,
        in_lock_step: bool = False,
    ) -> list[RequestHandle]:
        handles = submit_to(
            self,
            submissions,
            RequestHandle if self.autostart else SteppedRequestHandle,
            streams=streams,
            pins=pins,
            in_lock_step=in_lock_step,
        )
        if not self.autostart:
            self._stepped.update((handle.id, handle) for handle in handles)
        return handles
