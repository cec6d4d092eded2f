"""The relabel page: the real server in a process of its own, over HTTP and in a real browser."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from browsers import in_browser
from digits import write_digits
from holotype.agree.adjudicate import adjudicate
from holotype.agree.apply import apply
from holotype.agree.relabel import Desk, serve_page
from holotype.bundle import hash_file
from holotype.config import AgreeConfig, DatasetConfig, SourceConfig
from holotype.dataset import open_dataset
from holotype.dataset.listing import Record, example_name
from holotype.dataset.revisions import revise
from holotype.dataset.source import read_source
from holotype.dataset.store import cache_folder
from holotype.errors import ServerError
from holotype.preprocess import Box, Preprocess
from holotype.review import (
    Decision,
    Item,
    Sample,
    SuspectLabel,
    Suspects,
    append_decisions,
    read_decisions,
    read_log,
    write_sample,
    write_suspects,
)

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

_PROGRAM = """
import sys
from pathlib import Path
from holotype.agree.adjudicate import adjudicate
print(adjudicate(Path(sys.argv[1]), port=0, open_browser=False))
"""
_LIVENESS = 30.0
_ITEMS = 25


@dataclass(frozen=True)
class Server:
    """A running `adjudicate` and a client of it; `url` ends with the token and a slash."""

    process: subprocess.Popen[bytes]
    url: str
    client: httpx.Client
    output: Path

    def decide(self, index: int, label: int | None = None, *, action: str = "label") -> httpx.Response:
        body = {"index": index, "action": action, "label": label, "seconds": 1.5}
        return self.client.post("decide", params={"since": 0}, json=body)

    def wait(self) -> str:
        """What it printed when it ended by itself."""
        assert self.process.wait(_LIVENESS) == 0
        return self.output.read_text()


@contextmanager
def serving(data: Path, folder: Path) -> Iterator[Server]:
    folder.mkdir(exist_ok=True)
    log, output = folder / "stderr.txt", folder / "stdout.txt"
    with log.open("wb") as errors, output.open("wb") as printed:
        process = subprocess.Popen(
            [sys.executable, "-W", "error", "-c", _PROGRAM, str(data)], stdout=printed, stderr=errors
        )
    try:
        url = ""

        def announced() -> bool:
            nonlocal url
            assert process.poll() is None, log.read_text()
            found = re.search(r"http://127\.0\.0\.1:\d+/\S+/", log.read_text())
            url = found[0] if found else ""
            return bool(found)

        wait_for(announced, "address")
        with httpx.Client(base_url=url, timeout=_LIVENESS) as client:
            yield Server(process, url, client, output)
    finally:
        process.kill()
        process.wait()


def wait_for(condition: Callable[[], bool], what: str) -> None:
    limit = time.monotonic() + _LIVENESS
    while not condition():
        assert time.monotonic() < limit, f"no {what} within {_LIVENESS} s"
        time.sleep(0.02)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """120 real digits, 25 of which are under suspicion to be the next digit."""
    folder = write_digits(tmp_path / "digits")
    suspects = [
        SuspectLabel(path=r.path, label=r.label, suggested=str((int(r.label) + 1) % 3), score=1 - i / 100)
        for i, r in enumerate(records_of(folder)[:: 120 // _ITEMS][:_ITEMS])
    ]
    write_suspects(cache_folder(folder), Suspects(root_hash="x", items=tuple(suspects)))
    return folder


@pytest.fixture
def server(data: Path, tmp_path: Path) -> Iterator[Server]:
    with serving(data, tmp_path / "server") as running:
        yield running


def records_of(data: Path, revision: Any = "latest") -> tuple[Record, ...]:
    return revise(read_source(data, config=SourceConfig()), cache_folder(data), revision)[0].records


def suspect_paths(data: Path) -> list[str]:
    return [item["path"] for item in json.loads((cache_folder(data) / "suspects.json").read_text())["items"]]


class TestDoors:
    def test_a_wrong_token_is_refused_everywhere(self, server: Server) -> None:
        home = server.url.rsplit("/", 2)[0]
        token = server.url.rsplit("/", 2)[1]
        for wrong in ("x" * len(token), token[:-1], token + "x", "%C3%A9"):
            for path in ("", "queue", "image/0", "progress?since=0", "asset/relabel.js"):
                assert httpx.get(f"{home}/{wrong}/{path}").status_code == 403
            for path in ("decide?since=0", "undo?since=0", "finish"):
                body = {"index": 0, "action": "drop"}
                assert httpx.post(f"{home}/{wrong}/{path}", json=body).status_code == 403
        assert httpx.get(f"{home}/").status_code == 404
        assert server.client.get("progress", params={"since": 0}).json()["changes"] == []

    def test_a_foreign_host_name_is_refused(self, server: Server) -> None:
        for host in ("evil.example", "evil.example:8001", "127.0.0.1.evil.example", "127.0.0.1@evil.example"):
            assert server.client.get("queue", headers={"Host": host}).status_code == 403, host
        forwarded = server.client.get("queue", headers={"Host": "localhost:9999"})
        assert forwarded.status_code == 200

    def test_a_foreign_page_is_refused(self, server: Server) -> None:
        for origin in ("http://evil.example", "null", "http://127.0.0.1:1", "https://127.0.0.1"):
            body = {"index": 0, "action": "drop"}
            answer = server.client.post("decide?since=0", json=body, headers={"Origin": origin})
            assert answer.status_code == 403
        own = server.url.rsplit("/", 2)[0]
        answer = server.client.post("decide?since=0", json=body, headers={"Origin": own})
        assert answer.status_code == 200

    def test_no_path_leads_to_a_file(self, server: Server, data: Path) -> None:
        secret = data / "secret.txt"
        secret.write_text("secret")
        for path in (
            "image/../../secret.txt",
            "image/%2e%2e%2fsecret.txt",
            f"image/{secret}",
            f"image/%2F{str(secret)[1:]}",
            "image/-1",
            f"image/{_ITEMS}",
            "image/99999999999999999999999",
            "image/0/../1/x",
            "asset/relabel.py",
            "asset/..%2frelabel.py",
            "asset/%2e%2e/apply.py",
        ):
            answer = server.client.get(path, follow_redirects=True)
            assert answer.status_code in (403, 404, 422), path
            assert b"secret" not in answer.content.replace(b"secret.txt", b"")

    def test_nonsense_is_not_recorded(self, server: Server, data: Path) -> None:
        for body in (
            {"index": 0, "action": "label", "label": 3},
            {"index": 0, "action": "label", "label": -1},
            {"index": 0, "action": "label"},
            {"index": 0, "action": "label", "label": "1"},
            {"index": _ITEMS, "action": "drop"},
            {"index": -1, "action": "drop"},
            {"index": 0, "action": "burn"},
            {"index": 0, "action": "drop", "seconds": -1},
            {"index": 0, "action": "drop", "path": "elsewhere.png"},
            [],
        ):
            answer = server.client.post("decide", params={"since": 0}, json=body)
            assert answer.status_code in (404, 422), body
        assert read_decisions(cache_folder(data)) == {}

    def test_the_page_may_load_only_its_own(self, server: Server) -> None:
        page = server.client.get("")
        policy = page.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert "frame-ancestors 'none'" in policy
        assert page.headers["x-content-type-options"] == "nosniff"
        assert "http://" not in page.text
        assert "https://" not in page.text
        script = server.client.get("asset/relabel.js")
        assert script.headers["content-type"].startswith("text/javascript")
        assert "innerHTML" not in script.text

    def test_of_a_blind_item_the_browser_learns_nothing(self, data: Path, tmp_path: Path) -> None:
        items = tuple((path, "0") for path in suspect_paths(data)[:2])
        write_sample(cache_folder(data), Sample(root_hash="x", seed=0, items=items))
        with serving(data, tmp_path / "server") as server:
            text = server.client.get("queue").text
        queue = json.loads(text)
        assert queue["items"][:2] == [{"reasons": ["review"], "candidates": []}] * 2
        assert len(queue["items"]) == _ITEMS
        assert queue["items"][2] == {"reasons": ["suspect"], "candidates": [1, 2]}
        assert ".png" not in text


class TestAnswers:
    def test_undo_takes_back_the_last_answer_only(self, server: Server, data: Path) -> None:
        server.decide(0, 1)
        server.decide(0, 2)
        server.decide(1, action="drop")
        assert server.client.post("undo?since=0", json={"index": 0}).status_code == 409
        progress = server.client.post("undo?since=0", json={"index": 1}).json()
        assert progress["changes"] == [[0, 1], [0, 2], [1, -1], [1, None]]
        assert (progress["last"], progress["version"], progress["pace"]) == (0, 4, 1.5)
        progress = server.client.post("undo?since=4", json={"index": 0}).json()
        assert progress["changes"] == [[0, 1]]
        (path, decision), *others = read_decisions(cache_folder(data)).items()
        assert (path, decision.label, others) == (suspect_paths(data)[0], "1", [])

    def test_many_at_the_same_time_all_count(self, server: Server, data: Path) -> None:
        def answer(number: int) -> int:
            return server.decide(number % _ITEMS, number % 3).status_code

        with ThreadPoolExecutor(16) as pool:
            assert set(pool.map(answer, range(200))) == {200}
        log = (cache_folder(data) / "decisions.jsonl").read_bytes().splitlines()
        assert len([json.loads(line) for line in log]) == 200
        progress = server.client.get("progress", params={"since": 0}).json()
        assert progress["version"] == 200
        on_page = dict(progress["changes"])
        kept = read_decisions(cache_folder(data))
        assert [on_page[i] for i in range(_ITEMS)] == [int(kept[p].label or "") for p in suspect_paths(data)]

    @pytest.mark.parametrize("answers", [1, 5, 11])
    def test_killed_in_the_middle_it_keeps_what_it_confirmed(
        self, data: Path, tmp_path: Path, answers: int
    ) -> None:
        confirmed: list[list[int]] = []

        def answer_all() -> None:
            with suppress(httpx.HTTPError):
                for index in range(_ITEMS):
                    if server.decide(index, index % 3).status_code == 200:
                        confirmed.append([index, index % 3])

        with serving(data, tmp_path / "server") as server, ThreadPoolExecutor(1) as pool:
            working = pool.submit(answer_all)
            wait_for(lambda: len(confirmed) >= answers or working.done(), "answers")
            server.process.send_signal(signal.SIGKILL)
            assert server.process.wait(_LIVENESS) == -signal.SIGKILL
            working.result()
        with serving(data, tmp_path / "server") as server:
            kept = server.client.get("queue").json()["progress"]["changes"]
        # The one in the middle of which it was killed may have been written, and not been confirmed.
        assert confirmed
        assert kept[: len(confirmed)] == confirmed
        assert len(kept) <= len(confirmed) + 1

    def test_an_answer_is_about_the_picture_and_another_one_is_asked_about_anew(
        self, data: Path, tmp_path: Path
    ) -> None:
        first, second = suspect_paths(data)[:2]
        with serving(data, tmp_path / "server") as server:
            server.decide(0, 1)
            server.decide(1, action="drop")
        kept = read_decisions(cache_folder(data))
        assert {path: decision.sha256 for path, decision in kept.items()} == {
            path: hash_file(data / path) for path in (first, second)
        }
        (data / first).write_bytes((data / second).read_bytes())
        with serving(data, tmp_path / "server") as server:
            assert server.client.get("queue").json()["progress"]["changes"] == [[1, -1]]
            server.decide(0, 2)
            assert server.client.post("undo?since=0", json={"index": 0}).json()["changes"][-1] == [0, None]
            server.client.post("finish")
            assert "decided=1" in server.wait()
        assert [change.path for change in apply(data).dropped] == [second]

    @pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full, a disk that is always full")
    def test_what_cannot_be_written_is_not_confirmed(self, server: Server, data: Path) -> None:
        log = cache_folder(data) / "decisions.jsonl"
        log.symlink_to("/dev/full")
        answer = server.decide(0, 1)
        assert (answer.status_code, "not saved" in answer.text) == (507, True)
        progress = server.client.get("progress", params={"since": 0}).json()
        assert (progress["changes"], progress["last"]) == ([], None)
        log.unlink()
        assert server.decide(0, 1).status_code == 200

    def test_ctrl_c_ends_it_in_peace(self, server: Server) -> None:
        server.decide(0, 1)
        server.decide(1, action="skip")
        server.process.send_signal(signal.SIGINT)
        assert "Adjudicated(items=25, decided=1, skipped=1, out=None)" in server.wait()

    def test_it_ends_by_itself_when_all_is_decided_and_the_page_left_alone(
        self, data: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        folder, path = cache_folder(data), suspect_paths(data)[0]
        item = Item(path, "0", ("0", "1"), ("suspect",))
        append_decisions(
            folder, [Decision(path=path, action="drop", before="0", reason="suspect", at="2026-01-01")]
        )
        desk = Desk(folder, data, (item,), ("0", "1"), "holotype agree apply", linger=0.3)
        assert desk.complete
        serve_page(desk, port=0, open_browser=False)
        assert "1 image to decide about: http://127.0.0.1:" in capsys.readouterr().err

    def test_the_command_that_applies_reads_the_data_in_the_same_way(
        self, data: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        commands: list[str] = []
        monkeypatch.setattr(
            "holotype.agree.adjudicate.serve_page", lambda desk, **_: commands.append(desk.command)
        )
        config = AgreeConfig(data=DatasetConfig(format="folders", margin=0.2))
        adjudicate(data, config=config, new_classes=["a b"])
        settings = "--set data.format=folders --set data.margin=0.2"
        assert commands == [f"holotype agree apply {data} --new-class 'a b' {settings}"]

    def test_a_port_in_use_is_an_error(self, server: Server, data: Path) -> None:
        port = int(server.url.split(":")[2].split("/")[0])
        with pytest.raises(ServerError, match=f"cannot listen on 127.0.0.1 port {port}"):
            adjudicate(data, port=port, open_browser=False)

    def test_the_page_can_end_it(self, server: Server) -> None:
        assert server.client.post("finish").status_code == 204
        assert "decided=0" in server.wait()


class TestImages:
    def test_broken_and_missing_images_say_so_and_hide_nothing(self, server: Server, data: Path) -> None:
        first, second, third = suspect_paths(data)[:3]
        (data / first).write_bytes((data / first).read_bytes()[:-40])
        (data / second).unlink()
        (data / third).write_bytes(b"<svg onload=alert(1)>")
        answers = [server.client.get(f"image/{index}") for index in range(4)]
        assert [answer.status_code for answer in answers] == [422, 404, 422, 200]
        assert answers[0].text == "truncated image"
        assert all(str(data) not in answer.text for answer in answers)
        assert all(answer.headers["content-type"].startswith("text/plain") for answer in answers[:3])
        assert server.decide(0, action="drop").status_code == 200

    def test_a_part_of_an_image_is_shown_framed_in_its_surroundings(self, tmp_path: Path) -> None:
        import io

        import numpy as np
        from PIL import Image

        from holotype.agree.pictures import render
        from holotype.preprocess import Limits

        pixels = np.full((300, 400, 3), 128, np.uint8)
        pixels[100:150, 200:240] = (200, 0, 0)
        Image.fromarray(pixels).save(tmp_path / "scene.png")
        name = example_name("scene.png", Box(200, 100, 240, 150))
        content, kind = render(tmp_path, name, limits=Limits())
        shown = np.asarray(Image.open(io.BytesIO(content))).astype(int)
        # 30 pixels (a tenth of 300, more than 60 % of 40) on either side, and 30 above and below.
        assert (kind, shown.shape) == ("image/jpeg", (1280, 1164, 3))
        red = (shown[..., 0] - shown[..., 1]) > 100
        rows, columns = np.flatnonzero(red.any(axis=1)), np.flatnonzero(red.any(axis=0))
        assert abs(rows[0] / 1280 - 30 / 110) < 0.01
        assert abs(columns[-1] / 1164 - 70 / 100) < 0.01
        assert shown[int(1280 * 30 / 110) - 3, 600].min() > 200
        assert render(tmp_path, "scene.png", limits=Limits())[1] == "image/jpeg"


class Page:
    """What somebody at the keyboard does and sees."""

    def __init__(self, browser: Chrome, url: str) -> None:
        self.browser = browser
        browser.get(url)

    def text(self, name: str) -> str:
        return str(
            self.browser.execute_script("return document.getElementById(arguments[0]).innerText", name)
        )

    def shown(self, name: str) -> bool:
        script = "return document.getElementById(arguments[0]).offsetParent !== null"
        return bool(self.browser.execute_script(script, name))

    def until(self, count: int, image: int | None = None, *, total: int = _ITEMS) -> None:
        """Wait for `count` decided and, unless None, for the image of that number to be on the screen."""
        script = """
            const image = document.getElementById("image");
            const loaded = image.complete && image.naturalWidth && !image.classList.contains("waiting");
            const broken = !document.getElementById("broken").hidden;
            return loaded || broken
        """

        def ready() -> bool:
            if self.text("count") != f"{count} of {total}":
                return False
            return image is None or (
                self.text("place") == f"Image {image}" and bool(self.browser.execute_script(script))
            )

        wait_for(ready, f"{count} of {total} at image {image}; it says {self.text('count')!r}")

    def until_done(self) -> None:
        wait_for(lambda: self.shown("done"), "done screen")

    def press(self, *keys: str) -> None:
        from selenium.webdriver import ActionChains

        ActionChains(self.browser).send_keys(*keys).perform()

    def dispatch(self, **event: Any) -> None:
        """A key that the driver cannot press: of another layout, or held down."""
        script = "document.body.dispatchEvent(new KeyboardEvent('keydown', {bubbles: true, ...arguments[0]}))"
        self.browser.execute_script(script, event)

    def key_of(self, label: str) -> str:
        """The key that the page shows on the button of a class."""
        script = """
            const buttons = [...document.querySelectorAll("#choices button, #chips button")];
            const words = buttons.map((button) => button.innerText.split(/\\s+/));
            return words.find(([key, label]) => label === arguments[0])[0]
        """
        return str(self.browser.execute_script(script, label))

    def complaints(self) -> list[str]:
        return [entry["message"] for entry in self.browser.get_log("browser")]


@in_browser
class TestBrowser:
    def test_twenty_decisions_by_keyboard_one_undo_applied(
        self, data: Path, tmp_path: Path, browser: Chrome
    ) -> None:
        before = {record.path: record for record in records_of(data)}
        paths = suspect_paths(data)
        expected: dict[str, str | None] = {}
        with serving(data, tmp_path / "server") as server:
            page = Page(browser, server.url)
            for number, path in enumerate(paths[:20]):
                page.until(number, number + 1)
                # Kept, as suggested, the third class, no class, in turn.
                label = None if number % 4 == 3 else str((int(before[path].label) + number % 4) % 3)
                if number == 10:
                    page.press(page.key_of(str((int(label or 0) + 1) % 3)))
                    page.until(11, 12)
                    page.press("u")
                    page.until(10, 11)
                page.press("0" if label is None else page.key_of(label))
                expected[path] = label
            page.until(20, 21)
            assert not page.shown("alert")
            assert page.complaints() == []
            server.process.send_signal(signal.SIGINT)
            assert "decided=20" in server.wait()
            page.press("1")
            wait_for(lambda: "not saved" in page.text("alert"), "complaint")
            assert page.text("count") == f"20 of {_ITEMS}"
        log = read_log(cache_folder(data)).standing
        assert {one.path: one.label for one in log} == expected
        assert all(0 < one.seconds < _LIVENESS for one in log)

        changed = {path: label for path, label in expected.items() if label != before[path].label}
        applied = apply(data)
        assert (applied.revision, applied.unchanged) == (1, 20 - len(changed))
        assert {one.path: one.after or None for one in (*applied.changed, *applied.dropped)} == changed
        wanted = {path: (record.label, record.split) for path, record in before.items()}
        for path, label in changed.items():
            if label is None:
                del wanted[path]
            else:
                wanted[path] = (label, wanted[path][1])
        spec = Preprocess(height=32, width=32)
        table = open_dataset(data, spec=spec, config=DatasetConfig()).table
        rows = zip(table["path"], table["label"], table["split"], strict=True)
        assert {path: (label, split) for path, label, split in rows} == wanted
        assert {record.path: record for record in records_of(data, 0)} == before
        assert len(changed) == 15

    def test_every_key_and_the_end(self, data: Path, tmp_path: Path, browser: Chrome) -> None:
        from selenium.webdriver.common.keys import Keys

        shorten_queue(data, 6)
        paths = suspect_paths(data)
        (data / paths[4]).write_bytes(b"no image")
        with serving(data, tmp_path / "server") as server:
            page = Page(browser, server.url)
            page.until(0, 1, total=6)
            page.press("/", "2", Keys.ENTER)
            page.until(1, 2, total=6)
            page.press("d")
            page.until(2, 3, total=6)
            page.press(" ")
            page.until(3, 4, total=6)
            page.press(Keys.BACKSPACE)
            page.until(2, 3, total=6)
            page.press(Keys.ARROW_LEFT, Keys.ARROW_LEFT)
            page.until(2, 1, total=6)
            page.press(Keys.ARROW_RIGHT)
            page.until(2, 2, total=6)
            page.press(page.key_of("0"))  # decided otherwise than before; then on to what is open
            page.until(2, 3, total=6)
            browser.refresh()
            page.until(2, 3, total=6)
            page.press("s")
            page.until(3, 4, total=6)
            page.dispatch(key="1", code="Digit1", repeat=True)
            page.dispatch(key="&", code="Digit7", shiftKey=True)
            page.dispatch(key="&", code="Digit1", shiftKey=True)
            page.press(Keys.ARROW_LEFT)
            page.until(3, 3, total=6)
            page.press(Keys.ARROW_RIGHT)
            page.until(3, 4, total=6)
            page.dispatch(key="&", code="Digit1")  # as on a French keyboard
            page.until(4, 5, total=6)
            assert page.text("broken") == "This image cannot be shown: not an image we read."
            page.press("0")
            page.until(5, 6, total=6)
            page.press("1")
            page.until_done()
            assert page.text("verdict") == "5 of 6 images are decided; 1 skipped."
            assert page.text("command") == f"holotype agree apply {data}"
            page.press("s")
            page.until(6, 3, total=6)
            page.press(page.key_of("1"))
            page.until_done()
            assert page.text("verdict") == "All 6 images are decided."
            page.press(Keys.CONTROL, "z", Keys.NULL)
            page.until(6, 3, total=6)
            page.press(page.key_of("1"))
            page.until_done()
            page.press(Keys.ENTER)
            assert "Adjudicated(items=6, decided=6, skipped=0, out=None)" in server.wait()
            wait_for(lambda: "Finished" in page.text("verdict"), "farewell")
        kept = read_decisions(cache_folder(data))
        assert [kept[path].label for path in paths[:3]] == ["2", "0", "1"]
        assert kept[paths[4]].action == "drop"

    def test_a_second_tab_corrupts_nothing(self, data: Path, tmp_path: Path, browser: Chrome) -> None:
        with serving(data, tmp_path / "server") as server:
            page = Page(browser, server.url)
            page.until(0, 1)
            first = browser.current_window_handle
            browser.switch_to.new_window("tab")
            browser.get(server.url)
            page.until(0, 1)
            page.press("1")
            page.until(1, 2)
            browser.switch_to.window(first)
            page.press("2")
            page.until(1, 2)
        assert [one.path for one in read_log(cache_folder(data)).standing] == suspect_paths(data)[:1] * 2
        assert read_decisions(cache_folder(data))[suspect_paths(data)[0]].label == "1"

    def test_names_of_classes_are_text(self, data: Path, tmp_path: Path, browser: Chrome) -> None:
        name = "<img src=x onerror=document.title='broken'> & \"'"
        (data / "train" / "2").rename(data / "train" / name)
        for split in ("validation", "test"):
            shutil.rmtree(data / split)
        records = [record for record in records_of(data) if record.label == name][:3]
        suspects = [SuspectLabel(path=r.path, label=name, suggested="1", score=0.5) for r in records]
        write_suspects(cache_folder(data), Suspects(root_hash="x", items=tuple(suspects)))
        with serving(data, tmp_path / "server") as server:
            page = Page(browser, server.url)
            page.until(0, 1, total=3)
            assert name in page.text("choices")
            page.press("2")
            page.until(1, 2, total=3)
            assert name in page.text("last")
            assert browser.title == "1 of 3 · relabel"
        assert read_decisions(cache_folder(data))[records[0].path].label == name


def shorten_queue(data: Path, count: int) -> None:
    file = cache_folder(data) / "suspects.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, "items": content["items"][:count]}))
