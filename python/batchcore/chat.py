"""Chat templates: the Jinja programs in a GGUF that turn messages into a prompt.

Templates are written for Hugging Face's `apply_chat_template`, so they run in the same environment
as there: a sandbox (a template comes from a downloaded file) with the same extras.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NoReturn

from batchcore.errors import InvalidRequestError

if TYPE_CHECKING:
    from jinja2 import Template

__all__ = ["Message", "render"]

Message = Mapping[str, Any]
"""One message of a chat: `role`, `content`, and what else a template knows."""


def render(
    template: str,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = True,
    tools: Sequence[Mapping[str, Any]] | None = None,
    bos_token: str = "",
    eos_token: str = "",
    **variables: object,
) -> str:
    """Turn messages into the text of a prompt.

    Args:
        template: The Jinja source.
        messages: The chat so far, oldest first.
        add_generation_prompt: End with what begins the assistant's answer.
        tools: JSON schemas of functions that the model may call, where the template knows them.
        bos_token: What the template may put at the start of a text.
        eos_token: What the template may put at the end of a message.
        **variables: Anything else that the template reads, e.g. `enable_thinking=False`.

    Raises:
        InvalidRequestError: The template refuses the messages, or fails on them.
    """
    _check_messages(messages)
    compiled = _compile(template)
    try:
        return compiled.render(
            **{
                "messages": list(messages),
                "tools": tools,
                "documents": None,
                "add_generation_prompt": add_generation_prompt,
                "bos_token": bos_token,
                "eos_token": eos_token,
                **variables,
            }
        )
    except Exception as error:  # whatever the template's code runs into
        raise InvalidRequestError(f"the chat template failed: {error}") from error


def _check_messages(messages: object) -> None:
    # A string is a sequence too, and a template would quietly read it letter by letter.
    if isinstance(messages, (list, tuple)) and all(isinstance(m, Mapping) for m in messages):
        return
    raise InvalidRequestError(
        'messages must be a list of dicts like {"role": "user", "content": "Hi"}'
    )


@lru_cache(maxsize=32)
def _compile(template: str) -> Template:
    # jinja2 takes a while to import and many programs never chat.
    from jinja2 import TemplateError, nodes  # noqa: PLC0415
    from jinja2.ext import Extension, loopcontrols  # noqa: PLC0415
    from jinja2.sandbox import ImmutableSandboxedEnvironment  # noqa: PLC0415

    class Generation(Extension):
        """`{% generation %}` marks the assistant's words for training; here it does nothing."""

        tags = {"generation"}  # noqa: RUF012 - jinja2's interface

        def parse(self, parser: Any) -> list[nodes.Node]:
            next(parser.stream)
            body: list[nodes.Node] = parser.parse_statements(
                ("name:endgeneration",), drop_needle=True
            )
            return body

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    try:
        return environment.from_string(template)
    except TemplateError as error:
        raise InvalidRequestError(f"the chat template is not valid Jinja: {error}") from error


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes <, > and & for HTML, which models were not trained on.
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> NoReturn:
    from jinja2 import TemplateError  # noqa: PLC0415

    raise TemplateError(message)


def _strftime_now(fmt: str) -> str:
    return datetime.now().astimezone().strftime(fmt)
