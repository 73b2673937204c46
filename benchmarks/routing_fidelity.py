"""Does calibration route tokens as the model does? Streamed against resident, and llm-compressor's two pipelines.

What it measures
    Every statistic of a mixture of experts rests on which experts each token went to. The reference is plain
    transformers, the whole model in memory, float32, with hooks on the router modules. Against it stand Coterie's
    streamed sweep and llm-compressor's REAP modifier in the pipeline it infers by default (sequential) and in
    `basic`. Per layer: the share of tokens whose expert ids are all the same, the share of equal ids, and how many
    selections are booked on another expert. A second reference, the same model with bidirectional attention, tells a
    lost causal mask from rounding.

Why it is fair
    Same checkpoint bytes and token ids for all; everyone computes in float32, so that no near-tie is decided by
    rounding to bf16; the peer in its own environment with pinned versions, told not to propagate pruned outputs
    (propagate_error=False), so that the model it calibrates is the original; references are run with the transformers
    of both environments, so that a difference between versions would show. The peer's ids are what its own hook
    receives, and its own counters must agree with them. What must hold for us is exact equality; the script exits
    with 1 where it does not.

Run
    python benchmarks/routing_fidelity.py                        # a minute or two
    python benchmarks/routing_fidelity.py --model FOLDER         # a checkpoint that fits in memory, random ids
    python benchmarks/routing_fidelity.py --padded               # sequences of different lengths, padded on the right
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from common import (
    LLMCOMPRESSOR_PINS,
    QUICK,
    Shape,
    Workplace,
    common_options,
    ensure_venv,
    finish,
    machine,
    measure,
    print_machine,
    table,
    tail,
    thread_environment,
    versions,
    write_checkpoint,
    write_tokens,
)

# T tokens, B batch, L sequence, E experts, K experts per token

Ids = npt.NDArray[np.int64]

MEDIUM = Shape(4, 32, 4, 512, 256, 8, 4, 64, 2048)
REFERENCES = ("causal", "bidirectional")
PEER_PIPELINES: dict[str, dict[str, Any]] = {
    "peer sequential": {},
    "peer basic": {"pipeline": "basic"},
}


# ------------------------------------------------------------------------------------------------ in a child


def _save(found: dict[int, list[Any]], output: str) -> None:
    import torch
    from safetensors.torch import save_file

    save_file({str(layer): torch.cat(parts).to(torch.int64).contiguous() for layer, parts in found.items()}, output)


def _layer_number(name: str) -> int:
    return int(name.split(".layers.")[1].split(".")[0])


def run_reference(spec: dict[str, Any]) -> None:
    """Plain transformers, whole model, float32; `bidirectional` replaces the causal mask by one that hides padding."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(spec["threads"])
    tokens = load_file(spec["tokens"])
    model = AutoModelForCausalLM.from_pretrained(spec["model"], dtype=torch.float32).eval()
    found: dict[int, list[Any]] = {}

    def remember(layer: int) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            ids = [t for t in output if not t.is_floating_point()]
            assert len(ids) == 1, f"{type(module).__name__} does not return expert ids"
            found.setdefault(layer, []).append(ids[0].reshape(-1, ids[0].shape[-1]).clone())

        return hook

    routers = [(n, m) for n, m in model.named_modules() if type(m).__name__.endswith("Router")]
    assert routers, "no router modules found"
    for name, module in routers:
        module.register_forward_hook(remember(_layer_number(name)))
    with torch.no_grad():
        for ids_L, mask_L in zip(tokens["input_ids"], tokens["attention_mask"], strict=True):
            mask: torch.Tensor = mask_L[None]
            if spec["attention"] == "bidirectional":
                hidden = torch.where(mask_L.bool(), 0.0, torch.finfo(torch.float32).min)
                mask = hidden[None, None, None].expand(1, 1, len(ids_L), len(ids_L)).contiguous()
            model(input_ids=ids_L[None], attention_mask=mask, use_cache=False)
    _save(found, spec["output"])


