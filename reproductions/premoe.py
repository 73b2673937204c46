"""PreMoe: each task's experts by router logits, and the task of a query by the first router (arXiv:2505.17639).

Claim: experts kept by a task's own pattern serve that task, and a query finds its task from the logits of the first MoE
layer. Published: DeepSeek-R1 with 128 of 256 experts keeps 97.2 on MATH500, about the full model's, and 72.0 with 32.

Here: a store of one pattern per domain of a small trained MoE, TCESS with one candidate, as released. Held-out loss
with half and a quarter of the experts under the own pattern, the others' (mean), frequency in the domain, random
experts, a generalist of all tasks, and the pattern that queries of 64 tokens find; share of held-out queries of 32, 64
and 128 tokens that find their task; bytes and seconds to load.

    python reproductions/premoe.py
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from torch import Tensor

import coterie
from common import Reproduction, arguments, files_by_domain, mean_and_spread, narrowed_losses, resident, workplace
from coterie import api
from coterie.anatomy import moe_layers
from coterie.compression.methods import get_method
from coterie.compression.selector import Budget, select_layer
from coterie.patterns.loading import of
from coterie.patterns.retrieval import nearest, text_key
from coterie.patterns.store import PatternStore
from coterie.profiling.profile import LayerProfile

SHARES = {"half": 2, "quarter": 4}
QUERIES = (32, 64, 128)
RULE = (
    "differences are paired by seed and averaged over domains; reproduced if, with half and with a quarter of the"
    " experts, the own pattern loses less than the others' patterns and than random experts, by more than two standard"
    " errors over seeds, and queries of 64 tokens find their task at least twice as often as chance; not reproduced if"
    " the others' patterns or random experts lose less than the own by more than two standard errors at either size, or"
    " queries of 64 tokens find their task no more often than chance; inconclusive otherwise"
)


def query_keys(model: Any, data: Any, store: PatternStore) -> list[tuple[int, Tensor]]:
    """(domain, key) of every sequence: the first router's logits, by a forward hook on the model in memory."""
    layer, seen, found = moe_layers(model)[0], [], []
    hook = layer.router.register_forward_hook(lambda m, a, o: seen.append(o[0].detach()))
    for batch in data.batches:
        with torch.no_grad():
            model(input_ids=batch.ids_BL, use_cache=False)
        logits_BLE = seen.pop().view(*batch.ids_BL.shape, -1)
        found += [(int(d), text_key(z, store.key)) for d, z in zip(batch.domain_B, logits_BLE, strict=True)]
    hook.remove()
    return found


