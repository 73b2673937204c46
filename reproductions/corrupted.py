"""What reproductions of robustness share: held-out text with some words swapped for one that means nothing, and noise
on what routers see. Neither is ever trained on.
"""

# B batch, L sequence, T tokens that are no padding

from __future__ import annotations

import statistics
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any


@dataclass
class Swaps:
    """Some windows. clean_BL, ids_BL : before and after. same_BL : tokens that were not swapped, padding apart.
    mask_BL : which are no padding."""

    clean_BL: Any
    ids_BL: Any
    same_BL: Any
    mask_BL: Any

    def given(self, *, clean: bool) -> dict[str, Any]:
        """What a model takes."""
        return {"input_ids": self.clean_BL if clean else self.ids_BL, "attention_mask": self.mask_BL.long()}


def swapped(text: Any, share: float = 0.02, *, draws: int = 2, seed: int = 0) -> list[Swaps]:
    """The held-out windows, `draws` times over, each time with another `share` of their tokens replaced by the one that
    "AAA" begins with."""
    import torch

    from coterie.text import load_tokenizer

    token = load_tokenizer(text.tokenizer)("AAA", add_special_tokens=False)["input_ids"][0]
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(draws):
        for data in text.tests.values():
            for batch in data.batches:
                ids_BL = batch.ids_BL
                mask_BL = torch.ones_like(ids_BL, dtype=torch.bool) if batch.mask_BL is None else batch.mask_BL
                swap_BL = (torch.rand(ids_BL.shape, generator=generator) < share) & mask_BL
                found.append(Swaps(ids_BL, ids_BL.masked_fill(swap_BL, token), mask_BL & ~swap_BL, mask_BL))
    return found


def loss(model: Any, windows: list[Swaps], *, clean: bool) -> float:
    """Mean over the tokens that were not swapped, of text before (`clean`) or after the swaps."""
    import torch

    total, count = 0.0, 0
    with torch.no_grad():
        for some in windows:
            logits_BLV = model(**some.given(clean=clean), use_cache=False).logits
            counted_BL = some.same_BL[:, 1:]
            total += float(
                torch.nn.functional.cross_entropy(
                    logits_BLV[:, :-1][counted_BL].float(), some.clean_BL[:, 1:][counted_BL], reduction="sum"
                )
            )
            count += int(counted_BL.sum())
    return total / count


@contextmanager
def noise(model: Any, size: float = 0.1, *, seed: int = 0) -> Iterator[None]:
    """Routers, and only they, see their tokens with Gaussian noise, `size` times each token's root mean square."""
    import torch

    from coterie.anatomy import any_moe_layers

    generator = torch.Generator().manual_seed(seed)

    def add(module: Any, args: Any) -> Any:
        x, *more = args
        drawn = torch.randn(x.shape, generator=generator).to(x)
        return (x + size * x.square().mean(-1, keepdim=True).sqrt() * drawn, *more)

    with ExitStack() as stack:
        for layer in any_moe_layers(model):
            stack.callback(layer.router.register_forward_pre_hook(add).remove)
        yield


def routes(model: Any, windows: list[Swaps], *, clean: bool) -> dict[int, Any]:
    """Where the tokens go that were not swapped: {layer: Routing}."""
    import torch

    from coterie.analysis.routing import routed

    same_T = torch.cat([some.same_BL[some.mask_BL] for some in windows])
    seen = routed(model, [some.given(clean=clean) for some in windows])
    return {layer: replace(routing, mask_T=same_T) for layer, routing in seen.items()}


def flips(before: dict[int, Any], after: dict[int, Any]) -> float:
    """Share of tokens whose first expert is another one, mean over layers."""
    from coterie.analysis.routing import fluctuation

    return statistics.fmean(fluctuation(before[layer], after[layer]).first for layer in before)
