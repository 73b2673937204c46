"""`coterie methods`: what can be done, by whom it was published, and which parameters it takes."""

from typing import Annotated, Any

import typer

from coterie.cli.common import Common, console, emit_json, parameter_rows, quiet, table, verb


@verb
def methods(
    common: Common,
    name: Annotated[str | None, typer.Argument(help="Show the parameters of this one only.")] = None,
    parts: Annotated[
        bool, typer.Option("--parts", help="List routers, balancing terms and residual rules instead.")
    ] = False,
) -> None:
    """List the compression methods with paper and parameters (types, ranges, defaults); with --parts, what models are
    made of and trained with."""
    quiet(common.verbose)
    from coterie.architectures.parts import parts as all_parts
    from coterie.compression.methods import get_method
    from coterie.compression.methods import methods as registered

    known: dict[str, Any] = dict(all_parts() if parts else registered())
    if name is not None:
        everything: dict[str, Any] = {**all_parts(), **registered()}
        known = {key: entry for key, entry in everything.items() if entry.name == name}
        if not known:
            get_method(name)  # says which name is closest
    if common.json:
        emit_json([_described(entry) for entry in known.values()])
        return
    if name is None:
        rows = [[e.name, e.kind, e.paper, e.summary] for e in known.values()]
        table("", ["part" if parts else "method", "kind", "paper", "what it does"], rows, left=4)
        console.print("\nParameters of one: [bold]coterie methods NAME[/bold]")
        if not parts:
            console.print("Routers, balancing, residual rules: [bold]coterie methods --parts[/bold]")
        return
    for entry in known.values():
        told = ", ".join(filter(None, (entry.kind, entry.paper)))
        console.print(f"[bold]{entry.name}[/bold] ({told})\n{entry.summary}\n")
        rows = parameter_rows(entry.parameters())
        if rows:
            table("", ["parameter", "type", "default", "range", "what it does"], rows, left=5)
        else:
            console.print("It takes no parameters.")


def _described(entry: Any) -> dict[str, Any]:
    told = {"name": entry.name, "kind": entry.kind, "paper": entry.paper, "summary": entry.summary}
    if hasattr(entry, "cls"):
        told["observes"] = [o.__name__ for o in entry.cls().observes()]
    return {**told, "parameters": entry.parameters()}
