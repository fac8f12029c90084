"""Options of an engine: defaults, what a profile adds, what can't work."""

from __future__ import annotations

import os
from typing import Any, Literal

from batchcore.errors import ConfigError

__all__ = ["usable_cores"]

MAX_SLOTS = 256
"""llama.cpp's LLAMA_MAX_SEQ."""

# Where the engine finds the number of sequences itself, each may count on as many cells.
_AUTO_CELLS = 256
_AUTO_MAX_SEQS = 64

_MAX_SPECULATIVE_TOKENS = 16  # kMaxDrafts of the C++ core
# With more rows in a call drafts hardly pay, and each takes memory for its logits.
_MOST_DRAFT_ROWS = 64


def first_given(given: Any, found: Any, default: Any) -> Any:
    """What the caller said, else the profile, else the default."""
    if given is not None:
        return given
    return default if found is None else found


def check_positive(**values: Any) -> None:
    """Refuse what is no positive integer."""
    for name, value in values.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(f"{name} must be a positive integer, not {value!r}")


def check_not_negative(**values: Any) -> None:
    """Refuse what is no integer of at least 0."""
    for name, value in values.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise ConfigError(f"{name} must be an integer of at least 0, not {value!r}")


def check_speculative_tokens(value: Any) -> None:
    """Refuse what is no number of tokens that a step can guess."""
    check_not_negative(num_speculative_tokens=value)
    if value > _MAX_SPECULATIVE_TOKENS:
        raise ConfigError(
            f"num_speculative_tokens must be at most {_MAX_SPECULATIVE_TOKENS}, not {value}"
        )


def check_milliseconds(name: str, value: object, *, above_zero: bool) -> None:
    """Refuse what is no finite time."""
    good = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not good or not 0 <= value < float("inf") or (above_zero and value == 0):  # type: ignore[operator]
        raise ConfigError(f"{name} must be {'above' if above_zero else 'at least'} 0, not {value}")


def sequences_that_run(max_num_seqs: object, n_ctx: int) -> int:
    """The most sequences that ever run, from an option that may be `auto`."""
    if max_num_seqs == "auto":
        return max(1, min(_AUTO_MAX_SEQS, n_ctx // _AUTO_CELLS))
    check_positive(max_num_seqs=max_num_seqs)
    assert isinstance(max_num_seqs, int)
    if max_num_seqs > MAX_SLOTS:
        raise ConfigError(f"max_num_seqs must be at most {MAX_SLOTS}, not {max_num_seqs}")
    return max_num_seqs


def layout_for(
    *,
    on_cpu: bool,
    skips_others: bool,
    memory_kind: str,
    prefix_caching: bool,
    cells_per_sequence: int,
    max_sequence_tokens: int | None,
) -> Literal["unified", "streams"]:
    """The KV layout for `kv_layout="auto"`; docs/design.md has the reasons and figures.

    If attention skips the cells of other sequences (`skips_others`, as batchcore's kernels do),
    `unified` is best: prefixes are shared without a copy, and a sequence may use any cell.
    Otherwise `streams` are faster on a CPU. They limit a sequence to its part of the cells, so they
    are taken only if no request can be longer than that.
    """
    if skips_others:
        return "unified"
    if not prefix_caching:
        return "streams"
    fits = max_sequence_tokens is not None and max_sequence_tokens <= cells_per_sequence
    is_plain = memory_kind in {"attention", "sliding_window"}
    return "streams" if on_cpu and is_plain and fits else "unified"


def num_slots(max_num_seqs: int, kv_layout: str, prefix_caching: bool, most: int) -> int:
    """Sequences that the KV memory can tell apart.

    Beyond those that run, `unified` slots only hold cached prefixes and cost next to nothing; in
    `streams` each would take its part of the cells away from the running ones.
    """
    if kv_layout == "unified" and prefix_caching:
        return max(max_num_seqs, min(2 * max_num_seqs, MAX_SLOTS, most))
    return max_num_seqs


def max_outputs(num_slots: int, max_num_seqs: int, num_speculative_tokens: int, most: int) -> int:
    """Rows with logits that a decode call may have; each takes memory of the vocabulary's size."""
    drafts = min(max_num_seqs * num_speculative_tokens, _MOST_DRAFT_ROWS)
    return max(num_slots, min(max_num_seqs + drafts, most))


def usable_cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
