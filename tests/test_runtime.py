"""The same bundle gives the same answer in every runtime, and a model that is not itself is refused."""

from __future__ import annotations

import importlib
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from holotype.bundle import Bundle, Golden, Manifest, open_bundle, read_golden, write_bundle, write_golden
from holotype.cli import run
from holotype.errors import BundleError, ConfigError, MissingExtraError
from holotype.machine import available_cores
from holotype.policy import probabilities
from holotype.predictor import load
from holotype.preprocess import Preprocess
from holotype.runtime import NAMES, load_onnx, open_runtime, refuse_external_data, verify_golden
from tiny import CLASSES, SIZE, golden_images, picture, tiny_model, write_tiny_bundle


def rewrite(bundle: Path, target: Path, *, golden: Golden | None = None, **changes: object) -> Bundle:
    """A valid bundle, hashes and all, that differs from `bundle` in one thing."""
    opened = open_bundle(bundle)
    target.parent.mkdir(parents=True, exist_ok=True)
    file = target.parent / "golden.npz"
    write_golden(file, golden or read_golden(opened))
    payloads = ("onnx", "openvino", "openvino_weights")
    other = {name: changes.pop(name) for name in payloads if name in changes}
    files = {"onnx": opened.payload("onnx"), **other, "golden": file}
    return write_bundle(target, opened.manifest.model_copy(update=changes), files=files)


# -------------------------------------------------------------------------------------------- agreement


def test_onnxruntime_gives_the_golden_outputs_for_any_batch_size(tiny_bundle):
    bundle = open_bundle(tiny_bundle)
    runtime = open_runtime(bundle, name="onnxruntime")
    golden = read_golden(bundle)
    for count in (1, 2, 4):
        logits, embedding = runtime.run(golden.images[:count])
        assert logits.shape == (count, 3)
        assert embedding.shape == (count, 3)
        assert logits.dtype == embedding.dtype == np.float32
        assert np.allclose(logits, golden.logits[:count], atol=1e-5)
    assert runtime.run(golden.images[:3]).logits.argmax(axis=1).tolist() == [0, 1, 2]


def test_openvino_and_onnxruntime_agree_on_the_same_bundle(tiny_bundle):
    pytest.importorskip("openvino")
    bundle = open_bundle(tiny_bundle)
    images = np.random.default_rng(0).integers(0, 256, (5, SIZE, SIZE, 3), dtype=np.uint8)
    ours, theirs = (open_runtime(bundle, name=name).run(images) for name in ("onnxruntime", "openvino"))
    assert np.allclose(ours.logits, theirs.logits, atol=1e-4)
    assert np.allclose(ours.embedding, theirs.embedding, atol=1e-3)


def test_openvino_answers_stay_when_the_next_batch_is_run(tiny_bundle):
    pytest.importorskip("openvino")
    runtime = open_runtime(open_bundle(tiny_bundle), name="openvino")
    first = runtime.run(golden_images()[:1])
    before = first.logits.copy()
    runtime.run(golden_images()[1:2])
    assert np.array_equal(first.logits, before)


def test_an_openvino_bundle_is_served_with_the_weights_whose_hash_was_checked(tiny_bundle, tmp_path):
    openvino = pytest.importorskip("openvino")
    bundle = open_bundle(tiny_bundle)
    openvino.save_model(
        openvino.convert_model(str(bundle.payload("onnx"))), tmp_path / "model.xml", compress_to_fp16=False
    )
    files = {
        "openvino": tmp_path / "model.xml",
        "openvino_weights": tmp_path / "model.bin",
        "golden": bundle.payload("golden"),
    }
    whole = write_bundle(tmp_path / "whole", bundle.manifest, files=files)
    runtime = open_runtime(whole)
    assert runtime.name == "openvino"
    verify_golden(runtime, whole)

    del files["openvino_weights"]
    part = write_bundle(tmp_path / "part", bundle.manifest, files=files)
    (part.path / "openvino" / "model.bin").write_bytes((tmp_path / "model.bin").read_bytes())
    with pytest.raises(BundleError, match="OpenVINO model without its weights"):
        open_runtime(part)


def test_auto_takes_onnxruntime_where_the_bundle_has_onnx(tiny_bundle):
    assert load(tiny_bundle).runtime.name == "onnxruntime"


