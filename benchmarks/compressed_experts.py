"""What compressed experts save: one MoE layer with all of its choices, with half, and with half and the vectors.

Layers have the shapes of Phi-MoE (16 experts, top-2), OLMoE (64, top-8) and Mixtral-8x7B (8, top-2), by default with
both hidden and intermediate size halved so that they fit beside other work; weights are random float32. The three
contenders are the same layer with the same router, run in turn within every round, so that they share whatever else the
machine does. Figures are medians over rounds; ratios are of CPU seconds, which other work stretches less than wall
seconds (with one thread on an idle machine they are the same). prefill is 8 sequences of 32 tokens (as in the paper),
decode 8 of one. Experts run one after the other, as everywhere in Coterie; `arithmetic` is the ratio if only matrix
products of experts counted. Active parameters are those of the whole published models, computed from their shapes: the
rest of the model (attention, embeddings, routers) is a constant of each row.

    python benchmarks/compressed_experts.py [--scale 0.5] [--rounds 30] [--threads 1] [--quick]
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch

# H hidden, I expert intermediate, E experts, K experts per token


@dataclass(frozen=True)
class Shape:
    """One model. rest : parameters outside of routed experts that every token uses; layers : MoE layers."""

    name: str
    config: str
    hidden: int
    intermediate: int
    experts: int
    top_k: int
    layers: int
    rest: float

    def active(self, running: int, vectors: int = 0) -> float:
        """Parameters one token uses: `running` experts, and the vectors of `vectors` others, in every layer."""
        expert = 3 * self.hidden * self.intermediate
        vector = 2 * self.hidden + self.intermediate
        return self.rest + self.layers * (running * expert + vectors * vector)


SHAPES = (
    Shape("Phi-MoE", "PhimoeConfig", 4096, 6400, 16, 2, 32, 2.42e9),
    Shape("OLMoE", "OlmoeConfig", 2048, 1024, 64, 8, 16, 0.475e9),
    Shape("Mixtral-8x7B", "MixtralConfig", 4096, 14336, 8, 2, 32, 1.61e9),
)
PASSES = (("prefill 8 x 32", 8, 32), ("decode 8 x 1", 8, 1))


def layer_of(shape: Shape, scale: float) -> Any:
    """A random float32 MoE layer of this shape, sizes times `scale`, that draws no memory for anything else."""
    import transformers

    from coterie.anatomy import moe_layers
    from coterie.experts.forward import NAME

    sizes = {
        "hidden_size": int(shape.hidden * scale),
        "intermediate_size": int(shape.intermediate * scale),
        "num_experts_per_tok": shape.top_k,
        "num_experts" if shape.name == "OLMoE" else "num_local_experts": shape.experts,
    }
    other = {"vocab_size": 64, "num_hidden_layers": 1, "num_attention_heads": 8, "num_key_value_heads": 4}
    config = getattr(transformers, shape.config)(**sizes, **other, pad_token_id=0, bos_token_id=0, eos_token_id=0)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.set_experts_implementation(NAME)
    (layer,) = moe_layers(model)
    layer.block.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    for parameter in layer.block.parameters():
        parameter.requires_grad_(False).normal_(0, 0.02, generator=generator)
    layer.block.eval()
    return layer


def contenders(layer: Any) -> dict[str, Callable[[torch.Tensor], object]]:
    """The layer as it is, with half of its choices, and with half and the vectors: one set of weights."""
    from functools import partial

    from coterie.compression.methods import get_method
    from coterie.experts.compressed import convert
    from coterie.experts.forward import rerouted

    slot = get_method("compressed-experts").slot(layer)
    convert(layer.experts, layer.top_k)
    layer.experts.theta.normal_(1, 0.1, generator=torch.Generator().manual_seed(1))

    def run(main: int, reduced: bool, x: torch.Tensor) -> None:
        layer.experts.main_experts = main
        with ExitStack() as stack:
            if reduced:
                stack.enter_context(rerouted(layer.experts, slot))
            layer.block(x)

    half = layer.top_k // 2
    return {
        "full": partial(run, layer.top_k, False),
        "half": partial(run, layer.top_k, True),
        "half + vectors": partial(run, half, False),
    }


def medians(
    runs: dict[str, Callable[[torch.Tensor], object]], x: torch.Tensor, rounds: int
) -> dict[str, tuple[float, float]]:
    """Median (CPU, wall) seconds of each, one call of each per round."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for number in range(rounds + 3):
        for name, run in runs.items():
            began = time.process_time(), time.perf_counter()
            run(x)
            if number >= 3:  # the first are warm-ups
                times[name].append((time.process_time() - began[0], time.perf_counter() - began[1]))
    return {
        name: (statistics.median(cpu for cpu, _ in values), statistics.median(wall for _, wall in values))
        for name, values in times.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=float, default=0.5, help="of hidden and intermediate size; 1 needs 6 GB")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="test the script, measure nothing")
    given = parser.parse_args()
    scale, rounds = (0.0625, 2) if given.quick else (given.scale, given.rounds)
    torch.set_num_threads(given.threads)
    print(f"torch {torch.__version__}, {given.threads} threads, load {os.getloadavg()[0]:.1f}, scale {scale:g}")
    head = ("layer", "pass", "contender", "CPU ms", "wall ms", "of full", "of half", "arithmetic")
    form = "{:<13} {:<15} {:<15} {:>9} {:>9} {:>8} {:>8} {:>11}"
    print(form.format(*head))
    with torch.no_grad():
        for shape in SHAPES:
            layer = layer_of(shape, scale)
            runs = contenders(layer)
            for told, rows, length in PASSES:
                width = int(shape.hidden * scale)
                x = torch.randn(rows, length, width, generator=torch.Generator().manual_seed(2))
                found = medians(runs, x, rounds)
                for name, (cpu, wall) in found.items():
                    ratios = [cpu / found["full"][0], cpu / found["half"][0]]
                    ratios.append(1.0 if name == "full" else (shape.top_k // 2) / shape.top_k)
                    figures = [f"{cpu * 1e3:.2f}", f"{wall * 1e3:.2f}", *(f"{ratio:.2f}" for ratio in ratios)]
                    print(form.format(shape.name, told, name, *figures), flush=True)
            del layer, runs
    print(f"\n{'model':<13} {'active, all':>12} {'half':>8} {'half + vectors':>15} {'less':>7}")
    for shape in SHAPES:
        half = shape.top_k // 2
        full, plain, vectors = shape.active(shape.top_k), shape.active(half), shape.active(half, shape.top_k - half)
        told = f"{full / 1e9:10.3f} B {plain / 1e9:6.3f} B {vectors / 1e9:13.3f} B"
        print(f"{shape.name:<13} {told} {1 - vectors / full:7.1%}")


if __name__ == "__main__":
    main()