def main() -> None:
    given = arguments(__doc__, evaluate=16).parse_args()
    losses: dict[str, list[float]] = {}
    accuracy: dict[int, list[float]] = {length: [] for length in QUERIES}
    loading: dict[str, list[tuple[int, float]]] = {}
    shown = given.model is None and given.calibration is None
    with workplace(given) as (checkpoint, calibration, evaluation, _):
        model = resident(checkpoint)
        layers = moe_layers(model)
        files = files_by_domain(calibration)
        held_out = api.calibration(checkpoint, evaluation, samples=given.evaluate, length=given.length)
        assert held_out is not None
        assert held_out.domains == sorted(files)
        domains = held_out.domains
        text = {"samples": given.samples, "length": given.length}
        for seed in given.seeds:
            store = api.build_patterns(checkpoint, {d: files[d] for d in domains}, seed=seed, **text)
            seen = api.profile(checkpoint, list(files.values()), observers=["DomainCount"], seed=seed, **text)
            found = {}
            for length in QUERIES:
                queries = api.calibration(checkpoint, evaluation, samples=given.evaluate, length=length, seed=seed)
                assert queries is not None
                found[length] = [(d, nearest(store, k, length).task) for d, k in query_keys(model, queries, store)]
                accuracy[length].append(statistics.mean(domains[d] == task for d, task in found[length]))
                print(f"seed {seed}: {length} tokens find their task {accuracy[length][-1]:.3f}", flush=True)
            for share, part in SHARES.items():
                count = layers[0].num_experts // part
                table = {
                    t: narrowed_losses(model, held_out, {x.index: store.keep(x, t, count) for x in layers})
                    for t in domains
                }
                mean = {}
                own = [table[d][i] for i, d in enumerate(domains)]
                mean["own pattern"] = statistics.mean(own)
                mean["others' patterns"] = statistics.mean(
                    table[t][i] for i, d in enumerate(domains) for t in domains if t != d
                )
                mean["pattern found by the query"] = statistics.mean(
                    statistics.mean(table[t][i] for d, t in found[64] if d == i and t) for i in range(len(domains))
                )
                everything = {x.index: store.keep(x, domains, count) for x in layers}
                mean["all patterns, equal say"] = statistics.mean(narrowed_losses(model, held_out, everything))
                budget = Budget(keep_experts=count)
                by_count = []
                for i, d in enumerate(domains):
                    row = seen.domains.index(d)
                    keeps = {
                        x.index: select_layer(seen.layers[x.index].count_DE[row].double(), count, x, budget)
                        for x in layers
                    }
                    by_count.append(narrowed_losses(model, held_out, keeps)[i])
                mean["frequency in the domain"] = statistics.mean(by_count)
                chance = get_method("random", {"seed": seed})
                empty = {x.index: LayerProfile(x.index, x.name, x.num_experts, x.top_k, 0) for x in layers}
                keeps = {x.index: select_layer(chance.score(empty[x.index]), count, x, budget) for x in layers}
                mean["random"] = statistics.mean(narrowed_losses(model, held_out, keeps))
                for name, value in mean.items():
                    losses.setdefault(f"{share}: {name}", []).append(value)
                    print(f"seed {seed}: {share}: {name} {value:.4f}", flush=True)
                loading.setdefault(share, []).append(_load(checkpoint, store, domains[0], count))
            loading.setdefault("all", []).append(_load(checkpoint, store, domains[0], layers[0].num_experts))
        full = statistics.mean(narrowed_losses(model, held_out))
    result = Reproduction(
        slug="premoe" if shown else "premoe-other-model",
        title=f"PreMoe on {'the pocket model' if shown else 'a small MoE and real text'} (arXiv:2505.17639)",
        claim="Experts kept by a task's own pattern serve the task, and the first router's logits find it for a query.",
        published="DeepSeek-R1 on MATH500: 97.2 with 128 of 256 experts (about the full model's), 72.0 with 32.",
        rule=RULE,
        columns=["what", "value", "against own", "standard error"],
        seeds=given.seeds,
        setting={
            "model": "the pocket model" if given.model is None else "a trained Qwen3-MoE, 11 M parameters",
            "domains": ", ".join(domains),
            "calibration windows per domain": given.samples,
            "evaluation windows and queries per domain": given.evaluate,
            "tokens per window": given.length,
            "chance": 1 / len(domains),
        },
        command="python reproductions/premoe.py"
        + ("" if shown else " --model MODEL --calibration TEXT --evaluation HELD_OUT"),
    )
    result.rows.append(_row("loss of the whole model", full))
    for name, values in losses.items():
        base = losses[f"{name.split(':')[0]}: own pattern"]
        difference, spread = mean_and_spread([v - b for v, b in zip(values, base, strict=True)])
        result.rows.append(_row(f"loss, {name}", statistics.mean(values), difference, spread / len(values) ** 0.5))
    for length, values in accuracy.items():
        spread = mean_and_spread(values)[1] / len(values) ** 0.5
        result.rows.append(_row(f"{length} tokens find their task", statistics.mean(values), "", spread))
    for share, runs in loading.items():
        spread = mean_and_spread([s for _, s in runs])[1] / len(runs) ** 0.5
        result.rows.append(_row(f"MB of experts read, {share}", runs[0][0] / 1e6))
        result.rows.append(_row(f"seconds to load, {share}", statistics.mean(s for _, s in runs), "", spread))
    rows = {r["what"]: r for r in result.rows}
    controls = [rows[f"loss, {share}: {name}"] for share in SHARES for name in ("others' patterns", "random")]
    right, chance_level = rows["64 tokens find their task"]["value"], 1 / len(domains)
    better = [r["against own"] > 2 * r["standard error"] for r in controls]
    worse = [r["against own"] < -2 * r["standard error"] for r in controls]
    if all(better) and right >= 2 * chance_level:
        result.verdict = "reproduced"
    elif any(worse) or right <= chance_level:
        result.verdict = "not reproduced"
    result.show()
    print(f"kept in {result.save()}")


def _load(checkpoint: str, store: PatternStore, task: str, count: int) -> tuple[int, float]:
    """Bytes of experts read, and seconds, to load a task's pattern."""
    began = time.perf_counter()
    model, _ = coterie.load(checkpoint, pattern=store, task=task, keep_experts=count)
    return of(model).checkpoint.bytes_read, time.perf_counter() - began


def _row(name: str, value: float, against: float | str = "", error: float | str = "") -> dict[str, Any]:
    return {"what": name, "value": value, "against own": against, "standard error": error}


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
