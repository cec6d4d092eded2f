"""The queue, the sample, the log of decisions, revisions, and what `agree apply` makes of them."""

from __future__ import annotations

import csv
import json
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from digits import write_digits
from holotype.agree.adjudicate import adjudicate
from holotype.agree.apply import Applied, LabelChange, apply
from holotype.agree.exchange import NONE, read_answers, write_queue
from holotype.bundle import hash_file
from holotype.config import AgreeConfig, DatasetConfig, SourceConfig
from holotype.dataset import open_dataset
from holotype.dataset.listing import Listing, Record
from holotype.dataset.revisions import (
    Change,
    apply_revisions,
    latest_revision,
    read_revisions,
    revise,
    write_revision,
)
from holotype.dataset.source import read_source
from holotype.dataset.store import cache_folder
from holotype.errors import ConfigError, DatasetError
from holotype.preprocess import Limits, Preprocess
from holotype.review import (
    Decision,
    Item,
    Sample,
    SuspectLabel,
    Suspects,
    append_decisions,
    append_undo,
    build_queue,
    draw_sample,
    read_decisions,
    read_log,
    read_sample,
    read_suspects,
    sample_accuracy,
    write_sample,
    write_suspects,
)

SPEC = Preprocess(height=32, width=32)


def decision(path: str, label: str | None = None, *, action: str | None = None, **more: Any) -> Decision:
    """A decision for a label, or to drop where there is none."""
    chosen = action or ("drop" if label is None else "label")
    values = {"before": "old", "reason": "suspect", "at": "2026-01-01T00:00:00+00:00", **more}
    return Decision(path=path, action=chosen, label=label, **values)


def decide(data: Path, *decisions: Decision) -> None:
    append_decisions(cache_folder(data), decisions)


def records_of(data: Path, revision: int | str = "latest") -> dict[str, tuple[str, str | None]]:
    """Label and split of every example as of a revision."""
    listing, _ = revise(read_source(data, config=SourceConfig()), cache_folder(data), revision)  # type: ignore[arg-type]
    return {record.path: (record.label, record.split) for record in listing.records}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """120 real digits of three classes, to be decided about."""
    return write_digits(tmp_path / "digits")


@pytest.fixture
def paths(data: Path) -> list[str]:
    """Paths of the zeros of its training split."""
    return [file.relative_to(data).as_posix() for file in sorted((data / "train" / "0").iterdir())]


