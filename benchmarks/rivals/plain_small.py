"""The plain PyTorch loop of tutorials for small images from scratch: the usual recipe of CIFAR-10.

torchvision's ImageFolder, RandomCrop with padding 4 and flip, a DataLoader with two workers, a ResNet-18
whose stem is one 3x3 convolution, SGD 0.1 with Nesterov momentum and decay 5e-4 on batches of 128, a cosine
schedule. It holds nothing out: all of train/ is trained on, and the last weights count.
"""

from __future__ import annotations

import torch
from entry import Entry, below, read_entry, say_ready, write_wrong
from torch import nn
from torch.utils.data import DataLoader
from torchvision import datasets, transforms
from torchvision.models import resnet18


def main() -> None:
    entry = read_entry(__doc__)
    torch.manual_seed(entry.seed)
    normal = transforms.Normalize((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
    plain = transforms.Compose([transforms.ToTensor(), normal])
    training = transforms.Compose([
        transforms.RandomCrop(entry.size, padding=4), transforms.RandomHorizontalFlip(), *plain.transforms,
    ])  # fmt: skip
    train = datasets.ImageFolder(str(entry.data / "train"), training)
    loader = DataLoader(train, batch_size=128, shuffle=True, num_workers=2, persistent_workers=True)
    model = resnet18(num_classes=len(train.classes))
    model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    model.maxpool = nn.Identity()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, entry.epochs * len(loader))
    say_ready()
    for _ in range(entry.epochs):
        right = 0
        for images, labels in loader:
            optimizer.zero_grad()
            output = model(images)
            nn.functional.cross_entropy(output, labels).backward()
            optimizer.step()
            schedule.step()
            right += int((output.argmax(1) == labels).sum())
        print(f"epoch {right / len(train):.6f}", flush=True)
    write_wrong(entry, judge(entry, model, datasets.ImageFolder(str(entry.data / "test"), plain)))


def judge(entry: Entry, model: nn.Module, dataset: datasets.ImageFolder) -> dict[str, bool]:
    """Whether each image is classified rightly."""
    model.eval()
    right: list[bool] = []
    with torch.inference_mode():
        for images, labels in DataLoader(dataset, batch_size=128, num_workers=2):
            right += (model(images).argmax(1) == labels).tolist()
    return dict(zip(below(entry, [file for file, _ in dataset.samples]), right, strict=True))


if __name__ == "__main__":
    main()
