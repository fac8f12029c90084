"""The report of a lab run in files: one page for a browser, Markdown, the document, the plots."""

from __future__ import annotations

import base64
import json
import os
import re
import secrets
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
from markupsafe import Markup, escape

from batchcore.bench.result import _TRANSIENT, _for_json, write_text_atomically
from batchcore.errors import ConfigError
from batchcore.lab.answers import build_answers
from batchcore.lab.overview import build_facts, build_key_figures, build_state
from batchcore.lab.paths import resolve
from batchcore.lab.plots import PLOT_TITLES, draw_plots
from batchcore.lab.recommendations import build_recommendations
from batchcore.lab.sections import build_sections

if TYPE_CHECKING:
    from collections.abc import Mapping

    from batchcore.lab.plots import Plot, Plots

__all__ = ["WrittenReport", "write_report"]

_SCHEMA = 1
_CODE = re.compile(r"`([^`]+)`")


@dataclass(frozen=True, slots=True)
class WrittenReport:
    """Where the report is."""

    html: Path
    markdown: Path
    json: Path
    plots: tuple[Path, ...]
    skipped: Mapping[str, str]
    """Plots that could not be drawn, and why."""


def write_report(document: Mapping[str, Any], out_dir: str | os.PathLike[str]) -> WrittenReport:
    """Write `index.html`, `report.md`, `report.json` and the plots of a document.

    Answers and recommendations are made anew. Each file is written whole or not at all, the
    document first, so that what was measured is safe whatever fails later. The same document gives
    the same bytes. Plots of an earlier report that this one has not are removed.

    Args:
        document: As the lab writes it.
        out_dir: Where to; made if it is not there.

    Raises:
        ConfigError: matplotlib is missing, the folder can't be written, or the document is none.
        OSError: The disk is full or broken.
    """
    content = _complete(document)
    folder = Path(out_dir)
    _make_folder(folder / "plots")
    files = WrittenReport(
        folder / "index.html", folder / "report.md", folder / "report.json", (), {}
    )
    text = json.dumps(content, ensure_ascii=False, allow_nan=False, indent=1)
    write_text_atomically(files.json, text + "\n")
    plots = draw_plots(content)
    paths = _write_plots(folder / "plots", plots)
    view = _view(content, plots)
    write_text_atomically(files.markdown, _render("report.md.j2", view, is_html=False))
    write_text_atomically(files.html, _render("report.html.j2", view, is_html=True))
    return WrittenReport(files.html, files.markdown, files.json, paths, plots.skipped)


def _complete(document: Mapping[str, Any]) -> dict[str, Any]:
    """The document as it will be saved: with answers, and without what JSON has no word for."""
    if document.get("schema") != _SCHEMA:
        raise ConfigError(
            f"the document has schema {document.get('schema')}, and this batchcore reads {_SCHEMA}"
        )
    try:
        content: dict[str, Any] = json.loads(json.dumps(_for_json(dict(document))))
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"the document does not fit into JSON: {error}") from error
    content["answers"] = build_answers(content)
    content["recommendations"] = build_recommendations(content)
    return content


def _view(document: Mapping[str, Any], plots: Plots) -> dict[str, Any]:
    """What the templates see; both the same."""
    return {
        "answers": document["answers"],
        "recommendations": document["recommendations"],
        "sections": build_sections(document),
        "facts": build_facts(document),
        "key_figures": build_key_figures(document),
        "state": build_state(document),
        "model": str(resolve(document, "model.description") or "an unknown model"),
        "created": document.get("created"),
        "plots": plots.drawn,
        "skipped": plots.skipped,
        "plot_titles": PLOT_TITLES,
    }


def _render(template: str, view: Mapping[str, Any], *, is_html: bool) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=is_html,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["words"] = _html_words if is_html else _markdown_words
    environment.filters["exact"] = _exact
    environment.filters["data_uri"] = _data_uri
    return environment.get_template(template).render(view)


def _html_words(text: str) -> Markup:
    """A sentence, with what is between backticks as code."""
    return Markup(_CODE.sub(r"<code>\1</code>", str(escape(text))))


def _markdown_words(text: str) -> str:
    """A sentence or a cell in which nothing but code is markup."""
    plain = re.sub(r"\s+", " ", str(text)).replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"([\\|*\[\]])", r"\\\1", plain)


def _exact(value: Any) -> str:
    """A figure as it is in the document."""
    return json.dumps(value, ensure_ascii=False)


def _data_uri(plot: Plot) -> str:
    encoded = base64.b64encode(plot.svg.encode()).decode("ascii")
    return f"data:image/svg+xml;base64,{encoded}"


def _write_plots(folder: Path, plots: Plots) -> tuple[Path, ...]:
    paths = []
    for name in PLOT_TITLES:
        png, svg = (folder / f"{name}.{ending}" for ending in ("png", "svg"))
        plot = plots.drawn.get(name)
        if plot is None:
            for stale in (png, svg):
                _remove(stale)
            continue
        _write_bytes_atomically(png, plot.png)
        write_text_atomically(svg, plot.svg)
        paths += [png, svg]
    return tuple(paths)


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _typed(error, folder) from error


def _remove(file: Path) -> None:
    try:
        file.unlink(missing_ok=True)
    except OSError as error:
        raise _typed(error, file) from error


def _write_bytes_atomically(path: Path, content: bytes) -> None:
    """As `write_text_atomically` does."""
    partial = path.with_name(f".{secrets.token_hex(8)}.partial")
    try:
        with partial.open("xb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
    except OSError as error:
        raise _typed(error, path) from error
    finally:
        with suppress(OSError):  # nothing to remove, as after success
            partial.unlink()


def _typed(error: OSError, path: Path) -> Exception:
    """What may go away by itself stays an OSError; all else needs another path."""
    if error.errno in _TRANSIENT:
        return OSError(error.errno, error.strerror, os.fspath(path))
    return ConfigError(f"can't write {path}: {error.strerror}")