def test_the_answer_does_not_depend_on_the_number_of_threads(tiny_bundle):
    bundle = open_bundle(tiny_bundle)
    one, two = (open_runtime(bundle, threads=threads).run(golden_images()).logits for threads in (1, 2))
    assert np.allclose(one, two, atol=1e-6)


def test_an_onnx_bundle_is_served_without_torch(tiny_bundle):
    code = """
import sys
for name in ("torch", "timm", "torchvision"):
    sys.modules[name] = None
from holotype import load
from tiny import picture
print(load(sys.argv[1]).predict(picture("blue")).label)
"""
    here = str(Path(__file__).parent)
    result = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {here!r})\n{code}", str(tiny_bundle)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.stdout.strip() == "blue", result.stderr


# ----------------------------------------------------------------------------------- what a bundle lacks


def test_a_runtime_for_which_the_bundle_has_no_model_says_how_to_get_one(tiny_bundle, tmp_path):
    bundle = open_bundle(tiny_bundle)
    bare = write_bundle(tmp_path / "bare", bundle.manifest, files={"golden": bundle.payload("golden")})
    with pytest.raises(BundleError, match=r"has no ONNX model; run: holotype export"):
        open_runtime(bare, name="onnxruntime")
    with pytest.raises(BundleError, match=r"neither an OpenVINO nor an ONNX model; run: holotype export"):
        open_runtime(bare, name="openvino")
    with pytest.raises(BundleError, match=r"has no torch weights; use --runtime onnxruntime"):
        open_runtime(bundle, name="torch")


def test_an_unknown_runtime_is_an_error_that_lists_the_known_ones(tiny_bundle):
    with pytest.raises(
        ConfigError, match=r"unknown runtime 'tflite'; choose one of: auto, torch, onnxruntime, openvino"
    ):
        load(tiny_bundle, runtime="tflite")  # type: ignore[arg-type]
    assert NAMES[0] == "auto"


def test_a_missing_library_is_an_error_that_names_the_extra(tiny_bundle, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'holotype\[openvino\]'"):
        load(tiny_bundle, runtime="openvino")


def test_some_cores_are_available():
    assert available_cores() >= 1


# --------------------------------------------------------------------------------- models that are refused


@pytest.mark.parametrize("classes", [2, 4])
def test_a_model_with_another_number_of_classes_is_refused(tmp_path, classes):
    write_tiny_bundle(tmp_path / "b", model=tiny_model(classes=classes))
    with pytest.raises(BundleError, match=rf"gives logits \(4, {classes}\)"):
        load(tmp_path / "b")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_a_model_whose_outputs_are_not_finite_is_refused(tmp_path, value, runtime):
    pytest.importorskip(runtime)
    model = tiny_model()
    bias = next(tensor for tensor in model.graph.initializer if tensor.name == "bias")
    bias.CopyFrom(numpy_helper.from_array(np.full(3, value, np.float32), "bias"))
    write_tiny_bundle(tmp_path / "b", model=model)
    with pytest.raises(BundleError, match="golden outputs differ by nan"):
        load(tmp_path / "b", runtime=runtime)


def test_a_model_that_learned_something_else_is_refused(tmp_path):
    model = tiny_model()
    weight = next(tensor for tensor in model.graph.initializer if tensor.name == "weight")
    values = numpy_helper.to_array(weight)
    weight.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(values[:, [1, 0, 2]]), "weight"))
    write_tiny_bundle(tmp_path / "b", model=model)
    with pytest.raises(
        BundleError, match=r"golden outputs differ by .* under onnxruntime; export the bundle again"
    ):
        load(tmp_path / "b")


def test_changed_golden_outputs_are_refused(tiny_bundle, tmp_path):
    golden = read_golden(open_bundle(tiny_bundle))
    logits = golden.logits.copy()
    logits[3, 1] += 0.5
    rewrite(tiny_bundle, tmp_path / "b", golden=Golden(golden.images, logits))
    with pytest.raises(BundleError, match="golden outputs differ"):
        load(tmp_path / "b")


def test_the_noise_of_another_machine_is_accepted(tiny_bundle, tmp_path):
    golden = read_golden(open_bundle(tiny_bundle))
    noise = np.random.default_rng(0).normal(0, 1e-5, golden.logits.shape).astype(np.float32)
    rewrite(tiny_bundle, tmp_path / "b", golden=Golden(golden.images, golden.logits + noise))
    assert load(tmp_path / "b").classes == CLASSES


