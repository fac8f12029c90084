"""The server among llama-cpp-python's examples, which batches over the package's C bindings."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from batchcore.bench.peers.http_server import HttpServer

if TYPE_CHECKING:
    from pathlib import Path

    from batchcore.bench.peers.base import Setup
    from batchcore.bench.workload import WorkloadRequest

__all__ = ["NAME", "CompletionsDialect", "ExampleServer"]

NAME = "llama-cpp-python-server"
# So unlikely that no sampler takes it, and still a number.
_NEVER = -1e9


class CompletionsDialect:
    """OpenAI's completions, which count no tokens while they stream."""

    path = "/v1/completions"

    def __init__(self, end_of_generation: tuple[int, ...]) -> None:
        """Take the tokens that must not come, since it always stops at them."""
        self._bias = {str(token): _NEVER for token in end_of_generation}

    def body(self, request: WorkloadRequest) -> dict[str, Any]:
        """It knows no top-k, and so samples from the nucleus of all tokens."""
        params = request.params
        return {
            "prompt": request.prompt,
            "max_tokens": params.max_tokens,
            "temperature": params.temperature,
            "top_p": params.top_p,
            "seed": params.seed or 0,
            "logit_bias": self._bias,
            "stream": True,
        }

    def num_tokens(self, event: dict[str, Any], so_far: int, most: int) -> int:
        """One for each text; what did not come alone, e.g. inside of a character, with the last."""
        choice = (event.get("choices") or [{}])[0]
        if choice.get("finish_reason") == "length":
            return most
        return min(most, so_far + 1) if choice.get("text") else so_far

    def num_cached_tokens(self, event: dict[str, Any]) -> int | None:
        """Where there is a usage, it has them."""
        details = (event.get("usage") or {}).get("prompt_tokens_details") or {}
        cached: int | None = details.get("cached_tokens")
        return cached


class ExampleServer(HttpServer):
    """`examples/server/server.py` of the package's source."""

    health = "/healthz"

    def __init__(self, python: str, script: Path, version: str) -> None:
        """Take a Python that has the package, FastAPI, uvicorn and openai, and the script."""
        super().__init__(NAME, version)
        self._python = python
        self._script = script

    def command(self, setup: Setup, port: int, folder: Path) -> list[str]:
        """Write the configuration, which it only takes from a file."""
        config = folder / "config.json"
        model = {
            "path": str(setup.model),
            "n_ctx": setup.n_ctx,
            "n_seq_max": setup.num_slots,
            "n_batch": 2048,
            "n_ubatch": 512,
            "threads": setup.n_threads,
            "threads_batch": setup.n_threads,
            "flash_attn": True,
            "kv_unified": True,
            "swa_full": setup.keeps_prefixes,
            "store_logits": False,
        }
        server = {"host": "127.0.0.1", "port": port}
        config.write_text(json.dumps({"server": server, "model": model}), encoding="utf-8")
        return [self._python, str(self._script), "-C", str(config)]

    def dialect(self, setup: Setup) -> CompletionsDialect:
        """How it is spoken to."""
        return CompletionsDialect(setup.end_of_generation)
