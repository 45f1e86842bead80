"""The stages of a pipeline, one file each, in the order in which they run."""

from __future__ import annotations

from edgekd.pipeline.stage import Stage
from edgekd.stages.benchmark import BenchmarkStage
from edgekd.stages.bundle import BundleStage
from edgekd.stages.data import DataStage
from edgekd.stages.distill import DistillStage
from edgekd.stages.engines import EnginesStage
from edgekd.stages.export import ExportStage
from edgekd.stages.gate import GateStage
from edgekd.stages.quantize import QuantizeStage
from edgekd.stages.report import ReportStage
from edgekd.stages.student import StudentStage
from edgekd.stages.teacher import TeacherStage

STAGES: tuple[Stage, ...] = (
    DataStage(),
    TeacherStage(),
    StudentStage(),
    DistillStage(),
    ExportStage(),
    QuantizeStage(),
    EnginesStage(),
    BenchmarkStage(),
    GateStage(),
    ReportStage(),
    BundleStage(),
)
