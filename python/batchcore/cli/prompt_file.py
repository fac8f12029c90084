"""Prompts from a file: one per line, or JSONL with parameters of their own."""

from __future__ import annotations

import dataclasses
import difflib
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from batchcore.errors import ConfigError, InvalidRequestError
from batchcore.params import SamplingParams

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

__all__ = ["InputFormat", "PromptItem", "read_prompts"]

InputFormat = Literal["auto", "text", "jsonl"]

_PARAMS = {field.name for field in dataclasses.fields(SamplingParams)}


@dataclass(frozen=True, slots=True)
class PromptItem:
    """A prompt, how to complete it, and what to call it."""

    id: str | int
    prompt: str | list[int]
    params: SamplingParams
    where: str
    """For messages, e.g. `a.txt, line 7`."""
    chat_tokens: list[int] | None = None
    """The prompt with a chat template around it, where there is one."""

    @property
    def input(self) -> str | list[int]:
        """What the engine is to complete."""
        return self.prompt if self.chat_tokens is None else self.chat_tokens


def read_prompts(
    file: str, defaults: Mapping[str, Any], *, input_format: InputFormat = "auto"
) -> list[PromptItem]:
    """Read and check all prompts of a file; `-` is stdin. Empty lines are skipped.

    Args:
        file: Its path, or `-`.
        defaults: SamplingParams for prompts that don't say otherwise.
        input_format: `auto` is JSONL where the first line that isn't empty starts with `{`.

    Raises:
        ConfigError: The file can't be read, or has no prompts.
        InvalidRequestError: A line is not what it should be; the message says which and why.
    """
    name = "stdin" if file == "-" else file
    lines = [
        (number, line)
        for number, line in enumerate(_read_text(file, name).split("\n"), start=1)
        if line.strip()
    ]
    if not lines:
        raise ConfigError(f"no prompts in {name}")
    if input_format == "auto":
        input_format = "jsonl" if lines[0][1].lstrip().startswith("{") else "text"
    if input_format == "jsonl":
        return list(_from_json(lines, defaults, name))
    params = SamplingParams(**defaults)
    return [
        PromptItem(index, line.rstrip("\r"), params, f"{name}, line {number}")
        for index, (number, line) in enumerate(lines)
    ]


def _read_text(file: str, name: str) -> str:
    try:
        raw = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
    except OSError as error:
        raise ConfigError(f"can't read {name}: {error.strerror}") from error
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{name} is not UTF-8 (line {line})") from error


def _from_json(
    lines: list[tuple[int, str]], defaults: Mapping[str, Any], name: str
) -> Iterator[PromptItem]:
    for index, (number, line) in enumerate(lines):
        where = f"{name}, line {number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise InvalidRequestError(f"{where}: no valid JSON: {error}") from error
        if not isinstance(row, dict):
            raise InvalidRequestError(f"{where}: not a JSON object")
        yield PromptItem(
            id=_take_id(row, index, where),
            prompt=_take_prompt(row, where),
            params=_make_params({**defaults, **row}, where),
            where=where,
        )


def _take_id(row: dict[str, Any], index: int, where: str) -> str | int:
    found = row.pop("id", index)
    if not isinstance(found, str | int) or isinstance(found, bool):
        raise InvalidRequestError(f"{where}: id must be a text or an integer")
    return found


def _take_prompt(row: dict[str, Any], where: str) -> str | list[int]:
    prompt = row.pop("prompt", None)
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, list) and all(type(token) is int for token in prompt):
        return prompt
    raise InvalidRequestError(f'{where}: "prompt" must be a text or a list of tokens')


def _make_params(values: dict[str, Any], where: str) -> SamplingParams:
    for key in values:
        if key not in _PARAMS:
            near = difflib.get_close_matches(key, ["prompt", "id", *_PARAMS], n=1)
            hint = f", did you mean {near[0]!r}?" if near else ""
            raise InvalidRequestError(f"{where}: unknown key {key!r}{hint}")
    try:
        if isinstance(values.get("logit_bias"), dict):  # JSON's keys are texts
            bias = {int(token): value for token, value in values["logit_bias"].items()}
            values["logit_bias"] = bias
        return SamplingParams(**values)
    except TypeError as error:
        raise InvalidRequestError(f"{where}: a value of the wrong type: {error}") from error
    except ValueError as error:  # InvalidRequestError is one
        raise InvalidRequestError(f"{where}: {error}") from error
