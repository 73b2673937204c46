"""The `coterie` command. Verbs import torch only when they run, so help is instant."""

import sys
from typing import Annotated

import typer

from coterie.cli.analyze import analyze
from coterie.cli.common import notes, verb_first
from coterie.cli.compare import compare
from coterie.cli.compress import compress
from coterie.cli.demo import demo
from coterie.cli.evaluate import evaluate
from coterie.cli.export import export
from coterie.cli.finetune import finetune
from coterie.cli.grow import grow
from coterie.cli.heal import heal
from coterie.cli.inspect import inspect
from coterie.cli.methods import methods
from coterie.cli.patterns import patterns
from coterie.cli.plan import plan
from coterie.cli.profile import profile
from coterie.cli.race import race
from coterie.cli.train import train
from coterie.errors import CoterieError

app = typer.Typer(
    name="coterie",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        from coterie import __version__

        print(f"coterie {__version__}")
        raise typer.Exit


@app.callback(epilog="Global options (--device, --threads, --json, ...) may stand before or after the verb.")
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """One toolkit for sparse mixture-of-experts models.

    Shrink a checkpoint that does not fit:

      coterie compress Qwen/Qwen3-30B-A3B smaller --method reap --keep 0.5 --data calibration.jsonl

    Look first:   coterie inspect MODEL

    Try it now:   coterie demo
    """


for _verb in (inspect, profile, plan, compress, compare, evaluate, export, train, race, finetune, heal, methods, demo):
    app.command(no_args_is_help=_verb not in (methods, demo))(_verb)

app.add_typer(analyze, name="analyze")
app.add_typer(patterns, name="patterns")
app.add_typer(grow, name="grow")


def main() -> None:
    """Run the command line; what a user caused ends as one message and an exit code, never as a traceback."""
    sys.argv[1:] = verb_first(sys.argv[1:])
    try:
        app(prog_name="coterie")
    except CoterieError as error:
        name = next((a for a in sys.argv[1:] if not a.startswith("-")), "")
        notes.print(f"coterie {name}: {error}", style="red", highlight=False, markup=False, soft_wrap=True)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
