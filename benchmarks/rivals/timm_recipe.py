"""timm's way of fine-tuning: its loader, transforms, optimizer, schedule and EMA, used as its train.py does.

The command it stands for, with the input recipe of the weights (mean, std, bicubic, crop 0.875):

    train.py DATA --train-split train --val-split validation --model tf_efficientnet_lite0 --pretrained
        --num-classes N --batch-size 32 --opt adamw --lr 3e-4 --weight-decay 0.05 --sched cosine
        --epochs E --warmup-epochs 1 --sched-on-updates --smoothing 0.1 --workers 2
        --model-ema --model-ema-warmup --channels-last [--amp --amp-dtype bfloat16]
"""

from __future__ import annotations

import torch
from entry import Best, Entry, below, pretrained, read_entry, say_ready, write_wrong
from timm.data import create_dataset, create_loader, resolve_data_config
from timm.loss import LabelSmoothingCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3, random_seed
from torch import nn


def main() -> None:
    entry = read_entry(__doc__)
    random_seed(entry.seed)
    model = pretrained(entry).to(memory_format=torch.channels_last)
    recipe = resolve_data_config({"img_size": entry.size}, model=model)
    loader, validation = (load(entry, split, recipe) for split in ("train", "validation"))
    train(entry, model, loader, validation)
    judged: dict[str, bool] = {}
    for split in (validation, load(entry, "test", recipe)):
        files = below(entry, split.dataset.filenames(absolute=True))
        judged.update(zip(files, judge(entry, model, split), strict=True))
    write_wrong(entry, judged)


def load(entry: Entry, split: str, recipe: dict) -> torch.utils.data.DataLoader:
    training = split == "train"
    return create_loader(
        create_dataset("", root=str(entry.data), split=split, is_training=training),
        input_size=recipe["input_size"],
        batch_size=32,
        is_training=training,
        interpolation="random" if training else recipe["interpolation"],
        mean=recipe["mean"],
        std=recipe["std"],
        crop_pct=recipe["crop_pct"],
        num_workers=2,
        device=torch.device("cpu"),
    )


def train(
    entry: Entry,
    model: nn.Module,
    loader: torch.utils.data.DataLoader,
    validation: torch.utils.data.DataLoader,
) -> None:
    """Train, and leave the averaged weights of the epoch that was best on validation in the model."""
    optimizer = create_optimizer_v2(model, opt="adamw", lr=3e-4, weight_decay=0.05)
    schedule, _ = create_scheduler_v2(
        optimizer,
        sched="cosine",
        num_epochs=entry.epochs,
        warmup_epochs=1 if entry.epochs > 2 else 0,  # else it would be most of the schedule
        warmup_lr=1e-5,
        step_on_epochs=False,
        updates_per_epoch=len(loader),
    )
    average = ModelEmaV3(model, decay=0.9998, use_warmup=True)
    criterion = LabelSmoothingCrossEntropy(smoothing=0.1)
    best, update = Best(), 0
    say_ready()
    for _ in range(entry.epochs):
        model.train()
        for images, labels in loader:
            with torch.autocast("cpu", torch.bfloat16, enabled=entry.amp):
                output = model(images.contiguous(memory_format=torch.channels_last))
                loss = criterion(output, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            update += 1
            average.update(model, step=update)
            schedule.step_update(num_updates=update)
        right = judge(entry, average.module, validation)
        best.after_epoch(average.module, sum(right) / len(right))
    model.load_state_dict(best.state)


def judge(entry: Entry, model: nn.Module, loader: torch.utils.data.DataLoader) -> list[bool]:
    """Whether each image is classified rightly."""
    model.eval()
    right: list[bool] = []
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=entry.amp):
        for images, labels in loader:
            output = model(images.contiguous(memory_format=torch.channels_last))
            right += (output.argmax(1) == labels).tolist()
    return right


if __name__ == "__main__":
    main()
