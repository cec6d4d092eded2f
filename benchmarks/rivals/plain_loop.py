"""The plain PyTorch loop of tutorials, fine-tuning an ImageNet network.

torchvision's ImageFolder, RandomResizedCrop and flip, a DataLoader with two workers, the whole network
with AdamW and a cosine schedule, validation after every epoch with Resize and CenterCrop.
"""

from __future__ import annotations

import torch
from entry import Best, Entry, below, pretrained, read_entry, say_ready, write_wrong
from torch import nn
from torch.utils.data import DataLoader
from torchvision import datasets, transforms


def main() -> None:
    entry = read_entry(__doc__)
    torch.manual_seed(entry.seed)
    model, training, plain = build(entry)
    train = datasets.ImageFolder(str(entry.data / "train"), training)
    loader = DataLoader(train, batch_size=32, shuffle=True, num_workers=2, persistent_workers=True)
    validation = datasets.ImageFolder(str(entry.data / "validation"), plain)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, entry.epochs * len(loader))
    best = Best()
    say_ready()
    for _ in range(entry.epochs):
        model.train()
        for images, labels in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
            schedule.step()
        right = judge(model, validation)
        best.after_epoch(model, sum(right) / len(right))
    model.load_state_dict(best.state)
    judged: dict[str, bool] = {}
    for dataset in (validation, datasets.ImageFolder(str(entry.data / "test"), plain)):
        files = below(entry, [file for file, _ in dataset.samples])
        judged.update(zip(files, judge(model, dataset), strict=True))
    write_wrong(entry, judged)


def build(entry: Entry) -> tuple[nn.Module, transforms.Compose, transforms.Compose]:
    """The network with ImageNet weights and a fresh head; transforms of training and of validation."""
    model = pretrained(entry)
    normal = transforms.Normalize(model.pretrained_cfg["mean"], model.pretrained_cfg["std"])
    training = transforms.Compose([
        transforms.RandomResizedCrop(entry.size), transforms.RandomHorizontalFlip(),
        transforms.ToTensor(), normal,
    ])  # fmt: skip
    plain = transforms.Compose([
        transforms.Resize(round(entry.size * 256 / 224)), transforms.CenterCrop(entry.size),
        transforms.ToTensor(), normal,
    ])  # fmt: skip
    return model, training, plain


def judge(model: nn.Module, dataset: datasets.ImageFolder) -> list[bool]:
    """Whether each image is classified rightly."""
    model.eval()
    right: list[bool] = []
    with torch.inference_mode():
        for images, labels in DataLoader(dataset, batch_size=32, num_workers=2):
            right += (model(images).argmax(1) == labels).tolist()
    return right


if __name__ == "__main__":
    main()
