"""`remoe recipes`: the ready configs."""

from typing import Annotated

import typer

from remoe.cli.options import recipes_like

recipes_app = typer.Typer(help="List the ready configs, or show one.")


@recipes_app.callback(invoke_without_command=True, epilog="Example: remoe recipes show remoe-182m-relu > mine.yaml")
def recipes_command(context: typer.Context) -> None:
    """List the ready configs, or print one in full (`show`)."""
    from remoe.recipes import about, names

    if context.invoked_subcommand is None:
        width = max(map(len, names()))
        print("\n".join(f"{name:{width}}  {about(name)}" for name in names()))


@recipes_app.command("show", epilog="Example: remoe recipes show remoe-182m-relu > mine.yaml")
def show_command(
    name: Annotated[str, typer.Argument(metavar="NAME", help="a recipe's name", autocompletion=recipes_like)],
) -> None:
    """Print a recipe as complete YAML, every default written out."""
    from remoe.recipes import show

    print(show(name), end="")
