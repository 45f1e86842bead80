"""The device profile: a device's hardware, how a model is run on it, and its budgets.

Every figure states its source; one that was recalled and not looked up has ``verified: false``,
and one that is uncertain is left out. MB are 10⁶ bytes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, StringConstraints, model_validator

from edgekd.config.base import ConfigModel, Threads
from edgekd.config.host import local_providers, this_machine
from edgekd.config.loader import load_section
from edgekd.errors import InputError, unknown_name
from edgekd.files import profiles_folder

FigureSource = Literal[
    "nvidia-documentation",
    "ultralytics-documentation",
    "third-party",
    "derived",
    "recalled",
    "convention",
    "this-machine",
]
"""Where a figure is from. ``derived``: computed from others; ``recalled``: from memory, not looked
up; ``convention``: chosen by the profile's author; ``this-machine``: read from the system.
"""

NumberFormat = Literal["fp32", "fp16", "bf16", "int8", "fp8"]

SPARSE_OVER_DENSE = 1.8
"""The least ratio of a published sparse figure to a dense one of the same device; 2:4 sparsity
doubles the rate, and vendors round both."""


ARM = ("aarch64", "arm64", "armv7l", "armv8l")
"""Names of the processor architectures of boards."""

HOST_USABLE = 0.8
"""The share of this machine's memory that counts as usable for models."""


class SourcedValue(ConfigModel):
    """Base of every sourced value in a profile: its source, and whether it was looked up."""

    source: FigureSource
    """Where the figure is from."""
    verified: bool = True
    """Whether it was looked up; a ``recalled`` figure was not."""
    note: str | None = None
    """A remark."""

    @model_validator(mode="before")
    @classmethod
    def _with_source(cls, value: Any) -> Any:
        if isinstance(value, dict | BaseModel):
            return value
        raise ValueError(
            f"a figure says where it is from: write {{value: {value}, source: third-party}}"
        )

    @model_validator(mode="after")
    def _recalled_is_unverified(self) -> SourcedValue:
        if self.source == "recalled" and self.verified:
            raise ValueError("a recalled figure was not looked up: add 'verified: false'")
        return self


class Quantity(SourcedValue):
    """A number; its unit is in the name of its key (``total_mb``, ``bandwidth_gb_s``)."""

    value: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    """The number."""


class SourcedText(SourcedValue):
    """A name or a version. Versions are quoted in YAML, or 6.10 would become 6.1."""

    value: Annotated[str, StringConstraints(strict=True, min_length=1)]
    """The text."""


class DeviceMemory(ConfigModel):
    """Memory in MB. On a Jetson GPU and CPU share it; on a desktop it is the GPU's own."""

    total_mb: Quantity
    """Total memory."""
    usable_mb: Quantity
    """Memory that the operating system and its services leave for models."""

    @model_validator(mode="after")
    def _usable_is_a_part(self) -> DeviceMemory:
        if self.usable_mb.value > self.total_mb.value:
            raise ValueError(
                f"usable_mb = {self.usable_mb.value:g} is above total_mb = {self.total_mb.value:g}"
            )
        return self


class DeviceCompute(ConfigModel):
    """Peak rates. Dense and sparse figures have separate keys and are never mixed."""

    fp32_tflops: Quantity | None = None
    """float32 rate, TFLOPS."""
    fp16_dense_tflops: Quantity | None = None
    """Dense fp16 rate, TFLOPS."""
    int8_dense_tops: Quantity | None = None
    """Dense INT8 rate of the GPU alone, TOPS."""
    dla_int8_dense_tops: Quantity | None = None
    """Dense INT8 rate of the DLA alone, TOPS."""
    int8_sparse_tops: Quantity | None = None
    """The module's headline figure, TOPS; on an Orin NX or AGX Orin it includes the DLA."""
    fp8_sparse_tflops: Quantity | None = None
    """Sparse fp8 rate, TFLOPS."""
    bandwidth_gb_s: Quantity | None = None
    """Memory bandwidth, GB/s."""

    @model_validator(mode="after")
    def _dense_is_not_sparse(self) -> DeviceCompute:
        dense, sparse = self.int8_dense_tops, self.int8_sparse_tops
        if dense and sparse and sparse.value < SPARSE_OVER_DENSE * dense.value:
            raise ValueError(
                f"int8_dense_tops = {dense.value:g} next to int8_sparse_tops = {sparse.value:g}: "
                "the dense figure is about half of the sparse one"
            )
        return self


