"""The report of a lab run in files: whole, the same every time, and readable without a network."""

from __future__ import annotations

import copy
import errno
import json
import os
import re
import runpy
import sys
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest
from batchcore.errors import ConfigError

mpl = pytest.importorskip("matplotlib")

from batchcore.lab.plots import PLOT_TITLES, Plot, _draw, draw_plots  # noqa: E402
from batchcore.lab.report import write_report  # noqa: E402

sample_document = runpy.run_path(str(Path(__file__).with_name("lab_document.py")))[
    "sample_document"
]
MAX_PNG_BYTES = 60_000
VOID = {"meta", "img", "br", "link", "hr", "input"}


@pytest.fixture(scope="module")
def sample() -> dict[str, Any]:
    return sample_document()


@pytest.fixture
def document(sample) -> dict[str, Any]:
    """One to change."""
    return copy.deepcopy(sample)


@pytest.fixture(scope="module")
def report(sample, tmp_path_factory) -> Path:
    """Written once, to be read only."""
    folder = tmp_path_factory.mktemp("report")
    write_report(sample, folder)
    return folder


@pytest.fixture
def without_plots(monkeypatch):
    """Drawing takes long; most of the report has nothing to do with it."""
    monkeypatch.setattr("batchcore.lab.plots._draw", lambda _document, _name: "Not drawn here.")


def keep_two_parts(document: dict[str, Any]) -> None:
    """Those that give one plot."""
    document["parts"] = {name: document["parts"][name] for name in ("sequential", "static")}
    document["monitor"] = document["roofline"] = None