class TestRevisions:
    LISTING = Listing(
        Path("data"),
        (
            Record("a.png", "cat", "train"),
            Record("b.png", "cat", "train", group="g", annotator="ann"),
            Record("c.png#xywh=1,2,3,4", "dog", "test"),
        ),
    )

    def test_changes_lie_over_the_listing_and_revision_0_is_as_it_was(self, tmp_path: Path) -> None:
        changes = [
            Change(path="a.png", label="dog", reason="suspect"),
            Change(path="b.png", split="validation"),
            Change(path="c.png#xywh=1,2,3,4", drop=True),
        ]
        written = write_revision(tmp_path, source="relabel", changes=changes, root_hash_before="abc")
        assert read_revisions(tmp_path, 1) == (written,)
        assert (written.number, written.parent, written.root_hash_before) == (1, 0, "abc")
        revised, number = revise(self.LISTING, tmp_path, "latest")
        assert number == 1
        assert revised.records == (
            Record("a.png", "dog", "train"),
            Record("b.png", "cat", "validation", group="g", annotator="ann"),
        )
        assert revise(self.LISTING, tmp_path, 0) == (self.LISTING, 0)

    def test_each_revision_can_be_had_and_the_last_word_counts(self, tmp_path: Path) -> None:
        for change in (
            Change(path="a.png", label="dog"),
            Change(path="a.png", split="test"),
            Change(path="a.png", drop=True),
            Change(path="a.png", label="cow"),
            Change(path="a.png", restore=True),
        ):
            write_revision(tmp_path, source="relabel", changes=[change])
        states = [revise(self.LISTING, tmp_path, number)[0].records[0] for number in range(6)]
        assert [(state.path, state.label, state.split) for state in states] == [
            ("a.png", "cat", "train"),
            ("a.png", "dog", "train"),
            ("a.png", "dog", "test"),
            ("b.png", "cat", "train"),
            ("a.png", "cow", "test"),
            ("a.png", "cat", "test"),
        ]

    def test_a_new_label_is_not_the_annotators(self, tmp_path: Path) -> None:
        write_revision(tmp_path, source="relabel", changes=[Change(path="b.png", label="dog")])
        assert revise(self.LISTING, tmp_path, 1)[0].records[1].annotator is None

    def test_changes_of_files_that_are_gone_are_noted(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        changes = [Change(path="gone.png", label="dog"), Change(path="a.png", label="dog")]
        write_revision(tmp_path, source="relabel", changes=changes)
        revised, _ = revise(self.LISTING, tmp_path, "latest")
        assert revised.records[0].label == "dog"
        assert "1 of 2 changed examples are not in the data any more" in capsys.readouterr().err

    def test_changes_are_not_for_a_file_that_has_other_content_now(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        for name in "abcd":
            (tmp_path / f"{name}.png").write_bytes(name.encode())
        names = ("a.png", "b.png", "b.png#xywh=1,2,3,4", "c.png", "d.png")
        listing = Listing(tmp_path, tuple(Record(name, "cat") for name in names))
        changes = [
            Change(path=name, label="dog", split="test", sha256=hash_file(tmp_path / name.partition("#")[0]))
            for name in names
        ]
        folder = tmp_path / "cache"
        folder.mkdir()
        write_revision(folder, source="relabel", changes=[*changes[:4], Change(path="d.png", label="dog")])
        write_revision(folder, source="relabel", changes=[Change(path="a.png", label="cow")])
        assert all(record.label != "cat" for record in revise(listing, folder, "latest")[0].records)
        assert capsys.readouterr().err == ""
        for name in "abd":
            (tmp_path / f"{name}.png").write_bytes(b"another picture")
        (tmp_path / "c.png").unlink()  # who can say what it holds
        revised, number = revise(listing, folder, "latest")
        labels = {record.path: record.label for record in revised.records}
        assert labels == dict(zip(names, ("cow", "cat", "cat", "dog", "dog"), strict=True))
        assert {record.split for record in revised.records[:3]} == {None}
        assert number == 2
        told = capsys.readouterr().err
        assert told == "revision 2: not used for 3 files that have other content now, first a.png\n"

    def test_an_unknown_revision_names_those_that_exist(self, tmp_path: Path) -> None:
        write_revision(tmp_path, source="relabel", changes=[Change(path="a.png", label="dog")])
        with pytest.raises(DatasetError, match=r"no revision 7 .* 0 \(as the data says\), 1"):
            revise(self.LISTING, tmp_path, 7)

    def test_a_damaged_or_missing_revision_is_an_error_that_names_it(self, tmp_path: Path) -> None:
        for _ in range(3):
            write_revision(tmp_path, source="relabel", changes=[Change(path="a.png", label="dog")])
        (tmp_path / "revision-0002.json").write_text('{"number": 2')
        with pytest.raises(DatasetError, match=r"revision-0002\.json: cannot be read .*data\.revision=1"):
            revise(self.LISTING, tmp_path, "latest")
        assert revise(self.LISTING, tmp_path, 1)[1] == 1
        (tmp_path / "revision-0002.json").unlink()
        with pytest.raises(DatasetError, match=r"revision-0002\.json: cannot be read"):
            revise(self.LISTING, tmp_path, 3)

    def test_writers_at_the_same_time_get_numbers_of_their_own(self, tmp_path: Path) -> None:
        def write(number: int) -> int:
            return write_revision(
                tmp_path, source="relabel", changes=[Change(path=f"{number}.png", label="dog")]
            ).number

        with ThreadPoolExecutor(8) as pool:
            numbers = list(pool.map(write, range(40)))
        assert sorted(numbers) == list(range(1, 41))
        chain = read_revisions(tmp_path, latest_revision(tmp_path))
        assert {revision.changes[0].path for revision in chain} == {f"{i}.png" for i in range(40)}
        assert [file.name for file in tmp_path.glob(".*")] == []

    def test_a_change_says_one_thing(self) -> None:
        with pytest.raises(ValidationError, match="only one of"):
            Change(path="a.png", label="dog", drop=True)

    def test_no_revisions_change_nothing(self) -> None:
        assert apply_revisions(self.LISTING, ()) is self.LISTING


class TestSample:
    EXAMPLES = tuple((f"{i}.png", "cat" if i % 2 else "dog") for i in range(1000))

    def test_it_is_the_same_for_the_same_data_and_another_for_other_data(self) -> None:
        first = draw_sample(self.EXAMPLES, count=300, seed=0, root_hash="one")
        assert first == draw_sample(reversed(self.EXAMPLES), count=300, seed=0, root_hash="one")
        assert len({path for path, _ in first.items}) == 300
        assert set(first.items) <= set(self.EXAMPLES)
        for seed, root_hash in ((0, "two"), (1, "one")):
            other = draw_sample(self.EXAMPLES, count=300, seed=seed, root_hash=root_hash)
            # 90 are expected in common, with a standard deviation of 6.6.
            assert 50 < len(set(first.items) & set(other.items)) < 130

    def test_all_where_there_are_fewer(self) -> None:
        sample = draw_sample(self.EXAMPLES[:5], count=300, seed=0, root_hash="one")
        assert sorted(sample.items) == sorted(self.EXAMPLES[:5])

    def test_accuracy_counts_other_labels_and_images_of_no_class(self, tmp_path: Path) -> None:
        assert sample_accuracy(tmp_path, "root") == (0, 0, 0, 0)
        items = tuple((f"{i}.png", "cat") for i in range(6))
        write_sample(tmp_path, Sample(root_hash="root", seed=0, items=items))
        assert sample_accuracy(tmp_path, "root") == (0, 0, 6, 0)
        answers = [
            decision("0.png", "cat"),
            decision("1.png", "dog"),
            decision("2.png"),
            decision("3.png", action="skip"),
            decision("4.png", "cat"),
            decision("elsewhere.png", "dog"),
        ]
        append_decisions(tmp_path, answers)
        assert sample_accuracy(tmp_path, "root") == (4, 2, 6, 1)
        append_undo(tmp_path, "1.png")
        assert sample_accuracy(tmp_path, "root") == (3, 1, 6, 1)
        assert sample_accuracy(tmp_path, "another root") == (0, 0, 0, 0)

    def test_files_come_back_as_they_were_written(self, tmp_path: Path) -> None:
        assert read_sample(tmp_path) is None
        assert read_suspects(tmp_path) is None
        sample = draw_sample([("caf\udce9.png", "cat")], count=1, seed=0, root_hash="one")
        suspect = SuspectLabel(path="a.png", label="cat", suggested="dog", score=0.5, top=("dog", "cat"))
        write_sample(tmp_path, sample)
        write_suspects(tmp_path, Suspects(root_hash="one", items=(suspect,)))
        assert read_sample(tmp_path) == sample
        assert read_suspects(tmp_path) == Suspects(root_hash="one", items=(suspect,))
        (tmp_path / "suspects.json").write_text("{}")
        with pytest.raises(DatasetError, match=r"suspects\.json: cannot be read .*holotype audit"):
            read_suspects(tmp_path)


class TestLog:
    def test_the_last_decision_stands_and_undo_brings_back_the_one_before(self, tmp_path: Path) -> None:
        first, other, second = decision("a.png", "cat"), decision("b.png"), decision("a.png", "dog")
        append_decisions(tmp_path, [first, other])
        append_decisions(tmp_path, [second])
        assert list(read_decisions(tmp_path).items()) == [("b.png", other), ("a.png", second)]
        assert read_log(tmp_path).standing == (first, other, second)
        append_undo(tmp_path, "a.png")
        assert read_decisions(tmp_path) == {"a.png": first, "b.png": other}
        append_undo(tmp_path, "a.png")
        append_undo(tmp_path, "a.png")
        assert read_decisions(tmp_path) == {"b.png": other}
        assert read_log(tmp_path).undone == {"a.png"}
        append_decisions(tmp_path, [first])
        assert read_log(tmp_path).undone == frozenset()

    @pytest.mark.parametrize("kept", range(1, 60, 7))
    def test_a_torn_line_costs_only_itself(
        self, tmp_path: Path, kept: int, capsys: pytest.CaptureFixture[str]
    ) -> None:
        whole, torn, after = decision("a.png", "cat"), decision("b.png", "cat"), decision("c.png", "cat")
        append_decisions(tmp_path, [whole, torn])
        log = tmp_path / "decisions.jsonl"
        lines = log.read_bytes().splitlines(keepends=True)
        log.write_bytes(lines[0] + lines[1][:kept])
        assert read_decisions(tmp_path) == {"a.png": whole}
        append_decisions(tmp_path, [after])
        assert read_decisions(tmp_path) == {"a.png": whole, "c.png": after}
        assert "decisions.jsonl:2: not a whole decision" in capsys.readouterr().err

    @pytest.mark.parametrize(
        "line", [b"\xff\xfe", b"null", b"[]", b'{"undo": 3}', b'{"path": "a.png"}', b"[" * 100_000]
    )
    def test_lines_that_are_no_decision_are_passed_over(self, tmp_path: Path, line: bytes) -> None:
        append_decisions(tmp_path, [decision("a.png", "cat")])
        with (tmp_path / "decisions.jsonl").open("ab") as stream:
            stream.write(line + b"\n")
        assert list(read_decisions(tmp_path)) == ["a.png"]

    def test_names_that_are_not_utf8_are_kept(self, tmp_path: Path) -> None:
        odd = decision("caf\udce9\n.png", "c\udce9")
        append_decisions(tmp_path, [odd])
        assert read_decisions(tmp_path) == {odd.path: odd}

    def test_a_label_goes_with_the_action_label_only(self) -> None:
        for label, action in (("cat", "drop"), (None, "label"), ("cat", "skip")):
            with pytest.raises(ValidationError, match="a label goes with"):
                decision("a.png", label, action=action)


def replace_pictures(data: Path) -> None:
    """Another dataset at the same path, under the same names: each file holds what the next one held."""
    files = sorted(data.rglob("*.png"))
    contents = [file.read_bytes() for file in files]
    for file, content in zip(files, [*contents[1:], contents[0]], strict=True):
        file.write_bytes(content)


class TestAnotherDatasetAtTheSamePath:
    @pytest.fixture
    def decided(self, data: Path, paths: list[str]) -> Path:
        """Decisions about four of its examples, applied."""
        table = data.parent / "filled.csv"
        answers = [(paths[0], "1"), (paths[1], NONE), (paths[2], "0"), (paths[3], "2")]
        write_rows(table, ("image_path", "label"), answers)
        assert apply(data, decisions=table).revision == 1
        return data

    def test_no_revision_and_no_decision_is_for_it(
        self, decided: Path, paths: list[str], capsys: pytest.CaptureFixture[str]
    ) -> None:
        before, own = records_of(decided), records_of(decided, 0)
        assert before != own
        replace_pictures(decided)
        capsys.readouterr()
        dataset = open_dataset(decided, spec=SPEC, config=DatasetConfig())
        assert dict(dataset.table.select("path", "label").iter_rows()) == {p: r[0] for p, r in own.items()}
        note = f"revision 1: not used for 3 files that have other content now, first {paths[0]}\n"
        assert capsys.readouterr().err == note
        applied = apply(decided)
        assert (applied.revision, applied.changed, applied.dropped, applied.missing) == (1, (), (), 4)
        told = capsys.readouterr().err
        assert f"decisions: not used for 4 files that have other content now, first {paths[0]}\n" in told
        assert records_of(decided) == own

    def test_what_is_decided_anew_is(self, decided: Path, paths: list[str]) -> None:
        replace_pictures(decided)
        applied = apply(decided, decisions=decided.parent / "filled.csv")
        assert (applied.revision, applied.missing, len(applied.changed)) == (2, 0, 2)
        assert records_of(decided)[paths[0]] == ("1", "train")
        assert paths[1] not in records_of(decided)

    def test_its_sample_was_not_reviewed(self, decided: Path, paths: list[str]) -> None:
        folder = cache_folder(decided)
        write_sample(folder, Sample(root_hash="x", seed=0, items=tuple((path, "0") for path in paths[:5])))
        assert sample_accuracy(folder, "x", root=decided) == (4, 3, 5, 0)
        replace_pictures(decided)
        assert sample_accuracy(folder, "x", root=decided) == (0, 0, 5, 0)

    def test_old_decisions_and_revisions_which_do_not_say_what_was_seen_still_apply(
        self, data: Path, paths: list[str]
    ) -> None:
        decide(data, decision(paths[0], "1"))
        write_revision(cache_folder(data), source="relabel", changes=[Change(path=paths[1], label="2")])
        replace_pictures(data)
        assert [change.path for change in apply(data).changed] == [paths[0]]
        assert [records_of(data)[path][0] for path in paths[:2]] == ["1", "2"]

    def test_the_index_tells_what_files_hold_so_that_they_are_not_read_again(
        self, decided: Path, paths: list[str]
    ) -> None:
        open_dataset(decided, spec=SPEC, config=DatasetConfig(revision=0))
        before = records_of(decided)
        for path in paths:  # unread, they look as they were
            status = (decided / path).stat()
            (decided / path).write_bytes(bytes(status.st_size))
            os.utime(decided / path, ns=(status.st_atime_ns, status.st_mtime_ns))
        assert records_of(decided) == before
        (decided / paths[0]).touch()
        assert records_of(decided)[paths[0]] == ("0", "train")


class TestQueue:
    def test_sample_first_then_disagreements_then_suspects_each_image_once(self) -> None:
        labels = dict.fromkeys("abcdef", "cat")
        suspects = [
            SuspectLabel(path=path, label="cat", suggested="cow", score=score, top=("cow", "dog"))
            for path, score in (("d", 0.9), ("c", 0.8), ("a", 0.7), ("gone", 0.6))
        ]
        queue = build_queue(
            labels,
            sample=Sample(root_hash="x", seed=0, items=(("b", "cat"), ("a", "cat"))),
            disagreements={"c": ("dog", "cat"), "gone": ("dog", "cat")},
            suspects=Suspects(root_hash="x", items=tuple(suspects)),
        )
        assert queue == (
            Item("b", "cat", (), ("review",)),
            Item("a", "cat", (), ("review", "suspect"), 0.7),
            Item("c", "cat", ("dog", "cat", "cow"), ("disagreement", "suspect"), 0.8),
            Item("d", "cat", ("cow", "cat", "dog"), ("suspect",), 0.9),
        )
        assert [item.blind for item in queue] == [True, True, False, False]


class TestApply:
    def test_changes_what_was_decided_and_nothing_else(self, data: Path, paths: list[str]) -> None:
        before = records_of(data)
        decide(
            data,
            decision(paths[0], "1"),
            decision(paths[1], "0"),
            decision(paths[2]),
            decision(paths[3], action="skip"),
            decision(paths[4], "2", reason="disagreement"),
            decision("train/0/gone.png", "1"),
        )
        applied = apply(data)
        assert applied == Applied(
            revision=1,
            changed=(
                LabelChange(paths[0], "0", "1", "suspect"),
                LabelChange(paths[4], "0", "2", "disagreement"),
            ),
            dropped=(LabelChange(paths[2], "0", "", "suspect"),),
            unchanged=1,
            skipped=1,
            missing=1,
        )
        expected = dict(before)
        expected[paths[0]], expected[paths[4]] = ("1", "train"), ("2", "train")
        del expected[paths[2]]
        assert records_of(data) == expected
        assert records_of(data, 0) == before

    def test_the_index_shows_the_revision(self, data: Path, paths: list[str]) -> None:
        config = DatasetConfig()
        old = open_dataset(data, spec=SPEC, config=config)
        decide(data, decision(paths[0], "1"), decision(paths[1]))
        apply(data)
        new = open_dataset(data, spec=SPEC, config=config)
        assert new.counts()["0"]["train"] == old.counts()["0"]["train"] - 2
        assert new.counts()["1"]["train"] == old.counts()["1"]["train"] + 1
        assert new.root_hash != old.root_hash
        again = open_dataset(data, spec=SPEC, config=config.model_copy(update={"revision": 0}))
        assert again.root_hash == old.root_hash

    def test_twice_is_once(self, data: Path, paths: list[str], capsys: pytest.CaptureFixture[str]) -> None:
        decide(data, decision(paths[0], "1"), decision(paths[1]))
        assert apply(data).revision == 1
        capsys.readouterr()
        again = apply(data)
        assert (again.revision, again.changed, again.dropped, again.unchanged) == (1, (), (), 2)
        assert "no new revision" in capsys.readouterr().err
        assert latest_revision(cache_folder(data)) == 1

    def test_what_is_taken_back_later_is_given_back(self, data: Path, paths: list[str]) -> None:
        before = records_of(data)
        decide(data, decision(paths[0], "1"), decision(paths[1]), decision(paths[2], "2"))
        apply(data)
        append_undo(cache_folder(data), paths[0])
        append_undo(cache_folder(data), paths[1])
        decide(data, decision(paths[2], action="skip"))
        applied = apply(data)
        assert applied.revision == 2
        assert [(one.path, one.before, one.after) for one in applied.changed] == [
            (paths[0], "1", "0"),
            (paths[1], "", "0"),
            (paths[2], "2", "0"),
        ]
        assert records_of(data) == before
        assert apply(data).revision == 2

    def test_another_decision_later_replaces_what_was_applied(self, data: Path, paths: list[str]) -> None:
        decide(data, decision(paths[0]))
        apply(data)
        decide(data, decision(paths[0], "2"))
        assert apply(data).changed == (LabelChange(paths[0], "", "2", "suspect"),)
        assert records_of(data)[paths[0]] == ("2", "train")

    def test_splits_of_another_revision_stay(self, data: Path, paths: list[str]) -> None:
        folder = cache_folder(data)
        write_revision(folder, source="fix-split", changes=[Change(path=paths[0], split="test")])
        decide(data, decision(paths[0], "1"))
        apply(data)
        append_undo(folder, paths[0])
        assert records_of(data)[paths[0]] == ("1", "test")
        apply(data)
        assert records_of(data)[paths[0]] == ("0", "test")

    def test_a_label_that_is_no_class_is_refused_unless_it_is_meant(
        self, data: Path, paths: list[str]
    ) -> None:
        decide(data, decision(paths[0], "11"))
        with pytest.raises(DatasetError, match=r"'11', which is no class .* did you mean '1'\?"):
            apply(data)
        assert latest_revision(cache_folder(data)) == 0
        applied = apply(data, new_classes=["11"])
        assert applied.changed == (LabelChange(paths[0], "0", "11", "suspect"),)

    def test_out_is_the_whole_revised_dataset(self, data: Path, paths: list[str], tmp_path: Path) -> None:
        decide(data, decision(paths[0], "1"), decision(paths[1]))
        for out in (data / "revised.csv", tmp_path / "elsewhere" / "revised.csv"):
            out.parent.mkdir(exist_ok=True)
            assert apply(data, out=out).out == out
            table = read_source(out, config=SourceConfig())
            found = {
                (table.root / record.path).resolve().relative_to(data.resolve()).as_posix(): record
                for record in table.records
            }
            assert {p: (r.label, r.split) for p, r in found.items()} == records_of(data)
        with pytest.raises(ConfigError, match=r"must end in \.csv"):
            apply(data, out=data / "revised.parquet")

    @pytest.mark.skipif(sys.platform != "linux", reason="file names are bytes on Linux")
    def test_a_file_name_that_is_not_utf8_is_no_example(self, data: Path, paths: list[str]) -> None:
        name = "train/0/caf\udce9.png"
        (data / paths[0]).rename(data / name)
        decide(data, decision(name, "1"))
        applied = apply(data, out=data / "revised.csv")
        assert (applied.changed, applied.missing) == ((), 1)
        assert paths[1] in (data / "revised.csv").read_text()

    def test_an_older_revision_cannot_be_gone_on_from(self, data: Path) -> None:
        config = AgreeConfig(data=DatasetConfig(revision=0))
        with pytest.raises(ConfigError, match="latest revision"):
            apply(data, config=config)


class TestFilesForOtherTools:
    ITEMS = 6

    @pytest.fixture
    def queue(self, data: Path, paths: list[str], tmp_path: Path) -> Path:
        items = [
            Item(path, "0", ("1", "0") if number else (), ("suspect",) if number else ("review",))
            for number, path in enumerate(paths[: self.ITEMS])
        ]
        folder = tmp_path / "queue"
        write_queue(folder, items, root=data, classes=("0", "1", "2"), limits=Limits())
        return folder

    def test_they_are_blind(self, queue: Path) -> None:
        rows = read_rows(queue / "queue.csv")
        assert len(rows) == self.ITEMS
        assert {row["label"] for row in rows} == {""}
        assert [row["candidates"] for row in rows[:2]] == ["", "0 | 1"]
        tasks = json.loads((queue / "queue-label-studio.json").read_text())
        assert [task["data"]["image_path"] for task in tasks] == [row["image_path"] for row in rows]
        assert all(task["predictions"] == [] for task in tasks)
        text = (queue / "queue.csv").read_text() + (queue / "queue-label-studio.json").read_text()
        assert "train/0" not in text
        assert all((queue / row["image_path"]).read_bytes().startswith(b"\x89PNG") for row in rows)
        assert 'value="2"' in (queue / "label-studio-config.xml").read_text()

    def test_a_filled_csv_is_applied(self, data: Path, paths: list[str], queue: Path) -> None:
        rows = read_rows(queue / "queue.csv")
        for row, label in zip(rows, ("1", "0", NONE, "2"), strict=False):
            row["label"] = label
        write_rows(queue / "queue.csv", tuple(rows[0]), [tuple(row.values()) for row in rows])
        applied = apply(data, decisions=queue / "queue.csv")
        assert [(c.path, c.after, c.reason) for c in applied.changed] == [
            (paths[0], "1", "decided in queue.csv"),
            (paths[3], "2", "decided in queue.csv"),
        ]
        assert [c.path for c in applied.dropped] == [paths[2]]
        assert applied.unchanged == 1
        log = read_log(cache_folder(data)).standing
        assert apply(data, decisions=queue / "queue.csv").revision == 1
        assert read_log(cache_folder(data)).standing == log

    def test_a_quote_that_nobody_closes_is_named_and_loses_no_answer(
        self, data: Path, paths: list[str]
    ) -> None:
        file = data / "filled.csv"
        lines = [f'{path},"1"' for path in paths[:8]]
        lines[2] = lines[2][:-1]
        file.write_text("\n".join(["image_path,label", *lines]))
        with pytest.raises(DatasetError, match=r"filled\.csv: line 4: is not CSV \(.*; close the quotes"):
            apply(data, decisions=file)
        file.write_text("\r\n".join(["\ufeffimage_path,label", *lines[:2], f'"{paths[2]}","1\r\n"']))
        assert [change.path for change in apply(data, decisions=file).changed] == paths[:3]

    def test_a_label_studio_export_is_applied(self, data: Path, paths: list[str], queue: Path) -> None:
        def annotation(label: str, **more: Any) -> dict[str, Any]:
            result = {"type": "choices", "from_name": "label", "value": {"choices": [label]}}
            return {"completed_by": 1, "result": [result], **more}

        tasks = json.loads((queue / "queue-label-studio.json").read_text())
        tasks[0]["annotations"] = [annotation("1")]
        tasks[1]["annotations"] = [annotation("2", was_cancelled=True)]
        tasks[2]["annotations"] = [annotation("1"), annotation("2", ground_truth=True)]
        tasks[3]["predictions"] = [annotation("1")]
        tasks[4]["annotations"] = [annotation(NONE), annotation(NONE, completed_by={"id": 2})]
        export = queue / "export.json"
        export.write_text(json.dumps(tasks))
        expected = {paths[0]: "1", paths[2]: "2", paths[4]: None}
        assert read_answers(export, paths=paths, classes=("0", "1", "2")) == expected
        applied = apply(data, decisions=export)
        assert [c.path for c in applied.changed] == [paths[0], paths[2]]
        assert [c.path for c in applied.dropped] == [paths[4]]

    def test_the_short_json_export_and_paths_of_the_dataset_are_read(
        self, paths: list[str], queue: Path
    ) -> None:
        name = read_rows(queue / "queue.csv")[0]["image_path"]
        export = queue / "export.json"
        export.write_text(json.dumps([{"image_path": name, "label": "2"}, {"image_path": paths[1], "id": 7}]))
        assert read_answers(export, paths=paths, classes=("0", "2")) == {paths[0]: "2"}
        table = queue / "own.csv"
        write_rows(table, ("image_path", "label"), [(paths[5], "1")])
        assert read_answers(table, paths=paths, classes=("0", "1")) == {paths[5]: "1"}

    def test_bad_rows_are_all_named_and_nothing_is_applied(
        self, data: Path, paths: list[str], queue: Path
    ) -> None:
        table = queue / "own.csv"
        rows = [
            (paths[0], "1"),
            (paths[1], "seven"),
            ("train/0/none.png", "1"),
            (paths[0], "2"),
            (paths[2], ""),
        ]
        write_rows(table, ("image_path", "label"), rows)
        with pytest.raises(DatasetError, match="3 of 5 records") as caught:
            apply(data, decisions=table)
        for part in ("own.csv:3: 'seven'", "own.csv:4: 'train/0/none.png'", "own.csv:5: is answered twice"):
            assert part in str(caught.value)
        assert read_decisions(cache_folder(data)) == {}

    def test_two_answers_of_label_studio_must_be_settled_there(self, paths: list[str], queue: Path) -> None:
        choices = [{"result": [{"value": {"choices": [label]}}]} for label in "12"]
        export = queue / "export.json"
        export.write_text(json.dumps([{"data": {"image_path": paths[0]}, "annotations": choices}, 3]))
        with pytest.raises(DatasetError, match=r"2 of 2 .* several ways: 1, 2; .* task 2: has no image_path"):
            read_answers(export, paths=paths, classes=("1", "2"))

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("a.csv", b"path,label\n", "no column 'image_path'"),
            ("a.csv", b"\xff\xfea", "not UTF-8"),
            ("a.json", b"{", "not JSON"),
            ("a.json", b"{}", "no list of tasks"),
            ("a.txt", b"", "neither .csv nor .json"),
            ("missing.csv", None, "cannot be read"),
        ],
    )
    def test_files_that_are_none_of_these(
        self, tmp_path: Path, name: str, content: bytes | None, message: str
    ) -> None:
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(DatasetError, match=message):
            read_answers(tmp_path / name, paths=["a.png"], classes=("1",))

    def test_a_folder_of_something_else_is_not_replaced(self, data: Path, tmp_path: Path) -> None:
        (tmp_path / "photos").mkdir()
        (tmp_path / "photos" / "mine.jpg").touch()
        with pytest.raises(ConfigError, match="not a relabel queue"):
            write_queue(tmp_path / "photos", [], root=data, classes=(), limits=Limits())
        assert (tmp_path / "photos" / "mine.jpg").exists()


