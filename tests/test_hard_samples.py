from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from holotype import TrainResult, load
from holotype.bundle import open_bundle
from holotype.cli import run
from holotype.config import FitConfig, HardSamplesConfig
from holotype.errors import ConfigError
from holotype.fit.sampling import draw_weights
from holotype.hard_samples import COLUMNS, HardSamples, hard_samples


@pytest.fixture(scope="module")
def found(probe: TrainResult, tmp_path_factory: pytest.TempPathFactory) -> HardSamples:
    """The ten hardest images of the validation split."""
    out = tmp_path_factory.mktemp("hard") / "hard.csv"
    return hard_samples(probe.folder, config=HardSamplesConfig(count=10), out=out)


def rows_of(file: str) -> list[dict[str, str]]:
    with Path(file).open(newline="") as stream:
        return list(csv.DictReader(stream))


class TestRanking:
    def test_hardest_first(self, found: HardSamples, probe: TrainResult, digits: Path) -> None:
        predictor = load(probe.best)
        everything = {}
        for file in (digits / "validation").rglob("*.png"):
            chances = {c.label: c.probability for c in predictor.predict(file, top=3).top}
            everything[file.relative_to(digits).as_posix()] = chances
        losses = {path: -np.log(chances[Path(path).parent.name]) for path, chances in everything.items()}
        assert len(found.samples) == 10
        assert found.images == len(losses)
        assert [s.loss for s in found.samples] == pytest.approx(sorted(losses.values(), reverse=True)[:10])
        for sample in found.samples:
            chances = everything[sample.path]
            others = [chance for label, chance in chances.items() if label != sample.label]
            assert sample.label == Path(sample.path).parent.name
            assert sample.loss == pytest.approx(losses[sample.path])
            assert sample.label_probability == pytest.approx(chances[sample.label], abs=1e-6)
            assert sample.margin == pytest.approx(chances[sample.label] - max(others), abs=1e-6)
            assert sample.probability == pytest.approx(max(chances.values()), abs=1e-6)
            assert (sample.margin < 0) == (sample.predicted != sample.label)

    def test_count_beyond_the_split(self, probe: TrainResult, tmp_path: Path) -> None:
        config = HardSamplesConfig(count=1000, split="test")
        result = hard_samples(probe.folder, config=config, out=tmp_path / "all.csv")
        assert len(result.samples) == result.images == 24
        assert "These are test images" in Path(result.page).read_text()


class TestNeighbours:
    def test_they_are_the_nearest_training_images(
        self, found: HardSamples, probe: TrainResult, digits: Path
    ) -> None:
        predictor = load(probe.best)
        training = sorted((digits / "train").rglob("*.png"))

        def unit(files: list[Path]) -> np.ndarray:
            embedding = predictor.runtime.run(np.stack([predictor.read(file) for file in files])).embedding
            return embedding / np.linalg.norm(embedding, axis=1, keepdims=True)

        library = unit(training)
        labels = np.array([file.parent.name for file in training])
        for sample in found.samples:
            cosines = (unit([digits / sample.path]) @ library.T)[0]
            own = cosines[labels == sample.label]
            others = cosines[labels != sample.label]
            kinds = ((sample.neighbours, cosines), (sample.same_label, own), (sample.other_label, others))
            for near, wanted in kinds:
                # Embeddings are kept in half precision.
                best = np.sort(wanted)[::-1][:3]
                assert [n.similarity for n in near] == pytest.approx(best.tolist(), abs=2e-3)
                for neighbour in near:
                    place = training.index(digits / neighbour.path)
                    assert neighbour.similarity == pytest.approx(cosines[place], abs=2e-3)
                    assert neighbour.label == labels[place]
            assert {near.label for near in sample.same_label} == {sample.label}
            assert sample.label not in {near.label for near in sample.other_label}

    def test_a_training_image_is_not_its_own_neighbour(self, probe: TrainResult, tmp_path: Path) -> None:
        config = HardSamplesConfig(split="train", count=5, neighbours=50)
        result = hard_samples(probe.folder, config=config, out=tmp_path / "train.csv")
        for sample in result.samples:
            assert sample.path not in {near.path for near in sample.neighbours}
            assert len(sample.neighbours) == 50
            assert len(sample.same_label) == 23  # all others of its class
        first = rows_of(result.file)[0]
        assert first["image_path"] == first["hard_path"] == result.samples[0].path
        assert float(first["similarity"]) == 1


