"""How far an MoE block turns its tokens, measured or foretold by a small network (QuantMoE-Bench, arXiv:2406.08155).

    cos(x, y)   x : what the block receives, y : what it puts out (ffn), or both with the residual stream (residual)

A block that hardly turns its tokens matters little. The paper trains a network per block to foretell the cosine from x,

    p(x) = tanh(W_2 relu(W_1 x)),  W_1 [1024, H], W_2 [1, 1024], AdamW 1e-4, at most 100 epochs, MSE

stopped early on a tenth of the tokens, and takes the mean of what it foretells. Both means are recorded, the loss of
the network beside that of foretelling the mean. Tokens are a uniform sample; the paper keeps whole windows, which for
large models are terabytes.
"""

# T tokens, H hidden

from __future__ import annotations

import functools
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from coterie.anatomy import MoELayer
from coterie.profiling.observers import LayerShape, Observer, Routing
from coterie.profiling.sample import TokenSample

Side = Literal["ffn", "residual"]
WIDTH, EPOCHS, PATIENCE, BATCH = 1024, 100, 5, 1024


def turning_name(side: Side, tokens: int) -> str:
    """Where `turning` puts its figures."""
    return f"turning_{side}_t{tokens}_F"


class Predictor(nn.Module):
    """Foretells the cosine of a token from what the block receives: [T, H] -> [T]."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(hidden, WIDTH, bias=False), nn.Linear(WIDTH, 1, bias=False)

    def forward(self, x_TH: Tensor) -> Tensor:
        return torch.tanh(self.second(F.relu(self.first(x_TH)))).squeeze(-1)


@torch.enable_grad()
def trained(x_TH: Tensor, cosine_T: Tensor, seed: int = 0) -> tuple[Predictor, float, float]:
    """A predictor, its validation loss, and the loss of foretelling the mean. A tenth of the tokens validates."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = Predictor(x_TH.shape[1]).to(x_TH.device)
        order_T = torch.randperm(len(x_TH))
        held = max(len(x_TH) // 10, 1)
        known_T, held_T = order_T[held:], order_T[:held]
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, weight_decay=1e-2)
        best, best_state, waited = float("inf"), {k: v.clone() for k, v in network.state_dict().items()}, 0
        for _ in range(EPOCHS):
            for chosen_T in torch.split(known_T[torch.randperm(len(known_T))], BATCH):
                optimizer.zero_grad()
                F.mse_loss(network(x_TH[chosen_T]), cosine_T[chosen_T]).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
            with torch.no_grad():
                loss = float(F.mse_loss(network(x_TH[held_T]), cosine_T[held_T]))
            if loss < best:
                best, best_state, waited = loss, {k: v.clone() for k, v in network.state_dict().items()}, 0
            else:
                waited += 1
                if waited == PATIENCE:
                    break
        network.load_state_dict(best_state)
    plain = float((cosine_T[held_T] - cosine_T[known_T].mean()).square().mean())
    return network, best, plain


@functools.cache
def turning(side: Side = "ffn", tokens: int = 20000) -> type[Observer]:
    """An observer of mean cosines of a block: turning_<side>_t<tokens>_F, float64.

    Its figures: mean measured over all tokens, mean foretold over a sample of `tokens`, loss of the network, loss of
    foretelling the mean. Memory: 4 H bytes a token of the sample.
    """
    name = turning_name(side, tokens)

    class Turning(Observer):
        fields = {name: "none"}
        watches_block = True
        needs_residual = side == "residual"

        def __init__(self, shape: LayerShape) -> None:
            super().__init__(shape)
            self._sample = TokenSample(tokens)
            self._sum, self._count = 0.0, 0
            self._figures = torch.zeros(4, dtype=torch.float64)

        def see_block(self, routing: Routing, block_TH: Tensor) -> None:
            x_TH, y_TH = routing.x_TH, block_TH
            if side == "residual":
                assert routing.residual_TH is not None
                x_TH, y_TH = routing.residual_TH, routing.residual_TH + self.shape.residual_multiplier * block_TH
            cosine_T = F.cosine_similarity(x_TH.float(), y_TH.float(), dim=-1)
            self._sum += float(cosine_T.double().sum())
            self._count += len(cosine_T)
            self._sample.add(x_TH.float(), cosine_T)

        def see_layer(self, layer: MoELayer) -> None:
            if self._count:
                x_TH, cosine_T = self._sample.take()
                network, loss, plain = trained(x_TH, cosine_T)
                with torch.no_grad():
                    foretold = float(network(x_TH).double().mean())
                self._figures = torch.tensor([self._sum / self._count, foretold, loss, plain], dtype=torch.float64)

        def state(self) -> dict[str, Tensor]:
            return {name: self._figures}

    return Turning