@pytest.mark.parametrize(
    "change",
    [
        lambda g: Golden(g.images[:0], g.logits[:0]),
        lambda g: Golden(g.images[:3], g.logits),
        lambda g: Golden(g.images, g.logits[:, :2]),
        lambda g: Golden(g.images, g.logits[0]),
        lambda g: Golden(g.images[:, :16], g.logits),
        lambda g: Golden(g.images[0], g.logits),
    ],
    ids=["none", "fewer images", "fewer classes", "one row", "cut images", "one image"],
)
def test_golden_arrays_that_do_not_fit_the_manifest_are_refused(tiny_bundle, tmp_path, change):
    rewrite(tiny_bundle, tmp_path / "b", golden=change(read_golden(open_bundle(tiny_bundle))))
    with pytest.raises(BundleError, match="golden arrays"):
        load(tmp_path / "b")


def test_golden_images_of_another_type_are_refused(tiny_bundle, tmp_path):
    golden = read_golden(open_bundle(tiny_bundle))
    rewrite(tiny_bundle, tmp_path / "b", golden=Golden(golden.images.astype(np.float32), golden.logits))
    with pytest.raises(BundleError, match="the model fails on its golden inputs under onnxruntime"):
        load(tmp_path / "b")


def test_an_input_size_that_the_model_does_not_have_is_refused(tiny_bundle, tmp_path):
    rewrite(tiny_bundle, tmp_path / "b", preprocess=Preprocess(height=SIZE, width=SIZE + 8))
    with pytest.raises(BundleError, match="golden arrays"):
        load(tmp_path / "b")


@pytest.mark.parametrize(
    "classes", [("red", "green"), ("red", "green", "blue", "grey"), ("red", "green", "red")]
)
def test_a_wrong_list_of_classes_is_refused(tiny_bundle, tmp_path, classes):
    rewrite(tiny_bundle, tmp_path / "b", classes=classes)
    with pytest.raises(BundleError, match=r"golden arrays|lists a class twice"):
        load(tmp_path / "b")


def test_a_model_with_other_inputs_and_outputs_is_refused(tiny_bundle, tmp_path):
    model = tiny_model()
    for node in model.graph.node:
        for names in (node.input, node.output):
            names[:] = ["probabilities" if name == "logits" else name for name in names]
    model.graph.output[0].name = "probabilities"
    onnx.save(model, tmp_path / "model.onnx")
    rewrite(tiny_bundle, tmp_path / "b", onnx=tmp_path / "model.onnx")
    with pytest.raises(BundleError, match="the model fails on its golden inputs"):
        load(tmp_path / "b")


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("content", [b"", b"not a model", b"\x08\x0a" * 50])
def test_a_file_that_is_no_model_is_refused(tiny_bundle, tmp_path, runtime, content):
    pytest.importorskip(runtime)
    (tmp_path / "model.onnx").write_bytes(content)
    rewrite(tiny_bundle, tmp_path / "b", onnx=tmp_path / "model.onnx")
    with pytest.raises(BundleError, match=r"model\.onnx"):
        load(tmp_path / "b", runtime=runtime)


def test_a_temperature_is_part_of_the_answer(tiny_bundle, tmp_path):
    manifest = open_bundle(tiny_bundle).manifest
    warm = manifest.policy.model_copy(update={"temperature": 4.0})
    rewrite(tiny_bundle, tmp_path / "b", policy=warm)
    predictor = load(tmp_path / "b")
    images = golden_images()
    logits = load(tiny_bundle).runtime.run(images).logits
    assert np.allclose(predictor.probabilities(images), probabilities(logits, policy=warm))
    assert not np.allclose(predictor.probabilities(images), load(tiny_bundle).probabilities(images))


# ------------------------------------------------------------------------------------------ external data


def point_outside(tensor: onnx.TensorProto, location: str) -> None:
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", "0"), ("length", "12")):
        tensor.external_data.add(key=key, value=value)


def outside_tensor(location: str) -> onnx.TensorProto:
    tensor = numpy_helper.from_array(np.zeros(3, np.float32), "outside")
    point_outside(tensor, location)
    return tensor


def constant(location: str) -> onnx.NodeProto:
    return helper.make_node("Constant", [], ["unused"], value=outside_tensor(location))


