"""`coterie profile`: watch what the experts do on text, once, for all methods."""

from typing import Annotated

import typer

from coterie.cli import options as o
from coterie.cli.common import Common, emit_json, table, verb
from coterie.cli.progress import Bar


@verb
def profile(
    common: Common,
    model: o.Model,
    out: Annotated[str, typer.Option(help="Folder for the profile.", show_default=False)],
    data: o.Data = None,
    observe: Annotated[
        list[str] | None,
        typer.Option(
            help="Record only this statistic; repeat for more. By default all but those for which every expert runs on"
            " every token (DenseOutput, OutputCosine)."
        ),
    ] = None,
    method: Annotated[list[str] | None, typer.Option(help="Record what this method needs; repeat for more.")] = None,
    samples: o.Samples = 128,
    length: o.Length = 512,
    batch_size: o.BatchSize = None,
    pack: o.Pack = True,
    demonstrations: o.Demonstrations = None,
    seed: o.Seed = 0,
    tokens: o.Tokens = None,
    tokenizer: o.Tokenizer = None,
    overwrite: o.Overwrite = False,
) -> None:
    """Record statistics of every MoE layer on calibration text, in one streamed sweep."""
    runtime = common.runtime()
    from coterie import api

    with Bar("profile", enabled=not common.json) as bar:
        result = api.profile(
            model,
            data or (),
            out=out,
            observers=observe or (),
            methods=method or (),
            tokens=tokens,
            tokenizer=tokenizer,
            samples=samples,
            length=length,
            batch_size=batch_size,
            pack=pack,
            demonstrations=demonstrations,
            seed=seed,
            overwrite=overwrite,
            runtime=runtime,
            progress=bar,  # type: ignore[arg-type]
        )
    rows = []
    for layer in result.layers.values():
        count_E = layer.stats.get("count_E")
        if count_E is not None:
            share = count_E.double() / max(int(count_E.sum()), 1)
            rows.append([layer.index, layer.experts, float(share.max()), float(share.min()), int((count_E == 0).sum())])
    if common.json:
        keys = ("layer", "experts", "busiest", "idlest", "unused")
        emit_json(
            {
                "profile": out,
                "domains": result.domains,
                "settings": result.settings,
                "layers": [dict(zip(keys, row)) for row in rows],
            }
        )
        return
    text = [[str(i), str(e), f"{high:.1%}", f"{low:.1%}", str(unused)] for i, e, high, low, unused in rows]
    if text:
        table("expert load", ["layer", "experts", "busiest", "idlest", "unused"], text)
    total = sum(result.settings["tokens"].values())
    table("", ["", ""], [["profile", out], ["tokens", f"{total:,} of {', '.join(result.domains)}"]], left=2)
