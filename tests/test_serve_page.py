"""The page at /, in a real browser."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from browsers import in_browser
from holotype.bundle import open_bundle
from holotype.policy import Policy
from servers import Server, serving, stalled, wait_for
from tiny import CLASSES, picture, tiny_baseline, write_tiny_bundle

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

pytestmark = in_browser


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    policy = Policy(abstain="conformal", open_above=0.2, coverage=0.95, familiar=4.0)
    folder = tmp_path_factory.mktemp("page") / "colours"
    return write_tiny_bundle(folder, policy=policy, baseline=tiny_baseline()).path


@pytest.fixture(scope="module")
def server(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(bundle, folder=tmp_path_factory.mktemp("server")) as started:
        yield started


def text(browser: Chrome, selector: str) -> str:
    return str(browser.execute_script(f"return document.querySelector({selector!r})?.innerText || ''"))


def complaints(browser: Chrome) -> list[str]:
    return [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]


def choose(browser: Chrome, *files: Path) -> None:
    browser.find_element("id", "files").send_keys("\n".join(str(file) for file in files))


@pytest.fixture
def photos(tmp_path: Path) -> list[Path]:
    files = []
    for colour in (*CLASSES, "white"):
        files.append(tmp_path / f"{colour}.png")
        files[-1].write_bytes(picture(colour))
    return files


def test_images_are_answered_with_what_the_model_saw(
    server: Server, browser: Chrome, photos: list[Path]
) -> None:
    browser.get(server.url)
    wait_for(lambda: "3 classes" in text(browser, "#serving"), "connection")
    choose(browser, photos[0])
    wait_for(lambda: text(browser, ".result .label") == "red", "answer")
    assert "99" in text(browser, ".result dl.top .number")
    assert "inferring" in text(browser, ".result .timing")
    seen = "return document.querySelector('.result img').naturalWidth"
    wait_for(lambda: browser.execute_script(seen) == 32, "input")
    assert browser.execute_script("return document.querySelector('.result .heat').width") == 224
    choose(browser, photos[3])
    wait_for(lambda: text(browser, ".result .label").startswith("not sure"), "doubt")
    assert "unlike the images that were learned" in text(browser, ".result .doubt")
    assert complaints(browser) == []


DROP = """
const transfer = new DataTransfer();
for (const [name, content] of arguments[0]) {
  const bytes = Uint8Array.from(atob(content), (letter) => letter.charCodeAt(0));
  transfer.items.add(new File([bytes], name, { type: 'image/png' }));
}
const area = document.getElementById('drop');
const told = (kind) => area.dispatchEvent(
  new DragEvent(kind, { bubbles: true, cancelable: true, dataTransfer: transfer })
);
told('dragover');
const lit = area.classList.contains('over');
const taken = !told('drop');
return [lit, taken, area.classList.contains('over')];
"""


def test_files_can_be_dropped(server: Server, browser: Chrome) -> None:
    browser.get(server.url)
    wait_for(lambda: "3 classes" in text(browser, "#serving"), "connection")
    dropped = [(f"{colour}.png", base64.b64encode(picture(colour)).decode()) for colour in ("blue", "green")]
    # Lit while a file is over it; and the browser does not open the file in place of the page.
    assert browser.execute_script(DROP, dropped) == [True, True, False]
    labels = "return [...document.querySelectorAll('.result .label')].map((one) => one.textContent)"
    wait_for(lambda: browser.execute_script(labels) == ["blue", "green"], "answers")
    named = "return [...document.querySelectorAll('figcaption')].map((one) => one.textContent)"
    assert "blue.png, as the model sees it" in browser.execute_script(named)
    assert complaints(browser) == []


def focused(browser: Chrome) -> str:
    return str(browser.execute_script("return document.activeElement.id"))


def press(browser: Chrome, key: str) -> None:
    from selenium.webdriver import ActionChains

    ActionChains(browser).send_keys(key).perform()


def test_the_keyboard_is_enough(server: Server, browser: Chrome, photos: list[Path]) -> None:
    """From one control to the next with Tab: choose a file, take a picture, hide its heat map."""
    from selenium.webdriver.common.keys import Keys

    browser.get(server.url)
    wait_for(lambda: "3 classes" in text(browser, "#serving"), "connection")
    press(browser, Keys.TAB)
    assert focused(browser) == "files"
    outline = "return getComputedStyle(document.querySelector('label[for=files]')).outlineStyle"
    assert browser.execute_script(outline) == "solid"  # one sees where one is
    browser.switch_to.active_element.send_keys(str(photos[1]))  # what the system's dialog would give
    wait_for(lambda: text(browser, ".result .label") == "green", "answer")
    press(browser, Keys.TAB)
    assert focused(browser) == "camera"
    press(browser, Keys.ENTER)
    wait_for(lambda: focused(browser) == "shoot", "camera")
    press(browser, Keys.ENTER)
    wait_for(lambda: text(browser, ".result figcaption").startswith("camera"), "picture")
    press(browser, Keys.TAB)
    assert focused(browser) == "stop"
    press(browser, Keys.ENTER)
    assert focused(browser) == "camera"
    press(browser, Keys.TAB)
    hidden = "return document.querySelector('.result .heat').hidden"
    assert not browser.execute_script(hidden)
    press(browser, Keys.SPACE)
    assert browser.execute_script(hidden)
    assert complaints(browser) == []


def test_what_is_no_image_is_said(server: Server, browser: Chrome, tmp_path: Path) -> None:
    browser.get(server.url)
    wait_for(lambda: "3 classes" in text(browser, "#serving"), "connection")
    (tmp_path / "notes.txt").write_text("hello")
    choose(browser, tmp_path / "notes.txt")
    wait_for(lambda: "not an image" in text(browser, ".result .doubt"), "refusal")


def test_charts_and_drift_are_live(server: Server, browser: Chrome) -> None:
    browser.get(server.url)
    for _ in range(70):
        server.predict(picture("maroon"))
    wait_for(lambda: float(text(browser, "#rate")) > 0, "rate")
    wait_for(lambda: "not like those of validation" in text(browser, "#drift-said"), "drift")
    assert browser.execute_script("return document.querySelectorAll('#drift .moved').length") >= 2
    drawn = """
        const canvas = document.getElementById('rate-chart');
        const data = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
        return data.some((value) => value > 0);
    """
    assert browser.execute_script(drawn)


def test_a_line_that_nobody_answers_is_drawn(server: Server, browser: Chrome) -> None:
    browser.get(server.url)
    wait_for(lambda: "3 classes" in text(browser, "#serving"), "connection")
    above = """
        const canvas = document.getElementById('waiting-chart');
        const context = canvas.getContext('2d');
        const data = context.getImageData(canvas.width / 2, 14, canvas.width / 2, canvas.height / 2).data;
        return data.some((value) => value > 0);
    """
    with stalled(*server.workers):
        asked = [server.send(picture()) for _ in range(5)]
        wait_for(lambda: int(text(browser, "#waiting")) == 4, "number")
        wait_for(lambda: bool(browser.execute_script(above)), "line on the chart")
    assert {one.result().status_code for one in asked} == {200}


def test_one_of_several_models_is_asked(
    bundle: Path, tmp_path: Path, browser: Chrome, photos: list[Path]
) -> None:
    other = write_tiny_bundle(tmp_path / "other", classes=("rot", "grün", "blau")).path
    from selenium.webdriver.support.ui import Select

    with serving(f"one={bundle}", f"two={other}", folder=tmp_path) as server:
        browser.get(server.url)
        wait_for(lambda: text(browser, "#serving").startswith("one:"), "connection")
        choose(browser, photos[0])
        wait_for(lambda: text(browser, ".result .label") == "red", "answer")
        for _ in range(60):
            server.predict(picture("red"))
        wait_for(lambda: "The last" in text(browser, "#drift-said"), "drift of the first")
        Select(browser.find_element("id", "model")).select_by_visible_text("two")
        wait_for(lambda: text(browser, "#serving").startswith("two:"), "other model")
        hidden = "return document.getElementById('drift-section').hidden"
        wait_for(lambda: bool(browser.execute_script(hidden)), "end of the drift: this one has no baseline")
        choose(browser, photos[0])
        wait_for(lambda: text(browser, ".result .label") == "rot", "answer of the other")
        assert open_bundle(other).hash in text(browser, "#bundle")
        assert complaints(browser) == []


def test_what_is_not_kept_is_shown(bundle: Path, tmp_path: Path, browser: Chrome) -> None:
    later = tmp_path / "later"
    rival = write_tiny_bundle(tmp_path / "rival", policy=Policy(temperature=2.0)).path
    settings = {
        "records": {
            "database": f"sqlite:///{later / 'ab.db'}", "journal": str(tmp_path), "journal_bytes": 4096
        },
        "experiment": {"shadow": True},
    }  # fmt: skip
    with serving(bundle, challenger=rival, folder=tmp_path, **settings) as server:
        browser.get(server.url)
        wait_for(lambda: "The database is down." in text(browser, "#records"), "notice")
        for _ in range(30):
            server.predict(picture())
        wait_for(lambda: "wait in the journal until it is back" in text(browser, "#records"), "bytes")
        wait_for(lambda: "answers or labels are lost" in text(browser, "#records"), "count")
        assert browser.execute_script("return document.querySelectorAll('#records .moved').length") == 2
        later.mkdir()
        wait_for(lambda: "The database takes answers" in text(browser, "#records"), "database")
        with stalled(*server.workers[-1:]):  # whichever it is: with one of them busy, others are skipped
            asked = [server.send(picture()) for _ in range(8)]
            time.sleep(0.5)
        assert {one.result().status_code for one in asked} == {200}
        wait_for(lambda: "did not answer" in text(browser, "#skipped"), "skipped images")


def test_the_api_is_described_without_anything_from_elsewhere(
    bundle: Path, tmp_path: Path, browser: Chrome
) -> None:
    with serving(bundle, folder=tmp_path, env={"HOLOTYPE_API_KEY": "secret"}) as server:
        browser.get(f"{server.url}/docs")
        shown = "return !document.getElementById('key-form').hidden"
        wait_for(lambda: bool(browser.execute_script(shown)), "question")
        browser.find_element("id", "key").send_keys("secret\n")
        wait_for(lambda: "POST /predict" in text(browser, "#routes"), "routes")
        browser.execute_script("for (const one of document.querySelectorAll('details')) one.open = true")
        said = text(browser, "#routes")
        for part in (
            "top_k", "integer, ≥ 1, ≤ 3", f"one of {bundle.name}", "/v2/models/{name}/infer",
            "/admin/models/{name}/rollback", "too many images are waiting", "--data-binary @image.jpg",
            f"'{server.url}/feedback'", "$HOLOTYPE_ADMIN_KEY",
            f"'{server.url}/v2/models/{bundle.name}/infer'",
        ):  # fmt: skip
            assert part in said, part
        loaded = browser.execute_script("return performance.getEntries().map((entry) => entry.name)")
        assert [name for name in loaded if name.startswith("http") and not name.startswith(server.url)] == []
        assert len([name for name in loaded if name.endswith((".js", ".css"))]) == 2
        assert browser.execute_script("return document.documentElement.scrollWidth") <= 1280


def test_on_a_phone_nothing_is_cut_off(server: Server, browser: Chrome, photos: list[Path]) -> None:
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": 360, "height": 740, "deviceScaleFactor": 2, "mobile": True},
    )
    browser.get(server.url)
    wait_for(lambda: "3 classes" in text(browser, "#serving"), "connection")
    choose(browser, photos[1])
    wait_for(lambda: text(browser, ".result .label") == "green", "answer")
    width = browser.execute_script("return document.documentElement.scrollWidth")
    assert width <= 360


def test_it_asks_for_the_key(bundle: Path, tmp_path: Path, browser: Chrome, photos: list[Path]) -> None:
    with serving(bundle, folder=tmp_path, env={"HOLOTYPE_API_KEY": "secret"}) as server:
        browser.get(server.url)
        shown = "return !document.getElementById('key-form').hidden"
        wait_for(lambda: bool(browser.execute_script(shown)), "question")
        browser.find_element("id", "key").send_keys("secret\n")
        wait_for(lambda: "3 classes" in text(browser, "#serving"), "connection")
        choose(browser, photos[2])
        wait_for(lambda: text(browser, ".result .label") == "blue", "answer")


def test_an_experiment_is_shown_and_labels_are_told(
    bundle: Path, tmp_path: Path, browser: Chrome, photos: list[Path]
) -> None:
    rival = write_tiny_bundle(tmp_path / "rival", policy=Policy(temperature=2.0)).path
    settings = {
        "records": {"database": f"sqlite:///{tmp_path / 'ab.db'}", "journal": str(tmp_path)},
        "experiment": {"share": 0.5},
    }
    with serving(bundle, challenger=rival, folder=tmp_path, **settings) as server:
        browser.get(server.url)
        wait_for(lambda: "Wait for 100 labelled answers" in text(browser, "#trial-said"), "experiment")
        choose(browser, photos[0])
        wait_for(lambda: text(browser, ".result .label") != "…", "answer")
        browser.find_element("css selector", ".feedback button").click()
        wait_for(lambda: text(browser, ".feedback output") == "kept", "word")

        def labelled() -> int:
            status = server.client.get("/experiment").json()
            return int(status["champion"]["labelled"] + status["challenger"]["labelled"])

        wait_for(lambda: labelled() == 1, "label")
        assert json.loads(server.client.get("/experiment").text)["verdict"] == "undecided"