def branch(
    name: str, *, initializer: onnx.TensorProto | None = None, node: onnx.NodeProto | None = None
) -> onnx.GraphProto:
    value = helper.make_node(
        "Constant", [], [f"{name}_out"], value=numpy_helper.from_array(np.zeros(3, np.float32))
    )
    return helper.make_graph(
        [value, *([node] if node else [])],
        name,
        [],
        [helper.make_tensor_value_info(f"{name}_out", TensorProto.FLOAT, [3])],
        initializer=[initializer] if initializer else [],
    )


def choice(then: onnx.GraphProto) -> onnx.NodeProto:
    return helper.make_node("If", ["condition"], ["chosen"], then_branch=then, else_branch=branch("other"))


def as_initializer(model: onnx.ModelProto, location: str) -> None:
    point_outside(next(tensor for tensor in model.graph.initializer if tensor.name == "bias"), location)


def as_attribute(model: onnx.ModelProto, location: str) -> None:
    model.graph.node.append(constant(location))


def as_subgraph_initializer(model: onnx.ModelProto, location: str) -> None:
    model.graph.node.append(choice(branch("then", initializer=outside_tensor(location))))


def as_attribute_in_a_subgraph(model: onnx.ModelProto, location: str) -> None:
    model.graph.node.append(choice(branch("then", node=constant(location))))


def as_attribute_in_a_function(model: onnx.ModelProto, location: str) -> None:
    opset = [helper.make_opsetid("", 18)]
    model.functions.append(
        helper.make_function("ours", "Hidden", [], ["unused"], [constant(location)], opset)
    )


def as_subgraph_initializer_in_a_function(model: onnx.ModelProto, location: str) -> None:
    node = choice(branch("then", initializer=outside_tensor(location)))
    opset = [helper.make_opsetid("", 18)]
    model.functions.append(helper.make_function("ours", "Hidden", ["condition"], ["chosen"], [node], opset))


def as_sparse_initializer(model: onnx.ModelProto, location: str) -> None:
    indices = numpy_helper.from_array(np.arange(3), "indices")
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(outside_tensor(location), indices, [9]))


def without_saying_external(model: onnx.ModelProto, location: str) -> None:
    bias = next(tensor for tensor in model.graph.initializer if tensor.name == "bias")
    bias.external_data.add(key="location", value=location)


HIDING_PLACES: list[Callable[[onnx.ModelProto, str], None]] = [
    as_initializer,
    as_attribute,
    as_subgraph_initializer,
    as_attribute_in_a_subgraph,
    as_attribute_in_a_function,
    as_subgraph_initializer_in_a_function,
    as_sparse_initializer,
    without_saying_external,
]


@pytest.mark.parametrize("hide", HIDING_PLACES, ids=lambda hide: hide.__name__)
@pytest.mark.parametrize(
    "location", ["weights.bin", "../secret.bin", "{absolute}"], ids=["beside", "above", "absolute"]
)
@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_data_outside_of_the_model_is_refused_before_a_runtime_sees_it(
    tiny_bundle, tmp_path, monkeypatch, runtime, location, hide
):
    secret = tmp_path / "secret.bin"
    secret.write_bytes(bytes(12))
    model = tiny_model()
    hide(model, location.format(absolute=secret))
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    bundle = rewrite(tiny_bundle, tmp_path / "sub" / "b", onnx=tmp_path / "model.onnx")
    (bundle.path / "weights.bin").write_bytes(bytes(12))

    def opened(*_: object, **__: object) -> None:
        pytest.fail("the runtime was given the model")

    monkeypatch.setattr(onnxruntime, "InferenceSession", opened)
    if runtime == "openvino":
        openvino = pytest.importorskip("openvino")
        monkeypatch.setattr(openvino.Core, "read_model", opened)
        monkeypatch.setattr(openvino.Core, "compile_model", opened)
    with pytest.raises(
        BundleError, match=r"points to data outside the model file; save the model with its weights"
    ):
        load(bundle.path, runtime=runtime)


