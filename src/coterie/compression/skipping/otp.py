"""OTP: learn, token by token, how many of the experts that the router picked have to run (arXiv:2510.10962).

Online Top-any Pruning is the part of MC# that runs after quantization; it works on any checkpoint. In every MoE layer a
small mask router chooses one of the masks c_1 .. c_k over a token's k experts in falling order of weight, c_r keeping
the strongest r, and is trained by Gumbel-softmax while everything else is frozen:

    m = sum_r y_r c_r,   y = softmax((log pi(x, w) + g) / tau),   tau falling from tau_start to tau_end
    L = KL(model with all k experts || model with masks) + lambda mean(|m|_1 / k)
    or, where a share rho of the activations is asked for,  KL + mu (mean(|m|_1 / k) - rho)^2

The mean is over layers and real tokens. A large mu holds the share more closely, but what a batch's share differs by
then drowns the KL. In use the likeliest mask is taken, without noise, and what it leaves out is not run. The forward
pass is in `experts.masks`, the training in `training.skipping`.

The paper's own text and code could not be read: the set of masks, the router's shape and all numbers are ours. The KL
is over the teacher's 64 likeliest tokens and one bucket for all others; there is no loss on hidden states.
"""

# K experts per token

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field, model_validator
from torch import Tensor

from coterie.anatomy import MoELayer
from coterie.anatomy.forms import MaskForm, empty_mask_router
from coterie.compression.methods import OwnJob, method
from coterie.errors import CheckpointError, ModelError
from coterie.experts.masks import NAME, Candidates, mask_router


@method("otp", kind="skipping", paper="arXiv:2510.10962")
class Otp(OwnJob):
    """Let every token run only the experts a small trained router finds it needs."""

    how_much: ClassVar[str] = "how much runs is a parameter, e.g. --set ratio=0.8"
    on_the_fly: ClassVar[str] = "it trains"

    ratio: float | None = Field(
        None, gt=0, le=1, description="Share of expert activations to aim at; by default lambda decides."
    )
    lam: float = Field(0.05, ge=0, description="Lambda: weight of the share of activations, without ratio.")
    hold: float = Field(2.0, gt=0, description="Mu: weight of the squared distance to ratio.")
    inner: int = Field(32, ge=1, description="Width of the mask routers' first layer.")
    candidates: Candidates = Field(
        "nested", description="Masks to choose from: nested (the strongest 1 to k), or subsets with the strongest."
    )
    renormalise: bool | None = Field(
        None,
        description="Do experts that run take over the weight of the skipped? By default as the model's router: yes"
        " where the weights of every token have the same sum.",
    )
    steps: int = Field(300, ge=1, description="Training steps.")
    rate: float = Field(1e-2, gt=0, description="Highest learning rate.")
    batch_size: int = Field(8, ge=1, description="Sequences per step.")
    tau_start: float = Field(2.0, gt=0, description="Temperature of the masks at the first step.")
    tau_end: float = Field(0.1, gt=0, description="Temperature of the masks at the last step.")
    straight_through: bool = Field(False, description="Train with hard masks, and the gradients of soft ones.")
    keep_all: float = Field(0.9, gt=0, lt=1, description="Probability of keeping all experts, before training.")
    temperature: float = Field(1.0, gt=0, description="Of the distillation.")

    @model_validator(mode="after")
    def _it_cools(self) -> Otp:
        if self.tau_end > self.tau_start:
            raise ValueError(f"tau_end {self.tau_end:g} is above tau_start {self.tau_start:g}")
        return self

    def tau(self, step: int) -> float:
        """The temperature at a step, counted from 0: it falls by the same factor each step."""
        return float(self.tau_start * (self.tau_end / self.tau_start) ** (step / max(self.steps - 1, 1)))

    def check_model(self, moe: Mapping[int, MoELayer]) -> None:
        for index, layer in moe.items():
            if mask_router(layer.experts) is not None:
                raise ModelError(
                    f"layer {index} has a mask router already", "Start from the checkpoint it was made from."
                )
            try:
                empty_mask_router(layer, self.form)
            except CheckpointError as error:
                raise ModelError(error.message, error.hint) from error

    @property
    def form(self) -> MaskForm:
        return MaskForm(inner=self.inner, candidates=self.candidates, renormalise=bool(self.renormalise))

    def reform(self, moe: MoELayer) -> dict[str, Any]:
        return {"skip": self.form.model_dump()}

    def added(self, moe: MoELayer) -> dict[str, Tensor]:
        """Room for the mask router; its values are what training finds."""
        return {f"{NAME}.{name}": tensor for name, tensor in empty_mask_router(moe, self.form).state_dict().items()}

    def notes(self) -> list[str]:
        return ["how many experts run depends on the text: `coterie evaluate` tells it for yours"]
