"""The command line: one file a command, each parse, config, call, print."""

import io
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from remoe import __version__
from remoe.cli.analyze import analyze_command
from remoe.cli.bench import bench_app
from remoe.cli.compare import compare_command
from remoe.cli.convert import convert_command
from remoe.cli.demo import demo_command
from remoe.cli.density import density_command
from remoe.cli.eval import eval_command
from remoe.cli.export import export_command
from remoe.cli.failures import exit_code_of, spread_overrides
from remoe.cli.generate import generate_command
from remoe.cli.plan import plan_command
from remoe.cli.prepare import prepare_command
from remoe.cli.recipes import recipes_app
from remoe.cli.runs import runs_app
from remoe.cli.train import train_command

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None)
for name, command, example in (
    ("demo", demo_command, "remoe demo"),
    ("train", train_command, "remoe train demo-relu --set train.steps=100 --set name=first-run"),
    ("compare", compare_command, "remoe compare demo-relu --routers relu,topk,dense --seeds 0,1,2 --name routers"),
    ("eval", eval_command, "remoe eval runs/first-run --data held-out.txt"),
    ("analyze", analyze_command, "remoe analyze runs/first-run"),
    ("density", density_command, "remoe density runs/first-run --choose 0.7 --to first-run-sparser"),
    ("generate", generate_command, "remoe generate runs/first-run --prompt 'def ' --temperature 0.8"),
    ("export", export_command, "remoe export runs/first-run --to first-run-export"),
    ("convert", convert_command, "remoe convert olmoe --router relu --data text.txt --to olmoe-relu"),
    ("plan", plan_command, "remoe plan remoe-182m-relu --json"),
    (
        "prepare",
        prepare_command,
        "remoe prepare pile/*.jsonl.zst --tokenizer gpt2:tokenizers/gpt2 --output data/pile",
    ),
):
    app.command(name, epilog=f"Example: {example}")(command)
app.add_typer(bench_app, name="bench")
app.add_typer(runs_app, name="runs")
app.add_typer(recipes_app, name="recipes")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit with its code."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # a log or a pipe sees each line as it is printed
    given = list(spread_overrides(sys.argv[1:] if arguments is None else arguments))
    command = typer.main.get_command(app)
    sys.exit(exit_code_of(lambda: command.main(args=given, prog_name="remoe", standalone_mode=False)))


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"remoe {__version__}")
        raise typer.Exit


@app.callback(epilog="Example: remoe demo")
def _root(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="print the version and exit")
    ] = False,
) -> None:
    """Mixture-of-Experts language models whose router is trained by exact gradients."""