@pytest.mark.parametrize("link", ["symlink", "hard link"])
def test_linked_data_beside_the_model_is_refused(tiny_bundle, tmp_path, link):
    secret = tmp_path / "secret.bin"
    secret.write_bytes(bytes(12))
    model = tiny_model()
    as_initializer(model, "weights.bin")
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    bundle = rewrite(tiny_bundle, tmp_path / "sub" / "b", onnx=tmp_path / "model.onnx")
    inside = bundle.path / "weights.bin"
    inside.symlink_to(secret) if link == "symlink" else inside.hardlink_to(secret)
    with pytest.raises(BundleError, match="points to data outside"):
        load(bundle.path)


def test_a_model_with_its_weights_inside_passes(tmp_path):
    onnx.save(tiny_model(), tmp_path / "model.onnx")
    refuse_external_data(tmp_path / "model.onnx")
    assert load_onnx(tmp_path / "model.onnx", threads=1).run(golden_images()).logits.shape == (4, 3)


def test_looking_for_outside_data_takes_no_time_per_weight(tmp_path):
    import time

    model = tiny_model()
    model.graph.initializer.append(numpy_helper.from_array(np.zeros(20_000_000, np.float32), "large"))
    onnx.save(model, tmp_path / "model.onnx")
    started = time.process_time()
    refuse_external_data(tmp_path / "model.onnx")
    assert time.process_time() - started < 2


def test_a_manifest_without_payloads_opens_but_cannot_be_loaded(tmp_path):
    write_bundle(tmp_path / "b", Manifest(classes=CLASSES, preprocess=Preprocess()), files={})
    with pytest.raises(BundleError, match="has no torch weights"):
        load(tmp_path / "b")


# ------------------------------------------------------------------------------------- flags of the verbs


@pytest.mark.parametrize("verb", ["predict", "evaluate"])
def test_runtime_threads_and_precision_are_flags(tiny_bundle, tmp_path, capfd, monkeypatch, verb):
    pytest.importorskip("openvino")
    for split in ("train", "validation", "test"):
        for colour in CLASSES:
            (tmp_path / "data" / split / colour).mkdir(parents=True)
            for number in range(2):
                photo = picture(colour, size=(40, 40 + len(split) + number))
                (tmp_path / "data" / split / colour / f"{number}.png").write_bytes(photo)
    asked = []

    def opened(target, **settings):
        asked.append(settings)
        return load(target, **settings)

    module = {"predict": "holotype.predictor", "evaluate": "holotype.evaluate"}[verb]
    importlib.import_module(module)
    monkeypatch.setattr(sys.modules[module], "load", opened)
    target = tmp_path / "run"
    target.mkdir()
    shutil.copytree(tiny_bundle, target / "best")
    data = ["--data"] if verb == "evaluate" else []
    given = [verb, str(target), *data, str(tmp_path / "data"), "--quiet"]
    assert run([*given, "--runtime", "openvino", "--precision", "bf16", "--threads", "1"]) == 0
    assert (asked[0]["runtime"], asked[0]["precision"], asked[0]["threads"]) == ("openvino", "bf16", 1)
    capfd.readouterr()
    assert run([*given, "--runtime", "onnxruntime", "--precision", "bf16"]) == 2
    assert "onnxruntime has no bf16 on CPUs" in capfd.readouterr().err
    assert run([*given, "--threads", "0"]) == 2
    assert run([*given, "--set", "precision=fp8"]) == 2
    assert "precision" in capfd.readouterr().err


@pytest.mark.parametrize("payload", ["onnx", "openvino"])
def test_data_outside_is_refused_whatever_a_file_is_called(tiny_bundle, tmp_path, payload):
    """OpenVINO reads a file by its content, so a name decides nothing."""
    pytest.importorskip("openvino")
    model = tiny_model()
    as_initializer(model, "weights.bin")
    file = tmp_path / {"onnx": "model.pb", "openvino": "model.xml"}[payload]
    file.write_bytes(model.SerializeToString())
    weights = tmp_path / "model.bin"
    weights.write_bytes(bytes(12))
    more = {"openvino_weights": weights} if payload == "openvino" else {}
    bundle = rewrite(tiny_bundle, tmp_path / "b", **{payload: file}, **more)
    (bundle.path / "weights.bin").write_bytes(bytes(12))
    (bundle.path / "openvino").mkdir(exist_ok=True)
    (bundle.path / "openvino" / "weights.bin").write_bytes(bytes(12))
    with pytest.raises(BundleError, match="points to data outside"):
        load(bundle.path, runtime="openvino")
