"""Super experts: a few experts carry the model, and they are found by their largest output (arXiv:2507.23279).

Claim: removing the handful of experts with extreme outputs ruins a model, removing as many random ones does nothing,
and the attention sink on the first token goes with them. Published: of the 6144 experts of Qwen3-30B-A3B three are
super; without them WikiText-2 perplexity goes from 8.70 to 59.86 (random experts: 8.71), and attention on the first
token decays by about 90 % or more in every layer.

Small models do not grow super experts by themselves, so one is planted, and the model is trained on to live with it:

- the least used expert of the first layer gets a router row that picks it on the first token and on no other, and a
  down projection that writes one large channel there;
- behind it, keys read that channel and queries a constant one, in the slowest rotary dimensions: a sink;
- the layers behind it are then trained for a while on the calibration text.

What the tool finds in the planted model is compared with what was planted; what it finds in the model as it was is
shown beside it, together with the removal of that model's largest values, which are no super experts. The strength of
the sink and the rule were fixed after a pilot with seed 0 on the pocket model; seeds 1 to 3 are what counts.

    python reproductions/super_experts.py
"""

from __future__ import annotations

import math
import random
import shutil
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from common import Reproduction, arguments, mean_and_spread, workplace
from coterie import api
from coterie.anatomy import MoELayer, moe_layers
from coterie.errors import UsageError
from coterie.experts.forward import inner_activation, observe
from coterie.text import load_data, load_tokenizer

LAYER = 0
VALUE = 400.0  # what the planted expert writes; entries of these models reach about 100
SLOW = 8  # rotary pairs that carry the sink
GAIN = 2.5  # of the norms of queries and keys there
DECAY = 0.75
CONTROLS = 5
RULE = (
    "reproduced if, for every seed, the planted expert is exactly what is found, also on every text domain alone; if"
    " removing it raises the loss by more than the mean of random sets anywhere, and of random sets of its layer, by"
    " more than two standard errors over seeds; if attention on the first token decays by more than"
    f" {DECAY:g} on average over the layers behind it; and if at half of the experts frequency pruning with the list"
    " protected loses less than without by more than two standard errors; not reproduced if another expert is found, or"
    " the random sets of either kind hurt more by two standard errors; inconclusive otherwise"
)


class Inputs:
    """Keeps what the experts of one layer receive, and how often each is picked."""

    def __init__(self, experts: int) -> None:
        self.x: list[torch.Tensor] = []
        self.count_E = torch.zeros(experts, dtype=torch.int64)

    def routed(self, x_TH: torch.Tensor, index_TK: torch.Tensor, weight_TK: torch.Tensor) -> bool:
        self.x.append(x_TH.detach())
        self.count_E += torch.bincount(index_TK.reshape(-1), minlength=len(self.count_E))
        return False


def inputs_of(model: Any, layer: MoELayer, ids_BL: torch.Tensor) -> Inputs:
    seen = Inputs(layer.num_experts)
    with observe(layer.experts, seen), torch.no_grad():
        model(ids_BL)
    return seen


def make_planted(model: str, text: list[str], folder: Path, seed: int, steps: int, length: int) -> int:
    """A checkpoint with a planted super expert in `folder`; returns its number."""
    if (folder / "config.json").exists():
        shutil.rmtree(folder)
    net = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    if net.config.model_type != "qwen3_moe" or net.config.num_hidden_layers <= LAYER + 1:
        raise UsageError("the sink is built for the attention of Qwen3-MoE models of three layers or more")
    net.set_experts_implementation("coterie")
    tokenizer = load_tokenizer(Path(model))
    data = load_data(text, tokenizer, samples=64, length=length, batch_size=1, pack=False, seed=seed)
    rows = [b.ids_BL[0] for b in data.batches if b.ids_BL.shape[1] == length]
    ids_BL = torch.stack(random.Random(seed).sample(rows, 16))
    layer = next(m for m in moe_layers(net) if m.index == LAYER)
    expert = plant(net, layer, ids_BL)
    train(net, rows, steps, seed)
    net.config.save_pretrained(folder)
    net.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return expert


