"""`coterie methods`: what can be done, by whom it was published, and which parameters it takes."""

from typing import Annotated

import typer

from coterie.cli.common import Common, console, emit_json, parameter_rows, quiet, table, verb


@verb
def methods(
    common: Common,
    name: Annotated[str | None, typer.Argument(help="Show the parameters of this method only.")] = None,
) -> None:
    """List the compression methods with paper and parameters (types, ranges, defaults)."""
    quiet(common.verbose)
    from coterie.compression.methods import get_method
    from coterie.compression.methods import methods as registered

    known = registered()
    if name is not None and name not in known:
        get_method(name)  # says which name is closest
    chosen = {name: known[name]} if name is not None else known
    if common.json:
        entries = []
        for entry in chosen.values():
            observed = [o.__name__ for o in entry.cls().observes()]
            entries.append(
                {
                    "name": entry.name,
                    "kind": entry.kind,
                    "paper": entry.paper,
                    "summary": entry.summary,
                    "observes": observed,
                    "parameters": entry.parameters(),
                }
            )
        emit_json(entries)
        return
    if name is None:
        rows = [[e.name, e.kind, e.paper, e.summary] for e in chosen.values()]
        table("", ["method", "kind", "paper", "what it does"], rows, left=4)
        console.print("\nParameters of one: [bold]coterie methods NAME[/bold]")
        return
    entry = chosen[name]
    console.print(f"[bold]{entry.name}[/bold] ({entry.kind}, {entry.paper})\n{entry.summary}\n")
    rows = parameter_rows(entry.parameters())
    if rows:
        table("", ["parameter", "type", "default", "range", "what it does"], rows, left=5)
    else:
        console.print("It takes no parameters.")
