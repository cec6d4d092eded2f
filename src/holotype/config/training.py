"""Settings of training: network, augmentation, loss, optimizer, what is watched; and the presets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, cast

from pydantic import BaseModel, Discriminator, Field, PositiveFloat, Tag, field_validator, model_validator

from holotype.config.data import FROZEN, DataConfig
from holotype.config.judging import PolicyConfig

__all__ = [
    "AUGMENT_PRESETS",
    "PRESETS",
    "AdamW",
    "AugmentConfig",
    "Cosine",
    "DistillConfig",
    "FitConfig",
    "ModelConfig",
    "MonitorConfig",
    "OneCycle",
    "Optimizer",
    "Plateau",
    "Preset",
    "Schedule",
    "Sgd",
    "Step",
    "TimmOptimizer",
    "TrainConfig",
    "TuneConfig",
]

Sigma = Annotated[float, Field(ge=0, le=1)]
Preset = Literal["probe", "fast", "balanced", "thorough"]
AugmentPreset = Literal["none", "light", "standard", "strong"]
Metric = Literal["accuracy", "balanced_accuracy", "macro_f1", "weighted_f1", "log_loss", "ece"]


class ModelConfig(BaseModel):
    """The network and where its weights come from."""

    model_config = FROZEN

    name: str = Field(
        "tf_efficientnet_lite0", description="any timm architecture; holotype models lists them"
    )
    weights: str = Field("auto", description="auto: packaged, then the hub | none: random | a file")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout before the head while fine-tuning")
    drop_path: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="stochastic depth: share of residual branches left out by the last block",
    )
    attention: Literal["none", "se", "eca", "cbam"] = Field(
        "none", description="attention modules in the blocks of families that support them"
    )
    stem: Literal["standard", "small"] = Field(
        "standard", description="small: stride 1 and no pooling at the start, for images of about 32 pixels"
    )


_NO_AUGMENTATION: dict[str, Any] = {
    "rotation": 0.0, "flip": 0.0, "crop": 1.0, "aspect": 1.0, "hue": 0.0, "saturation": 0.0, "value": 0.0,
    "noise": None, "erasing": 0.0, "policy": "none", "mixup": 0.0, "cutmix": 0.0,
}  # fmt: skip

AUGMENT_PRESETS: dict[AugmentPreset, dict[str, Any]] = {
    "none": _NO_AUGMENTATION,
    "light": {**_NO_AUGMENTATION, "flip": 0.5, "crop": 0.8},
    "standard": {},
    "strong": {"crop": 0.5, "erasing": 0.25, "policy": "trivial", "cutmix": 1.0},
}
"""What each augmentation preset changes of the defaults."""


class AugmentConfig(BaseModel):
    """Random changes of training images; drawn per (seed, epoch, image)."""

    model_config = FROZEN

    preset: AugmentPreset = Field("standard", description="none, light, standard or strong; keys override it")
    rotation: float = Field(30.0, ge=0, le=180, description="largest turn, in degrees either way")
    flip: float = Field(
        0.5, ge=0, le=1, description="probability of a horizontal mirror; 0 where mirrored is wrong"
    )
    crop: float = Field(
        0.8, gt=0, le=1, description="least share of the area that a random crop keeps; 1: no crop"
    )
    aspect: float = Field(1.0, ge=1, le=4, description="largest stretch of one side against the other")
    hue: float = Field(15.0, ge=0, le=180, description="largest turn of the hue, in degrees either way")
    saturation: float = Field(0.3, ge=0, le=1, description="saturation is scaled by up to 1 +- this")
    value: float = Field(0.3, ge=0, le=1, description="brightness (V of HSV) is scaled by up to 1 +- this")
    noise: tuple[Sigma, Sigma] | None = Field(
        (0.01, 0.05), description="range of the Gaussian noise's sigma, in units of white = 1; null: none"
    )
    erasing: float = Field(
        0.0, ge=0, le=1, description="probability that a rectangle is erased (Zhong et al. 2020)"
    )
    policy: Literal["none", "trivial", "randaugment"] = Field(
        "none", description="TrivialAugment (Mueller & Hutter 2021) | RandAugment (Cubuk et al. 2020)"
    )
    operations: int = Field(2, ge=1, le=8, description="operations of RandAugment")
    magnitude: float = Field(9.0, ge=0, le=30, description="magnitude of RandAugment's operations")
    mixup: float = Field(0.0, ge=0, description="alpha of MixUp (Zhang et al. 2018); 0: none")
    cutmix: float = Field(0.0, ge=0, description="alpha of CutMix (Yun et al. 2019); 0: none")
    mixed: float = Field(1.0, ge=0, le=1, description="share of the images that MixUp or CutMix mixes")

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        preset, presets = values.get("preset", "standard"), cast("Mapping[str, Any]", AUGMENT_PRESETS)
        return {**(presets.get(preset, {}) if isinstance(preset, str) else {}), **values}

    @field_validator("noise")
    @classmethod
    def _least_first(cls, value: tuple[float, float] | None) -> tuple[float, float] | None:
        if value is not None and value[0] > value[1]:
            raise ValueError(f"the range goes from {value[0]} down to {value[1]}: give the smaller one first")
        return value


class AdamW(BaseModel):
    """AdamW (Loshchilov & Hutter 2019)."""

    model_config = FROZEN

    name: Literal["adamw"] = "adamw"
    learning_rate: float = Field(3e-4, gt=0, description="peak rate of the head and the last block")
    weight_decay: float = Field(0.01, ge=0, description="decay of weights; norms and biases have none")


class Sgd(BaseModel):
    """Stochastic gradient descent with momentum."""

    model_config = FROZEN

    name: Literal["sgd"] = "sgd"
    learning_rate: float = Field(0.1, gt=0, description="peak rate of the head and the last block")
    weight_decay: float = Field(1e-4, ge=0, description="decay of weights; norms and biases have none")
    momentum: float = Field(0.9, ge=0, lt=1, description="momentum")


class TimmOptimizer(BaseModel):
    """Any other optimizer of timm, by its name there (`timm.optim.list_optimizers()`)."""

    model_config = FROZEN

    name: str = Field("lamb", description="its name")
    learning_rate: float = Field(1e-3, gt=0, description="peak rate of the head and the last block")
    weight_decay: float = Field(0.01, ge=0, description="decay of weights; norms and biases have none")
    options: dict[str, Any] = Field(default_factory=dict, description="its other arguments, by name")


def _optimizer_kind(value: Any) -> str:
    name = value.get("name", "adamw") if isinstance(value, Mapping) else getattr(value, "name", "adamw")
    return name if name in ("adamw", "sgd") else "timm"


Optimizer = Annotated[
    Annotated[AdamW, Tag("adamw")] | Annotated[Sgd, Tag("sgd")] | Annotated[TimmOptimizer, Tag("timm")],
    Discriminator(_optimizer_kind),
]


class Cosine(BaseModel):
    """The rate falls from the peak like half a cosine (Loshchilov & Hutter 2017)."""

    model_config = FROZEN

    name: Literal["cosine"] = "cosine"
    floor: float = Field(0.01, ge=0, le=1, description="the last rate, as a share of the peak")


class OneCycle(BaseModel):
    """The rate rises to the peak and falls below its start, the momentum against it (Smith & Topin 2018)."""

    model_config = FROZEN

    name: Literal["one-cycle"] = "one-cycle"
    rise: float = Field(0.25, gt=0, lt=1, description="share of the steps with a rising rate")
    start: float = Field(0.04, gt=0, le=1, description="the first rate, as a share of the peak")
    floor: float = Field(1e-5, gt=0, le=1, description="the last rate, as a share of the peak")


class Step(BaseModel):
    """The rate is multiplied by a factor after every so many epochs."""

    model_config = FROZEN

    name: Literal["step"] = "step"
    every: int = Field(3, ge=1, description="epochs between falls of the rate")
    factor: float = Field(0.1, gt=0, lt=1, description="what the rate is multiplied by")


class Plateau(BaseModel):
    """The rate is multiplied by a factor when the metric has not become better."""

    model_config = FROZEN

    name: Literal["plateau"] = "plateau"
    wait: int = Field(2, ge=1, description="epochs without a better metric before the rate falls")
    factor: float = Field(0.3, gt=0, lt=1, description="what the rate is multiplied by")
    floor: float = Field(0.001, ge=0, le=1, description="the lowest rate, as a share of the peak")


def _schedule_kind(value: Any) -> Any:
    return value.get("name", "cosine") if isinstance(value, Mapping) else getattr(value, "name", value)


Schedule = Annotated[
    Annotated[Cosine, Tag("cosine")]
    | Annotated[OneCycle, Tag("one-cycle")]
    | Annotated[Step, Tag("step")]
    | Annotated[Plateau, Tag("plateau")],
    Discriminator(_schedule_kind),
]


class FitConfig(BaseModel):
    """The two stages of training: a head on frozen features, then fine-tuning from that head."""

    model_config = FROZEN

    epochs: int = Field(8, ge=0, description="epochs of fine-tuning; 0: only the head is fitted")
    unfreeze: int | Literal["auto", "most", "all"] = Field(
        "auto",
        description="how many of the last blocks are fine-tuned; most: the last 60 %; auto: most of"
        " pretrained weights, all of random ones or behind a random first convolution; what is random beside"
        " pretrained weights is always trained",
    )
    freeze: int | None = Field(
        None, ge=0, description="how many of the first stages stay frozen, instead of fit.unfreeze"
    )
    gradual: int = Field(
        0,
        ge=0,
        description="epochs after which one more stage is unfrozen, from the last (Howard & Ruder 2018);"
        " 0: all at once",
    )
    scale: Annotated[float, Field(gt=0, le=4)] | Literal["auto"] = Field(
        "auto",
        description="side of the images while fine-tuning, as a share of data.size: smaller is faster"
        " (Touvron et al. 2019); auto: 0.8 where the network is pretrained and takes any size, else 1",
    )
    scale_start: float | None = Field(
        None,
        gt=0,
        le=4,
        description="fit.scale of the first epoch; it grows to fit.scale over the first half of the epochs",
    )
    batch_size: int = Field(
        32, ge=1, description="images per optimizer step, over all processes and accumulated parts"
    )
    micro_batch: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        "auto",
        description="images a process computes at once; auto: the most that fits, up to the batch. It changes"
        " rounding only, but for batch norm that learns (freeze_norm=false) and for model.drop_path",
    )
    optimizer: Optimizer = Field(AdamW(), description="adamw | sgd | any of timm's")
    schedule: Schedule = Field(Cosine(), description="cosine | one-cycle | step | plateau")
    warmup: float = Field(
        0.1, ge=0, lt=1, description="share of the steps with a rising rate at the start; not of one-cycle"
    )
    layer_decay: float = Field(
        1.0, gt=0, le=1, description="each block's rate is this share of the next one's"
    )
    backbone_rate: float = Field(1.0, gt=0, le=1, description="rate of the backbone as a share of the head's")
    l2: float = Field(0.0, ge=0, description="l2 / 2 times the squared weights is added to the loss")
    label_smoothing: float = Field(0.1, ge=0, lt=1, description="mass spread over all classes")
    imbalance: Literal["none", "weights", "sampler", "focal", "logit-adjust", "auto"] = Field(
        "none",
        description="what is done about unequal classes: weights: of the loss | sampler: classes are drawn"
        " equally often | focal: the loss of Lin et al. 2017 | logit-adjust: Menon et al. 2021 | auto: as"
        " the audit of this dataset advises, or one would by its defaults",
    )
    focal_gamma: float = Field(2.0, ge=0, description="exponent of the focal loss")
    focal_alpha: dict[str, PositiveFloat] | Literal["none", "balanced"] = Field(
        "none", description="weight of each class in the focal loss; balanced: by inverse frequency"
    )
    logit_tau: float = Field(1.0, ge=0, description="strength of the logit adjustment")
    focus: str | None = Field(
        None, description="a list of images to draw more often (a CSV with image_path, as of hard-samples)"
    )
    focus_weight: float = Field(3.0, ge=1, description="how many times as often they are drawn")
    clip_norm: float | None = Field(1.0, gt=0, description="largest gradient norm; null: no clipping")
    ema: float | None = Field(
        0.99,
        gt=0,
        lt=1,
        description="largest decay per step of the averaged weights; it warms up as 1 - step^(-2/3): 0.99"
        " takes 1,000 steps; null: no averaging",
    )
    freeze_norm: bool | Literal["auto"] = Field(
        "auto", description="keep the batch-norm statistics as they are; auto: where they are pretrained"
    )
    patience: int = Field(5, ge=1, description="epochs without a better metric before stopping")
    metric: Metric = Field("accuracy", description="what the best epoch is chosen by, on validation")
    seed: int = Field(0, ge=0, lt=2**63, description="seed of everything random")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto", description="auto: the faster of fp32 and half precision, measured at start"
    )
    compile: bool | Literal["auto"] = Field(
        "auto", description="torch.compile; auto: on a GPU, where measuring shows that it pays"
    )
    deterministic: bool = Field(False, description="only deterministic kernels; precision auto becomes fp32")
    checkpoint_seconds: float = Field(
        300.0,
        gt=0,
        description="a checkpoint within an epoch after so many seconds, beside that at its end",
    )


class DistillConfig(BaseModel):
    """Learning from another bundle's answers (Hinton et al. 2015)."""

    model_config = FROZEN

    teacher: str | None = Field(None, description="bundle or run folder to learn from; null: none")
    weight: float = Field(0.5, ge=0, le=1, description="share of the teacher in the loss")
    temperature: float = Field(2.0, gt=0, description="temperature of both in the teacher's part")


