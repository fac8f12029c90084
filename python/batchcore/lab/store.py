"""Finished parts in files, so that a run that was stopped goes on where it was."""

from __future__ import annotations

import hashlib
import json
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batchcore.bench.result import write_text_atomically
from batchcore.errors import ConfigError
from batchcore.lab.runs import without_nan

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping, Sequence

__all__ = ["PartStore", "fingerprint"]

_FORMAT = "batchcore-lab-part"
_SCHEMA = 1


def fingerprint(**what: Any) -> str:
    """A short text that is the same only for the same values."""
    text = json.dumps(without_nan(what), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


class PartStore:
    """The folder `parts` of a report: one file for each section of the document."""

    def __init__(self, out_dir: str | os.PathLike[str]) -> None:
        """Make the folders, and prove that they can be written.

        Raises:
            ConfigError: They can't.
            OSError: The disk is full or broken.
        """
        self._dir = Path(out_dir) / "parts"
        probe = self._dir / ".probe"
        try:
            self._dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"can't write {out_dir}: {error.strerror}") from error
        write_text_atomically(probe, "\n" * 4096)
        probe.unlink(missing_ok=True)

    def load(self, names: Sequence[str], mark: str) -> dict[str, Any] | None:
        """Sections that were saved with this fingerprint; None where one of them was not."""
        found = {}
        for name in names:
            try:
                values = json.loads(self._file(name).read_text(encoding="utf-8"))
            except (OSError, ValueError, RecursionError):
                return None
            if not isinstance(values, dict) or "content" not in values:
                return None
            head = (values.get("format"), values.get("schema"), values.get("fingerprint"))
            if head != (_FORMAT, _SCHEMA, mark):
                return None
            found[name] = values["content"]
        return found

    def save(self, sections: Mapping[str, Any], mark: str) -> None:
        """Write a file for each, whole or not at all.

        Raises:
            OSError: The disk is full or broken.
        """
        for name, content in sections.items():
            values = {
                "format": _FORMAT,
                "schema": _SCHEMA,
                "name": name,
                "fingerprint": mark,
                "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
                "content": content,
            }
            write_text_atomically(self._file(name), json.dumps(values, allow_nan=False) + "\n")

    def clear(self, names: Sequence[str]) -> None:
        """Forget these sections."""
        for name in names:
            self._file(name).unlink(missing_ok=True)

    def _file(self, name: str) -> Path:
        return self._dir / f"{name}.json"
