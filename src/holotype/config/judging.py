"""Settings of the verbs that use a bundle."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field

from holotype.config.data import FROZEN, DatasetConfig, MaxPixels

__all__ = [
    "CompareConfig",
    "EvaluateConfig",
    "ExplainConfig",
    "ExportConfig",
    "HardSamplesConfig",
    "PolicyConfig",
    "PredictConfig",
]

RuntimeChoice = Literal["auto", "torch", "onnxruntime", "openvino", "tensorrt"]
PrecisionChoice = Literal["auto", "fp32", "bf16"]

_PRECISION = "arithmetic of what is not in integers; auto: as the bundle was accepted"
_THREADS = "of the runtime; null: as it was measured to be the fastest, else all cores"


class PolicyConfig(BaseModel):
    """When an answer is "not sure"; fitted on validation, and kept in the bundle."""

    model_config = FROZEN

    abstain: Literal["none", "score", "conformal"] = Field(
        "conformal",
        description="not sure is an answer; score: below the threshold of its class | conformal: where not"
        " exactly one class is left open (Sadinle et al. 2019)",
    )
    coverage: float = Field(
        0.95, gt=0, lt=1, description="conformal: share of images whose class is among those left open"
    )
    precision: float = Field(
        0.95, gt=0, lt=1, description="score: share of the answers of a class that are right where sure"
    )
    unfamiliar: float | None = Field(
        0.01,
        gt=0,
        lt=1,
        description="share of validation images that are called unlike what was learned; null: none ever",
    )


class EvaluateConfig(BaseModel):
    """Settings of `evaluate`."""

    model_config = FROZEN

    split: Literal["auto", "train", "validation", "test"] = Field(
        "auto", description="auto: test where there is one, else validation"
    )
    runtime: RuntimeChoice = Field("auto", description="what runs the model")
    precision: PrecisionChoice = Field("auto", description=_PRECISION)
    threads: int | None = Field(None, ge=1, description=_THREADS)
    data: DatasetConfig = DatasetConfig()


class PredictConfig(BaseModel):
    """Settings of `predict`."""

    model_config = FROZEN

    top: int = Field(5, ge=1, description="classes listed per image")
    runtime: RuntimeChoice = Field("auto", description="what runs the model")
    precision: PrecisionChoice = Field("auto", description=_PRECISION)
    threads: int | None = Field(None, ge=1, description=_THREADS)
    max_pixels: MaxPixels = 50_000_000


class ExportConfig(BaseModel):
    """Settings of `export`."""

    model_config = FROZEN

    images: int = Field(128, ge=64, description="real images pushed through both models by the parity gate")
    precision: Literal["auto", "fp32", "bf16", "fp16", "int8"] = Field(
        "auto",
        description="auto: as it is, of tensorrt fp16 | bf16: of openvino, weights in half precision"
        " | fp16, int8: of tensorrt",
    )
    calibration_images: int = Field(
        256, ge=8, description="training images that the ranges of an int8 tensorrt graph are read from"
    )
    max_batch: int = Field(32, ge=1, description="largest batch of a tensorrt engine")
    measure: bool = Field(True, description="measure which runtime is the fastest here, for runtime=auto")
    policy: PolicyConfig = PolicyConfig()
    data: DatasetConfig = DatasetConfig()


class ExplainConfig(BaseModel):
    """Settings of `explain`."""

    model_config = FROZEN

    split: Literal["auto", "train", "validation", "test"] = Field(
        "auto", description="where confused images are taken from; auto: test where there is one"
    )
    pairs: int = Field(3, ge=1, description="confused pairs shown, the most frequent first")
    images: int = Field(4, ge=1, le=32, description="images of each pair and side")
    data: DatasetConfig = DatasetConfig()


class HardSamplesConfig(BaseModel):
    """Settings of `hard-samples`."""

    model_config = FROZEN

    split: Literal["auto", "train", "validation", "test"] = Field(
        "validation", description="where the hardest images are looked for"
    )
    count: int = Field(50, ge=1, description="hardest images listed")
    neighbours: int = Field(3, ge=1, le=50, description="nearest training images listed for each")
    runtime: RuntimeChoice = Field("auto", description="what runs the model")
    data: DatasetConfig = DatasetConfig()


class CompareConfig(BaseModel):
    """Settings of `compare`."""

    model_config = FROZEN

    split: Literal["auto", "train", "validation", "test"] = Field(
        "auto", description="auto: test where there is one, else validation"
    )
    margin: float = Field(
        1.0, ge=0, le=100, description="loss of accuracy, in points, that is still not worse"
    )
    measure: bool = Field(True, description="also measure both in one interleaved run")
    data: DatasetConfig = DatasetConfig()
