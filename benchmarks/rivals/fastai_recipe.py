"""fastai's way of fine-tuning: the transforms of its book's chapter on production, and fine_tune.

One epoch of the new head, then the planned ones of everything with its one-cycle schedule and
discriminative rates; batches of 64, all other settings fastai's own. Its mixed precision asks autocast
for "cuda" by name, so that it changes nothing on a CPU; channels-last is used, which it does offer.
"""

from __future__ import annotations

from entry import Best, Entry, below, read_entry, say_ready, write_wrong
from fastai.vision.all import (
    Callback,
    ImageDataLoaders,
    Learner,
    RandomResizedCrop,
    accuracy,
    aug_transforms,
    get_image_files,
    set_seed,
    vision_learner,
)


class Announce(Callback):
    """Says what each epoch reached, and keeps the best weights, as SaveModelCallback does on disk."""

    order = 60  # after the recorder, whose last value is the accuracy on validation

    def __init__(self, best: Best) -> None:
        self.best = best

    def after_epoch(self) -> None:
        self.best.after_epoch(self.learn.model, float(self.learn.recorder.values[-1][-1]))


def main() -> None:
    entry = read_entry(__doc__)
    set_seed(entry.seed)
    best = Best()
    learner = build(entry)
    say_ready()
    with learner.no_bar(), learner.no_logging():
        learner.fine_tune(entry.epochs, cbs=Announce(best))
        learner.model.load_state_dict(best.state)
        write_wrong(entry, judge(entry, learner))


def build(entry: Entry) -> Learner:
    loaders = ImageDataLoaders.from_folder(
        entry.data,
        train="train",
        valid="validation",
        item_tfms=RandomResizedCrop(entry.size, min_scale=0.5),
        batch_tfms=aug_transforms(),
        bs=64,
        num_workers=2,
    )
    return vision_learner(
        loaders,
        "tf_efficientnet_lite0",
        metrics=accuracy,
        pretrained_cfg_overlay={"file": str(entry.weights)},
    ).to_channelslast(use_amp=False)


def judge(entry: Entry, learner: Learner) -> dict[str, bool]:
    """Whether each image of validation and test is classified rightly."""
    files = [file for split in ("validation", "test") for file in get_image_files(entry.data / split)]
    loader = learner.dls.test_dl(files, with_labels=True)
    probabilities, labels = learner.get_preds(dl=loader)
    right = (probabilities.argmax(1) == labels).tolist()
    return dict(zip(below(entry, files), right, strict=True))


if __name__ == "__main__":
    main()
