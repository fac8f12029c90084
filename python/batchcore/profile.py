"""Engine options that were found to be good on a machine, in a file: made by `batchcore tune`."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from batchcore.errors import ConfigError

__all__ = ["Profile"]

_FORMAT = "batchcore-profile"
_SCHEMA_VERSION = 1
_KINDS: dict[str, type] = {
    "max_num_seqs": int,
    "n_ubatch": int,
    "n_threads": int,
    "kv_layout": str,
    "flash_attn": str,
}


@dataclass(frozen=True)
class Profile:
    """Options of `Engine` that a profile may set, and what they rest on."""

    options: dict[str, Any]
    """By name: `max_num_seqs`, `n_ubatch`, `n_threads`, `kv_layout`, `flash_attn`; any of them."""
    evidence: dict[str, Any] = field(default_factory=dict)
    """Environment, model and figures of the measurement, for people to read."""

    def __post_init__(self) -> None:
        """Refuse what an engine would not take from a profile."""
        for name, value in self.options.items():
            kind = _KINDS.get(name)
            if kind is None:
                raise ConfigError(f"a profile can't set {name!r}; it may set {', '.join(_KINDS)}")
            if not isinstance(value, kind) or isinstance(value, bool):
                raise ConfigError(f"{name} in a profile must be of type {kind.__name__}")

    def to_json(self) -> str:
        """As it is kept in a file."""
        document = {
            "format": _FORMAT,
            "schema_version": _SCHEMA_VERSION,
            "options": self.options,
            "evidence": self.evidence,
        }
        return json.dumps(document, indent=2) + "\n"

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Profile:
        """Read a file.

        Raises:
            ConfigError: It can't be read, or is no profile of this version.
        """
        name = os.fspath(path)
        try:
            values = json.loads(Path(path).read_bytes())
        except OSError as error:
            raise ConfigError(f"can't read the profile {name}: {error.strerror}") from error
        except ValueError as error:
            raise ConfigError(f"the profile {name} is not JSON: {error}") from error
        if not isinstance(values, dict) or values.get("format") != _FORMAT:
            raise ConfigError(f"{name} is no profile: make one with 'batchcore tune'")
        if values.get("schema_version") != _SCHEMA_VERSION:
            raise ConfigError(f"{name} is a profile of version {values.get('schema_version')!r}")
        options = values.get("options")
        if not isinstance(options, dict):
            raise ConfigError(f"the profile {name} has no options")
        return cls(options, values.get("evidence") or {})

    @classmethod
    def of(cls, profile: Profile | str | os.PathLike[str] | None) -> Profile:
        """Itself, from a file, or an empty one."""
        if profile is None:
            return cls({})
        return profile if isinstance(profile, Profile) else cls.load(profile)