class DeviceCpu(ConfigModel):
    """The processor: the usable cores and its name."""

    cores: Quantity
    """Number of cores."""
    model: SourcedText
    """Name of the processor."""


class DeviceGpu(ConfigModel):
    """The GPU; the compute capability is written ``"8.7"``."""

    compute_capability: SourcedText
    """The compute capability, such as ``"8.7"``, in quotes."""


class PowerMode(SourcedValue):
    """A power mode and its watts; ``watts`` is left out of a mode without a limit (MAXN)."""

    name: str
    """Name of the mode."""
    watts: Annotated[float, Field(gt=0)] | None = None
    """Its limit; left out of a mode without one (MAXN)."""


class DeviceRuntime(ConfigModel):
    """How models are run there."""

    engine: Literal["onnxruntime", "tensorrt"]
    """The preferred runtime of the device."""
    providers: tuple[str, ...] = ()
    """ONNX Runtime's execution providers, the preferred first, for when ONNX Runtime runs the
    model. Only ``host`` leaves them out.
    """
    threads: Threads | None = None
    """Threads within an operator. Left out, the runtime chooses."""
    jetpack: SourcedText | None = None
    """JetPack version."""
    tensorrt: SourcedText | None = None
    """TensorRT version."""
    cuda: SourcedText | None = None
    """CUDA version."""


class DeviceBudget(ConfigModel):
    """Default budgets of one model, for keys that the pipeline's ``gate`` leaves out."""

    latency_ms: Quantity | None = None
    """Largest latency of one query, in ms."""
    memory_mb: Quantity | None = None
    """Largest peak memory of the process above an empty one, in MB."""
    storage_mb: Quantity | None = None
    """Largest size of the shipped files, in MB."""


class Profile(ConfigModel):
    """One device. Only ``host`` has no ``memory`` and ``cpu`` in its file: they are read from the
    machine.
    """

    name: Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9.-]*$")]
    """Name of the profile."""
    device: str
    """Name of the device."""
    kind: Literal["jetson", "desktop-gpu", "cpu-board", "x86", "host"]
    """What kind of machine it is; ``host`` is the machine edgekd runs on."""
    memory: DeviceMemory | None = None
    """Memory; read from the machine for ``host``."""
    storage_mb: Quantity | None = None
    """Storage."""
    compute: DeviceCompute = DeviceCompute()
    """Peak rates."""
    cpu: DeviceCpu | None = None
    """The processor; read from the machine for ``host``."""
    gpu: DeviceGpu | None = None
    """The GPU."""
    power_modes: tuple[PowerMode, ...] = ()
    """Power modes."""
    precisions: Annotated[tuple[NumberFormat, ...], Field(min_length=1)]
    """Number formats that the device runs."""
    runtime: DeviceRuntime
    """How models are run there."""
    budget: DeviceBudget = DeviceBudget()
    """Default budgets of one model."""
    note: str | None = None
    """A remark."""

    @model_validator(mode="after")
    def _whole(self) -> Profile:
        if self.kind != "host" and self.memory is None:
            raise ValueError("add 'memory:' with total_mb and usable_mb")
        if self.kind != "host" and not self.runtime.providers:
            raise ValueError("runtime: add 'providers: [CPUExecutionProvider]' or others")
        if self.kind in ("jetson", "desktop-gpu") and self.gpu is None:
            raise ValueError(f"a {self.kind} has a GPU: add 'gpu: {{compute_capability: …}}'")
        if self.memory and self.budget.memory_mb:
            budget, usable = self.budget.memory_mb.value, self.memory.usable_mb.value
            if budget > usable:
                raise ValueError(
                    f"budget.memory_mb = {budget:g} is above memory.usable_mb = {usable:g}"
                )
        return self

    def statements(self) -> Iterator[tuple[str, SourcedValue]]:
        """Every figure and version with its dotted key, in the order of the file."""
        yield from _statements(self, "")

    def mismatch(self, environment: Mapping[str, Any]) -> str:
        """Why a machine is not this device, or empty.

        A board is known by the name in its device tree, an x86 machine by its processor, a
        desktop's GPU by its own name. One that does not say what it is counts by its processor's
        architecture.

        Args:
            environment: of a record ``edgerun.bench/1`` or ``edgerun.info/1``.
        """
        if self.kind == "host":
            return ""
        machine, cpu = (str(environment.get(key) or "unknown") for key in ("machine", "cpu"))
        board = self.kind in ("cpu-board", "jetson")
        if board != (machine.lower() in ARM):
            return f"it was measured on {machine} ({cpu}), not on {self.name}"
        gpu = environment.get("gpu")
        if self.kind == "desktop-gpu":
            name, wanted = gpu.get("name") if isinstance(gpu, Mapping) else None, self.device
            if name is None:
                return f"it was measured on a machine without the GPU of {self.name}"
        elif board:
            name, wanted = environment.get("device"), self.device
        else:
            name, wanted = environment.get("cpu"), self.cpu.model.value if self.cpu else ""
        if name is not None and (lacking := _words(wanted) - _words(str(name))):
            return (
                f"the machine calls itself {name!r}, without {', '.join(sorted(lacking))}: it is "
                f"not {self.device}"
            )
        return ""

    def unverified(self) -> list[tuple[str, SourcedValue]]:
        """The sourced values that are not verified."""
        return [(key, stated) for key, stated in self.statements() if not stated.verified]


