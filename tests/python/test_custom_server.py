"""The example of a server with a policy of its own, over loopback."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import sys
from pathlib import Path

import batchcore as bc
import pytest
from batchcore.testing import synthetic_gguf

PATH = Path(__file__).parents[2] / "examples" / "custom_server.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("custom_server", PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("server") / "model.gguf"
    return bc.Model(synthetic_gguf(path, n_layer=1, n_embd=64))


class Serving:
    """A server on a free port, and a client of it."""

    def __init__(self, example, model, *, router=False, **options):
        self.accounts = example.Accounts(
            {
                "a": example.Account("alice", "interactive", 10_000),
                "b": example.Account("bob", "batch", 20),
            }
        )
        self._example = example
        options = {
            "max_num_seqs": 2,
            "n_ctx": 2048,
            "n_threads": 1,
            "on_submit": self.accounts.admit,
        } | options
        self.engine = (
            bc.Router(model, ["cpu", "cpu"], **options)
            if router
            else bc.AsyncEngine(model, **options)
        )

    async def __aenter__(self):
        await self.engine.start()
        server = self._example.Server(self.engine, self.accounts)
        self._listening = await asyncio.start_server(server.handle, "127.0.0.1", 0)
        self.port = self._listening.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_):
        self._listening.close()
        await self.engine.aclose()

    async def send(self, body, *, key="a", line="POST /generate HTTP/1.1", length=None):
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        head = f"{line}\r\nAuthorization: Bearer {key}\r\n"
        head += f"Content-Length: {len(raw) if length is None else length}\r\n\r\n"
        writer.write(head.encode() + raw)
        await writer.drain()
        return reader, writer

    async def ask(self, body, **options):
        """Status, headers and body as it went over the wire."""
        reader, writer = await self.send(body, **options)
        raw = await asyncio.wait_for(reader.read(), 60)
        writer.close()
        head, _, content = raw.partition(b"\r\n\r\n")
        lines = head.decode().split("\r\n")
        return int(lines[0].split(" ")[1]), dict(line.split(": ") for line in lines[1:]), content


def chunks_of(content):
    """The payload of a chunked body, and whether it was complete."""
    lines = []
    while content:
        size, _, content = content.partition(b"\r\n")
        if int(size, 16) == 0:
            return lines, True
        lines.append(json.loads(content[: int(size, 16)]))
        content = content[int(size, 16) + 2 :]
    return lines, False


@pytest.mark.parametrize("router", [False, True])
def test_whole_answers_and_chunks(example, model, router):
    async def main():
        async with Serving(example, model, router=router) as serving:
            whole, headers, content = await serving.ask({"prompt": "Hi", "max_tokens": 30})
            assert (whole, headers["Content-Length"]) == (200, str(len(content)))
            assert json.loads(content).keys() == {"text"}
            status, headers, content = await serving.ask(
                {"prompt": "Hi", "max_tokens": 30, "stream": True}
            )
            assert (status, headers["Transfer-Encoding"]) == (200, "chunked")
            lines, is_complete = chunks_of(content)
            assert is_complete
            assert lines[-1]["finish_reason"] in ("stop", "length")
            assert {line["finish_reason"] for line in lines[:-1]} <= {None}

    asyncio.run(main())


def test_tiers_come_from_keys_and_budgets_are_spent(example, model):
    async def main():
        seen = []
        async with Serving(example, model) as serving:
            serving.engine.add_observer(seen.append)
            await serving.ask({"prompt": [5] * 4, "max_tokens": 6})
            await serving.ask({"prompt": [5] * 4, "max_tokens": 500}, key="b")
            assert [event.submission.priority for event in seen] == ["interactive", "batch"]
            used = [4 + len(event.output.outputs[0].token_ids) for event in seen]
            assert seen[1].submission.params.max_tokens == 16  # what the budget allowed
            left = {one.user: one.budget_tokens for one in serving.accounts.by_key.values()}
            assert left == {"alice": 10_000 - used[0], "bob": 20 - used[1]}
            serving.accounts.by_key["b"].budget_tokens = 3
            status, _, content = await serving.ask({"prompt": [5] * 4}, key="b")
            assert (status, "only 3 tokens" in json.loads(content)["error"]) == (403, True)

    asyncio.run(main())


def test_a_full_queue_is_429_and_a_closed_one_503(example, model):
    async def main():
        async with Serving(example, model, max_queued_requests=1) as serving:
            serving.engine.pause()
            waiting = asyncio.create_task(serving.ask({"prompt": [5]}))
            while await serving.engine.wait_for_capacity(timeout=0.01):
                pass
            status, headers, _ = await serving.ask({"prompt": [5]})
            assert (status, int(headers["Retry-After"]) >= 1) == (429, True)
            assert await serving.engine.drain(60)
            assert (await waiting)[0] == 200
            status, headers, _ = await serving.ask({"prompt": [5]})
            assert (status, headers["Retry-After"]) == (503, "5")

    asyncio.run(main())


@pytest.mark.parametrize("stream", [False, True])
def test_a_deadline_is_504(example, model, stream):
    async def main():
        async with Serving(example, model) as serving:
            serving.engine.pause()
            body = {"prompt": [5], "timeout": 0.01, "stream": stream}
            assert (await serving.ask(body))[0] == 504

    asyncio.run(main())


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_hangs_up_cancels_its_request(example, model, stream):
    async def main():
        ended = asyncio.Event()
        events = []
        async with Serving(example, model, max_queued_requests=1) as serving:
            serving.engine.add_observer(lambda event: (events.append(event), ended.set()))
            serving.engine.pause()
            _, writer = await serving.send({"prompt": [5], "max_tokens": 2000, "stream": stream})
            while await serving.engine.wait_for_capacity(timeout=0.01):
                pass  # until it has been handed in
            writer.close()
            await asyncio.wait_for(ended.wait(), 60)
        assert events[0].output.outputs[0].finish_reason == "cancelled"

    asyncio.run(main())


def test_an_engine_lost_in_mid_stream_ends_the_body_early(example, model):
    async def main():
        async with Serving(example, model) as serving:
            serving.accounts.by_key["a"].budget_tokens = 10**6
            hook = serving.engine.engine.on_submit

            def endless(submission):
                params = bc.SamplingParams(max_tokens=2000, ignore_eos=True)
                return hook(bc.Submission(submission.prompt_token_ids, params, user="alice"))

            serving.engine.engine.on_submit = endless
            reader, writer = await serving.send({"prompt": [5], "stream": True})
            start = await reader.readuntil(b"}\n\r\n")
            await asyncio.to_thread(serving.engine.engine._native.close)
            rest = await asyncio.wait_for(reader.read(), 60)
            writer.close()
            content = (start + rest).partition(b"\r\n\r\n")[2]
            lines, is_complete = chunks_of(content)
            assert lines[0]["finish_reason"] is None
            assert not is_complete

    asyncio.run(main())


@pytest.mark.parametrize(
    ("expected", "body", "options"),
    [
        (401, {"prompt": "Hi"}, {"key": "c"}),
        (404, {"prompt": "Hi"}, {"line": "GET /generate HTTP/1.1"}),
        (404, b"", {"line": "\0"}),
        (400, b"{", {}),
        (400, [], {}),
        (400, {}, {}),
        (400, {"prompt": 7}, {}),
        (400, {"prompt": "Hi", "max_tokens": 0}, {}),
        (400, {"prompt": "Hi", "timeout": "soon"}, {}),
        (400, b"", {"length": "many"}),
        (413, b"", {"length": 1 << 30}),
        (413, b"", {"length": -1}),
    ],
)
def test_what_can_not_be_served_has_a_status(example, model, expected, body, options):
    async def main():
        async with Serving(example, model) as serving:
            status, _, content = await serving.ask(body, **options)
            assert status == expected
            assert json.loads(content).keys() == {"error"}

    asyncio.run(main())


def test_who_sends_too_slowly_is_let_go(example, model, monkeypatch):
    async def main():
        async with Serving(example, model) as serving:
            assert (await serving.ask(b"{", length=50))[0] == 408

    monkeypatch.setattr(example, "READ_TIMEOUT_S", 0.05)
    asyncio.run(main())
