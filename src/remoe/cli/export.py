"""`remoe export`: a run's model as a folder that loads with remoe and in transformers."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Annotated

from typer import Option

from remoe.cli.options import RunPath


def export_command(
    path: RunPath,
    to: Annotated[Path, Option("--to", metavar="DIR", help="folder to write; must be new or empty")],
    overwrite: Annotated[bool, Option("--overwrite", help="write into a folder that holds files")] = False,
    shard_gb: Annotated[float, Option(help="size of a weights file; larger models become several", min=0.001)] = 5.0,
) -> None:
    """Save a run's model as files.

    Writes the weights (safetensors), config.json, the tokenizer's files, a model card with the run's figures, and the
    code with which transformers loads it where remoe is not installed.
    """
    from remoe.export import check_new, missing_in_transformers, write_export
    from remoe.training.loading import fill, find_checkpoint, load, outline
    from remoe.training.saved import run_of, tokenizer_of

    if not overwrite or not to.is_dir():
        check_new(to, fix="--overwrite writes into it")
    run, tokenizer = run_of(path), tokenizer_of(path)
    found = find_checkpoint(path) if run else None
    if found is not None:  # its weights need not be in memory as a whole
        model, step, read = outline(found), found.step, partial(fill, found)
    else:
        model, step, read = load(path), None, None
    holds_files = to.is_dir() and any(to.iterdir())
    with nullcontext(to) if holds_files else _whole(to) as folder:
        write_export(model, tokenizer, folder, run, step, shard_gb * 1e9, read, source=path)
    print(f"{to}: {', '.join(sorted(file.name for file in to.iterdir()))}")
    reason = missing_in_transformers(model.config)
    if reason is not None:
        print(f"loads with remoe, not in transformers: {reason}")


@contextmanager
def _whole(to: Path) -> Iterator[Path]:
    """A folder of the same name that becomes the new `to` at the end; a failure leaves nothing.

    An empty `to` is filled, not replaced: it may be a mount, or somebody's working directory.
    """
    import shutil
    import tempfile

    to, is_there = to.resolve(), to.is_dir()
    made = [place for place in to.parents if not place.exists()]
    to.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{to.name}.", dir=to if is_there else to.parent))
    whole = aside / to.name
    try:
        yield whole
        if not is_there:
            whole.rename(to)
        else:
            for file in whole.iterdir():
                file.rename(to / file.name)
    finally:
        shutil.rmtree(aside)
        with suppress(OSError):  # the first one that holds the export, or anything else, ends it
            for place in made:
                place.rmdir()