class Page(HTMLParser):
    """A page as its elements; refuses what is not nested well."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if not self._open or self._open[-1] != "style":
            self.text.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def words(self) -> str:
        return re.sub(r"\s+", " ", "".join(self.text))


def page(folder: Path) -> Page:
    return Page((folder / "index.html").read_text(encoding="utf-8"))


def read(folder: Path) -> dict[str, bytes]:
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


# -- the files ------------------------------------------------------------------------------------


def test_all_files_are_there_and_nothing_else(report):
    plots = {f"plots/{name}.{ending}" for name in PLOT_TITLES for ending in ("png", "svg")}
    assert set(read(report)) == {"index.html", "report.md", "report.json", *plots}


def test_the_document_is_saved_with_its_answers(report, sample):
    saved = json.loads((report / "report.json").read_text(encoding="utf-8"))
    assert len(saved["answers"]) == 12
    assert saved["recommendations"]
    assert {name: saved[name] for name in sample} == sample


def test_the_same_document_gives_the_same_bytes(report, sample, tmp_path):
    with mpl.rc_context({"font.size": 30, "axes.facecolor": "red", "svg.fonttype": "path"}):
        before = dict(mpl.rcParams)
        found = write_report(copy.deepcopy(sample), tmp_path)
        assert dict(mpl.rcParams) == before  # what a user has set is neither used nor changed
    assert read(tmp_path) == read(report)
    assert found.html == tmp_path / "index.html"
    assert len(found.plots) == 2 * len(PLOT_TITLES)
    assert not found.skipped


def test_a_document_in_which_answers_are_already(report, tmp_path, without_plots):
    saved = json.loads((report / "report.json").read_text(encoding="utf-8"))
    saved["answers"] = [{"number": 1, "answer": "stale"}]
    write_report(saved, tmp_path)
    assert (tmp_path / "report.json").read_bytes() == (report / "report.json").read_bytes()


def test_what_json_has_no_word_for(document, tmp_path, without_plots):
    document["parts"]["sequential"]["single_s"] = float("nan")
    document["parts"]["scheduler"]["loads"][0]["request_rate"] = float("inf")
    write_report(document, tmp_path)
    saved = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert saved["parts"]["sequential"]["single_s"] is None
    assert saved["parts"]["scheduler"]["loads"][0]["request_rate"] == "inf"


# -- the page -------------------------------------------------------------------------------------


def test_the_page_needs_nothing_from_outside(report):
    text = (report / "index.html").read_text(encoding="utf-8")
    elements = Page(text).elements
    assert not [tag for tag, _ in elements if tag in {"script", "link", "iframe", "object"}]
    for _, attributes in elements:
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("src", "href", "srcset", "poster", "action"):
            target = attributes.get(name) or "#"
            assert target.startswith(("#", "data:image/svg+xml;base64,"))
    assert "url(" not in text
    assert "@import" not in text
    assert "http:" not in text
    assert "https:" not in text


def test_the_page_is_well_structured(report):
    found = page(report)
    levels = [int(tag[1]) for tag, _ in found.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(two - one <= 1 for one, two in pairwise(levels))
    assert len(found.all("caption")) == len(found.all("table")) > 8
    assert len(found.all("img")) == len(PLOT_TITLES)
    assert all(image["alt"] for image in found.all("img"))
    assert found.all("html") == [{"lang": "en"}]


def test_the_contents_lead_to_every_part(report):
    found = page(report)
    ids = [attributes["id"] for _, attributes in found.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    links = {(link["href"] or "")[1:] for link in found.all("a")}
    parts = {f"part-{number}" for number in range(1, 7)}
    assert links >= {*parts, "answers", "recommendations", "environment"}
    assert links <= set(ids)


def test_both_forms_say_the_same(report):
    saved = json.loads((report / "report.json").read_text(encoding="utf-8"))
    words = page(report).words
    markdown = (report / "report.md").read_text(encoding="utf-8")
    for one in saved["answers"]:
        for text in (one["question"], one["answer"], one["reasoning"]):
            assert text.replace("`", "") in words
            assert text in markdown
        for path, value in one["figures"].items():
            assert path in words
            assert f"`{path}` = " in markdown
            assert json.dumps(value) in words
    for one in saved["recommendations"]:
        assert one["text"].replace("`", "") in words
        assert one["text"] in markdown
    for value in (saved["model"]["sha256"], saved["config"]["command"], "Sample CPU 2000"):
        assert value in words
        assert value in markdown


def test_the_markdown_is_in_order(report):
    text = (report / "report.md").read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert (report / target).is_file(), target
    for target in re.findall(r"\]\(#([^)]+)\)", text):
        assert f'<a id="{target}"></a>' in text
    tables = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    assert len(tables) == len(page(report).all("table"))
    for table in tables:
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()}) == 1
    assert "\n\n\n" not in text


def test_texts_of_a_document_are_no_markup(document, tmp_path, without_plots):
    bad = "<script>alert(1)</script> | a*b* [c](d) & `"
    document["model"]["description"] = bad
    document["parts"]["batch_sizes"]["rows"][0]["note"] = bad
    document["parts"]["batch_sizes"]["recommended"]["reason"] = bad
    document["config"]["command"] = bad
    write_report(document, tmp_path)
    found = page(tmp_path)
    assert not found.all("script")
    assert found.words.count("<script>alert(1)</script>") >= 4
    markdown = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "<script" not in markdown
    assert "\\| a\\*b\\* \\[c\\](d) &amp;" in markdown


# -- what is missing ------------------------------------------------------------------------------


def test_an_interrupted_run_says_what_is_missing(document, tmp_path):
    document["interrupted"] = True
    keep_two_parts(document)
    (tmp_path / "plots").mkdir()
    (tmp_path / "plots" / "roofline.png").write_bytes(b"of an earlier run")
    (tmp_path / "plots" / "mine.png").write_bytes(b"not of a report")
    found = write_report(document, tmp_path)
    assert set(found.skipped) == set(PLOT_TITLES) - {"batch_comparison"}
    assert {file.name for file in (tmp_path / "plots").iterdir()} == {
        "batch_comparison.png",
        "batch_comparison.svg",
        "mine.png",
    }
    for text in (page(tmp_path).words, (tmp_path / "report.md").read_text(encoding="utf-8")):
        assert "This run was interrupted" in text
        assert "Part 3, Part 4, Part 5 and Part 6 were not run." in text
        assert "The run was interrupted before it was finished." in text
        assert "Without its plots: throughput and memory by batch size." in text
        assert "No plot of roofline of the model on this machine: This run has no roofline" in text
        assert "Not answered." in text
    assert len(page(tmp_path).all("img")) == 1


def test_a_document_with_nothing_in_it(tmp_path):
    found = write_report({"schema": 1}, tmp_path)
    assert set(found.skipped) == set(PLOT_TITLES)
    assert found.plots == ()
    words = page(tmp_path).words
    assert words.count("Not run.") == 6
    assert words.count("Not answered.") == 12
    assert "None: the parts that they rest on were not run." in words


def test_a_quick_run_is_called_so(document, tmp_path, without_plots):
    document["config"]["quick"] = True
    write_report(document, tmp_path)
    assert "This was a quick run" in page(tmp_path).words


# -- the plots ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PLOT_TITLES)
def test_plots_are_small_and_have_text(report, name):
    png = (report / "plots" / f"{name}.png").read_bytes()
    assert png.startswith(b"\x89PNG")
    assert len(png) <= MAX_PNG_BYTES
    svg = ET.fromstring((report / "plots" / f"{name}.svg").read_text(encoding="utf-8"))
    texts = [element for element in svg.iter() if element.tag.endswith("}text")]
    assert len(texts) > 4
    assert svg.get("width") == "345.6pt"


def texts(svg: str) -> set[str]:
    return {"".join(one.itertext()).strip() for one in ET.fromstring(svg).iter()}


def test_latencies_without_single_requests_are_percentiles(document):
    for mode in ("static", "continuous"):
        del document["parts"]["dynamic"][mode]["latencies_s"]
        del document["parts"]["dynamic"][mode]["ttfts_s"]
    found = _draw(document, "latency_distributions")
    assert isinstance(found, Plot)
    assert {"mean", "p50", "p95", "p99"} <= texts(found.svg)
    assert found.alt.startswith("Bars of mean and percentiles. Latency: static p50")


def test_a_gpu_is_shown_where_one_was_watched(document):
    columns = document["monitor"]["static"]["columns"]
    columns["gpu0_utilisation_percent"] = [50.0] * len(columns["time_s"])
    found = _draw(document, "utilisation_over_time")
    assert isinstance(found, Plot)
    assert "GPU utilisation (%)" in texts(found.svg)
    assert "CPU of the process (%)" not in texts(found.svg)


@pytest.mark.parametrize("value", [None, 0, -1, "$x", []])
def test_no_value_breaks_a_plot(document, value):
    dynamic, sizes = document["parts"]["dynamic"], document["parts"]["batch_sizes"]
    dynamic["static"]["output_tokens_per_s"] = value
    dynamic["continuous"]["latencies_s"] = value
    dynamic["slot_waste"]["static"] = value
    document["parts"]["sequential"]["runs"][0]["total_s"] = value
    document["parts"]["padding"]["prompt_strategies"][1]["strategy"] = value
    document["parts"]["padding"]["slot"][0]["counted"]["waste"] = value
    sizes["rows"][1]["output_tokens_per_s"] = value
    sizes["rows"][2]["kv_bytes"] = value
    sizes["recommended"]["batch_size"] = value
    document["monitor"]["static"]["columns"]["num_running"][3] = value
    document["roofline"]["points"][0]["seconds_per_step"] = value
    plots = draw_plots(document)
    assert set(plots.drawn) | set(plots.skipped) == set(PLOT_TITLES)


# -- what fails -----------------------------------------------------------------------------------


def test_without_matplotlib(document, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match=r"pip install 'batchcore\[lab\]'"):
        write_report(document, tmp_path)
    assert set(read(tmp_path)) == {"report.json"}  # what was measured is safe


def test_a_folder_that_can_not_be_made(document, tmp_path):
    file = tmp_path / "file"
    file.write_text("", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"can't write .*file"):
        write_report(document, file / "report")


@pytest.mark.parametrize("name", ["report.json", "index.html", "plots/batch_comparison.png"])
def test_a_file_that_can_not_be_written(document, tmp_path, name):
    keep_two_parts(document)
    (tmp_path / name / "in the way").mkdir(parents=True)
    with pytest.raises(ConfigError, match=rf"can't write .*{name}"):
        write_report(document, tmp_path)
    assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.parametrize("count", [0, 1, 4])
def test_a_full_disk_leaves_what_was_there(document, tmp_path, monkeypatch, count):
    keep_two_parts(document)
    write_report(document, tmp_path)
    before = read(tmp_path)
    calls = iter(range(100))

    def full(_file: int) -> None:
        if next(calls) >= count:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    document["created"] = "2026-02-03T04:05:06+00:00"
    document["parts"]["static"]["median"]["total_s"] *= 2
    with pytest.raises(OSError, match="No space left") as caught:
        write_report(document, tmp_path)
    assert caught.value.filename
    after = read(tmp_path)
    assert set(after) == set(before)  # nothing is half-written, nothing left over
    assert len([name for name in before if after[name] != before[name]]) == count


@pytest.mark.parametrize("schema", [None, 0, 2, "1"])
def test_a_document_of_another_schema(document, tmp_path, schema):
    document["schema"] = schema
    with pytest.raises(ConfigError, match="schema"):
        write_report(document, tmp_path)
    assert not read(tmp_path)


def test_a_document_that_does_not_fit_into_json(document, tmp_path):
    document["config"]["odd"] = object()
    with pytest.raises(ConfigError, match="does not fit into JSON"):
        write_report(document, tmp_path)
    assert not read(tmp_path)
