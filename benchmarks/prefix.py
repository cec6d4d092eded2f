"""What it costs that graphs take pixels: `uint8[N, H, W, 3]` against a float NCHW input, in each runtime.

    python benchmarks/prefix.py RUN INT8_RUN [--rounds 20]

From the ONNX file of each bundle a second one is made without its first nodes: its input is what the first
convolution reads, a float tensor of that shape; of a graph in INT8 the rounding of pixels comes back, since a
client that sends floats needs it. Both are timed at batch 1 in onnxruntime and OpenVINO, each in a process of
its own, in turn; the share is the median over the rounds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from holotype.bundle import open_bundle
from holotype.machine import available_cores, machine_name

SECONDS = 0.2


def main() -> None:
    if sys.argv[1:2] == ["child"]:
        answer(Path(sys.argv[2]), sys.argv[3])
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--rounds", type=int, default=20)
    arguments = parser.parse_args()
    print(f"on {machine_name()}; medians of {arguments.rounds} rounds")
    for run in arguments.runs:
        bundle = open_bundle(run)
        whole = bundle.path / "model.onnx"
        with tempfile.TemporaryDirectory() as scratch:
            bare = Path(scratch) / "bare.onnx"
            onnx.save(without_prefix(onnx.load(whole)), bare)
            for runtime in ("onnxruntime", "openvino"):
                compare(f"{run} {bundle.manifest.precision}", whole, bare, runtime, rounds=arguments.rounds)


def without_prefix(model: onnx.ModelProto) -> onnx.ModelProto:
    """The graph from the tensor that the first convolution reads, as floats."""
    conv = next(node for node in model.graph.node if node.op_type == "Conv")
    producers = {node.output[0]: node for node in model.graph.node}
    cut = conv.input[0]
    rounded = cut in producers and producers[cut].op_type == "DequantizeLinear"
    if rounded:
        cut = producers[cut].input[0]
    inferred = onnx.shape_inference.infer_shapes(model)
    shapes = {info.name: info.type.tensor_type.shape for info in inferred.graph.value_info}
    sides = [side.dim_value or "N" for side in shapes[cut].dim]
    kept, needed = [], {output.name for output in model.graph.output}
    for node in reversed(model.graph.node):
        if cut not in node.output and needed & set(node.output):
            kept.insert(0, node)
            needed |= set(node.input) - {cut}
    bare = onnx.ModelProto()
    bare.CopyFrom(model)
    del bare.graph.node[:], bare.graph.input[:]
    if rounded:
        scale = numpy_helper.from_array(np.array(1, np.float32), "pixels.scale")
        zero = numpy_helper.from_array(np.array(0, np.uint8), "pixels.zero")
        bare.graph.initializer.extend([scale, zero])
        kept.insert(0, helper.make_node("QuantizeLinear", ["pixels", scale.name, zero.name], [cut]))
    else:
        for node in kept:
            node.input[:] = ["pixels" if name == cut else name for name in node.input]
    bare.graph.node.extend(kept)
    used = [
        tensor for tensor in bare.graph.initializer if tensor.name in needed | {"pixels.scale", "pixels.zero"}
    ]
    del bare.graph.initializer[:]
    bare.graph.initializer.extend(used)
    bare.graph.input.append(helper.make_tensor_value_info("pixels", TensorProto.FLOAT, sides))
    del bare.graph.value_info[:]
    onnx.checker.check_model(bare)
    return bare


def compare(name: str, whole: Path, bare: Path, runtime: str, *, rounds: int) -> None:
    """Both in turn, who begins changes."""
    children = [
        subprocess.Popen(
            [sys.executable, __file__, "child", str(file), runtime],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for file in (whole, bare)
    ]
    found: list[list[float]] = [[], []]
    try:
        for turn in range(rounds + 1):
            for place in (0, 1) if turn % 2 else (1, 0):
                child = children[place]
                child.stdin.write("go\n")  # type: ignore[union-attr]
                child.stdin.flush()  # type: ignore[union-attr]
                milliseconds = json.loads(child.stdout.readline())  # type: ignore[union-attr]
                if turn:
                    found[place].append(milliseconds)
    finally:
        for child in children:
            child.kill()
    with_it, without = (statistics.median(one) for one in found)
    share = statistics.median(a / b for a, b in zip(*found, strict=True)) - 1
    print(f"{name:40} {runtime:12} {with_it:.3f} ms of pixels, {without:.3f} ms of floats: {share:+.1%}")


def answer(file: Path, runtime: str) -> None:
    """In a process of its own: the median of a call, in milliseconds, whenever asked."""
    model = onnx.load(file)
    info = model.graph.input[0]
    shape = [1, *(side.dim_value for side in list(info.type.tensor_type.shape.dim)[1:])]
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, shape).astype(
        np.uint8 if info.type.tensor_type.elem_type == TensorProto.UINT8 else np.float32
    )
    if runtime == "onnxruntime":
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = available_cores()
        session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])

        def run() -> None:
            session.run(["logits"], {info.name: images})
    else:
        import openvino

        core = openvino.Core()
        network = core.read_model(str(file))
        network.reshape(shape)
        settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": available_cores()}
        request = core.compile_model(network, "CPU", settings).create_infer_request()
        request.set_input_tensor(openvino.Tensor(images, shared_memory=True))

        def run() -> None:
            request.start_async()
            request.wait()

    for _ in sys.stdin:
        run()
        times, end = [], time.perf_counter() + SECONDS
        while time.perf_counter() < end:
            began = time.perf_counter()
            run()
            times.append(time.perf_counter() - began)
        print(json.dumps(1e3 * statistics.median(times)), flush=True)


if __name__ == "__main__":
    main()
