"""The whole lab: plan, parts, report. Goes on where a run of the same lab was stopped."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from batchcore import _core
from batchcore.bench.environment import describe_environment, describe_model
from batchcore.bench.model_cost import ModelCost
from batchcore.errors import ConfigError, ModelLoadError
from batchcore.lab import calibrate, load, padding_part, parts, roofline
from batchcore.lab.plan import LabConfig, estimate_s, fit_to_budget, fit_to_context
from batchcore.lab.runs import without_nan
from batchcore.lab.setup import Lab
from batchcore.lab.store import PartStore, fingerprint

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Mapping

    from batchcore.model import Model

    Measure = Callable[[Lab, Mapping[str, Any]], dict[str, Any]]

__all__ = ["STAGES", "LabProgress", "check_extras", "run_lab"]

SCHEMA = 1
"""Of the document."""

_NEEDED = {"gguf": "gguf", "matplotlib": "matplotlib", "psutil": "psutil"}


@dataclass(frozen=True, slots=True)
class Stage:
    """What is measured and saved as one."""

    title: str
    sections: tuple[str, ...]
    """Of the document; those that are none of its own go under `parts`."""
    measure: Measure


STAGES = (
    Stage("1 and 2: one by one, static batch", ("sequential", "static"), parts.measure_baseline),
    Stage("3: batch sizes", ("batch_sizes",), parts.measure_batch_sizes),
    Stage("4: padding", ("padding",), padding_part.measure_padding),
    Stage("5: static and dynamic batching", ("dynamic", "monitor"), parts.measure_dynamic),
    Stage("6: under load", ("scheduler",), load.measure_load),
    Stage("roofline", ("roofline",), roofline.measure_roofline),
)
_TOP_LEVEL = ("monitor", "roofline")
_PLAN = Stage("plan", ("plan",), lambda _lab, _done: {})


@dataclass(frozen=True, slots=True)
class LabProgress:
    """Where a run is."""

    stage: int
    """0 is the plan; the last one, one more than there are parts, is the report."""
    num_stages: int
    title: str
    done: float
    """Share of this stage, 0 to 1."""
    note: str
    """What comes next; where a stage was found in a file, `found`."""
    estimated_s: float | None = None
    """About how long all parts take; known once there is a plan."""


def run_lab(
    model: Model,
    out_dir: str | os.PathLike[str],
    config: LabConfig,
    on_progress: Callable[[LabProgress], None] | None = None,
    *,
    restart: bool = False,
) -> dict[str, Any]:
    """Measure all parts, write the report, and return the document that it is made from.

    Every part that is done is saved under `parts` in the folder of the report. A later run of the
    same model, sizes, machine and build takes those that it finds there. Ctrl-C goes through, and
    so does what fails in a part; parts that are done stay.

    Args:
        model: What to measure.
        out_dir: Folder of the report; made where there is none.
        config: Sizes; they are cut down where the model is too slow for the time budget.
        on_progress: Called between runs, never during one.
        restart: Measure everything, whatever was saved.

    Raises:
        ConfigError: The folder can't be written, an extra is missing, or the model can't generate.
        EngineError: A part failed.
        OSError: The disk is full or broken.
    """
    check_extras()
    store = PartStore(out_dir)
    if restart:
        store.clear([name for stage in (_PLAN, *STAGES) for name in stage.sections])
    report = on_progress or (lambda _progress: None)
    report(LabProgress(0, len(STAGES), "reading the model file", 0.0, ""))
    environment, described = describe_environment(), describe_model(model)
    cost, why_no_cost = _read_cost(model)
    lab = Lab(model, fit_to_context(config, model.n_ctx_train), cost, why_no_cost)
    same = {
        "model": [described["sha256"], described["size_bytes"]],
        "machine": [environment["cpu"], environment["num_usable_cores"], _device_names()],
        "build": [environment["build"][key] for key in ("version", "llama_cpp_commit")],
    }
    plan = _make_plan(lab, store, fingerprint(**same, config=lab.config.to_dict()), report)
    lab.config = LabConfig(**_with_tuples(plan["config"]))
    mark = fingerprint(**same, config=plan["config"])
    done: dict[str, Any] = {}
    reused: list[str] = []
    for number, stage in enumerate(STAGES, 1):
        found = store.load(stage.sections, mark)
        if found is not None:
            reused += stage.sections
            report(LabProgress(number, len(STAGES), stage.title, 1.0, "found"))
        else:
            found = _measure(lab, stage, number, done, report, plan["estimated_s"])
            store.save(found, mark)
        done.update(found)
    document = {
        "schema": SCHEMA,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "interrupted": False,
        "environment": environment,
        "model": _more_of(model, described),
        "config": {
            **plan["config"],
            "command": environment["command"],
            "calibration": plan["rates"],
            "estimated_s": plan["estimated_s"],
            "prefix_caching": False,
            "reused_parts": reused,
        },
        "parts": {name: value for name, value in done.items() if name not in _TOP_LEVEL},
        **{name: done[name] for name in _TOP_LEVEL},
    }
    report(LabProgress(len(STAGES) + 1, len(STAGES), "report", 0.0, ""))
    finish(document, out_dir)
    return document


def finish(document: dict[str, Any], out_dir: str | os.PathLike[str]) -> None:
    """Add answers and recommendations to a document, and write all of it."""
    # Only here, since plotting takes long to import.
    from batchcore.lab.answers import build_answers  # noqa: PLC0415
    from batchcore.lab.recommendations import build_recommendations  # noqa: PLC0415
    from batchcore.lab.report import write_report  # noqa: PLC0415

    document["answers"] = build_answers(document)
    document["recommendations"] = build_recommendations(document)
    write_report(document, out_dir)


def check_extras() -> None:
    """See that everything is installed, before anything is measured.

    Raises:
        ConfigError: Something is not; the message says how to get it.
    """
    missing = [name for module, name in _NEEDED.items() if find_spec(module) is None]
    if missing:
        raise ConfigError(f"the lab needs {' and '.join(missing)}: pip install 'batchcore[lab]'")


def _make_plan(
    lab: Lab, store: PartStore, mark: str, report: Callable[[LabProgress], None]
) -> dict[str, Any]:
    """The sizes that fit the budget; those of the run before, or its parts would not fit them."""
    found = store.load(_PLAN.sections, mark)
    if found is not None:
        return dict(found["plan"])

    def measure(lab: Lab, _done: Mapping[str, Any]) -> dict[str, Any]:
        rates = calibrate.measure_rates(lab)
        config = fit_to_budget(lab.config, rates)
        return {
            "plan": {
                "config": config.to_dict(),
                "rates": asdict(rates),
                "estimated_s": estimate_s(config, rates),
            }
        }

    plan = _measure(lab, Stage(_PLAN.title, _PLAN.sections, measure), 0, {}, report, None)
    store.save(plan, mark)
    return dict(plan["plan"])


def _measure(
    lab: Lab,
    stage: Stage,
    number: int,
    done: Mapping[str, Any],
    report: Callable[[LabProgress], None],
    estimated_s: float | None,
) -> dict[str, Any]:
    def on_step(share: float, note: str) -> None:
        report(LabProgress(number, len(STAGES), stage.title, share, note, estimated_s))

    lab.on_step = on_step
    found: dict[str, Any] = without_nan(stage.measure(lab, done))
    on_step(1.0, "done")
    return found


def _read_cost(model: Model) -> tuple[ModelCost | None, str]:
    try:
        return ModelCost.from_gguf(model.path), ""
    except (ConfigError, ModelLoadError) as error:
        return None, str(error)


def _device_names() -> list[str]:
    return [device["description"] for device in _core.devices()]


def _more_of(model: Model, described: dict[str, Any]) -> dict[str, Any]:
    names = ("architecture", "memory_kind", "n_vocab", "n_layer", "n_embd", "n_ctx_train")
    return {**described, **{name: getattr(model, name) for name in names}}


def _with_tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: tuple(value) if isinstance(value, list) else value for key, value in values.items()
    }
