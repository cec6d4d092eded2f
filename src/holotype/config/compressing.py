"""Settings of `compress` and `benchmark`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import BaseModel, Field, model_validator

from holotype.config.data import FROZEN, DatasetConfig
from holotype.config.judging import PolicyConfig

__all__ = [
    "BenchmarkConfig",
    "BudgetConfig",
    "CompressConfig",
    "Int8Config",
    "MagnitudeConfig",
    "Method",
    "RoundedConfig",
    "StructuredConfig",
    "StudentConfig",
]

Method = Literal["bf16", "int8", "mixed", "structured", "qat", "student", "magnitude"]


class BudgetConfig(BaseModel):
    """What a compressed model may cost; null: no limit. Accuracy is that of validation."""

    model_config = FROZEN

    drop: float | None = Field(1.0, ge=0, le=100, description="largest loss of accuracy, in points")
    class_drop: float | None = Field(
        None, ge=0, le=100, description="largest loss of any class's recall, in points"
    )
    size: int | None = Field(None, gt=0, description="largest payload that is served, in bytes")
    latency: float | None = Field(None, gt=0, description="longest median latency of one image here, in ms")


class Int8Config(BaseModel):
    """INT8 after training."""

    model_config = FROZEN

    calibration: Literal["auto", "min-max", "percentile", "entropy"] = Field(
        "auto",
        description="how ranges are read from the images; auto: the one that changes answers least",
    )
    images: int = Field(
        256, ge=8, description="training images that ranges are read from, equally many per class"
    )
    floats: int = Field(
        4, ge=0, description="layers that mixed precision may leave in float, the most sensitive first"
    )
    sensitivity: Literal["auto", "always"] = Field(
        "auto",
        description="what rounding each layer alone costs; auto: measured where mixed precision is tried",
    )


class RoundedConfig(BaseModel):
    """Quantization-aware training."""

    model_config = FROZEN

    epochs: int = Field(4, ge=1, description="passes over the training images")
    learning_rate: float = Field(
        1e-4, gt=0, description="of weights, relative to the size of each layer's; falling to 0 over a cosine"
    )
    scale_rate: float = Field(1e-4, gt=0, description="of the scales of activations, relative to their size")


class StructuredConfig(BaseModel):
    """Channels removed, and what they did learned again by the rest."""

    model_config = FROZEN

    sparsities: tuple[float, ...] = Field(
        (0.3, 0.5, 0.7), description="shares of the channels to remove; each is a candidate"
    )
    steps: int = Field(2, ge=1, description="a share is removed in so many steps, each followed by training")
    epochs: int = Field(4, ge=1, description="passes over the training images after each step")
    round_to: int = Field(16, ge=1, description="channels of a layer are kept in multiples of it")


class MagnitudeConfig(BaseModel):
    """Small weights set to 0: the file shrinks only when it is compressed, and nothing becomes faster.

    By a threshold or by a sparsity: one of the two is null.
    """

    model_config = FROZEN

    threshold: float | None = Field(
        0.01, gt=0, description="weights below it become 0; null, as where a sparsity is given: by sparsity"
    )
    sparsity: float | None = Field(
        None, gt=0, lt=1, description="share of the weights that become 0; null: by threshold"
    )
    scope: Literal["global", "layer"] = Field(
        "global", description="what a sparsity is the share of: all weights together, or those of each layer"
    )
    epochs: int = Field(0, ge=0, description="passes over the training images that keep the zeros")

    @model_validator(mode="before")
    @classmethod
    def _by_sparsity(cls, values: Any) -> Any:
        """A sparsity takes the place of the threshold that nobody gave."""
        if isinstance(values, Mapping) and values.get("sparsity") is not None:
            return {"threshold": None, **values}
        return values

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if self.threshold is None and self.sparsity is None:
            raise ValueError("neither threshold nor sparsity is given, so no weight would become 0")
        if self.threshold is not None and self.sparsity is not None:
            raise ValueError("threshold and sparsity are both given: set one of them to null")
        if self.sparsity is None and self.scope == "layer":
            raise ValueError("scope is about a sparsity, a threshold is the same everywhere: give sparsity")
        return self


class StudentConfig(BaseModel):
    """A smaller network that learns from the bundle's answers."""

    model_config = FROZEN

    name: str | None = Field(
        None,
        description="a timm architecture; null: the bundle's own network on smaller images, which is faster,"
        " but has as many bytes",
    )
    weights: str = Field(
        "auto", description="of a network that is named; auto: packaged, then the hub | none: random | a file"
    )
    size: int | None = Field(
        None, ge=16, description="side of its images; null: as the bundle's, 5/7 of it for its own network"
    )
    epochs: int = Field(8, ge=1, description="passes over the training images")


class CompressConfig(BaseModel):
    """Settings of `compress`."""

    model_config = FROZEN

    budget: BudgetConfig = BudgetConfig()
    methods: tuple[Method, ...] = Field(
        ("bf16", "int8", "mixed", "structured", "qat", "student"),
        description="what may be tried, from cheap to dear; magnitude is for those who ask",
    )
    search: Literal["enough", "all"] = Field(
        "enough",
        description="enough: dearer methods are tried while nothing fits | all: every method is tried",
    )
    int8: Int8Config = Int8Config()
    qat: RoundedConfig = RoundedConfig()
    structured: StructuredConfig = StructuredConfig()
    magnitude: MagnitudeConfig = MagnitudeConfig()
    student: StudentConfig = StudentConfig()
    rounds: int = Field(12, ge=3, description="turns that each candidate has in the race that decides")
    seed: int = Field(0, ge=0, description="of the choice of images and of training")
    policy: PolicyConfig = PolicyConfig()
    data: DatasetConfig = DatasetConfig()


class BenchmarkConfig(BaseModel):
    """Settings of `benchmark`."""

    model_config = FROZEN

    runtimes: tuple[Literal["torch", "onnxruntime", "openvino", "tensorrt"], ...] | None = Field(
        None, description="what is measured; null: all that are installed and that the bundle has files for"
    )
    precisions: tuple[Literal["fp32", "bf16"], ...] = Field(
        ("fp32", "bf16"), description="arithmetic of what is not in integers"
    )
    batches: tuple[int, ...] = Field((1, 8), description="images per call")
    threads: tuple[int, ...] | None = Field(None, description="threads; null: all cores")
    rounds: int = Field(12, ge=3, description="turns of each setup")
    seconds: float = Field(0.25, gt=0, description="of each setup and batch size in a turn")
    data: DatasetConfig = DatasetConfig()
