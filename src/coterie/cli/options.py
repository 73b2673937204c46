"""Options that several verbs share, declared once."""

from typing import Annotated

import typer

Model = Annotated[str, typer.Argument(help="Checkpoint folder or hub id (owner/name).", show_default=False)]
Data = Annotated[
    list[str] | None,
    typer.Option(
        help="Text: a file (txt, md, jsonl[.gz], parquet), a folder, or a dataset (owner/name[:config[:split]]);"
        " repeat for more. A jsonl line has `text` and may have `domain`; otherwise the file name is the domain.",
        show_default=False,
    ),
]
Tokens = Annotated[
    str | None, typer.Option(help="Token ids instead of text: a safetensors file with `input_ids` [B, L].")
]
Tokenizer = Annotated[str | None, typer.Option(help="Tokenizer of another checkpoint, if the model has none.")]
Samples = Annotated[int, typer.Option(min=1, help="Sequences per domain.")]
Length = Annotated[int, typer.Option(min=2, help="Tokens per sequence.")]
BatchSize = Annotated[
    int | None,
    typer.Option(min=1, help="Sequences per batch; by default about 8192 tokens' worth.", show_default=False),
]
Pack = Annotated[
    bool,
    typer.Option("--pack/--no-pack", help="Join documents and cut full windows, or pad one document per sequence."),
]
Demonstrations = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Take this many of each domain's longest documents or dialogues, one a sequence, instead of windows"
        " (--samples, --pack): what EASY-EP is judged on.",
        show_default=False,
    ),
]
Seed = Annotated[int, typer.Option(min=0, help="Seed of everything that is drawn.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", help="Method parameter name=value; repeat for more (`coterie methods NAME` lists them)."),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the output if it exists.")]

_B = "Budget: how much stays"
Keep = Annotated[float | None, typer.Option(help="Share of the experts, e.g. 0.5.", rich_help_panel=_B)]
KeepExperts = Annotated[int | None, typer.Option(min=1, help="Experts per layer.", rich_help_panel=_B)]
TargetSize = Annotated[
    str | None,
    typer.Option(help="Size of the whole checkpoint: 12GB, 500MB, or 0.25x of what it was.", rich_help_panel=_B),
]
Scope = Annotated[
    str,
    typer.Option(
        help="uniform: the same number in every layer. global: rank experts over all layers.",
        rich_help_panel=_B,
    ),
]
Minimum = Annotated[
    int, typer.Option(min=1, help="Fewest experts of a layer, with --scope global.", rich_help_panel=_B)
]
Layers = Annotated[str | None, typer.Option(help="Only these decoder layers, e.g. 4-30.", rich_help_panel=_B)]
ExcludeLayers = Annotated[str | None, typer.Option(help="All but these decoder layers.", rich_help_panel=_B)]
Protect = Annotated[
    list[str] | None,
    typer.Option(help="Experts that always stay: layer:expert,... or a file of `coterie analyze`.", rich_help_panel=_B),
]
