"""Settings of the data: what is read, and how it is cut into splits and pixels."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["FROZEN", "ConvertConfig", "DataConfig", "DatasetConfig", "MaxPixels", "SourceConfig"]

FROZEN = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)
"""Of every section: immutable, no number is infinite or none, and an unknown key is an error."""


MaxPixels = Annotated[
    int, Field(gt=0, le=1_000_000_000, description="largest image that is decoded, in pixels")
]
"""A setting of every verb that decodes images; beyond it, `preprocess.Limits` refuses."""


class SourceConfig(BaseModel):
    """What is read of a dataset, and how it is laid out."""

    model_config = FROZEN

    format: Literal[
        "auto", "folders", "csv", "parquet", "voc", "yolo", "createml", "coco", "label-studio", "json"
    ] = Field("auto", description="how the data is laid out; auto: by what is there")
    boxes: Literal["crop", "single", "reject"] | None = Field(
        None,
        description="what to do with labelled boxes: crop: each is an example | single: images whose boxes"
        " are of one class are examples, others are bad records | reject: images with boxes are left out",
    )
    margin: float = Field(
        0.1, ge=0, le=2, description="what crop adds on every side of a box, as a share of its size"
    )
    background: str | None = Field(
        None, description="class of images known to hold no object; null: they are left out"
    )
    images: str | None = Field(
        None, description="folder of the images, where an annotation file is kept elsewhere"
    )
    revision: int | Literal["latest"] = Field(
        "latest", description="which revision of labels and splits; 0: as the data itself says"
    )
    max_unpacked_gb: float = Field(
        100, gt=0, description="what a dataset given as .tar or .zip may unpack to, into the cache folder"
    )
    max_pixels: MaxPixels = 50_000_000


class DatasetConfig(SourceConfig):
    """And how it is cut into splits: all that a model leaves open, whose input has its size already."""

    validation: float = Field(
        0.15, gt=0, lt=0.9, description="share for validation where the data has no such split"
    )
    test: float = Field(0.15, ge=0, lt=0.9, description="share for test where the data has no splits at all")
    split_revision: int | None = Field(
        None, ge=0, description="revision whose splits are used; null: those of data.revision, as its labels"
    )
    max_unreadable: float = Field(
        0.01, ge=0, le=1, description="share of unreadable files and bad records above which we stop"
    )
    cache_limit_gb: float | None = Field(
        None,
        ge=0,
        description="size of the pixel cache; null: a fifth of the free disk; beyond it, decode on the fly",
    )


class DataConfig(DatasetConfig):
    """And into which pixels, where there is no model yet."""

    size: int | None = Field(
        None, ge=16, le=2048, description="side of the model's input; null: the weights' own"
    )
    resize: Literal["auto", "squash", "letterbox", "crop"] = Field(
        "auto", description="how an image is fitted into the square; auto: squash, which loses no pixel"
    )
    filter: Literal["auto", "bilinear", "bicubic", "lanczos"] = Field(
        "auto",
        description="how pixels are resampled, here and wherever the model runs; auto: as for the weights |"
        " bilinear: an ordinary photo is read in a quarter less time",
    )


class ConvertConfig(BaseModel):
    """Settings of `convert`."""

    model_config = FROZEN

    preview: int = Field(48, ge=1, le=1000, description="examples drawn on the contact sheet")
    data: SourceConfig = SourceConfig()
