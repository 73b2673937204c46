"""What a method that quantizes is: it gives bits to experts and linear layers; how they are rounded is a parameter.

The engine (`compression.quantize`) measures what a method asks for, carries its allocation out and writes; it is not
known here. Routers, gates with a single output, norms, embeddings and the head always stay as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

from pydantic import Field
from torch import Tensor

from coterie.compression.bits import Allocation, Grids, Role, Widths, all_linears, shapes_of
from coterie.compression.methods import OwnJob, Pick
from coterie.compression.quantizers import Report, Spec, quantize
from coterie.errors import UsageError
from coterie.experts.nested import NestedCodes
from coterie.experts.packing import Coded
from coterie.profiling.profile import LayerProfile
from coterie.streaming.model import StreamedModel

Bits = Literal[1, 2, 3, 4, 5, 6, 7, 8, 16]


class Quantizer(OwnJob):
    """Base of all methods that store weights in few bits."""

    how_much: ClassVar[str] = "how many bits is a parameter, e.g. --set bits=4"
    without_text: ClassVar[str] = "Name some with --data, or round without text: --set quantizer=hqq."
    on_the_fly: ClassVar[str] = "it rounds layer after layer on its own text"
    takes: ClassVar[frozenset[str]] = frozenset({"protect", "profile", "plan", "target_size"})
    others: ClassVar[int | None] = None  # bits of linear layers unless said; None: those of `bits`

    attention_bits: Bits | None = Field(None, description="Bits of attention's linear layers; 16 leaves them.")
    shared_bits: Bits | None = Field(None, description="Bits of shared experts.")
    dense_bits: Bits | None = Field(None, description="Bits of feed-forward blocks without experts.")
    group_size: int = Field(128, ge=1, le=2**20, description="Neighbouring inputs that share a scale.")
    symmetric: bool = Field(False, description="Without zero points; what vLLM and transformers load packed.")
    quantizer: Literal["rtn", "hqq", "gptq"] = Field(
        "gptq", description="How weights are rounded: rtn to the nearest, hqq without text, gptq by inputs on text."
    )
    float_zero: bool = Field(
        True, description="Zero points that are no integers: costs nothing here, and helps at 2 and 3 bits."
    )
    search: bool = Field(
        False,
        description="Try 101 ranges for every group and take the best: much better at 2 bits, several times slower.",
    )
    narrowest: float = Field(0.3, gt=0, le=1, description="search: the narrowest range, as share of the plain one.")
    low_bit: Literal["gptq", "mc"] = Field(
        "gptq", description="gptq at 1 to 3 bits: whole, or as MC's code, where only blocks of 128 inputs make up."
    )
    damp: float = Field(0.01, ge=1e-6, le=1, description="gptq: added to the diagonal of H, as share of its mean.")
    least_share: float = Field(
        0.005, ge=0, le=1, description="gptq: an expert that sees a smaller share of the tokens is rounded to nearest."
    )
    least_tokens: int = Field(32, ge=1, description="gptq: and so is one that sees fewer tokens than this.")

    @property
    def needs_text(self) -> bool:
        """To round by inputs, or to allocate."""
        return self.quantizer == "gptq" or any(observer.needs_text for observer in self.observes())

    @property
    def grids(self) -> Grids:
        return Grids(group=self.group_size, symmetric=self.symmetric, quantizer=self.quantizer)

    def check(self) -> None:
        """Raise UsageError for parameters that do not go together."""
        if self.quantizer == "hqq" and self.symmetric:
            raise UsageError("hqq looks for zero points, which a symmetric grid does not have", "Choose gptq or rtn.")

    def round_linear(
        self,
        w_OI: Tensor,
        spec: Spec,
        grids: Grids,
        gram_II: Tensor | None,
        *,
        tokens: int,
        calibration_tokens: int,
    ) -> tuple[Coded | NestedCodes, list[Report]]:
        """Codes of one matrix, and what they cost, at each width they can be read at, the widest last.

        spec : its grid. gram_II : sum of x x^T over the `tokens` inputs it received, None where nothing is known.
        calibration_tokens : of the whole text.
        """
        options: dict[str, Any] = {}
        if grids.quantizer == "gptq":
            options = {
                "damp": self.damp,
                "compensate_inside": self.low_bit == "gptq" or spec.bits > 3,
                "fallback_share": self.least_share,
                "fallback_rows": self.least_tokens,
            }
        coded, told = quantize(
            w_OI,
            spec,
            quantizer=grids.quantizer,
            gram_II=gram_II,
            tokens=tokens,
            calibration_tokens=calibration_tokens,
            **options,
        )
        return coded, [told]

    def round_expert(self, *given: Any, **named: Any) -> tuple[Coded | NestedCodes, list[Report]]:
        """The same of one matrix of an expert."""
        return self.round_linear(*given, **named)

    def allocate(self, streamed: StreamedModel, layers: Mapping[int, LayerProfile]) -> Allocation:
        """Bits of every matrix. layers : the statistics of `observes`."""
        raise NotImplementedError

    def role_bits(self, role: Role) -> int:
        """Bits of the linear layers of one role."""
        said: int | None = getattr(self, f"{role}_bits")
        if said is not None:
            return said
        return self.others if self.others is not None else int(getattr(self, "bits", 16))

    def linears(self, streamed: StreamedModel) -> dict[str, int]:
        """{path: bits} of all linear layers by their role, those that stay left out."""
        return {n.name: bits for n in all_linears(streamed) if (bits := self.role_bits(n.role)) != 16}

    def fitted(self, streamed: StreamedModel, target: int) -> Self:
        """The same method with as many bits as the bytes of all tensors allow.

        Raises UsageError if the target cannot be met, or this method has nothing to turn.
        """
        raise UsageError(
            f"{type(self).__name__} has no bits to turn towards a size", "Use quantize, pmq or a quantmoe method."
        )

    def pick(self, *given: Any) -> Pick:
        raise UsageError(
            f"{type(self).__name__} stores experts in fewer bits and removes none",
            "Use it with `coterie compress MODEL OUT --method ...` or `coterie plan --method ...`.",
        )

    def pick_all(self, *given: Any) -> dict[int, Pick]:
        self.pick()
        raise AssertionError


def too_small(target: int, least: int, with_what: str) -> UsageError:
    """What to say where a size cannot be met."""
    return UsageError(
        f"{target / 1e6:.2f} MB cannot be met: {with_what} takes {least / 1e6:.2f} MB",
        "Raise --target-size, quantize attention too, or remove experts first.",
    )


def everywhere(streamed: StreamedModel, bits: int) -> dict[int, Widths]:
    """The same bits for every expert of every layer."""
    return {index: {p: [bits] * moe.bank.num_experts for p in shapes_of(moe)} for index, moe in streamed.moe.items()}
