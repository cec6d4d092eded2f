"""Errors say what, where and how to fix it, in one line, and survive a trip between processes."""

from __future__ import annotations

import pickle
import subprocess
import sys

import pytest

from holotype import errors
from holotype.errors import (
    BrokenImageError,
    BundleError,
    ConfigError,
    EmptyImageError,
    HolotypeError,
    ImageError,
    ImageTooLargeError,
    MissingExtraError,
    UnsupportedImageError,
    require,
)

CLASSES = [
    value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, HolotypeError)
]


def test_an_error_names_place_problem_and_remedy_in_one_line():
    error = BundleError("payload is missing", where="runs/a/best", fix="restore the bundle")
    assert str(error) == "runs/a/best: payload is missing; restore the bundle"
    assert (error.what, error.where, error.fix) == ("payload is missing", "runs/a/best", "restore the bundle")


def test_place_and_remedy_are_optional():
    assert str(HolotypeError("no")) == "no"
    assert str(HolotypeError("no", where="here")) == "here: no"
    assert str(HolotypeError("no", fix="try again")) == "no; try again"


def test_text_from_outside_cannot_break_the_line():
    assert str(HolotypeError("first\nsecond\r\n\tthird", where="a\nb")) == "a b: first second third"


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_every_error_is_public_documented_and_survives_pickling(kind):
    assert kind.__name__ in errors.__all__
    assert kind.__name__ in (errors.__doc__ or "")
    error = kind("what", where="where", fix="fix")
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is kind
    assert (str(copy), copy.what, copy.where, copy.fix) == (str(error), "what", "where", "fix")


def test_image_errors_carry_the_status_that_tells_a_client_why():
    statuses = {kind: kind.status for kind in CLASSES if issubclass(kind, ImageError)}
    assert statuses == {
        ImageError: 422,
        EmptyImageError: 400,
        ImageTooLargeError: 413,
        UnsupportedImageError: 415,
        BrokenImageError: 422,
    }


def test_a_command_exits_with_two_for_a_mistake_in_its_settings_and_one_for_the_rest():
    assert {kind.exit_code for kind in CLASSES if issubclass(kind, ConfigError)} == {2}
    assert {kind.exit_code for kind in CLASSES if not issubclass(kind, ConfigError)} == {1}


def test_require_returns_the_module():
    import json.decoder

    assert require("json.decoder", extra="train", purpose="reading JSON") is json.decoder


def test_require_names_the_purpose_and_the_line_that_installs():
    with pytest.raises(MissingExtraError) as caught:
        require("no_such_library.part", extra="openvino", purpose="fast inference")
    assert str(caught.value) == (
        "fast inference needs the Python package 'no_such_library'; run: pip install 'holotype[openvino]'"
    )


def test_require_treats_a_blocked_module_as_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(MissingExtraError, match="training"):
        require("torch", extra="train", purpose="training")


def test_errors_import_nothing_of_ours_and_nothing_heavy():
    code = "import sys, holotype.errors; print([m for m in ('numpy', 'PIL', 'torch') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
