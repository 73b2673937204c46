"""What all verbs share: the global options, output, progress, errors. Nothing here imports torch."""

import functools
import inspect
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

console = Console(width=None if sys.stdout.isatty() else 160)  # files and pipes have no width of their own
notes = Console(stderr=True, width=None if sys.stderr.isatty() else 160)


@dataclass(frozen=True)
class Common:
    """Values of the global options."""

    device: str = "cpu"
    compute_dtype: str = "auto"
    threads: int = 0
    offline: bool = False
    verbose: bool = False
    json: bool = False
    trust_remote_code: bool = False
    allow_nonfinite: bool = False
    memory: str = "2GiB"

    def runtime(self) -> Any:
        """The same as the API's `Runtime`; imports torch."""
        quiet(self.verbose)
        from coterie.api import Runtime

        return Runtime(
            device=self.device,
            compute_dtype=self.compute_dtype,
            threads=self.threads,
            offline=self.offline,
            trust_remote_code=self.trust_remote_code,
            allow_nonfinite=self.allow_nonfinite,
            memory=self.memory,
        )


_GLOBAL = "Global options"
OPTIONS: dict[str, Any] = {
    "device": Annotated[str, typer.Option(help="Where layers compute: cpu, cuda, cuda:1.", rich_help_panel=_GLOBAL)],
    "compute_dtype": Annotated[
        str,
        typer.Option(help="auto (float32 on a CPU), float32, bfloat16 or float16.", rich_help_panel=_GLOBAL),
    ],
    "threads": Annotated[int, typer.Option(min=0, help="CPU threads; 0 = all cores.", rich_help_panel=_GLOBAL)],
    "offline": Annotated[bool, typer.Option("--offline", help="Never ask the hub.", rich_help_panel=_GLOBAL)],
    "verbose": Annotated[bool, typer.Option("--verbose", "-v", help="Say more.", rich_help_panel=_GLOBAL)],
    "json": Annotated[bool, typer.Option("--json", help="Print JSON for machines.", rich_help_panel=_GLOBAL)],
    "trust_remote_code": Annotated[
        bool,
        typer.Option("--trust-remote-code", help="Run code that comes with a checkpoint.", rich_help_panel=_GLOBAL),
    ],
    "allow_nonfinite": Annotated[
        bool, typer.Option("--allow-nonfinite", help="Accept NaN and Inf weights.", rich_help_panel=_GLOBAL)
    ],
    "memory": Annotated[
        str, typer.Option(help="Memory for waiting hidden states; more is spilled to disk.", rich_help_panel=_GLOBAL)
    ],
}
_TAKES_VALUE = {"--device", "--compute-dtype", "--threads", "--memory"}
_FLAGS = {"--offline", "--verbose", "-v", "--json", "--trust-remote-code", "--allow-nonfinite"}


def verb(function: Callable[..., None]) -> Callable[..., None]:
    """Give a verb the global options; it receives their values as `common`."""
    signature = inspect.signature(function)
    defaults = Common()
    added = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=getattr(defaults, name), annotation=annotation)
        for name, annotation in OPTIONS.items()
    ]
    own = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for n, p in signature.parameters.items() if n != "common"]

    @functools.wraps(function)
    def wrapper(**given: Any) -> None:
        common = Common(**{name: given.pop(name) for name in OPTIONS})
        try:
            function(common=common, **given)
        except KeyboardInterrupt:  # typer would make it exit code 1
            say("interrupted; the same command goes on where this one stopped", style="yellow")
            raise typer.Exit(130) from None

    parameters = [*own, *added]
    wrapper.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    wrapper.__annotations__ = {p.name: p.annotation for p in parameters} | {"return": None}
    return wrapper


def verb_first(arguments: list[str]) -> list[str]:
    """Let global options stand before the verb: move them behind it."""
    moved, rest = [], list(arguments)
    while rest and rest[0].split("=")[0] in _TAKES_VALUE | _FLAGS:
        option = rest.pop(0)
        moved.append(option)
        if option in _TAKES_VALUE and rest:
            moved.append(rest.pop(0))
    at = 2 if rest[:1] in (["analyze"], ["patterns"], ["grow"]) else 1  # a verb that has verbs of its own
    return [*rest[:at], *moved, *rest[at:]] if rest else moved


def all_verbs(app: typer.Typer) -> dict[str, Any]:
    """Every command by the words that call it: `compress`, `analyze super-experts`."""
    from typer.main import get_command

    found: dict[str, Any] = {}
    for name, command in get_command(app).commands.items():  # type: ignore[attr-defined]
        inner = getattr(command, "commands", None)
        found |= {f"{name} {below}": c for below, c in inner.items()} if inner else {name: command}
    return found


def quiet(verbose: bool) -> None:
    """Keep libraries from chatting unless asked, and threads from spinning: must run before torch is imported."""
    if "OMP_WAIT_POLICY" not in os.environ:  # spin briefly, then sleep: benchmarks/cpu_choices.py
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    if not verbose:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        import warnings

        warnings.filterwarnings("ignore")


def helps_only() -> bool:
    """Is this one of several processes (torchrun, accelerate) and not the first? It has nothing to say."""
    return os.environ.get("RANK", "0") != "0"


def say(text: str, *, style: str = "") -> None:
    """A note to the person at the terminal; never mixed into results."""
    notes.print(text, style=style, highlight=False)


def warn(text: str) -> None:
    notes.print(f"warning: {text}", style="yellow", highlight=False, markup=False)


def emit_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def table(title: str, columns: list[str], rows: list[list[str]], *, left: int = 1) -> None:
    """A table on standard output; the first `left` columns are text, the others numbers."""
    if title:
        console.print(title, style="bold", highlight=False, markup=False)
    grid = Table(header_style="bold", box=None, pad_edge=False, show_header=any(columns))
    for number, column in enumerate(columns):
        grid.add_column(column, justify="left" if number < left else "right", overflow="fold")
    for row in rows:
        grid.add_row(*row)
    console.print(grid)


def gigabytes(count: float) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count:.0f} B"


def millions(count: float) -> str:
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.2f}{unit}"
    return f"{count:.0f}"


def parse_set(items: list[str]) -> dict[str, Any]:
    """`--set name=value` to parameters; values are read as YAML (numbers, true/false, lists), else kept as text."""
    import yaml

    from coterie.errors import UsageError

    parameters: dict[str, Any] = {}
    for item in items:
        name, equals, value = item.partition("=")
        if not equals or not name:
            raise UsageError(f"cannot read --set {item!r}", "Write --set name=value.")
        try:
            parameters[name.strip().replace("-", "_")] = yaml.safe_load(value)
        except yaml.YAMLError:
            parameters[name.strip().replace("-", "_")] = value
    return parameters


def parameter_rows(parameters: list[dict[str, Any]]) -> list[list[str]]:
    """Rows for a table of a method's parameters."""
    return [[p["name"], _type(p), _shown(p.get("default")), _range(p), p.get("description", "")] for p in parameters]


def _type(parameter: dict[str, Any]) -> str:
    if "enum" in parameter:
        return " | ".join(str(v) for v in parameter["enum"])
    if "anyOf" in parameter:
        return " or ".join(sorted({_type(p) for p in parameter["anyOf"]}))
    return str(parameter.get("const", parameter.get("type", "any")))


def _shown(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else ("" if value is None else str(value))


def _range(parameter: dict[str, Any]) -> str:
    signs = (("minimum", ">="), ("exclusiveMinimum", ">"), ("maximum", "<="), ("exclusiveMaximum", "<"))
    return ", ".join(f"{sign} {parameter[name]:g}" for name, sign in signs if name in parameter)
