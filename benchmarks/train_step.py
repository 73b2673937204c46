"""What a training step of Coterie's decoder costs, beside transformers' Mixtral, and what every router adds to it.

A step is forward, backward and AdamW on a batch of random tokens. Both models have the same shape and the same weights
(the stock export of the decoder is the Mixtral), and their losses are compared before anything is timed. Mixtral runs
with each experts implementation of transformers, with torch's default AdamW and with the fused one that the decoder
has. Then the same decoder takes steps with each router there is; settings are such that a token runs two experts where
a router can be told so, and the table says how many ran.

    ratio      the fastest of Mixtral over this one: above 1 is faster
    overhead   time of the whole step above that of top-k, in percent

Fair means: contenders take turns in every round, the least time of the rounds counts, after one that warms up.
`--clock cpu` takes the CPU time of the process, which other processes disturb less, where there is one thread; with
more it is always the wall's. `--keep-memory` makes the C library keep freed memory, for all of them. batched_mm
gathers the weights of every slot; where that is more than `--most-gb` it is left out.

    python benchmarks/train_step.py [--shapes small] [--threads 1] [--dtypes float32] [--only routers] [--quick]
"""

# B batch, L sequence

from __future__ import annotations

import argparse
import gc
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common import machine, print_machine
from coterie.architectures.config import CoterieConfig
from coterie.architectures.decoder import CoterieForCausalLM
from coterie.architectures.stock import as_stock
from coterie.routing.base import router_class, routers
from coterie.routing.record import Record, listening
from train_experts import CLOCKS, STOCK, keep_memory, turns

# hidden, layers, expert width, vocabulary, B, L; always 8 experts, of which a token runs 2
SHAPES = {"medium": (256, 6, 512, 8192, 8, 256), "small": (128, 4, 128, 4096, 8, 128)}
QUICK = {"quick": (32, 2, 32, 128, 2, 16)}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TOP_K = {"kind": "top-k", "combine": "renormalised"}
# so that a token runs two experts, on average or always; routers that are not named do by default
SETTINGS: dict[str, dict[str, Any]] = {
    "adamoe": {"top_k": 4},  # of 8 experts and 8 null experts
    "dts": {"hard": True},
    "top-p": {"p": 0.25, "most": 2},
    "top-k": TOP_K,
}
MORE = {"dts, before its switch": {"kind": "dts"}}  # runs every expert above a threshold: nearly all of them


def decoder(shape: tuple[int, ...], router: dict[str, Any], seed: int, **how: Any) -> Any:
    H, layers, I, V, _, L = shape  # noqa: E741
    torch.manual_seed(seed)
    config = CoterieConfig(
        vocab_size=V, hidden_size=H, num_hidden_layers=layers, num_attention_heads=4, num_experts=8,
        moe_intermediate_size=I, max_position_embeddings=L, router=router,
    )  # fmt: skip
    return CoterieForCausalLM._from_config(config, **how).train()


