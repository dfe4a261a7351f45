"""`remoe bench`: speed and memory beside the peers that are installed."""

from typing import Annotated

import typer

from remoe.cli.bench_decode import decode_command
from remoe.cli.bench_layer import layer_command
from remoe.cli.bench_model import model_command
from remoe.cli.bench_tune import tune_command

bench_app = typer.Typer(
    epilog="Example: remoe bench layer --peers all --chart layer.svg",
    no_args_is_help=True,
    invoke_without_command=True,
)


@bench_app.callback()
def bench_command(
    context: typer.Context,
    tune: Annotated[bool, typer.Option("--tune", help="the same as `remoe bench tune`")] = False,
) -> None:
    """Measure layers and models beside the peers that are installed."""
    if tune and context.invoked_subcommand is None:
        tune_command()


for name, command, example in (
    ("layer", layer_command, "remoe bench layer --shapes remoe182m_E8 --peers all --json layer.json"),
    ("model", model_command, "remoe bench model remoe-182m-relu --peers all --json model.json"),
    ("tune", tune_command, "remoe bench tune --shapes remoe182m_E8 --json tune.json"),
    ("decode", decode_command, "remoe bench decode remoe-182m-relu --peers all --json decode.json"),
):
    bench_app.command(name, epilog=f"Example: {example}")(command)