def run_peer(spec: dict[str, Any]) -> None:
    """llm-compressor's REAP modifier, with its router hook also writing down the ids that it is given."""
    import torch
    from llmcompressor import oneshot  # type: ignore[import-not-found, unused-ignore]
    from llmcompressor.modifiers.pruning.reap import REAPPruningModifier  # type: ignore[import-not-found, unused-ignore]
    from safetensors.torch import load_file
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from torch.utils.data import DataLoader
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    torch.set_num_threads(spec["threads"])
    tokens = load_file(spec["tokens"])
    found: dict[int, list[Any]] = {}
    counters: dict[int, Any] = {}

    class Watched(REAPPruningModifier):  # type: ignore[misc,unused-ignore]
        def _experts_block_hook(self, layer_name: str, module: Any, args: Any, output: Any) -> None:
            super()._experts_block_hook(layer_name, module, args, output)
            layer = _layer_number(layer_name)
            found.setdefault(layer, []).append(args[1].reshape(-1, args[1].shape[-1]).clone())
            counters[layer] = self._saliency_trackers[layer_name].count.clone()

    samples = [
        {"input_ids": i[None], "attention_mask": m[None]}
        for i, m in zip(tokens["input_ids"], tokens["attention_mask"], strict=True)
    ]
    model = AutoModelForCausalLM.from_pretrained(spec["model"], dtype=torch.float32)
    oneshot(
        model=model,
        processor=PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"?": 0}, unk_token="?"))),
        dataset=DataLoader(samples, batch_size=None, shuffle=False),  # type: ignore[arg-type]
        recipe=Watched(sparsity=0.25),
        num_calibration_samples=len(samples),
        propagate_error=False,
        moe_calibrate_all_experts=False,
        **spec["settings"],
    )
    for layer, parts in found.items():
        counted = torch.bincount(torch.cat(parts).reshape(-1), minlength=len(counters[layer]))
        assert torch.equal(counted.double(), counters[layer]), f"layer {layer}: its counter disagrees with its ids"
    _save(found, spec["output"])


def streamed_ids(model: str, tokens: str) -> dict[int, list[Any]]:
    """Expert ids per layer from Coterie's streamed sweep, float32, one sequence per batch; padding is left out.

    The adapter to Coterie: the one function here that knows its interface.
    """
    import torch
    from safetensors.torch import load_file

    from coterie.profiling.observe import LayerObservation
    from coterie.profiling.observers import Observer, Routing
    from coterie.streaming.checkpoint import Checkpoint
    from coterie.streaming.lockstep import Batch, sweep
    from coterie.streaming.model import StreamedModel

    found: dict[int, list[Any]] = {}

    class RoutingIds(Observer):
        """Writes down which experts each token was sent to."""

        fields: ClassVar[dict[str, str]] = {"ids_TK": "sum"}

        def __init__(self, shape: Any) -> None:
            super().__init__(shape)
            self.seen: list[torch.Tensor] = []

        def see_routing(self, routing: Routing) -> None:
            self.seen.append(routing.index_TK.clone())

        def state(self) -> dict[str, torch.Tensor]:
            return {"ids_TK": torch.cat(self.seen)}

    def announce(observation: LayerObservation, number: int, batch: Batch) -> None:
        observation.batch(batch)

    data = load_file(tokens)
    mask_BL = data["attention_mask"].bool()
    batches = [
        Batch(ids_L[None], None if bool(mask_L.all()) else mask_L[None])
        for ids_L, mask_L in zip(data["input_ids"], mask_BL, strict=True)
    ]
    with Checkpoint.open(model) as checkpoint:
        streamed = StreamedModel(checkpoint, compute_dtype="float32")
        for step in sweep(streamed, batches):
            if step.index not in streamed.moe:
                continue
            observation = LayerObservation(streamed.moe[step.index], [RoutingIds], domains=1)
            with observation:
                step.run(before=functools.partial(announce, observation))
            found[step.index] = [observation.result().stats["ids_TK"]]
    return found


def run_streamed(spec: dict[str, Any]) -> None:
    """Coterie."""
    import torch

    torch.set_num_threads(spec["threads"])
    _save(streamed_ids(spec["model"], spec["tokens"]), spec["output"])


