"""What kind of model a folder holds, by its config.json; nothing is loaded."""

import json
from pathlib import Path

OWN_TYPE = "relu_"
"""What the model type of a converted model begins with; that of its source follows."""


def model_type_of(source: Path) -> str | None:
    """The model type in a folder's config.json; None where it has none."""
    try:
        return json.loads((source / "config.json").read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError):
        return None


def is_converted(path: Path) -> bool:
    """Whether a folder holds a converted model of transformers."""
    return str(model_type_of(path)).startswith(OWN_TYPE)