class MonitorConfig(BaseModel):
    """What is recorded of a run."""

    model_config = FROZEN

    trackers: tuple[Literal["tensorboard", "mlflow", "wandb"], ...] = Field(
        ("tensorboard",), description="where curves go; tensorboard is always written"
    )
    every: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        "auto",
        description="steps between rows of steps.csv, with norms of every stage; auto: 10, at most a"
        " thirtieth of the run, so that there is a curve",
    )


class TrainConfig(BaseModel):
    """Settings of `train`."""

    model_config = FROZEN

    preset: Preset = Field("balanced", description="probe: head only | fast | balanced | thorough")
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    augment: AugmentConfig = AugmentConfig()
    fit: FitConfig = FitConfig()
    distill: DistillConfig = DistillConfig()
    monitor: MonitorConfig = MonitorConfig()
    policy: PolicyConfig = PolicyConfig()


WITHOUT_EFFECT_ON_RESULTS: dict[str, Any] = {
    "fit": {"micro_batch", "checkpoint_seconds"},
    "data": {"max_unreadable", "cache_limit_gb", "max_unpacked_gb"},
    "monitor": True,
}
"""Settings of `train` on which no result depends, up to rounding; as `exclude` of `model_dump`."""


class TuneConfig(BaseModel):
    """Settings of `tune`: how a space of training settings is searched."""

    model_config = FROZEN

    trials: int = Field(20, ge=1, description="trials in all, those of earlier sessions included")
    minutes: float | None = Field(None, gt=0, description="no new trial after so many minutes")
    sampler: Literal["tpe", "random", "grid"] = Field(
        "tpe",
        description="how the next trial is chosen; tpe: by those before (Bergstra et al. 2011) | grid: all"
        " combinations, in random order",
    )
    pruner: Literal["median", "hyperband", "none"] = Field(
        "median",
        description="how a trial that promises little is stopped early; median: where it is worse than half"
        " of the others were, after a quarter of the epochs | hyperband: Li et al. 2018",
    )
    startup: int = Field(5, ge=0, description="trials that are finished before any is stopped early")
    lost_after: int = Field(
        60, ge=10, description="seconds without a sign of life after which a trial elsewhere is tried again"
    )
    seed: int = Field(0, ge=0, description="seed of the sampler; the trials' own is fit.seed")
    space: dict[str, Any] = Field(
        default_factory=lambda: {
            "fit.optimizer.learning_rate": {"low": 1e-4, "high": 1e-3, "log": True},
            "fit.layer_decay": {"low": 0.7, "high": 1.0},
            "augment.crop": [0.2, 0.4, 0.8],
            "model.dropout": [0.0, 0.2, 0.5],
        },
        description="by key of train: a list of choices, or {low, high, log, step}; a space of your own"
        " replaces this one",
    )
    train: dict[str, Any] = Field(
        default_factory=dict, description="settings of every trial, by the keys of train"
    )


_FINE_TUNING = {"optimizer": {"name": "adamw", "learning_rate": 6e-4}, "imbalance": "auto"}

PRESETS: dict[Preset, dict[str, Any]] = {
    "probe": {"fit": {"epochs": 0}, "augment": {"preset": "light"}},
    "fast": {"fit": {"epochs": 3, **_FINE_TUNING}, "augment": {"preset": "light"}},
    "balanced": {
        "fit": {"epochs": 8, **_FINE_TUNING},
        "augment": {"preset": "light", "crop": 0.4},
        "model": {"dropout": 0.2},
    },
    "thorough": {
        "fit": {"epochs": 24, "unfreeze": "all", "scale": 1.0, "patience": 8, **_FINE_TUNING},
        "augment": {"preset": "light", "crop": 0.4},
        "model": {"dropout": 0.2},
    },
}
"""How long each trains and what with: set by the ablation in docs/decisions.md."""