ROLES = {"reference": run_reference, "peer": run_peer, "streamed": run_streamed}


# --------------------------------------------------------------------------------------------------- parent


def load_ids(file: Path) -> dict[int, Ids]:
    """Layer -> ids [T, K]."""
    from safetensors.numpy import load_file

    return {int(layer): ids for layer, ids in sorted(load_file(file).items(), key=lambda item: int(item[0]))}


def agreement(ours: Ids, reference: Ids, real: npt.NDArray[np.bool_], experts: int) -> dict[str, float]:
    """Compare ids [T, K] of the same tokens; `real` [T] marks tokens that are not padding.

    Ids are compared as sets: the order within a token carries no meaning. A contender may have left padding out or
    not; what it counted on padding is reported.
    """
    padding = 0
    if len(ours) == len(real):
        padding = int((~real).sum()) * ours.shape[1]
        ours = ours[real]
    reference = reference[real]
    if ours.shape != reference.shape:
        return {"tokens": len(ours), "expected": len(reference)}
    a, b = np.sort(ours, 1), np.sort(reference, 1)
    equal = sum(int((a[:, k : k + 1] == b).any(1).sum()) for k in range(a.shape[1]))
    counts = np.bincount(a.ravel(), minlength=experts) - np.bincount(b.ravel(), minlength=experts)
    return {
        "tokens": len(a),
        "same_tokens": float((a == b).all(1).mean()),
        "same_ids": equal / a.size,
        "moved_selections": int(np.abs(counts).sum() // 2),
        "selections": a.size,
        "selections_on_padding": padding,
    }


def worst(layers: dict[int, dict[str, float]]) -> float:
    """Smallest share of tokens routed as in the reference, over layers."""
    return min((layer.get("same_tokens", 0.0) for layer in layers.values()), default=0.0)


def padded_tokens(file: Path, seed: int) -> None:
    """Cut the sequences of a token file to different lengths, padded on the right with id 0."""
    from safetensors.numpy import load_file, save_file

    data = load_file(file)
    samples, length = data["input_ids"].shape
    lengths = np.random.Generator(np.random.PCG64([seed, 2])).integers(length // 4, length + 1, samples)
    mask = (np.arange(length)[None] < lengths[:, None]).astype(np.int64)
    save_file({"input_ids": data["input_ids"] * mask, "attention_mask": mask}, file)


def main(arguments: list[str]) -> int:
    """Run the benchmark; 1 if streamed routing is not resident routing."""
    if arguments and arguments[0].startswith("--as-"):
        ROLES[arguments[0][5:]](json.loads(arguments[1]))
        return 0
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common_options(parser)
    parser.add_argument("--model", type=Path, help="checkpoint folder (default: a random Qwen3-MoE, 4 layers x 32)")
    parser.add_argument("--samples", type=int, default=8, help="sequences (default 8)")
    parser.add_argument("--length", type=int, default=256, help="tokens per sequence (default 256)")
    parser.add_argument("--padded", action="store_true", help="sequences of different lengths")
    parser.add_argument("--no-peer", action="store_true", help="only the streamed side")
    options = parser.parse_args(arguments)

    facts = machine()
    print_machine(facts)
    here = Path(sys.executable)
    pythons = {"ours": here}
    if not options.no_peer:
        pythons["peer"] = ensure_venv("llmcompressor-0.14.0.1", LLMCOMPRESSOR_PINS, options.cache)
    names = ("coterie", "llmcompressor", "transformers", "torch")
    installed = {side: versions(python, names) for side, python in pythons.items()}
    for side, packages in installed.items():
        print(f"{side}:", ", ".join(f"{k} {v}" for k, v in packages.items()))

    with Workplace(options, "routing-fidelity") as work:
        model = options.model
        if model is None:
            model = work / "model"
            write_checkpoint(QUICK if options.quick else MEDIUM, model, seed=options.seed)
        config = json.loads((model / "config.json").read_text())
        experts = next(config[k] for k in ("num_experts", "num_local_experts", "n_routed_experts") if k in config)
        tokens = work / "tokens.safetensors"
        write_tokens(
            tokens,
            vocabulary=config["vocab_size"],
            samples=options.samples,
            length=options.length,
            seed=options.seed,
        )
        if options.padded:
            padded_tokens(tokens, options.seed)
        from safetensors.numpy import load_file

        real = load_file(tokens)["attention_mask"].astype(bool).ravel()
        print(f"job: {options.samples} x {options.length} tokens, {int(real.sum())} of them real, float32\n")

        failures: dict[str, str] = {}

        def collect(name: str, role: str, python: Path, **extra: Any) -> dict[int, Ids] | None:
            output = work / f"{name.replace(' ', '-')}.safetensors"
            spec = {"model": str(model), "tokens": str(tokens), "output": str(output), "threads": options.threads}
            spec.update(extra)
            command: list[str | Path] = [python, __file__, f"--as-{role}", json.dumps(spec)]
            log = work / f"{name.replace(' ', '-')}.log"
            run = measure(command, log=log, environment=thread_environment(options.threads))
            if run.returncode or not output.exists():
                failures[name] = tail(log)
                print(f"{name} failed ({run.returncode}):\n{failures[name]}\n")
                return None
            return load_ids(output)

        references = {name: collect(name, "reference", here, attention=name) for name in REFERENCES}
        causal = references["causal"]
        if causal is None:
            raise SystemExit("without the reference there is nothing to compare with")
        contenders: dict[str, dict[int, Ids] | None] = {"coterie streamed": collect("streamed", "streamed", here)}
        if not options.no_peer:
            plain = f"plain {installed['peer']['transformers']}"
            contenders[plain] = collect("reference-peer", "reference", pythons["peer"], attention="causal")
            for name, settings in PEER_PIPELINES.items():
                contenders[name] = collect(name, "peer", pythons["peer"], settings=settings)

        results: dict[str, dict[str, dict[int, dict[str, float]]]] = {}
        for name, found in {**contenders, "bidirectional reference": references["bidirectional"]}.items():
            if found is None:
                continue
            results[name] = {}
            for against in REFERENCES:
                reference = references[against]
                if reference is not None:
                    results[name][against] = {
                        layer: agreement(found[layer], reference[layer], real, experts) if layer in found else {}
                        for layer in reference
                    }
        for against in REFERENCES:
            print(f"against plain transformers {installed['ours']['transformers']}, {against} attention")
            print(
                table(
                    ("contender", "layer", "tokens", "all ids same %", "ids same %", "selections moved", "on padding"),
                    [
                        (
                            name,
                            layer,
                            f"{found.get('tokens', 0):.0f}",
                            *(f"{100 * found[k]:.2f}" if k in found else "-" for k in ("same_tokens", "same_ids")),
                            f"{found['moved_selections']} of {found['selections']}" if "selections" in found else "-",
                            f"{found.get('selections_on_padding', 0):.0f}",
                        )
                        for name, several in results.items()
                        for layer, found in several.get(against, {}).items()
                    ],
                )
            )
            print()
        streamed = results.get("coterie streamed", {}).get("causal", {})
        exact = bool(streamed) and worst(streamed) == 1.0
        for name, several in results.items():
            if name == "bidirectional reference" or "bidirectional" not in several:
                continue
            to_causal, to_bidirectional = worst(several["causal"]), worst(several["bidirectional"])
            nearer = "causal" if to_causal >= to_bidirectional else "bidirectional"
            print(
                f"{name}: in its worst layer {100 * to_causal:.2f} % of tokens are routed as with the causal mask, "
                f"{100 * to_bidirectional:.2f} % as without: nearer to {nearer}"
            )
        print(f"streamed routing equals resident routing token by token: {'yes' if exact else 'NO'}")
        finish(
            {
                "benchmark": "routing_fidelity",
                "quick": options.quick,
                "machine": facts,
                "versions": installed,
                "pins": LLMCOMPRESSOR_PINS,
                "config": config,
                "job": {"samples": options.samples, "length": options.length, "padded": options.padded},
                "results": results,
                "failures": failures,
                "exact": exact,
            },
            options.json,
        )
    return 0 if exact else 1


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