def step(model: Any, ids_BL: Tensor, dtype: torch.dtype, *, fused: bool = True) -> Callable[[], None]:
    """One step of a model of its own optimizer."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, **({"fused": True} if fused else {}))

    def call() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = model(ids_BL, labels=ids_BL).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return call


def against_mixtral(shape: tuple[int, ...], ids_BL: Tensor, given: argparse.Namespace, **now: Any) -> Iterator[Any]:
    """Rows of the decoder and of Mixtral in all its forms."""
    dtype = DTYPES[now["dtype"]]
    names = list(STOCK)
    if ids_BL.numel() * 2 * 3 * shape[0] * shape[2] * 4 > given.most_gb * 1e9:
        names.remove("batched_mm")
    ours = decoder(shape, TOP_K, given.seed)
    calls: dict[str, Callable[[], None]] = {}
    for name in names:
        for fused in (True, False):
            model = as_stock(ours).train()
            model.set_experts_implementation(name)
            with torch.no_grad():
                found = [float(m(ids_BL, labels=ids_BL).loss) for m in (model, ours)]
            if abs(found[0] - found[1]) > 1e-4:
                raise SystemExit(f"not the same function: losses {found}")
            calls[f"Mixtral, {name}{', fused AdamW' if fused else ''}"] = step(model, ids_BL, dtype, fused=fused)
    calls["Coterie, fused AdamW"] = step(ours, ids_BL, dtype)
    best = turns(calls, given.rounds, now["clock"])
    least = min(seconds for name, seconds in best.items() if name.startswith("Mixtral"))
    for name, seconds in best.items():
        yield {"step": name, "ms": seconds * 1e3, "tokens/s": ids_BL.numel() / seconds, "ratio": least / seconds}


def with_routers(shape: tuple[int, ...], ids_BL: Tensor, given: argparse.Namespace, **now: Any) -> Iterator[Any]:
    """Rows of the decoder with every router, a few at a time beside top-k, as all together would take much memory."""
    dtype = DTYPES[now["dtype"]]
    wanted: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {}
    for kind, cls in routers().items():
        how = {"attn_implementation": "eager"} if cls.needs_attention else {}
        if cls.needs_attention:
            wanted.setdefault("top-k, eager attention", (TOP_K, how))
        wanted[kind] = ({"kind": kind, **SETTINGS.get(kind, {})}, how)
    wanted |= {name: (told, {}) for name, told in MORE.items()}
    if given.routers:
        wanted = {name: told for name, told in wanted.items() if told[0]["kind"] in given.routers}
    top_k = wanted.pop("top-k", (TOP_K, {}))
    names = list(wanted)
    for first in range(0, len(names), 4):
        models = {}
        for name in ("top-k", *names[first : first + 4]):
            told, how = wanted.get(name, top_k)
            told = dict(told)
            fields = router_class(told["kind"]).Settings.model_fields
            told |= {n: v for n, v in {"vocabulary": shape[3], "heads": 4}.items() if n in fields}
            models[name] = decoder(shape, told, given.seed, **how)
        best = turns({name: step(m, ids_BL, dtype) for name, m in models.items()}, given.rounds, now["clock"])
        for name, seconds in best.items():
            ran = experts_per_token(models[name], ids_BL)
            if name != "top-k" or not first:
                row = {"router": name, "ms": seconds * 1e3, "overhead": 100 * (seconds / best["top-k"] - 1)}
                yield row | {"experts per token": ran}
        del models
        gc.collect()


@torch.no_grad()
def experts_per_token(model: Any, ids_BL: Tensor) -> float:
    """How many experts a token of this batch runs in training, mean over tokens and layers."""
    ran: list[float] = []

    def see(record: Record) -> None:
        ran.extend(float((r.expert_TK < r.experts).sum(-1).float().mean()) for r in record.routings.values())

    with listening(model, see):
        model(ids_BL, labels=ids_BL)
    return sum(ran) / len(ran)


def said(row: dict[str, Any], where: str) -> str:
    if "step" in row:
        return f"{where}  {row['step']:<34} {row['ms']:9.2f} ms {row['tokens/s']:8.0f} tokens/s {row['ratio']:6.2f}"
    more = "" if row["experts per token"] < 2.1 else "  (runs more experts)"
    more = more if row["experts per token"] > 1.9 else "  (runs fewer experts)"
    return (
        f"{where}  {row['router']:<34} {row['ms']:9.2f} ms {row['overhead']:+8.1f} %"
        f"  {row['experts per token']:5.2f} experts per token{more}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--only", choices=["mixtral", "routers"], help="half of it")
    parser.add_argument("--routers", nargs="+", choices=list(routers()), help="only these")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall")
    parser.add_argument("--most-gb", type=float, default=0.25)
    parser.add_argument("--keep-memory", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a tiny model; tests the script, measures nothing")
    parser.add_argument("--json", type=Path, help="write the rows here too")
    given = parser.parse_args()
    torch.set_flush_denormal(True)
    if given.keep_memory:
        keep_memory()
    facts = machine()
    print_machine(facts)
    print(f"torch {torch.__version__}, least of {given.rounds} rounds")
    rows = []
    for shape_name, shape in (QUICK if given.quick else {n: SHAPES[n] for n in given.shapes}).items():
        V, B, L = shape[3:]
        ids_BL = torch.randint(0, V, (B, L), generator=torch.Generator().manual_seed(given.seed))
        for threads in given.threads:
            torch.set_num_threads(threads)
            clock = given.clock if threads == 1 else "wall"
            for dtype in given.dtypes:
                where = {"shape": shape_name, "threads": threads, "dtype": dtype, "clock": clock}
                told = f"{shape_name}, {threads} thread{'s' * (threads > 1)}, {dtype}, {clock}"
                for part in (against_mixtral, with_routers):
                    if given.only and given.only not in part.__name__:
                        continue
                    if part is with_routers and (threads, dtype) != (given.threads[0], given.dtypes[0]):
                        continue  # what a router adds is shown once for each shape
                    for row in part(shape, ids_BL, given, dtype=dtype, clock=CLOCKS[clock]):
                        rows.append(where | row)
                        print(said(row, told), flush=True)
    if given.json:
        found = {"machine": facts, "torch": torch.__version__, "keep_memory": given.keep_memory, "rows": rows}
        given.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
