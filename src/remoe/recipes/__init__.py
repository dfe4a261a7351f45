"""Ready configs by name, and plans of several runs: the comparison and the demo."""

from remoe.recipes.catalog import about, load, names, read_config, show

__all__ = ["about", "load", "names", "read_config", "show"]
