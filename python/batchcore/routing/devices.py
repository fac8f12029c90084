"""From names of devices to models and engines, for the replicas that a Router builds."""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from batchcore import _core, engine_options
from batchcore.engine import Engine
from batchcore.errors import ConfigError
from batchcore.model import Model

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping, Sequence

__all__ = ["Device", "EngineBuilder", "default_devices", "find_device"]

_CPU = "cpu"
_NOT_ACCELERATORS = ("cpu", "accel")  # both only help the CPU, and are used with any device


@dataclass(frozen=True, slots=True)
class Device:
    """Where a replica runs."""

    name: str
    """As it was asked for."""
    ggml_name: str
    """As `batchcore info` lists it; `CPU` for no GPU at all."""

    @property
    def is_cpu(self) -> bool:
        """Whether no layer is in GPU memory."""
        return self.ggml_name == "CPU"


def _known(found: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Names that may be asked for, in lower case, and ggml's for them."""
    names = {_CPU: "CPU"}
    counts: Counter[str] = Counter()
    for device in found:
        if device["type"] in _NOT_ACCELERATORS:
            continue
        backend = str(device["backend"]).lower()
        names[f"{backend}:{counts[backend]}"] = device["name"]
        counts[backend] += 1
    return names


def find_device(name: str, found: Sequence[Mapping[str, Any]] | None = None) -> Device:
    """The device that `cpu`, `cuda:1` or ggml's own name (`CUDA1`) stands for.

    Args:
        name: In any case. `BACKEND:N` is the N-th device of that backend, from 0.
        found: The devices there are; None means those of `batchcore info`.

    Raises:
        ConfigError: There is none; the message names those that there are.
    """
    known = _known(_core.devices() if found is None else found)
    if not isinstance(name, str):
        raise ConfigError(f"a device is named by a text, not {name!r:.80}")
    by_ggml_name = {ggml_name.lower(): ggml_name for ggml_name in known.values()}
    ggml_name = known.get(name.lower()) or by_ggml_name.get(name.lower())
    if ggml_name is None:
        raise ConfigError(
            f"there is no device {name!r}; this build and machine have {', '.join(known)}"
        )
    return Device(name, ggml_name)


def default_devices(found: Sequence[Mapping[str, Any]] | None = None) -> list[str]:
    """Every device with memory of its own for a model, or the CPU where there is none."""
    known = _known(_core.devices() if found is None else found)
    return [name for name in known if name != _CPU] or [_CPU]


class EngineBuilder:
    """Builds the engine of each replica, and again when it is lost. Thread-safe.

    Weights are loaded once per device and stay, whatever becomes of the engines.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | Model,
        devices: Sequence[str] | None,
        options: Mapping[str, Any],
    ) -> None:
        """Find the devices; nothing is loaded yet.

        Args:
            model: As for `Engine`. A loaded Model lies where it was loaded to, and so it can only
                be used for replicas of one device.
            devices: One name per replica; None means `default_devices`.
            options: As for `Engine`.

        Raises:
            ConfigError: A device does not exist, or there are none.
        """
        found = _core.devices()
        if isinstance(devices, str):
            raise ConfigError(f"devices must be a list of names, not the text {devices!r}")
        names = default_devices(found) if devices is None else list(devices)
        if not names:
            raise ConfigError("a router needs at least one device")
        self.devices = [find_device(name, found) for name in names]
        """Where each replica runs."""
        if isinstance(model, Model) and len({device.ggml_name for device in self.devices}) > 1:
            raise ConfigError("a loaded model is on one device; pass its path to use several")
        self._model = model
        self._options = dict(options)
        self._models: dict[str, Model] = {}
        self._lock = threading.Lock()
        self._threads = threads_of(self.devices, engine_options.usable_cores())

    def build(self, replica: int) -> Engine:
        """A new engine. Blocks while it loads.

        Raises:
            ModelLoadError, ConfigError, EngineError: As for `Engine`.
        """
        device = self.devices[replica]
        options = dict(self._options)
        if options.get("n_threads") is None and self._threads[replica] is not None:
            options["n_threads"] = self._threads[replica]
        return Engine(self._model_on(device), **options)

    def _model_on(self, device: Device) -> Model:
        if isinstance(self._model, Model):
            return self._model
        with self._lock:  # two replicas that start must not both load it
            model = self._models.get(device.ggml_name)
            if model is None:
                layers = 0 if device.is_cpu else self._options.get("n_gpu_layers", -1)
                model = Model(self._model, devices=[device.ggml_name], n_gpu_layers=layers)
                self._models[device.ggml_name] = model
            return model


def threads_of(devices: Sequence[Device], num_cores: int) -> list[int | None]:
    """Cores for each replica: those on the CPU share them out, others keep the engine's default.

    Threads of engines that compute at once on the same core would wait for each other by spinning.
    """
    on_cpu = [index for index, device in enumerate(devices) if device.is_cpu]
    threads: list[int | None] = [None] * len(devices)
    if len(on_cpu) > 1:
        each, rest = divmod(num_cores, len(on_cpu))
        for place, index in enumerate(on_cpu):
            threads[index] = max(1, each + (place < rest))
    return threads
