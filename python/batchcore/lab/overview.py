"""The frame of a report: its state, its key figures, and where they come from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from batchcore.lab.answers import PART_TITLES
from batchcore.lab.answers_sizes import RECOMMENDED
from batchcore.lab.paths import Figures, MissingFigureError, is_number, resolve
from batchcore.lab.wording import listed, points, ratio, size

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["build_facts", "build_key_figures", "build_state"]

_FACTS = {
    "Machine": (
        ("CPU", "environment.cpu"),
        ("cores, usable", "environment.num_usable_cores"),
        ("cores, all", "environment.num_cores"),
        ("load before the run (1 min)", "environment.load_average_1min"),
        ("platform", "environment.platform"),
        ("Python", "environment.python"),
        ("time", "environment.time"),
    ),
    "Build": (
        ("batchcore", "environment.build.version"),
        ("llama.cpp", "environment.build.llama_cpp_version"),
        ("llama.cpp commit", "environment.build.llama_cpp_commit"),
        ("compiler", "environment.build.compiler"),
        ("build type", "environment.build.build_type"),
        ("CPU features", "environment.build.cpu_features"),
        ("backends", "environment.build.backends"),
    ),
    "Model": (
        ("description", "model.description"),
        ("file", "model.file_name"),
        ("size", "model.size_bytes"),
        ("parameters", "model.num_params"),
        ("layers", "model.n_layer"),
        ("vocabulary", "model.n_vocab"),
        ("memory", "model.memory_kind"),
        ("SHA-256", "model.sha256"),
    ),
}


def build_state(document: Mapping[str, Any]) -> list[str]:
    """What a reader has to know before anything else; nothing for a whole, full run."""
    missing = [
        title.partition(":")[0]
        for name, title in PART_TITLES.items()
        if not resolve(document, f"parts.{name}")
    ]
    found = []
    if document.get("interrupted"):
        found.append("This run was interrupted: the report has only what was finished by then.")
    if missing:
        verb = "was" if len(missing) == 1 else "were"
        found.append(f"{listed(missing)} {verb} not run.")
    if resolve(document, "config.quick"):
        found.append("This was a quick run: few repeats, short texts, so expect more noise.")
    return found


def build_key_figures(document: Mapping[str, Any]) -> list[tuple[str, str]]:
    """A few figures and what each is."""
    makers: tuple[Callable[[Figures], tuple[str, str]], ...] = (
        lambda f: (
            ratio(f.number("parts.static.speedup.median")),
            f"as fast in a batch of {f.number('parts.static.batch_size'):.0f} as one by one",
        ),
        lambda f: (f"{f.number(RECOMMENDED):.0f}", "recommended batch size"),
        lambda f: (
            f"{points(f.number('parts.padding.lab_formula_waste_pct'))}%",
            "padding in one batch (formula)",
        ),
        lambda f: (
            ratio(f.number("parts.dynamic.improvement.throughput.median")),
            "throughput of continuous over static",
        ),
        lambda f: (
            ratio(f.number("parts.dynamic.improvement.p95_latency.median")),
            "p95 latency of continuous over static",
        ),
    )
    figures = Figures(document)
    return [made for make in makers if (made := _try(make, figures))]


def _try(make: Callable[[Figures], tuple[str, str]], figures: Figures) -> tuple[str, str] | None:
    try:
        return make(figures)
    except MissingFigureError:
        return None


def build_facts(document: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Machine, build, model and settings, as groups of names and values."""
    figures = Figures(document)
    found = []
    for title, names in _FACTS.items():
        facts = [
            (label, _say(path, value))
            for label, path in names
            if _is_there(value := figures.peek(path))
        ]
        if title == "Machine":
            facts += _devices(figures)
        found.append((title, facts))
    config = document.get("config")
    if isinstance(config, dict):
        found.append(("Settings", [(key, _say(key, value)) for key, value in config.items()]))
    return [(title, facts) for title, facts in found if facts]


def _devices(figures: Figures) -> list[tuple[str, str]]:
    found = []
    for index in range(figures.length("environment.devices")):
        path = f"environment.devices[{index}]"
        names = [figures.peek(f"{path}.{name}") for name in ("description", "type")]
        memory = figures.peek(f"{path}.memory_total_bytes")
        texts = [str(name) for name in names if name]
        if is_number(memory):
            texts.append(size(memory))
        found.append((f"device {figures.peek(f'{path}.name') or index}", ", ".join(texts)))
    return found


def _is_there(value: Any) -> bool:
    return value is not None and value not in ("", [])


def _say(name: str, value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "not set"}[value]
    if isinstance(value, list):
        return ", ".join(str(one) for one in value) or "none"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_say(key, one)}" for key, one in value.items())
    if name.endswith("_bytes") and is_number(value):
        return size(value)
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, int) and "num_params" in name:
        return f"{value:,}"
    return str(value)
