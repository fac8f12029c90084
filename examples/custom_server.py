r"""A small HTTP server around batchcore with a policy of its own. Needs nothing but batchcore.

    python examples/custom_server.py smollm2-135m --port 8000
    curl -N http://127.0.0.1:8000/generate -H 'Authorization: Bearer key-of-alice' \
        -d '{"prompt": "Once upon a time", "max_tokens": 32, "stream": true}'

One request per connection, no TLS, no logging: a place to start from, behind a proxy.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import json
import math
import signal
from typing import TYPE_CHECKING, Any

import batchcore as bc
from batchcore import errors

if TYPE_CHECKING:
    from collections.abc import Mapping

MAX_BODY_BYTES = 1 << 20
READ_TIMEOUT_S = 10.0  # for a whole request, so that slow senders hold no connection


class RefusedError(Exception):
    """Refused by this server; the message starts with the HTTP status."""


@dataclasses.dataclass
class Account:
    """Who an API key stands for, and how many tokens of prompt and output are left."""

    user: str
    tier: str
    budget_tokens: int


class Accounts:
    """Who goes first and who has had enough: an admission hook and an observer."""

    def __init__(self, by_key: Mapping[str, Account]) -> None:
        """Take what a real server would look up elsewhere."""
        self.by_key = by_key
        self._by_user = {account.user: account for account in by_key.values()}

    def admit(self, submission: bc.Submission) -> bc.Submission:
        """For `on_submit`: give a request its user's tier, and no more tokens than are left."""
        account = self._by_user[submission.user]
        left = account.budget_tokens - len(submission.prompt_token_ids)
        if left < 1:
            raise RefusedError(f"403 Forbidden: only {account.budget_tokens} tokens are left")
        params = submission.params
        params = dataclasses.replace(params, max_tokens=min(params.max_tokens, left))
        return dataclasses.replace(submission, params=params, priority=account.tier)

    def charge(self, event: bc.FinishedRequest) -> None:
        """For `add_observer`: count what was used. Requests that run side by side may overdraw."""
        used = [event.output.prompt_token_ids, *(one.token_ids for one in event.output.outputs)]
        self._by_user[event.submission.user].budget_tokens -= sum(map(len, used))


def to_http(error: Exception) -> tuple[str, dict[str, object]]:
    """The status line's end and the extra headers for what went wrong."""
    if isinstance(error, errors.QueueFullError):
        return "429 Too Many Requests", {"Retry-After": math.ceil(error.retry_after_s)}
    if isinstance(error, errors.RequestTimeoutError):
        return "504 Gateway Timeout", {}
    if isinstance(error, errors.EngineError):  # closed, drained, or no replica in service
        return "503 Service Unavailable", {"Retry-After": 5}
    if isinstance(error, RefusedError):
        return str(error).partition(":")[0], {}
    if isinstance(error, asyncio.TimeoutError):
        return "408 Request Timeout", {}
    if isinstance(error, (ValueError, TypeError, LookupError, asyncio.LimitOverrunError)):
        return "400 Bad Request", {}
    return "500 Internal Server Error", {}


class Server:
    """Serves one AsyncEngine or Router, which has `accounts.admit` as its `on_submit`."""

    def __init__(self, engine: bc.AsyncEngine | bc.Router, accounts: Accounts) -> None:
        """The engine must be started."""
        self._engine = engine
        self._accounts = accounts
        engine.add_observer(accounts.charge)

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, for `asyncio.start_server`."""
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):  # they hung up
            try:
                user, body = await asyncio.wait_for(self._read(reader), READ_TIMEOUT_S)
                answer = asyncio.create_task(self._generate(writer, user, body))
                gone = asyncio.create_task(reader.read(1))  # ends when they hang up
                await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
                answer.cancel()  # unless it is done; and with it the request
                gone.cancel()
                await asyncio.gather(answer, gone, return_exceptions=True)
                if not answer.cancelled():
                    await answer
            except (ConnectionError, asyncio.IncompleteReadError):
                raise
            except Exception as error:
                await send(writer, *to_http(error), text=json.dumps({"error": str(error)}))
        writer.close()

    async def _read(self, reader: asyncio.StreamReader) -> tuple[str, dict[str, Any]]:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        fields = (line.partition(":") for line in head[1:])
        headers = {name.lower(): value.strip() for name, _, value in fields}
        if head[0].split(" ")[:2] != ["POST", "/generate"]:
            raise RefusedError("404 Not Found: there is only POST /generate")
        key = headers.get("authorization", "").removeprefix("Bearer ")
        if key not in self._accounts.by_key:
            raise RefusedError("401 Unauthorized: unknown API key")
        length = int(headers.get("content-length", "0"))
        if not 0 <= length <= MAX_BODY_BYTES:
            raise RefusedError(f"413 Content Too Large: at most {MAX_BODY_BYTES} bytes")
        body = json.loads(await reader.readexactly(length))
        if not isinstance(body, dict):
            raise ValueError("the body must be a JSON object")
        return self._accounts.by_key[key].user, body

    async def _generate(self, writer: asyncio.StreamWriter, user: str, body: Any) -> None:
        params = bc.SamplingParams(max_tokens=body.get("max_tokens", 64))
        handle = await self._engine.submit(
            body["prompt"], params, user=user, timeout=body.get("timeout", 60.0)
        )
        if not body.get("stream"):
            await send(writer, "200 OK", {}, text=json.dumps({"text": (await handle).text}))
            return
        deltas = aiter(handle)
        try:
            delta = await anext(deltas)  # until then, what goes wrong can still have a status
            if delta.finish_reason == "timeout":
                raise errors.RequestTimeoutError("the request was not finished within its timeout")
            await send(writer, "200 OK", {"Transfer-Encoding": "chunked"})
            # After that, an error ends the connection without the last chunk, as HTTP wants it.
            with contextlib.suppress(errors.EngineError, StopAsyncIteration):
                while True:
                    line = json.dumps({"text": delta.text, "finish_reason": delta.finish_reason})
                    end = "0\r\n\r\n" if delta.finish_reason not in (None, "error") else ""
                    writer.write(f"{len(line) + 1:x}\r\n{line}\n\r\n{end}".encode())  # ASCII
                    await writer.drain()  # a slow client holds back nobody else
                    delta = await anext(deltas)
        finally:
            handle.cancel()


async def send(
    writer: asyncio.StreamWriter, status: str, headers: dict[str, object], text: str | None = None
) -> None:
    """The head of an answer, and its body where that is known."""
    headers = {"Content-Type": "application/json", "Connection": "close", **headers}
    if text is not None:
        headers["Content-Length"] = len(text)  # json.dumps writes ASCII
    head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    writer.write(f"HTTP/1.1 {status}\r\n{head}\r\n{text or ''}".encode())
    await writer.drain()


async def main() -> None:
    """Serve until SIGINT or SIGTERM, then finish what is running."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--port", type=int, default=8000)
    options = parser.parse_args()
    accounts = Accounts(
        {
            "key-of-alice": Account("alice", "interactive", 1_000_000),
            "key-of-bob": Account("bob", "batch", 10_000),
        }
    )
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with bc.AsyncEngine(options.model, on_submit=accounts.admit) as engine:
        server = Server(engine, accounts)
        listening = await asyncio.start_server(server.handle, "127.0.0.1", options.port)
        await stop.wait()
        listening.close()  # nobody new
        await engine.drain(timeout=30.0)  # the others have so long; the rest is cancelled


if __name__ == "__main__":
    asyncio.run(main())
