"""Networks: a timm architecture with our head, pixels in, logits and embedding out; and their weights."""

from holotype.models.architecture import (
    DEFAULT,
    Architecture,
    Classifier,
    InputRecipe,
    architecture_of,
    create,
    has_weights,
    head_of,
    input_spec,
    known_names,
    recipe_of,
    set_head,
)
from holotype.models.device import choose_device
from holotype.models.stages import Stage, blocks, stages
from holotype.models.weights import (
    build,
    fresh_parts,
    fresh_stem,
    load_weights,
    open_network,
    pretrained,
    save_weights,
    weights_of,
)

__all__ = [
    "DEFAULT",
    "Architecture",
    "Classifier",
    "InputRecipe",
    "Stage",
    "architecture_of",
    "blocks",
    "build",
    "choose_device",
    "create",
    "fresh_parts",
    "fresh_stem",
    "has_weights",
    "head_of",
    "input_spec",
    "known_names",
    "load_weights",
    "open_network",
    "pretrained",
    "recipe_of",
    "save_weights",
    "set_head",
    "stages",
    "weights_of",
]