def _words(name: str) -> set[str]:
    """The words of a device's name that tell it from others: no sizes, clocks or trade marks.

    Super is a power mode of an Orin Nano.
    """
    text = re.sub(r"\((r|tm|c)\)", " ", name.lower().partition(",")[0])
    words = set(re.findall(r"[a-z0-9.-]+", text))
    return {word for word in words if not re.fullmatch(r"super|\d+gb|t\d+|[\d.]+", word)} | (
        {word for word in words if re.fullmatch(r"\d+", word)}
    )


def _statements(section: BaseModel, prefix: str) -> Iterator[tuple[str, SourcedValue]]:
    for key in type(section).model_fields:
        value = getattr(section, key)
        name = f"{prefix}{key}"
        if isinstance(value, SourcedValue):
            yield name, value
        elif isinstance(value, BaseModel):
            yield from _statements(value, f"{name}.")
        elif isinstance(value, tuple):
            for item in value:
                if isinstance(item, PowerMode):
                    yield f"{name}.{item.name}", item


def list_profiles() -> list[str]:
    """The names of the shipped profiles, sorted."""
    return sorted(path.stem for path in profiles_folder().glob("*.yaml"))


def load_profile(name_or_path: str, base: Path | None = None) -> Profile:
    """Read a device profile.

    Args:
        name_or_path: a shipped profile's name (``raspberry-pi-5``), or a YAML file.
        base: the folder that a relative path is relative to; None is the current folder.

    Returns:
        The profile; that of kind ``host`` is filled with this machine's figures.

    Raises:
        InputError: no shipped profile has this name (the nearest is suggested), or the file is
            missing or does not fit; the error names the file and its line.
    """
    if name_or_path.endswith((".yaml", ".yml")) or "/" in name_or_path or "\\" in name_or_path:
        path = (base or Path()) / Path(name_or_path).expanduser()
        if path.is_dir():
            raise InputError(
                "this is a folder, not a profile", where=str(path), remedy="give a YAML file"
            )
    elif name_or_path in (known := list_profiles()):
        path = profiles_folder() / f"{name_or_path}.yaml"
    else:
        raise unknown_name("profile", name_or_path, known)
    profile = load_section(path, Profile)
    return _filled(profile) if profile.kind == "host" else profile


def _filled(profile: Profile) -> Profile:
    """A ``host`` profile with this machine's memory, processor and providers."""
    machine = this_machine()
    here: FigureSource = "this-machine"
    # A fixed share, not the memory free at the moment: the profile is part of a benchmark's
    # fingerprint, and the same machine must give the same profile.
    memory = DeviceMemory(
        total_mb=Quantity(value=machine.memory_mb, source=here),
        usable_mb=Quantity(
            value=round(HOST_USABLE * machine.memory_mb),
            source="convention",
            note=f"{HOST_USABLE:.0%} of the total",
        ),
    )
    cpu = DeviceCpu(
        cores=Quantity(value=machine.cores, source=here),
        model=SourcedText(value=machine.cpu_model, source=here),
    )
    runtime = profile.runtime
    if not runtime.providers:
        runtime = runtime.model_copy(update={"providers": local_providers()})
    return profile.model_copy(
        update={
            "memory": profile.memory or memory,
            "cpu": profile.cpu or cpu,
            "runtime": runtime,
        }
    )
