"""How long STUN's expert stage takes to plan, by experts per layer, and how that grows.

Router rows are random points around centres, so that clusters exist; half of the experts go under one threshold for
all layers. Reading weights is not part of it.

    python benchmarks/stun_planning.py
    python benchmarks/stun_planning.py --experts 64 128 256 --layers 8
"""

from __future__ import annotations

import argparse
import json
import math
import time

import torch

from coterie.anatomy import MoELayer
from coterie.compression.pruning.stun import Stun
from coterie.compression.selector import Budget
from coterie.profiling.profile import LayerProfile

TOP_K = 8


class _Layer(MoELayer):
    """What planning reads of a layer, without a model."""

    def __init__(self, index: int, experts: int) -> None:
        module = torch.nn.Module()
        super().__init__(index, f"layers.{index}", module, "", module, "", module, module, TOP_K)
        self._experts = experts

    @property
    def num_experts(self) -> int:
        return self._experts


def layer_profile(index: int, experts: int, hidden: int) -> LayerProfile:
    generator = torch.Generator().manual_seed(index)
    centres = 2 * torch.randn(experts // 4, hidden, generator=generator)
    rows_EC = centres[torch.randint(0, experts // 4, (experts,), generator=generator)]
    rows_EC = rows_EC + torch.randn(experts, hidden, generator=generator)
    flat = torch.randn(experts, 64, generator=generator, dtype=torch.float64)
    stats = {"router_rows_EC": rows_EC, "expert_gram_EE": flat @ flat.T}
    return LayerProfile(index, f"layers.{index}", experts, TOP_K, 0, 1, stats)


def seconds(experts: int, layers: int, hidden: int, linkage: str) -> float:
    profiles = {i: layer_profile(i, experts, hidden) for i in range(layers)}
    moe = {i: _Layer(i, experts) for i in range(layers)}
    began = time.perf_counter()
    found = Stun(linkage=linkage).pick_all(profiles, moe, Budget(keep=0.5, scope="global"))  # type: ignore[arg-type]
    took = time.perf_counter() - began
    assert sum(len(pick.keep) for pick in found.values()) == round(0.5 * experts * layers)
    return took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, nargs="+", default=[128, 256, 512], help="experts per layer")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--whole", type=int, nargs=2, default=[58, 256], help="layers and experts of one whole model")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for linkage in ("code", "complete"):
        times = {E: seconds(E, given.layers, given.hidden, linkage) / given.layers for E in given.experts}
        first, last = min(times), max(times)
        growth = math.log(times[last] / times[first]) / math.log(last / first) if last > first else float("nan")
        layers, experts = given.whole
        whole = seconds(experts, layers, given.hidden, linkage)
        rows.append({"linkage": linkage, "seconds_per_layer": times, "growth": growth, "whole": whole})
        if not given.json:
            told = ", ".join(f"{E} experts {t:.3f} s" for E, t in times.items())
            print(f"{linkage} linkage, a layer: {told}; time grows as experts^{growth:.1f}")
            print(f"{linkage} linkage, {layers} layers of {experts} experts: {whole:.1f} s")
    if given.json:
        print(json.dumps({"layers": given.layers, "hidden": given.hidden, "whole": given.whole, "rows": rows}))


if __name__ == "__main__":
    main()
