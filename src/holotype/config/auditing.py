"""Settings of the verbs that look at data and its annotation."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field

from holotype.config.data import FROZEN, DataConfig, DatasetConfig
from holotype.config.training import ModelConfig

__all__ = ["AgreeConfig", "AuditConfig", "DuplicatesConfig", "GatesConfig", "HealthConfig"]


class GatesConfig(BaseModel):
    """What a dataset must fulfil to be called ready."""

    model_config = FROZEN

    balance: float = Field(1.3, ge=1, description="largest class / smallest class, at most")
    class_size: int = Field(20, ge=1, description="images of the smallest class, at least")
    leakage: float = Field(
        0.0, ge=0, le=1, description="share of validation and test with a copy in another split, at most"
    )
    conflicts: int = Field(0, ge=0, description="groups of copies with different labels, at most")
    label_accuracy: float = Field(
        0.99, gt=0, le=1, description="lower bound of the label accuracy in a reviewed sample, at least"
    )
    health: float = Field(0.05, ge=0, le=1, description="share of images with an issue, at most")
    shortcut: float = Field(
        0.3, ge=0, le=1, description="correlation of a health measure with the class, at most"
    )
    shift: float = Field(
        0.65, ge=0.5, le=1, description="AUC of a classifier that tells train from another split, at most"
    )


class HealthConfig(BaseModel):
    """When an image is odd. Levels are of the model's input, 0 black to 1 white."""

    model_config = FROZEN

    dark: float = Field(0.2, ge=0, le=1, description="too dark: 95 % of its pixels are below this level")
    light: float = Field(0.85, ge=0, le=1, description="too light: 95 % of its pixels are above this level")
    blur: float = Field(
        0.2, ge=0, description="blurry: sharpness of its edges below this; 0: a smooth ramp, 1: an ideal step"
    )
    information: float = Field(
        3.0, ge=0, le=8, description="low information: entropy of its grey levels below this, in bits"
    )
    aspect: float = Field(3.0, ge=1, description="odd aspect: longer side over shorter side above this")
    size: float = Field(
        4.0, ge=1, description="odd size: side this many times larger or smaller than the median of the set"
    )
    grey: float = Field(0.003, ge=0, le=1, description="grey: mean difference of the channels below this")
    trait: float = Field(
        0.1, gt=0, le=1, description="an issue of more than this share of images is a trait of the set"
    )


class DuplicatesConfig(BaseModel):
    """How copies are searched for."""

    model_config = FROZEN

    near: bool = Field(
        True, description="also near copies: re-encoded, mirrored, rotated, cropped, brightened"
    )
    false_copies: float = Field(
        0.002, gt=0, lt=1, description="share of the images that may be called copies by chance, as estimated"
    )
    neighbours: int = Field(8, ge=1, le=100, description="nearest images of each that are looked at")
    approximate: bool | Literal["auto"] = Field(
        "auto", description="approximate search (faiss); auto: above 100,000 images"
    )


class AuditConfig(BaseModel):
    """Settings of `audit`."""

    model_config = FROZEN

    folds: int = Field(5, ge=2, le=20, description="folds of the out-of-sample label check")
    suspects: float = Field(
        0.1, gt=0, le=1, description="share of the images listed as label suspects, at most"
    )
    seed: int = Field(0, ge=0, description="seed of folds, calibration and samples")
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    gates: GatesConfig = GatesConfig()
    health: HealthConfig = HealthConfig()
    duplicates: DuplicatesConfig = DuplicatesConfig()


class AgreeConfig(BaseModel):
    """Settings of `agree`."""

    model_config = FROZEN

    least: int = Field(200, ge=1, description="images that every annotator gets, at least")
    samples: int = Field(2000, ge=100, description="bootstrap samples behind an interval")
    accept: float = Field(0.80, ge=0, le=1, description="Krippendorff's alpha from which labels are accepted")
    tentative: float = Field(
        0.667, ge=0, le=1, description="alpha from which they are tentative; below, rewrite the guideline"
    )
    seed: int = Field(0, ge=0, description="seed of order, overlap and bootstrap")
    data: DatasetConfig = DatasetConfig()
