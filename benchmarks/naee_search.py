"""How long NAEE's search takes for one layer: exact over 8 experts, greedy over 64 and 128.

One random Qwen3-MoE layer with experts in bfloat16 is given random inputs, as if a sweep had passed them, and searched.
Timed are the three parts of the search: every expert on every token (with the inner products of their outputs), the
trials, and the same trials without the shortcut that runs only the tokens which used an expert. The forward passes that
bring the inputs to a layer are not in it. Seconds are CPU seconds, which other work on the machine stretches little;
with one thread on an idle machine they are wall seconds. Each line is a process of its own; `peak MB` is what the
search adds to the memory of the process that holds the layer and its inputs.

    python benchmarks/naee_search.py [--tokens 4096] [--hidden 2048] [--width 768] [--threads 1] [--no-slow]
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import resource
import time

import torch

CASES = ((8, 2, "exact"), (64, 8, "greedy"), (128, 8, "greedy"))  # experts, per token, search


def layer_of(experts: int, top_k: int, hidden: int, width: int):  # type: ignore[no-untyped-def]
    """A random MoE layer that keeps its experts in bfloat16."""
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    from coterie.anatomy import moe_layers
    from coterie.experts.forward import NAME

    config = Qwen3MoeConfig(
        vocab_size=64,
        hidden_size=hidden,
        num_hidden_layers=1,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        moe_intermediate_size=width,
        num_experts=experts,
        num_experts_per_tok=top_k,
        norm_topk_prob=True,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.set_experts_implementation(NAME)
    (layer,) = moe_layers(model)
    generator = torch.Generator().manual_seed(0)
    layer.block.to_empty(device="cpu")
    for name, parameter in layer.block.named_parameters():
        flat = parameter.data.view(-1, parameter.shape[-1])
        for row in range(0, len(flat), 4096):
            part = flat[row : row + 4096]
            part.copy_(torch.randn(part.shape, generator=generator) * 0.02)
        parameter.requires_grad_(False)
        if "experts" not in name:
            parameter.data = parameter.data.float()
    return layer.block.eval() and layer


def measure(experts: int, top_k: int, search: str, given: argparse.Namespace, pipe) -> None:  # type: ignore[no-untyped-def]
    """Seconds of each part, in a process of its own."""
    from coterie.experts.forward import observe
    from coterie.profiling import reconstruction
    from coterie.profiling.reconstruction import Replay, _Arrived, _Door

    torch.set_num_threads(given.threads)
    layer = layer_of(experts, top_k, given.hidden, given.width)
    x_TH = torch.randn(given.tokens, given.hidden, generator=torch.Generator().manual_seed(1))
    batch_T = torch.arange(given.tokens) // 512
    door = _Door()
    with torch.no_grad():
        try:
            with observe(layer.experts, door):
                layer.block(x_TH[None])
        except _Arrived:
            pass
        assert door.seen is not None
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        began = time.process_time()
        replay = Replay(layer, batch_T, door.seen[1], door.seen[2], x_TH)
        outputs = time.process_time() - began
        began = time.process_time()
        if search == "exact":
            trials = len(replay.exact(experts // 2))
            fast, slow = time.process_time() - began, None
        else:
            order, _ = replay.greedy()
            fast, slow, trials = time.process_time() - began, None, (experts + top_k + 1) * (experts - top_k) // 2
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            if given.slow:
                reconstruction._agree = lambda *routes: False
                began = time.process_time()
                again, _ = replay.greedy()
                slow = time.process_time() - began
                assert torch.equal(order, again)
        if search == "exact":
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    pipe.send((outputs, trials, fast, slow, (peak - before) * 1024))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--slow", action=argparse.BooleanOptionalAction, default=True, help="Also without the shortcut."
    )
    given = parser.parse_args()
    sizes = f"{given.tokens} tokens, H {given.hidden}, I {given.width}, {given.threads} threads"
    print(f"torch {torch.__version__}, {sizes}, load {os.getloadavg()[0]:.1f}")
    head = ("experts", "search", "trials", "outputs s", "trials s", "all tokens s", "peak MB")
    print("{:>8} {:>7} {:>7} {:>10} {:>9} {:>13} {:>8}".format(*head))
    context = multiprocessing.get_context("spawn")
    for experts, top_k, search in CASES:
        ours, theirs = context.Pipe()
        child = context.Process(target=measure, args=(experts, top_k, search, given, theirs))
        child.start()
        outputs, trials, fast, slow, added = ours.recv()
        child.join()
        without = "" if slow is None else f"{slow:.1f}"
        line = f"{experts:8d} {search:>7} {trials:7d} {outputs:10.1f} {fast:9.1f} {without:>13} {added / 1e6:8.0f}"
        print(line, flush=True)


if __name__ == "__main__":
    main()
