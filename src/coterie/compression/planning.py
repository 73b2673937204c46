"""Plans from profiles: a pure function of profile, budget and parameters, and the checks that a plan or profile fits.

Nothing is read or written here but headers.
"""

from __future__ import annotations

from collections.abc import Mapping

from coterie.anatomy import check_keep
from coterie.compression.methods import Method, OwnJob, Pick, get_method
from coterie.compression.plan import LayerPlan, Plan
from coterie.compression.selector import Budget, check_protect, counts_for
from coterie.compression.sizes import Size, measure
from coterie.errors import UsageError
from coterie.experts.compressed import is_compressed
from coterie.experts.packed import packed_modules
from coterie.profiling.profile import LayerProfile, Profile
from coterie.streaming.model import StreamedModel


def plan_layers(
    streamed: StreamedModel,
    method: Method,
    budget: Budget,
    layers: Mapping[int, LayerProfile],
    counts: Mapping[int, int] | None,
) -> dict[int, LayerPlan]:
    """A pure function of profile, budget and parameters: the plan of every MoE layer.

    counts : experts each layer keeps; None where the budget, or the method, spreads them over the layers.
    A method that looks at no data is given empty profiles.
    """
    empty = {i: LayerProfile(i, moe.name, moe.num_experts, moe.top_k, 0, moe.groups) for i, moe in streamed.moe.items()}
    profiles = {i: layers.get(i, empty[i]) for i in streamed.moe}
    if counts is None:
        picked = method.pick_all(profiles, streamed.moe, budget)
    else:
        picked = {i: method.pick(profiles[i], moe, counts[i], budget) for i, moe in streamed.moe.items()}
    return {i: layer_plan_of(method, profiles[i], picked[i]) for i in streamed.moe}


def make_plan(streamed: StreamedModel, model: str, name: str, method: Method, budget: Budget, profile: Profile) -> Plan:
    """The plan of one method on a finished profile. Raises UsageError if the profile is of another model or lacks
    what the method reads."""
    digest = streamed.checkpoint.digest()
    check_profile(profile, streamed, digest)
    check_protect(budget, streamed.moe)
    check_editable(streamed, method)
    counts = known_counts(streamed, method, budget, measure(streamed))
    profile.require(method.observes_for(counts))
    layers = plan_layers(streamed, method, budget, profile.layers, counts)
    return Plan(
        model=model,
        model_digest=digest,
        method=name,
        parameters=method.model_dump(mode="json"),
        budget=budget.describe(),
        data_digest=profile.data_digest,
        layers=[layers[index] for index in sorted(layers)],
    )


def known_counts(streamed: StreamedModel, method: Method, budget: Budget, size: Size) -> dict[int, int] | None:
    """Experts each layer will keep, where that is known before anything was measured; checks the budget either way."""
    if method.keeps_all and not isinstance(method, OwnJob) and budget != Budget(keep=1.0):
        raise UsageError("this method removes no expert: a budget of experts would be ignored", "Leave it out.")
    if budget.scope == "global" or method.allocates:
        method.check_spread(streamed.moe, budget)
        return None
    return counts_for(budget, streamed.moe, size.bytes_of_expert, size.other_bytes, cut=method.cuts)


def check_editable(streamed: StreamedModel, method: Method) -> None:
    """Raise UsageError if `method` cannot work on this model: it changes matrices of experts that are stored as
    factors, or anything of experts that vectors stand in for; or for reasons of its own. Raise ModelError if it would
    store experts in a form that a packed checkpoint has no room for."""
    compressed = [index for index, layer in streamed.moe.items() if is_compressed(layer.experts)]
    if compressed:
        raise UsageError(
            f"the experts of layer {compressed[0]} are compressed experts: their vectors stand in for experts as they"
            " are",
            "Remove, merge or edit experts first; compressed-experts comes last.",
        )
    quantized = next(packed_modules(streamed.model), None)
    if quantized is not None:
        raise UsageError(
            f"{quantized[0]} is quantized, and its codes cannot be edited",
            "Remove, merge or heal first, from the checkpoint it was made from; quantize last.",
        )
    method.check_model(streamed.moe)
    if any(method.ranks(layer) for layer in streamed.moe.values()):
        streamed.refuse_packed("low-rank factors of its experts would not be")
    factored = [index for index, layer in streamed.moe.items() if layer.bank.factored]
    edits = method.rebuilds or isinstance(method, OwnJob)
    if factored and (edits or any(method.ranks(layer) for layer in streamed.moe.values())):
        raise UsageError(
            f"the experts of layer {factored[0]} are stored as low-rank factors, and this method edits matrices",
            "Apply it before the experts are factored.",
        )


def plan_method(plan: Plan) -> Method:
    """The method a plan was made with."""
    return get_method(plan.method, plan.parameters)


def check_profile(profile: Profile, streamed: StreamedModel, digest: str) -> None:
    if profile.model_digest != digest or set(profile.layers) != set(streamed.moe):
        raise UsageError(
            f"the profile was made of another model ({profile.model})", "Profile this checkpoint: `coterie profile`."
        )


def check_plan(plan: Plan, streamed: StreamedModel, digest: str) -> None:
    if plan.model_digest != digest:
        raise UsageError(f"the plan was made for another model ({plan.model})", "Plan this checkpoint: `coterie plan`.")
    if sorted(layer.index for layer in plan.layers) != sorted(streamed.moe):
        raise UsageError("the plan does not name every MoE layer of the model exactly once")
    for layer in plan.layers:
        E = streamed.moe[layer.index].num_experts
        if layer.experts != E or len(layer.scores) not in (0, E):
            raise UsageError(
                f"the plan speaks of {layer.experts} experts and {len(layer.scores)} scores in layer {layer.index},"
                f" which has {E} experts",
                "Change only what stays (`keep`) in a plan.",
            )
        method = plan_method(plan)
        if method.redirects:
            method.expert_map(layer)  # says itself what does not fit
        else:
            check_keep(streamed.moe[layer.index], layer.keep)


def layer_plan_of(method: Method, layer: LayerProfile, picked: Pick) -> LayerPlan:
    plan = LayerPlan(
        index=layer.index,
        name=layer.name,
        experts=layer.experts,
        keep=picked.keep,
        scores=[round(float(s), 9) for s in picked.scores_E],
        extra=dict(picked.extra),
    )
    method.prepare(layer, plan)
    return plan