class TestList:
    def test_rows_are_training_images_of_the_label(self, found: HardSamples, digits: Path) -> None:
        rows = rows_of(found.file)
        assert list(rows[0]) == list(COLUMNS)
        assert len(rows) == 30
        assert {row["image_path"].split("/")[0] for row in rows} == {"train"}
        assert {row["hard_path"].split("/")[0] for row in rows} == {"validation"}
        assert {row["image_path"] for row in rows} == found.training_images
        for row in rows:
            assert (digits / row["image_path"]).is_file()
            assert row["label"] == row["image_path"].split("/")[1] == row["hard_path"].split("/")[1]
        wanted = [near.path for sample in found.samples for near in sample.same_label]
        assert [row["image_path"] for row in rows] == wanted

    def test_rows_name_what_is_near_of_other_labels_which_is_not_trained_on(
        self, found: HardSamples, digits: Path
    ) -> None:
        rows = rows_of(found.file)
        others = [near for sample in found.samples for near in sample.other_label]
        assert [row["other_path"] for row in rows] == [near.path for near in others]
        assert [float(row["other_similarity"]) for row in rows] == pytest.approx(
            [near.similarity for near in others], abs=1e-4
        )
        for row in rows:
            assert (digits / row["other_path"]).is_file()
            assert row["other_label"] == row["other_path"].split("/")[1] != row["label"]
        listed = draw_weights(
            np.zeros(72, dtype=np.int64),
            sorted(str(file.relative_to(digits)) for file in (digits / "train").rglob("*.png")),
            config=FitConfig(focus=found.file),
            imbalance="none",
            counts=np.array([72]),
        )
        assert listed is not None
        assert (listed > listed.min()).sum() == len(found.training_images)

    def test_page(self, found: HardSamples) -> None:
        page = Path(found.page).read_text()
        assert Path(found.page) == Path(found.file).with_suffix(".html")
        assert f"--focus {found.file}" in page
        for sample in found.samples:
            assert f'alt="{sample.path}"' in page
        assert "no image" not in page

    def test_refusals(self, probe: TrainResult, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"name it \.csv"):
            hard_samples(probe.folder, out=tmp_path / "list.txt")


class TestCommandLine:
    def test_json_and_lines(
        self, probe: TrainResult, tmp_path: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        out = tmp_path / "hard.csv"
        command = ["hard-samples", str(probe.folder), "--count", "2", "--neighbours", "1", "--out", str(out)]
        assert run([*command, "--json", "--quiet"]) == 0
        result = json.loads(capfd.readouterr().out)
        assert [len(sample["neighbours"]) for sample in result["samples"]] == [1, 1]
        assert result["file"] == str(out)
        assert run(command) == 0
        printed = capfd.readouterr().out
        assert result["samples"][0]["path"] in printed
        assert f"--focus {out}" in printed

    def test_by_default_beside_the_bundle(
        self, probe: TrainResult, capfd: pytest.CaptureFixture[str]
    ) -> None:
        assert run(["hard-samples", str(probe.best), "--quiet"]) == 0
        assert (probe.folder / "hard-samples-digits-validation.csv").is_file()

    def test_evaluate_names_the_next_step(
        self, probe: TrainResult, digits: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        wrong = tmp_path / "digits"
        shutil.copytree(digits, wrong)
        moved = next((wrong / "test" / "0").iterdir())
        moved.rename(wrong / "test" / "1" / moved.name)
        command = [
            "evaluate",
            str(probe.best),
            "--data",
            str(wrong),
            "--split",
            "test",
            "--out",
            str(tmp_path / "out"),
        ]
        assert run([*command, "--quiet"]) == 0
        lines = capfd.readouterr().out.splitlines()
        assert "1 taken for 0: 1" in lines
        (first, second) = (
            line.removeprefix("next    holotype ") for line in lines if line.startswith("next")
        )
        assert first.split() == ["explain", str(probe.best), "--data", str(wrong), "--split", "test"]
        assert second.split() == ["hard-samples", str(probe.best), "--data", str(wrong)]
        assert run([*second.split(), "--out", str(tmp_path / "h.csv"), "--quiet"]) == 0


class TestLoop:
    def test_training_on_the_list(
        self,
        found: HardSamples,
        tuned: TrainResult,
        digits: Path,
        tmp_path: Path,
        capfd: pytest.CaptureFixture[str],
    ) -> None:
        """The list of one run is a file that the next trains on, and it changes what is learned."""
        settings = ["data.size=64", "augment.flip=0", "fit.epochs=2", "fit.deterministic=true"]
        flags = [part for setting in settings for part in ("--set", setting)]
        command = ["train", str(digits), "--name", "focused", "--runs", str(tmp_path), "--quiet", "--json"]
        assert run([*command, *flags, "--focus", found.file]) == 0
        result = json.loads(capfd.readouterr().out)
        assert result["report"]["metrics"]["accuracy"]["value"] >= 0.85
        assert found.file in (tmp_path / "focused" / "config.yaml").read_text()
        weights = [
            open_bundle(folder).manifest.payloads["weights"].sha256
            for folder in (tmp_path / "focused", tuned.folder)
        ]
        assert weights[0] != weights[1]

    def test_validation_images_are_never_trained_on(
        self, found: HardSamples, digits: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        hard = tmp_path / "hard.csv"
        hard.write_text(f"image_path\n{found.samples[0].path}\n")
        command = ["train", str(digits), "--runs", str(tmp_path), "--focus", str(hard), "--quiet"]
        settings = ["--set", "data.size=64", "--set", "augment.flip=0", "--set", "fit.epochs=1"]
        assert run([*command, *settings]) == 2
        assert f"{found.samples[0].path!r} is no training image" in capfd.readouterr().err