@torch.no_grad()
def plant(net: Any, layer: MoELayer, ids_BL: torch.Tensor) -> int:
    """Edit `net` as described on top; returns the expert."""
    config, decoder = net.config, net.model
    embed_VH = decoder.embed_tokens.weight
    size_H = embed_VH.pow(2).mean(0)
    sink, constant = (int(c) for c in size_H.argsort()[:2])  # the two least used channels
    for channel in (sink, constant):
        embed_VH[:, channel] = 0
        for block, moe in zip(decoder.layers, moe_layers(net), strict=True):
            block.self_attn.o_proj.weight[channel] = 0
            moe.experts.down_proj[:, channel] = 0
    embed_VH[:, constant] = embed_VH.abs().max()
    for block in decoder.layers:
        for norm in (block.input_layernorm, block.post_attention_layernorm):
            norm.weight[sink], norm.weight[constant] = 1, norm.weight.mean()

    seen = inputs_of(net, layer, ids_BL)
    x_BLH = seen.x[0].reshape(*ids_BL.shape, -1)
    first_H, others_TH = x_BLH[0, 0], x_BLH[:, 1:].reshape(-1, x_BLH.shape[-1])
    expert = int(seen.count_E.argmin())
    # a router row that gives the first token +t and all others -t, by ridge regression
    x_TH = torch.cat([first_H[None] * len(others_TH) ** 0.5, others_TH]).double()
    logits_TE = others_TH @ layer.router.weight.T
    strength = float(logits_TE.abs().amax())
    wanted_T = torch.full((len(x_TH),), -strength, dtype=torch.float64)
    wanted_T[0] = strength * len(others_TH) ** 0.5
    gram_HH = x_TH.T @ x_TH
    ridge = 1e-3 * gram_HH.diagonal().mean() * torch.eye(len(gram_HH), dtype=torch.float64)
    layer.router.weight[expert] = torch.linalg.solve(gram_HH + ridge, x_TH.T @ wanted_T).float()
    inner_I = inner_activation(layer.experts, expert, first_H[None])[0]
    inner = int(inner_I.abs().argmax())
    layer.bank.read(expert).down_HI[sink] = 0
    layer.bank.read(expert).down_HI[sink, inner] = VALUE / inner_I[inner]  # one super weight

    D = decoder.layers[0].self_attn.head_dim
    slow_D = torch.zeros(D)
    slow_D[D // 2 - SLOW : D // 2] = 1 / SLOW**0.5  # one of each slowest rotary pair
    for index, block in enumerate(decoder.layers):
        attention = block.self_attn
        if index <= LAYER:
            continue
        q_NDH = attention.q_proj.weight.view(config.num_attention_heads, D, -1)
        k_NDH = attention.k_proj.weight.view(config.num_key_value_heads, D, -1)
        v_NDH = attention.v_proj.weight.view(config.num_key_value_heads, D, -1)
        k_NDH[:, :, sink], v_NDH[:, :, sink] = slow_D, 0
        normed = float(inputs_to_attention(net, block, ids_BL)[:, 1:, constant].mean())
        usual = float(q_NDH.norm(dim=(1, 2)).mean())
        q_NDH[:, :, constant] = slow_D * usual / normed
        slow = slow_D > 0  # as loud as the sink needs to be: |q| = |k| = sqrt(D) behind their norms
        attention.q_norm.weight[slow], attention.k_norm.weight[slow] = GAIN, GAIN
    return expert


@torch.no_grad()
def inputs_to_attention(net: Any, block: Any, ids_BL: torch.Tensor) -> torch.Tensor:
    """What the attention of one decoder layer reads, behind its norm, [B, L, H]."""
    found: list[torch.Tensor] = []
    handle = block.input_layernorm.register_forward_hook(lambda module, args, output: found.append(output))
    net(ids_BL)
    handle.remove()
    return found[0]


def train(net: Any, rows: list[torch.Tensor], steps: int, seed: int) -> None:
    """Plain language modelling on documents, batches of eight; only the layers behind the planted expert change."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    net.train()
    for part in (net.model.embed_tokens, *net.model.layers[: LAYER + 1]):
        part.requires_grad_(False)
    trained = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=5e-4, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: 0.5 * (1 + math.cos(math.pi * s / max(steps, 1))))
    for step in range(steps):
        ids_BL = torch.stack(draw.sample(rows, min(8, len(rows))))
        logits_BLV = net(ids_BL).logits
        loss = F.cross_entropy(logits_BLV[:, :-1].flatten(0, 1), ids_BL[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        if step % 25 == 0 or step == steps - 1:
            print(f"  step {step}: loss {float(loss.detach()):.3f}", flush=True)
    net.eval()


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--steps", type=int, default=80, help="training steps of a planted model")
    parser.set_defaults(seeds=[1, 2, 3], length=128)
    given = parser.parse_args()
    with workplace(given) as (model, calibration, evaluation, folder):
        found = [one_seed(given, model, calibration, evaluation, folder, seed) for seed in given.seeds]
    columns: dict[str, list[float]] = {name: [f[name] for f in found] for name in found[0]}
    pocket = given.model is None and given.calibration is None
    result = Reproduction(
        slug="super-experts" if pocket else "super-experts-other-model",
        title=f"Super experts on {'the pocket model' if pocket else 'a small MoE and real text'} (arXiv:2507.23279)",
        claim="Removing the few experts with extreme outputs ruins a model, removing as many random ones does nothing,"
        " and the attention sink goes with them.",
        published="Qwen3-30B-A3B, WikiText-2 perplexity: 8.70; without its 3 super experts 59.86, without 3 random ones"
        " 8.71; attention on the first token decays by 90 % or more in all layers.",
        rule=RULE,
        columns=["measure", "mean", "standard error"],
        seeds=given.seeds,
        setting={
            "model": "the pocket model" if given.model is None else "a trained Qwen3-MoE, 11 M parameters",
            "text": "the demo texts" if given.calibration is None else domains_of(given.evaluation),
            "evaluation documents per domain": given.evaluate,
            "tokens per document, at most": given.length,
            "planted": f"one expert of layer {LAYER}, {VALUE:g} in one channel; trained on for {given.steps} steps",
            "random sets": f"{CONTROLS} of each kind",
        },
        command="python reproductions/super_experts.py"
        + ("" if pocket else " --model MODEL --calibration TEXT --evaluation HELD_OUT"),
    )
    error = {}
    for name, values in columns.items():
        mean, spread = mean_and_spread(values)
        error[name] = spread / len(values) ** 0.5
        result.rows.append({"measure": name, "mean": mean, "standard error": error[name]})
    result.verdict = verdict(columns, error)
    result.show()
    print(f"kept in {result.save()}")


def domains_of(sources: list[str]) -> str:
    files = [f for s in map(Path, sources) for f in (sorted(s.iterdir()) if s.is_dir() else [s])]
    return ", ".join(sorted({file.name.split(".")[0] for file in files}))


def verdict(columns: dict[str, list[float]], error: dict[str, float]) -> str:
    """By the rule on top."""
    mean = {name: sum(values) / len(values) for name, values in columns.items()}
    exact = all(v == 1 for name in (EXACT, OVERLAP) for v in columns[name])
    margins = {name: mean[name] - 2 * error[name] for name in (*AGAINST, SAVED)}
    if exact and min(margins.values()) > 0 and mean[SINK] > DECAY:
        return "reproduced"
    worse = any(mean[name] + 2 * error[name] < 0 for name in AGAINST)
    return "not reproduced" if worse or any(v == 0 for v in columns[EXACT]) else "inconclusive"


EXACT = "planted: exactly the planted expert is found (1 = yes)"
OVERLAP = "planted: domains on which exactly it is found, share"
SINK = "planted: decay of attention on the first token behind it"
AGAINST = (
    "planted: change of loss above that of random experts",
    "planted: change of loss above that of random experts of its layer",
)
SAVED = "planted, 50 % frequency pruning: loss without the list above loss with it"


def one_seed(
    given: Any, model: str, calibration: list[str], evaluation: list[str], folder: Path, seed: int
) -> dict[str, float]:
    """All measures of one seed, by name."""
    text: dict[str, Any] = {"samples": given.evaluate, "length": given.length, "seed": seed}
    print(f"seed {seed}: planting", flush=True)
    path = folder / "planted"
    expert = make_planted(model, calibration, path, seed, given.steps, given.length)
    file = folder / f"super-experts-{seed}.json"
    report = api.super_experts(str(path), evaluation, out=str(file), controls=CONTROLS, **text).report
    pairs = [[e["layer"], e["expert"]] for e in report["super_experts"]]
    planted = [LAYER, expert]
    rows: dict[str, float] = {EXACT: float(pairs == [planted])}
    rows[OVERLAP] = sum(s == [planted] for s in report["domains"].values()) / len(report["domains"])
    if pairs != [planted]:
        print(f"  found {pairs} instead of {planted}: {report['reason']}")
        ablated = api.super_experts(
            str(path), evaluation, ablate=[f"{LAYER}:{expert}"], controls=CONTROLS, **text
        ).report
        report["verification"], removed = ablated["verification"], "given experts"
    else:
        removed = "super experts"
    runs = {run["removed"]: run for run in report["verification"]["runs"]}
    print(f"  {removed} {runs[removed]['delta']:+.3f} of {runs['nothing']['loss']:.3f}", flush=True)
    random_delta = mean_delta(runs, "random experts ")
    layer_delta = mean_delta(runs, "random experts of the same layers ")
    rows["planted: loss"] = runs["nothing"]["loss"]
    rows["planted: change of loss without it"] = runs[removed]["delta"]
    rows["planted: change of loss without its one super weight"] = runs.get("super weights", runs[removed])["delta"]
    rows["planted: change of loss without random experts"] = random_delta
    rows["planted: change of loss without random experts of its layer"] = layer_delta
    rows[AGAINST[0]] = runs[removed]["delta"] - random_delta
    rows[AGAINST[1]] = runs[removed]["delta"] - layer_delta
    behind = {i: d for i, d in runs[removed]["sink_decay"].items() if int(i) > LAYER}
    rows[SINK] = sum(behind.values()) / len(behind)
    sinks = [report["verification"]["sink"][i]["share"] for i in behind]
    rows["planted: share of attention on the first token behind it"] = sum(sinks) / len(sinks)
    rows["planted: largest activation"] = max(runs["nothing"]["hidden_max"].values())
    rows["planted: largest activation without it"] = max(runs[removed]["hidden_max"].values())
    entry = (report["super_experts"] or report["next"])[0]
    rows["planted: share of the first token's gates"] = entry["first_token_share"]
    rows["planted: share of all other tokens' gates"] = entry["other_tokens_share"]

    profile = api.profile(str(path), calibration, methods=["frequency"], pack=False, **text)
    losses = {}
    for name, protect in (("without", []), ("with", [f"@{file}"])):
        small = str(folder / f"half-{name}")
        api.compress(str(path), small, method="frequency", profile=profile, keep=0.5, protect=protect, overwrite=True)
        losses[name] = api.evaluate([small], evaluation, tokenizer=model, pack=False, **text)[0].mean_loss
    rows["planted, 50 % frequency pruning: loss with the list"] = losses["with"]
    rows[SAVED] = losses["without"] - losses["with"]

    natural = api.super_experts(model, evaluation, verify=False, **text).report
    rows["as it was: super experts found"] = len(natural["super_experts"])
    rows["as it was: largest value over the median"] = natural["largest"] / natural["median"]
    top = [f"{e['layer']}:{e['expert']}" for e in (natural["super_experts"] + natural["next"])[:3]]
    report = api.super_experts(model, evaluation, ablate=top, controls=CONTROLS, **text).report
    runs = {run["removed"]: run for run in report["verification"]["runs"]}
    rows["as it was: change of loss without its three largest"] = runs["given experts"]["delta"]
    rows["as it was: change of loss without random experts"] = mean_delta(runs, "random experts ")
    rows["as it was: change of loss without random experts of their layers"] = mean_delta(
        runs, "random experts of the same layers "
    )
    return rows


def mean_delta(runs: dict[str, Any], prefix: str) -> float:
    values = [run["delta"] for name, run in runs.items() if name.startswith(prefix) and name[len(prefix) :].isdigit()]
    return sum(values) / len(values)


if __name__ == "__main__":
    main()
