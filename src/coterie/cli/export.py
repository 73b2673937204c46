"""`coterie export`: a checkpoint in the form other software needs."""

from typing import Annotated, Any

import typer

from coterie.cli import options as o
from coterie.cli.common import Common, emit_json, gigabytes, say, table, verb, warn
from coterie.cli.progress import Bar


@verb
def export(
    common: Common,
    model: o.Model,
    out: Annotated[str, typer.Argument(help="Folder to write.", show_default=False)],
    pad: Annotated[
        bool,
        typer.Option("--pad", help="Give all layers the same number of experts, with dead ones that are never picked."),
    ] = False,
    form: Annotated[
        str | None,
        typer.Option(
            help="Of a quantized checkpoint: dense (any software, full size) or compressed-tensors (packed, for"
            " transformers and vLLM). Of a decoder that `coterie train` made: stock, an architecture of transformers.",
            show_default=False,
        ),
    ] = None,
    gguf: Annotated[
        str | None,
        typer.Option(
            metavar="TYPE",
            help="One file for llama.cpp, of a plain or a quantized checkpoint: F32, F16, BF16, Q8_0, Q5_1, Q5_0, Q4_1,"
            " Q4_0, MXFP4, TQ2_0 or TQ1_0.",
            show_default=False,
        ),
    ] = None,
    data: o.Data = None,
    samples: o.Samples = 64,
    length: o.Length = 512,
    tokens: o.Tokens = None,
    tokenizer: o.Tokenizer = None,
    seed: o.Seed = 0,
    overwrite: o.Overwrite = False,
) -> None:
    """Write a checkpoint as other software needs it: layers of one size (--pad), quantized weights or a trained
    decoder (--form), one file for llama.cpp (--gguf).

    Routers with a bias (GPT-OSS, DeepSeek-V3, GLM-4 and their kin) make it exact. Others need --data: dead experts
    are kept from being picked on that text, and the share of tokens on which it fails is told.
    """
    from coterie.errors import UsageError

    if pad + (form is not None) + (gguf is not None) != 1:
        raise UsageError(
            "say what to export to, one thing at a time",
            "--pad gives all layers the same number of experts; --form dense or compressed-tensors is for quantized;"
            " --gguf Q8_0 is for llama.cpp.",
        )
    runtime = common.runtime()
    from coterie import api

    if form is not None or gguf is not None:
        _other_form(common, runtime, model, out, form, gguf, overwrite)
        return

    with Bar("export", enabled=not common.json) as bar:
        result = api.export(
            model,
            out,
            data=data or (),
            samples=samples,
            length=length,
            tokens=tokens,
            tokenizer=tokenizer,
            seed=seed,
            overwrite=overwrite,
            runtime=runtime,
            progress=bar,  # type: ignore[arg-type]
        )
    if common.json:
        emit_json(result.describe())
        return
    leak = {index: "" if result.exact else f"{share:.2%}" for index, share in result.leaks.items()}
    rows = [[str(i), str(before), str(after), leak.get(i, "never")] for i, (before, after) in result.layers.items()]
    table(f"padded: {out}", ["layer", "experts", "with dead ones", "tokens that could pick one"], rows)
    say(f"{gigabytes(result.bytes_before)} became {gigabytes(result.bytes_after)}; loads with plain transformers")
    if not result.exact:
        warn("these routers have no bias: on other text a dead expert can be picked, adds nothing and takes a place")


def _other_form(
    common: Common, runtime: Any, model: str, out: str, form: str | None, gguf: str | None, overwrite: bool
) -> None:
    from coterie import api

    with Bar("export", enabled=not common.json) as bar:
        options: dict[str, Any] = {"overwrite": overwrite, "runtime": runtime, "progress": bar}
        result: Any
        if gguf is not None:
            result = api.export_gguf(model, out, gguf, **options)
        else:
            assert form is not None
            result = api.unpack(model, out, form, **options)
    if common.json:
        emit_json(result.describe())
        return
    say(f"{result.out}: {result.form}, {gigabytes(result.bytes_before)} became {gigabytes(result.bytes_after)}")
    for note in result.notes:
        warn(note)
