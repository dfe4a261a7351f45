"""`remoe prepare`: text files to one tokenised dataset."""

import os
from pathlib import Path
from typing import Annotated

import typer


def prepare_command(
    inputs: Annotated[
        list[Path],
        typer.Argument(metavar="INPUT", help="txt, jsonl or parquet files; .gz, .xz and .zst are read too"),
    ],
    tokenizer: Annotated[str, typer.Option(help="bytes, characters, words, gpt2:FOLDER, or a tokenizer.json")],
    output: Annotated[Path, typer.Option(help="PREFIX of the .bin/.idx pair and what belongs to it")],
    key: Annotated[str, typer.Option(help="key of a row's text")] = "text",
    domain_field: Annotated[
        str | None, typer.Option(help="key of a row's domain, dotted; default: meta.pile_set_name if there")
    ] = None,
    on_bad_line: Annotated[str, typer.Option(help="refuse, or skip (skipped lines are counted and listed)")] = "refuse",
    append_eod: Annotated[bool, typer.Option(help="end each document with the end-of-document id")] = True,
    workers: Annotated[int, typer.Option(help="processes; default: one a core")] = os.cpu_count() or 1,
    resume: Annotated[bool, typer.Option(help="go on from a run that was stopped")] = True,
    overwrite: Annotated[bool, typer.Option(help="replace a dataset that is there")] = False,
) -> None:
    """Tokenise files into a Megatron dataset PREFIX.bin/.idx that keeps each document's domain."""
    from remoe.data.prepare import PrepareConfig, bad_lines, prepare

    config = PrepareConfig(
        key=key,
        domain_field=domain_field,
        on_bad_line=on_bad_line,
        append_eod=append_eod,
        workers=workers,
        resume=resume,
        overwrite=overwrite,
    )
    manifest = prepare(inputs, tokenizer, output, config)
    print(f"{output}: {manifest['tokens']:,} tokens in {manifest['documents']:,} documents")
    for domain, tokens in manifest["tokens_per_domain"].items():
        print(f"  {tokens:12,}  {domain}")
    if manifest["skipped_lines"]:
        print(f"skipped {bad_lines(manifest['skipped_lines'])}, listed in {output}.skipped.txt")