class TestAdjudicate:
    def test_without_anything_to_ask_it_says_what_to_do(self, data: Path) -> None:
        with pytest.raises(DatasetError, match="nothing to decide about; run holotype audit"):
            adjudicate(data, port=None)

    def test_votes_that_differ_are_asked_about(self, data: Path, paths: list[str], tmp_path: Path) -> None:
        # Agreed on the dataset's label, differing, agreed on another one, one vote only, three ways.
        ballots = ("01122", "02120", "0012 ")
        for name, ballot in zip(("ann", "bob", "eve"), ballots, strict=True):
            rows = [(path, vote) for path, vote in zip(paths, ballot.replace(" ", ""), strict=False)]
            rows = [row for row in rows if row[0] != paths[3] or name == "ann"]
            write_rows(tmp_path / f"{name}.csv", ("image_path", "label"), rows)
        files = [tmp_path / f"{name}.csv" for name in ("ann", "bob", "eve")]
        result = adjudicate(data, votes=files, out=tmp_path / "queue", port=None)
        assert (result.items, result.decided, result.skipped) == (3, 0, 0)
        rows = read_rows(tmp_path / "queue" / "queue.csv")
        assert [row["candidates"] for row in rows] == ["0 | 1 | 2", "0 | 1", "0 | 2"]
        assert {row["reason"] for row in rows} == {"disagreement"}

    def test_votes_for_an_unknown_class_are_refused_unless_it_is_meant(
        self, data: Path, paths: list[str], tmp_path: Path
    ) -> None:
        for name, label in (("ann", "one"), ("bob", "1")):
            write_rows(tmp_path / f"{name}.csv", ("image_path", "label"), [(paths[0], label)])
        files = [tmp_path / "ann.csv", tmp_path / "bob.csv"]
        with pytest.raises(DatasetError, match=r"annotators chose 'one' for .* --new-class"):
            adjudicate(data, votes=files, port=None)
        assert adjudicate(data, votes=files, port=None, new_classes=["one"]).items == 1

    def test_decided_items_come_as_decided(self, data: Path, paths: list[str]) -> None:
        suspects = [
            SuspectLabel(path=path, label="0", suggested="1", score=0.9) for path in (*paths[:4], "gone.png")
        ]
        write_suspects(cache_folder(data), Suspects(root_hash="x", items=tuple(suspects)))
        decide(data, decision(paths[0], "1"), decision(paths[1], action="skip"), decision(paths[2]))
        apply(data)
        result = adjudicate(data, port=None)
        assert (result.items, result.decided, result.skipped) == (4, 2, 1)


def write_rows(file: Path, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    with file.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([header, *rows])


def read_rows(file: Path) -> list[dict[str, str]]:
    with file.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))
