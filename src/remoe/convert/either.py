"""A folder with a model of ours, or a converted one of transformers: loaded, and saved with the dial turned.

Only the second kind needs transformers.
"""

from pathlib import Path
from types import ModuleType
from typing import Any

from remoe.convert.model_type import is_converted
from remoe.eval import density
from remoe.eval.density import DensityPoint
from remoe.export import check_new
from remoe.training.loading import load


def load_either(path: Path) -> Any:
    """The model in eval mode on the CPU: ours, or a converted one that is called as ours is.

    Raises CheckpointError as `load` does, MissingExtraError for a converted model where transformers is missing.
    """
    return _converted().load_converted(path) if is_converted(path) else load(path)


def save_at(point: DensityPoint, path: Path, to: Path) -> None:
    """Write the model at `path` with a point's thresholds in force; `to` is new or empty.

    A converted model stays what it is: a folder that transformers loads by itself.
    """
    if not is_converted(path):
        return density.save_at(point, path, to)
    check_new(to)
    _converted().save_with_thresholds(path, list(point.thresholds), to)


def _converted() -> ModuleType:
    from remoe.convert import converted  # needs transformers, an extra

    return converted
