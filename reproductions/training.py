"""What reproductions of training claims share: a small decoder, text, and `coterie race` around them.

    race = trained({"top-2": base(router={"kind": "top-k", "top_k": 2}), "rmoe": base(router={"kind": "rmoe"})}, given)

All configs read the same tokens in the same order with the same seeds. By default the text is the standard library of
the running interpreter (code, and its documentation), so that anybody can repeat a run from the package alone; other
text is named with --data and --held-out.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from common import against, told
from coterie import api, assets

SIZES: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_experts": 8,
    "moe_intermediate_size": 128,
    "intermediate_size": 256,
    "max_position_embeddings": 512,
}


def options(description: str | None, tokens: int = 400_000) -> argparse.ArgumentParser:
    """The options every reproduction of a training claim has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", help="text to train on (default: the interpreter's standard library)")
    parser.add_argument("--held-out", nargs="+", help="text to measure on")
    parser.add_argument("--tokens", type=int, default=tokens, help="tokens each model reads")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    return parser


def base(
    *,
    balancing: list[dict[str, Any]] | None = None,
    controllers: list[dict[str, Any]] | None = None,
    dials: list[dict[str, Any]] | None = None,
    training: Mapping[str, Any] | None = None,
    **model: Any,
) -> dict[str, Any]:
    """A config of the small decoder; what is given differs from it."""
    schedule = {"batch_size": 8, "length": 128, "rate": 2e-3, "evaluate_every": 0.1, "evaluate_samples": 12}
    return {
        "model": {**SIZES, **model},
        "balancing": balancing or [],
        "controllers": controllers or [],
        "dials": dials or [],
        "training": {**schedule, **(training or {})},
    }


def trained(
    configs: Mapping[str, dict[str, Any]],
    given: argparse.Namespace,
    *,
    equal: str = "tokens",
    after: Callable[[Any, Any, Any], None] | None = None,
) -> Any:
    """The race of these configs, in memory. after : called with (run, model, text) of each."""
    with tempfile.TemporaryDirectory(prefix="coterie-reproduction-") as name:
        data, held_out = given.data, given.held_out
        if data is None:
            train, evaluate = assets.write_library_texts(Path(name))
            data, held_out = [str(train)], [str(evaluate)]
        told = {key: {**config, "data": data, "evaluate": held_out or []} for key, config in configs.items()}
        return api.race(
            told,
            None,
            seeds=given.seeds,
            equal=equal,
            tokens=given.tokens,
            after=after,
            on_run=lambda name, seed, done, of: print(f"run {done + 1} of {of}: {name}, seed {seed}", flush=True),
        )


def losses(race: Any, name: str) -> list[float]:
    """Held-out loss at the end, by seed."""
    return [run.losses["all"] for run in race.of(name)]


def setting(given: argparse.Namespace, **more: Any) -> dict[str, Any]:
    """What a reader must know of a run, without any path of this machine."""
    text = "the interpreter's standard library: code and documentation"
    return {
        "text": text if given.data is None else "encyclopaedia, reviews, arithmetic, news, Spanish, Dutch, Python",
        "tokens per run": given.tokens,
        "model": "decoder, 4 layers, width 128, 8 experts of 128, unless said otherwise",
        **more,
    }


def reversed_by(lower: Any, higher: Any) -> str:
    """How losses by seed compare, in the words of `common.told`: "below" if the first are lower for certain."""
    return told(against(lower, higher))


def columns(race: Any) -> list[dict[str, Any]]:
    """A row for each config of a race, for `Reproduction.rows`."""
    return [
        {
            "config": row["name"],
            "loss": row["loss"],
            "two standard errors": row["spread"] or 0.0,
            "difference": row["difference"],
            "of the difference": row["difference_spread"] or 0.0,
            "experts per token": row["experts_per_token"],
            "violation": row["max_vio"],
            "MFLOP per token": row["flops_per_token"] / 1e6,
        }
        for row in race.table()
    ]


ROWS = [
    "config",
    "loss",
    "two standard errors",
    "difference",
    "of the difference",
    "experts per token",
    "violation",
    "MFLOP per token",
]


def token_losses(model: Any, text: Any) -> tuple[Any, dict[int, Any]]:
    """Loss of every held-out token [T], and of the same tokens, by layer, how many experts they ran [T]."""
    import torch

    from coterie.routing.record import listening

    losses: list[torch.Tensor] = []
    ran: dict[int, list[torch.Tensor]] = {}

    def see(record: Any) -> None:
        for layer, routing in record.routings.items():
            count_BL = (routing.expert_TK < routing.experts).sum(-1).view(record.shape)
            ran.setdefault(layer, []).append(count_BL[:, :-1][real_BL[:, 1:]].float())

    with torch.no_grad(), listening(model, see):
        for data in text.tests.values():
            for batch in data.batches:
                mask_BL = batch.mask_BL
                real_BL = torch.ones_like(batch.ids_BL, dtype=torch.bool) if mask_BL is None else mask_BL
                logits = model(input_ids=batch.ids_BL, attention_mask=real_BL.long(), use_cache=False).logits
                loss = torch.nn.functional.cross_entropy(
                    logits[:, :-1].flatten(0, 1).float(), batch.ids_BL[:, 1:].flatten(), reduction="none"
                )
                losses.append(loss.view(len(batch.ids_BL), -1)[real_BL[:, 1:]])
    return torch.cat(losses), {layer: torch.cat(parts) for layer, parts in ran.items()}
