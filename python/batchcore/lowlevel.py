"""llama.cpp's contexts and batches as they are, for research and benchmarks.

This is a thin layer: you choose positions and sequences, one call is one `llama_process`. What
differs from C is that misuse raises where llama.cpp would abort the process. The engine does not go
through this module.

```python
from batchcore import Model
from batchcore.lowlevel import Batch, Context

model = Model("smollm2-135m")
tokens = model.tokenize("The capital of France is")
with Context(model, n_ctx=512) as context:
    context.decode(Batch.from_arrays(tokens, range(len(tokens)), [0] * len(tokens)))
    print(model.detokenize([context.logits(-1).argmax()]))
```

A context may be used from any thread, but by one at a time: a second one gets an `EngineError`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from batchcore import _log
from batchcore._core import Batch, LowLevelContext, ResultView

if TYPE_CHECKING:
    from types import TracebackType

    from batchcore.model import Model

__all__ = ["Batch", "Context", "ResultView"]


class Context(LowLevelContext):
    """A `llama_context` with its thread pool. A context manager; `close` frees it at once."""

    def __init__(
        self,
        model: Model,
        *,
        n_ctx: int = 0,
        n_seq_max: int = 1,
        n_batch: int = 2048,
        n_ubatch: int = 512,
        n_outputs_max: int = 0,
        n_threads: int = 0,
        n_threads_batch: int = 0,
        kv_layout: Literal["unified", "streams"] = "unified",
        type_k: str = "f16",
        type_v: str = "f16",
        flash_attn: bool | None = None,
        swa_full: bool = True,
        offload_kqv: bool = True,
        op_offload: bool = True,
        embeddings: bool = False,
        pooling: Literal["model", "none", "mean", "cls", "last", "rank"] = "model",
        poll: int = 0,
    ) -> None:
        """Make a context.

        Args:
            model: What it runs.
            n_ctx: KV cells in all; 0 means as many as the model was trained with. `streams` divides
                them between the sequences and rounds up to 256 each.
            n_seq_max: Sequences at a time, at most 256.
            n_batch: Tokens per call.
            n_ubatch: Tokens that are computed at once.
            n_outputs_max: Tokens per call that may ask for logits; 0 means `n_batch`. Fewer save
                memory: a row is as wide as the vocabulary.
            n_threads: Threads for a single token; 0 means the cores that are there.
            n_threads_batch: Threads for more than one token; 0 means `n_threads`.
            kv_layout: One pool of cells for all sequences, or a stream of cells for each.
            type_k: Type of the K cache, e.g. `f16` or `q8_0`.
            type_v: Type of the V cache; quantised ones need flash attention.
            flash_attn: On, off, or None for llama.cpp's choice.
            swa_full: Keep all cells of sliding-window layers, so that sequences can be cut back.
            offload_kqv: Keep the cells in GPU memory.
            op_offload: Let the GPU do large operations on weights in host memory.
            embeddings: Output embeddings too; then every token of a batch is an output.
            pooling: How to make one embedding of a sequence; `model` is what the file says.
            poll: How long idle threads spin for the next call, 0 (sleep) to 100.

        Raises:
            ConfigError: A parameter has a value that can't work.
            EngineError: There is not enough memory.
        """
        n_batch = max(n_batch, n_ubatch)
        options = {
            "n_ctx": n_ctx,
            "n_seq_max": n_seq_max,
            "n_batch": n_batch,
            "n_ubatch": n_ubatch,
            "n_outputs_max": n_outputs_max or n_batch,
            "n_threads": n_threads,
            "n_threads_batch": n_threads_batch,
            "kv_layout": kv_layout,
            "type_k": type_k,
            "type_v": type_v,
            "flash_attn": {None: "auto", False: "off", True: "on"}[flash_attn],
            "swa_full": swa_full,
            "offload_kqv": offload_kqv,
            "op_offload": op_offload,
            "embeddings": embeddings,
            "pooling": pooling,
            "poll": poll,
        }
        try:
            super().__init__(model._native, options)
        finally:
            _log.forward()

    def __enter__(self) -> Context:  # noqa: PYI034 - Self needs Python 3.11
        """Use it."""
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Free it."""
        self.close()
