from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from holotype import TrainResult, load
from holotype.cli import run
from holotype.config import ExplainConfig
from holotype.errors import BundleError, ConfigError, DatasetError
from holotype.explain import Evidence, Explanation, Shown, explain
from holotype.explain.page import Group, write_page, write_picture
from holotype.report import BundleSummary


@pytest.fixture(scope="module")
def mislabelled(digits: Path, probe: TrainResult, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits, of whose test split only images that `probe` gets right are left, and five labels wrong:

    three zeros lie among the ones, two ones among the zeros.
    """
    data = tmp_path_factory.mktemp("mislabelled") / "digits"
    shutil.copytree(digits, data)
    predictor = load(probe.best)
    for file in sorted((data / "test").rglob("*.png")):
        if predictor.predict(file).label != file.parent.name:
            file.unlink()
    for label, other, count in (("0", "1", 3), ("1", "0", 2)):
        for file in sorted((data / "test" / label).glob("0*.png"))[:count]:
            file.rename(data / "test" / other / f"wrong-{file.name}")
    return data


@pytest.fixture(scope="module")
def explained(probe: TrainResult, mislabelled: Path, tmp_path_factory: pytest.TempPathFactory) -> Explanation:
    return explain(probe.folder, data=mislabelled, out=tmp_path_factory.mktemp("explained"))


class TestConfused:
    def test_both_directions_of_a_pair(self, explained: Explanation) -> None:
        (pair,) = explained.pairs
        assert pair.classes == ("0", "1")
        assert pair.counts == (2, 3)
        assert explained.mistakes == 5
        assert explained.split == "test"
        for i in (0, 1):
            assert len(pair.wrong[i]) == pair.counts[i]
            for shown in pair.wrong[i]:
                assert shown.path.startswith(f"test/{pair.classes[i]}/wrong-")
                assert (shown.label, shown.predicted) == (pair.classes[i], pair.classes[1 - i])
                assert [part.label for part in shown.evidence] == [shown.label, shown.predicted]
            for shown in pair.right[i]:
                assert "wrong-" not in shown.path
                assert shown.label == shown.predicted == pair.classes[i]
                assert [part.label for part in shown.evidence] == [pair.classes[i], pair.classes[1 - i]]
            for group in (pair.wrong[i], pair.right[i]):
                certain = [max(part.probability for part in shown.evidence) for shown in group]
                assert certain == sorted(certain, reverse=True)

    def test_probabilities_are_the_predictors(
        self, explained: Explanation, probe: TrainResult, mislabelled: Path
    ) -> None:
        shown = explained.pairs[0].wrong[1][0]
        answer = load(probe.best).predict(mislabelled / shown.path)
        told = {choice.label: choice.probability for choice in answer.top}
        for part in shown.evidence:
            assert part.probability == pytest.approx(told[part.label], abs=1e-4)

    def test_files(self, explained: Explanation) -> None:
        folder = Path(explained.page).parent
        assert {file.name for file in folder.iterdir()} == {"explain.html", "explain.json", "explain.png"}
        assert Explanation.model_validate_json((folder / "explain.json").read_text()) == explained
        page = Path(explained.page).read_text()
        pair = explained.pairs[0]
        shown = [one for group in (*pair.wrong, *pair.right) for one in group]
        assert len(re.findall(r'<img src="data:image/png;base64,', page)) == 3 * len(shown)
        assert all(one.path in page for one in shown)
        assert "http" not in re.sub(r"data:image/\w+;base64,[\w+/=]+", "", page).replace("http-equiv", "")
        with Image.open(explained.picture) as picture:
            assert picture.format == "PNG"
            assert picture.width > 3 * 144

    def test_limits(self, probe: TrainResult, mislabelled: Path, tmp_path: Path) -> None:
        config = ExplainConfig(pairs=1, images=1, split="test")
        (pair,) = explain(probe.folder, data=mislabelled, config=config, out=tmp_path).pairs
        assert [len(group) for group in (*pair.wrong, *pair.right)] == [1, 1, 1, 1]
        assert pair.counts == (2, 3)

    def test_no_confusion(self, probe: TrainResult, mislabelled: Path, tmp_path: Path) -> None:
        clean = tmp_path / "clean"
        shutil.copytree(mislabelled, clean)
        for file in clean.rglob("wrong-*"):
            file.unlink()
        with pytest.raises(DatasetError, match="no image of its test split is taken for another class"):
            explain(probe.folder, data=clean, out=tmp_path / "out")
        assert not (tmp_path / "out").exists()


class TestNamed:
    def test_two_best_classes(self, probe: TrainResult, digits: Path, tmp_path: Path) -> None:
        files = sorted((digits / "test" / "2").iterdir())[:2]
        result = explain(probe.folder, [*files, tmp_path / "none.png"], out=tmp_path / "out")
        assert [shown.path for shown in result.named] == [str(file) for file in files]
        for file, shown in zip(files, result.named, strict=True):
            best = load(probe.best).predict(file).top[:2]
            assert [part.label for part in shown.evidence] == [choice.label for choice in best]
            assert shown.label is None
            assert shown.predicted == best[0].label
        (missing,) = result.unreadable
        assert missing.path == str(tmp_path / "none.png")
        assert missing.error in (tmp_path / "out" / "explain.html").read_text()

    def test_refusals(self, probe: TrainResult, tiny_bundle: Path, digits: Path, tmp_path: Path) -> None:
        with pytest.raises(DatasetError, match=r"none\.png: cannot be read"):
            explain(probe.folder, [tmp_path / "none.png"], out=tmp_path)
        with pytest.raises(ConfigError, match="201 images do not fit on a page"):
            explain(probe.folder, ["x.png"] * 201, out=tmp_path)
        with pytest.raises(ConfigError, match="not both"):
            explain(probe.folder, ["x.png"], data=digits)
        with pytest.raises(BundleError, match="has no torch weights"):
            explain(tiny_bundle, ["x.png"])


class TestCommandLine:
    def test_json_names_the_files(
        self, probe: TrainResult, mislabelled: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        command = ["explain", probe.folder, "--data", mislabelled, "--out", tmp_path, "--json", "--quiet"]
        assert run([str(part) for part in command]) == 0
        result = json.loads(capfd.readouterr().out)
        assert result["pairs"][0]["counts"] == [2, 3]
        assert Path(result["page"]).is_file()
        assert Path(result["picture"]).is_file()

    def test_lines_for_people(
        self, probe: TrainResult, digits: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        file = next((digits / "test" / "1").iterdir())
        assert run(["explain", str(probe.folder), str(file), str(tmp_path), "--out", str(tmp_path)]) == 0
        out = capfd.readouterr().out
        assert str(file) in out
        assert str(tmp_path / "explain.html") in out
        assert run(["explain", str(probe.folder), str(file), "x.png", "--out", str(tmp_path)]) == 1
        assert "x.png: cannot be read" in capfd.readouterr().out

    def test_images_have_no_split(self, probe: TrainResult, capfd: pytest.CaptureFixture[str]) -> None:
        assert run(["explain", str(probe.folder), "x.png", "--split", "test"]) == 2
        assert "given images have no split" in capfd.readouterr().err


def test_names_are_shown_as_they_are(tmp_path: Path) -> None:
    panels = np.zeros((1, 3, 160, 160, 3), dtype=np.uint8)
    odd = "<b>Hütte</b> " + 40 * "long "
    evidence = (Evidence(label=odd, probability=0.75), Evidence(label="b", probability=0.25))
    shown = Shown(path="a/<i>.png", label=None, predicted=odd, evidence=evidence)
    explanation = Explanation(
        bundle=BundleSummary(hash="0", path="b"),
        page=str(tmp_path / "explain.html"),
        picture=str(tmp_path / "explain.png"),
        images=1,
        named=(shown,),
    )
    groups = [Group(None, None, (shown,), panels)]
    write_page(tmp_path / "explain.html", explanation, groups)
    write_picture(tmp_path / "explain.png", groups)
    page = (tmp_path / "explain.html").read_text()
    assert "&lt;b&gt;Hütte&lt;/b&gt;" in page
    assert "<b>Hütte" not in page
    assert "data:image/jpeg;base64," in page
