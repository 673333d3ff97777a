"""All settings in one model: `settings.load` fills it, `settings.plan` says what follows."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from onstream.settings.base import Section
from onstream.settings.sections.deployment import DeploymentSettings
from onstream.settings.sections.images import ImagesSettings
from onstream.settings.sections.inference import InferenceSettings, TeacherInferenceSettings
from onstream.settings.sections.jobs import JobsSettings
from onstream.settings.sections.orchestrator import OrchestratorSettings
from onstream.settings.sections.run import (
    DeliverySettings,
    LogSettings,
    ModelSettings,
    RedisSettings,
    RunSettings,
)
from onstream.settings.sections.task import EvalSettings, TaskSettings
from onstream.settings.sections.teachers import NamedTeacherSettings, TeacherName
from onstream.settings.sections.trainer import CheckpointSettings, TrainerSettings
from onstream.settings.sections.weights import WeightsSettings


class Settings(Section):
    """Every section. Sources, strongest first: command line, environment
    (`ONSTREAM_SECTION__NAME`), TOML files (later wins), defaults.
    """

    run: RunSettings = RunSettings()
    model: ModelSettings = ModelSettings()
    task: TaskSettings = TaskSettings()
    images: ImagesSettings = ImagesSettings()
    eval: EvalSettings = EvalSettings()
    deployment: DeploymentSettings = DeploymentSettings()
    inference: InferenceSettings = InferenceSettings()
    teacher_inference: TeacherInferenceSettings = TeacherInferenceSettings()
    orchestrator: OrchestratorSettings = OrchestratorSettings()
    teachers: dict[TeacherName, NamedTeacherSettings] = Field(default_factory=dict)
    trainer: TrainerSettings = TrainerSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    weights: WeightsSettings = WeightsSettings()
    jobs: JobsSettings = JobsSettings()
    redis: RedisSettings = RedisSettings()
    delivery: DeliverySettings = DeliverySettings()
    log: LogSettings = LogSettings()

    @property
    def run_dir(self) -> Path:
        """Where the run keeps its files."""
        return self.run.dir / self.run.name
