"""All files of an export."""

from pathlib import Path

from remoe.data.chat import ChatTemplate, save_template
from remoe.data.tokenizer import Tokenizer
from remoe.errors import ConfigError
from remoe.export import tokenizer_files, transformers_files
from remoe.export.card import model_card
from remoe.model import ReMoEForCausalLM
from remoe.model.weights import Fill, save_model
from remoe.training.run import Run
from remoe.training.saved import template_of

MAX_SHARD_BYTES = 5e9


def check_new(to: Path, fix: str = "") -> None:
    """Raise ConfigError where a model would be written over something, into `--to`."""
    if to.exists() and not to.is_dir():
        raise ConfigError(f"--to is {to}, a file, must be a folder")
    if to.is_dir() and any(to.iterdir()):
        raise ConfigError(f"--to is {to}, which holds files, must be new or empty" + (f"; {fix}" if fix else ""))


def write_tokenizer(tokenizer: Tokenizer, folder: Path, template: ChatTemplate | None) -> None:
    """Write a tokenizer into a folder, for remoe and for AutoTokenizer, with the chat template if there is one."""
    tokenizer.save(folder)
    tokenizer_files.write(tokenizer, folder, has_template=template is not None)
    if template is not None:
        save_template(template, folder)


def write_export(
    model: ReMoEForCausalLM,
    tokenizer: Tokenizer,
    folder: Path,
    run: Run | None = None,
    step: int | None = None,
    max_shard_bytes: float = MAX_SHARD_BYTES,
    fill: Fill | None = None,
    *,
    source: Path | None = None,
    is_changed: bool = False,
) -> None:
    """Write weights, config, tokenizer, transformers' remote code and a model card; what was there is replaced.

    `run` is the one that trained the model, for its figures up to `step`, that of the weights; None where there is
    none. The card has no figures where `is_changed`: the model is not the run's any more. `fill` reads the weights of a
    model on the meta device, one file's at a time. `source` is the run, checkpoint or export that it was made from, for
    its chat template and what an export says of its training; None: the run. A model that transformers' classes do not
    have (`missing_in_transformers`) gets no remote code and loads with remoe alone.
    """
    metrics = [row for row in run.metrics() if step is None or row["step"] <= step] if run else []
    source = source or (run.path if run else None)
    of_training = transformers_files.run_settings(run, metrics) if run else transformers_files.kept_settings(source)
    save_model(model, folder, max_shard_bytes, fill)
    tokenizer.save(folder)
    template = template_of(source) if source else None
    if template is not None:
        save_template(template, folder)
    if transformers_files.missing_in_transformers(model.config) is None:
        transformers_files.write(model, tokenizer, folder, of_training)
        tokenizer_files.write(tokenizer, folder, has_template=template is not None)
    else:
        transformers_files.remove(folder)
    card = model_card(model, tokenizer, folder, run, [] if is_changed else metrics)
    (folder / "README.md").write_text(card, encoding="utf-8")
