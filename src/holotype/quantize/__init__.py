"""Integers instead of floats: ranges from real images, and graphs that round where runtimes compute in int8.

ranges.py  what values each activation takes, as three calibrations read them
prefix.py  pixels into the first convolution without a float in between
qdq.py     the graph with QuantizeLinear and DequantizeLinear
graph.py   what every graph of ours is
"""

from holotype.quantize.graph import OPSET, check_graph, opset_of
from holotype.quantize.prefix import float_pixels, fold_normalisation, read_pixels_directly
from holotype.quantize.qdq import dynamic_int8, is_transformer, prefix_of, quantizable, quantize
from holotype.quantize.ranges import CALIBRATIONS, Calibration, Ranges, calibration_rows, observe

__all__ = [
    "CALIBRATIONS",
    "OPSET",
    "Calibration",
    "Ranges",
    "calibration_rows",
    "check_graph",
    "dynamic_int8",
    "float_pixels",
    "fold_normalisation",
    "is_transformer",
    "observe",
    "opset_of",
    "prefix_of",
    "quantizable",
    "quantize",
    "read_pixels_directly",
]
