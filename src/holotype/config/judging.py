"""Settings of the verbs that use a bundle."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field

from holotype.config.data import FROZEN, DataConfig

__all__ = ["EvaluateConfig", "ExplainConfig", "ExportConfig", "HardSamplesConfig", "PredictConfig"]


class EvaluateConfig(BaseModel):
    """Settings of `evaluate`."""

    model_config = FROZEN

    split: Literal["auto", "train", "validation", "test"] = Field(
        "auto", description="auto: test where there is one, else validation"
    )
    runtime: Literal["auto", "torch", "onnxruntime", "openvino"] = Field(
        "auto", description="what runs the model"
    )
    data: DataConfig = DataConfig()


class PredictConfig(BaseModel):
    """Settings of `predict`."""

    model_config = FROZEN

    top: int = Field(5, ge=1, description="classes listed per image")
    runtime: Literal["auto", "torch", "onnxruntime", "openvino"] = Field(
        "auto", description="what runs the model"
    )
    max_pixels: int = Field(50_000_000, gt=0, description="largest image that is decoded, in pixels")


class ExportConfig(BaseModel):
    """Settings of `export`."""

    model_config = FROZEN

    images: int = Field(128, ge=64, description="real images pushed through both models by the parity gate")
    data: DataConfig = DataConfig()


class ExplainConfig(BaseModel):
    """Settings of `explain`."""

    model_config = FROZEN

    split: Literal["auto", "train", "validation", "test"] = Field(
        "auto", description="where confused images are taken from; auto: test where there is one"
    )
    pairs: int = Field(3, ge=1, description="confused pairs shown, the most frequent first")
    images: int = Field(4, ge=1, le=32, description="images of each pair and side")
    data: DataConfig = DataConfig()


class HardSamplesConfig(BaseModel):
    """Settings of `hard-samples`."""

    model_config = FROZEN

    split: Literal["auto", "train", "validation", "test"] = Field(
        "validation", description="where the hardest images are looked for"
    )
    count: int = Field(50, ge=1, description="hardest images listed")
    neighbours: int = Field(3, ge=1, le=50, description="nearest training images listed for each")
    runtime: Literal["auto", "torch", "onnxruntime", "openvino"] = Field(
        "auto", description="what runs the model"
    )
    data: DataConfig = DataConfig()
