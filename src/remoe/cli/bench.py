"""`remoe bench`: speed and memory beside the peers that are installed."""

import typer

from remoe.cli.bench_decode import decode_command
from remoe.cli.bench_layer import layer_command
from remoe.cli.bench_model import model_command

bench_app = typer.Typer(
    help="Measure layers and models beside the peers that are installed.",
    epilog="Example: remoe bench layer --peers all --chart layer.svg",
    no_args_is_help=True,
)
for name, command, example in (
    ("layer", layer_command, "remoe bench layer --shapes remoe182m_E8 --peers all --json layer.json"),
    ("model", model_command, "remoe bench model remoe-182m-relu --peers all --json model.json"),
    ("decode", decode_command, "remoe bench decode remoe-182m-relu --peers all --json decode.json"),
):
    bench_app.command(name, epilog=f"Example: {example}")(command)
