"""DERN: the exact properties of the method, on tiny random experts of three layouts.

`qwen3` is the usual fused gated layout, `gpt-oss` is transposed, interleaved and has biases, `nemotron` has no gate.
"""

# E experts, R kept experts, P dropped experts, I neurons of one expert, H hidden, T tokens, N segments, C clusters

import copy
import functools
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import GptOssConfig, NemotronHConfig, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from coterie.anatomy import ExpertBank, moe_layers, select
from coterie.compression.merging.dern import Dern, mapped_routing, redistribution
from coterie.compression.merging.segments import (
    Segments,
    best_match,
    equalised_means,
    first_distinct,
    means_or_members,
    normalise_rows_,
    spherical_kmeans,
    strongest_gate_first,
)
from coterie.compression.methods import get_method
from coterie.compression.plan import LayerPlan
from coterie.errors import CheckpointError, ModelError, UsageError
from coterie.profiling.observers import GateMass, SelectionCount
from coterie.profiling.profile import LayerProfile

E, H, I = 6, 16, 12  # noqa: E741
KEEP, DROP = [0, 2, 3], [1, 4, 5]
IMPORTANCE = [0.3, 0.05, 0.2, 0.25, 0.15, 0.05]
FAMILIES = ["qwen3", "gpt-oss", "nemotron"]
families = pytest.mark.parametrize("family", FAMILIES)
seeds = st.integers(0, 10_000)


def experts(family: str, seed: int = 0, dtype: torch.dtype = torch.float32, related: float = 1.0) -> nn.Module:
    """A random experts module. All experts share a random base, scrambled in each; `related` is the base's size."""
    sizes = {"hidden_size": H, "moe_intermediate_size": I}
    if family == "qwen3":
        module = Qwen3MoeExperts(Qwen3MoeConfig(num_experts=E, **sizes))
    elif family == "gpt-oss":
        module = GptOssExperts(GptOssConfig(num_local_experts=E, hidden_size=H, intermediate_size=I))
    else:
        module = NemotronHExperts(NemotronHConfig(n_routed_experts=E, **sizes))
    random = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data.normal_(generator=random)
    bank = ExpertBank(module)
    base = Segments.of(bank.read(0)).map(lambda t: torch.randn(t.shape, generator=random))
    for expert in range(E):
        order = torch.randperm(I, generator=random)
        mixed = Segments.of(bank.read(expert)).map(lambda own, base, o=order: own + related * base[o], base)
        bank.write(expert, mixed.into(bank.read(expert)))
    return module.to(dtype).requires_grad_(False)


def outputs(module: nn.Module) -> Tensor:
    """What each expert makes of the same tokens. Shape [E, T, H]."""
    dtype = next(module.parameters()).dtype
    x_TH = torch.randn(20, H, generator=torch.Generator().manual_seed(99)).to(dtype)
    return torch.stack([module(x_TH, torch.full((20, 1), e), torch.ones(20, 1, dtype=dtype)) for e in range(E)])


def plan(keep: list[int] = KEEP, index: int = 0) -> LayerPlan:
    return LayerPlan(index=index, name=f"layer {index}", experts=E, keep=keep, extra={"importance": list(IMPORTANCE)})


def rebuilt(module: nn.Module, keep: list[int] = KEEP, **parameters) -> tuple[nn.Module, dict[str, float]]:
    """A copy of the module after DERN, and the figures."""
    module = copy.deepcopy(module)
    return module, get_method("dern", parameters).rebuild(ExpertBank(module), plan(keep))


def scrambled(segments: Segments, seed: int) -> Segments:
    order = torch.randperm(len(segments.up_NH), generator=torch.Generator().manual_seed(seed))
    return segments.map(lambda tensor: tensor[order])


def copy_expert(module: nn.Module, source: int, target: int, scramble: int = 1) -> None:
    """Make expert `target` a copy of `source` with its neurons in another order."""
    bank = ExpertBank(module)
    expert = copy.deepcopy(bank.read(source))
    bank.write(target, scrambled(Segments.of(expert), scramble).into(expert))


def same_weights(a: nn.Module, b: nn.Module, only: list[int] | None = None) -> bool:
    chosen = slice(None) if only is None else only
    return all(torch.equal(x[chosen], y[chosen]) for x, y in zip(a.parameters(), b.parameters()))


def rows(segments: Segments) -> set[bytes]:
    """Every segment as its bits, biases included."""
    columns = [t.reshape(len(t), -1) for t in vars(segments).values() if t is not None]
    return {row.numpy().tobytes() for row in torch.cat(columns, dim=1).double()}


# -- the method in plain loops, straight from the paper's rules: what the fast code must equal


def reference(module: nn.Module, alpha: float, parts: list[str], importance: list[float], stats: bool) -> nn.Module:
    bank, result = ExpertBank(module), copy.deepcopy(module)
    every = {e: Segments.of(bank.read(e)).map(Tensor.double) for e in range(E)}

    def vector(e: int, j: int, parts: list[str]) -> Tensor:
        s = every[e]
        named = {"gate": s.gate_NH, "up": s.up_NH, "down": s.down_NH}
        return torch.cat([named[p][j] for p in ("gate", "up", "down") if p in parts and named[p] is not None])

    def cos(a: Tensor, b: Tensor) -> float:
        return float(a @ b / (a.norm() * b.norm()))

    arrived: dict[int, list[tuple[int, int]]] = {r: [] for r in KEEP}
    for i in DROP:
        for j in range(I):
            sims = {r: max(cos(vector(i, j, parts), vector(r, k, parts)) for k in range(I)) for r in KEEP}
            best = max(KEEP, key=lambda r: sims[r])
            if sims[best] > alpha:
                arrived[best].append((i, j))
    whole = ["gate", "up", "down"]
    for r in KEEP:
        members = [(r, j) for j in range(I)] + arrived[r]
        if len(members) == I:
            continue
        omega = dict(enumerate(importance))
        if stats:
            omega[r] += sum(importance[i] for i, _ in arrived[r]) / I
        V = [vector(e, j, whole) for e, j in members]
        U = [v / v.norm() for v in V]
        fires = [vector(e, j, ["gate" if every[e].gate_NH is not None else "up"]).abs().max() for e, j in members]
        first = sorted(sorted(range(len(V)), key=lambda n: -fires[n])[:I])
        centres = [U[n] for n in first]
        previous = None
        while True:
            assigned = [max(range(I), key=lambda c: cos(U[n], centres[c])) for n in range(len(V))]
            if assigned == previous:
                break
            previous = assigned
            for c in range(I):
                inside = [n for n in range(len(V)) if assigned[n] == c]
                if inside:
                    L = sum(V[n].norm() for n in inside) / len(inside)
                    total = sum(omega[members[n][0]] for n in inside)
                    centres[c] = sum(omega[members[n][0]] * L * U[n] for n in inside) / total

        def write(tensors: list[Tensor], assigned=assigned, members=members, V=V, omega=omega, first=first) -> Tensor:
            """The centre of each cluster, for one of the tensors a segment consists of."""
            new = []
            for c in range(I):
                inside = [n for n in range(len(V)) if assigned[n] == c]
                if not inside:
                    new.append(tensors[first[c]])
                    continue
                L = sum(V[n].norm() for n in inside) / len(inside)
                total = sum(omega[members[n][0]] for n in inside)
                new.append(sum(omega[members[n][0]] * L / V[n].norm() * tensors[n] for n in inside) / total)
            return torch.stack(new)

        names = [name for name, tensor in vars(every[r]).items() if tensor is not None]
        new = Segments(**{name: write([getattr(every[e], name)[j] for e, j in members]) for name in names})
        ExpertBank(result).write(r, new.into(bank.read(r)))
    return result


@families
@pytest.mark.parametrize("parts", ["up,down", "gate,up,down", "down", "up"])
@pytest.mark.parametrize("stats", [False, True])
def test_equals_the_paper_in_plain_loops(family, parts, stats):
    module = experts(family, seed=7)
    router = "stats" if stats else "slice"
    fast, figures = rebuilt(module, alpha=0.55, sim_parts=parts, init="paper", router=router, max_iter=100)
    slow = reference(module, 0.55, parts.split(","), IMPORTANCE, stats)
    assert figures["receivers"] == 3
    assert 0 < figures["moved"] < 36
    assert figures["merged_clusters"] > 0
    for a, b in zip(fast.parameters(), slow.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("weights", ["importance", "uniform"])
def test_weights_of_the_means(weights):
    module = experts("qwen3", seed=3)
    fast, _ = rebuilt(module, alpha=0.3, init="paper", weights=weights, max_iter=100)
    importance = IMPORTANCE if weights == "importance" else [1.0] * E
    slow = reference(module, 0.3, ["up", "down"], importance, stats=False)
    assert same_weights(module, fast) is False
    for a, b in zip(fast.parameters(), slow.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


# -- invariants: nothing to do


@families
def test_keeping_every_expert_changes_nothing(family):
    module = experts(family)
    after, figures = rebuilt(module, keep=list(range(E)), alpha=-1)
    assert same_weights(module, after)
    assert figures == {}


@families
@pytest.mark.parametrize("alpha", [1.0, 1.5, 2.0])
def test_no_cosine_exceeds_one_so_nothing_moves(family, alpha):
    module = experts(family)
    copy_expert(module, 0, 1)  # cosines of 1 up to rounding
    after, figures = rebuilt(module, alpha=alpha)
    assert same_weights(module, after)
    assert (figures["moved"], figures["discarded"], figures["moved_share"]) == (0, 36, 0)


def test_alpha_one_is_plain_pruning_of_a_whole_model():
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
        moe_intermediate_size=I, num_experts=E, num_experts_per_tok=2,
    )  # fmt: skip
    pruned = Qwen3MoeForCausalLM(config).eval()
    recombined = copy.deepcopy(pruned)
    for plain, rich in zip(moe_layers(pruned), moe_layers(recombined)):
        Dern(alpha=1).rebuild(rich.bank, plan(index=rich.index))
        select(rich, KEEP)
        select(plain, KEEP)
    tokens = torch.randint(64, (2, 12))
    with torch.no_grad():
        assert torch.equal(recombined(tokens).logits, pruned(tokens).logits)


# -- invariants: segments


@families
def test_an_expert_is_the_sum_of_its_segments(family):
    module = experts(family).double()
    bank, whole = ExpertBank(module), outputs(module)
    total = torch.zeros_like(whole[0])
    original = copy.deepcopy(bank.read(0))
    for j in range(I):
        keep_j = torch.arange(I) == j
        single = Segments.of(original).map(lambda t, k=keep_j: t * k.view(-1, *[1] * (t.dim() - 1)))
        bank.write(0, single.into(original))
        total += outputs(module)[0]
    surplus = 0 if original.down_bias_H is None else (I - 1) * original.down_bias_H
    torch.testing.assert_close(total - surplus, whole[0])


@families
def test_segments_survive_reading_joining_and_writing(family):
    module = experts(family, dtype=torch.bfloat16)
    before = copy.deepcopy(module)
    bank = ExpertBank(module)
    expert = bank.read(1)
    halves = [Segments.of(expert, torch.arange(5)), Segments.of(expert, torch.arange(5, I))]
    bank.write(1, Segments.join(halves).into(copy.deepcopy(expert)))
    assert same_weights(module, before)
    bank.write(1, scrambled(Segments.of(expert), 3).into(expert))
    assert not same_weights(module, before)
    torch.testing.assert_close(outputs(module.double()), outputs(before.double()))


@settings(max_examples=25, deadline=None)
@given(seed=seeds, family=st.sampled_from(FAMILIES), init=st.sampled_from(["dedup", "paper", "own"]))
def test_the_order_of_neurons_has_no_influence(seed, family, init):
    module = experts(family, seed)
    other = copy.deepcopy(module)
    for e in range(E):
        bank = ExpertBank(other)
        bank.write(e, scrambled(Segments.of(copy.deepcopy(bank.read(e))), seed + e).into(bank.read(e)))
    (a, figures_a), (b, figures_b) = (rebuilt(m, alpha=0.4, init=init) for m in (module, other))
    torch.testing.assert_close(outputs(a), outputs(b), rtol=1e-3, atol=1e-3)
    assert figures_a == pytest.approx(figures_b)


def test_order_has_no_influence_where_stored_gates_are_tied():
    module = experts("qwen3", related=0.5)
    module.gate_up_proj.data[:, :I, 0] = 9.0  # every neuron's strongest gate entry is the same
    module = module.bfloat16()
    other = copy.deepcopy(module)
    for e in range(E):
        bank = ExpertBank(other)
        bank.write(e, scrambled(Segments.of(copy.deepcopy(bank.read(e))), e).into(bank.read(e)))
    a, b = (rebuilt(m, alpha=0.2)[0] for m in (module, other))
    for r in KEEP:
        assert rows(Segments.of(ExpertBank(a).read(r))) == rows(Segments.of(ExpertBank(b).read(r)))


# -- invariants: a dropped copy of a kept expert


@families
@pytest.mark.parametrize("init", ["dedup", "own", "random"])
@pytest.mark.parametrize("parts", ["up,down", "gate,up,down", "up"])
def test_a_dropped_copy_of_a_kept_expert_is_lossless(family, init, parts):
    module = experts(family, related=0)
    copy_expert(module, 2, 4)
    after, figures = rebuilt(module, keep=[0, 1, 2, 3, 5], alpha=0.99, init=init, sim_parts=parts)
    assert (figures["moved"], figures["receivers"], figures["merged_clusters"]) == (I, 1, I)
    assert figures["mean_similarity"] == pytest.approx(1)
    torch.testing.assert_close(outputs(after), outputs(module), rtol=1e-4, atol=1e-4)
    assert same_weights(module, after, only=[0, 1, 3, 4, 5])


@families
def test_a_copy_is_lossless_to_the_bit_in_bfloat16(family):
    module = experts(family, related=0, dtype=torch.bfloat16)
    copy_expert(module, 2, 4)
    after, _ = rebuilt(module, keep=[0, 1, 2, 3, 5], alpha=0.99)
    before_2, after_2 = (Segments.of(ExpertBank(m).read(2)) for m in (module, after))
    assert rows(before_2) == rows(after_2)


@families
def test_the_literal_initialisation_ruins_an_expert_that_takes_in_its_copy(family):
    module = experts(family, related=0)
    copy_expert(module, 2, 4)
    after, _ = rebuilt(module, keep=[0, 1, 2, 3, 5], alpha=0.99, init="paper")
    error = (outputs(after)[2] - outputs(module)[2]).norm() / outputs(module)[2].norm()
    assert error > 0.2


def test_several_copies_go_home():
    module = experts("qwen3", related=0)
    copy_expert(module, 0, 1)
    copy_expert(module, 3, 4, scramble=2)
    copy_expert(module, 3, 5, scramble=3)
    after, figures = rebuilt(module, alpha=0.99, router="prob_map")
    assert figures["moved_share"] == 1
    torch.testing.assert_close(outputs(after), outputs(module), rtol=1e-4, atol=1e-4)


def test_ties_between_kept_experts_go_to_the_lowest():
    module, layer = experts("qwen3", related=0), plan()
    for twin in (3, 4):
        module.gate_up_proj.data[twin], module.down_proj.data[twin] = module.gate_up_proj[2], module.down_proj[2]
    Dern(alpha=0.9, router="prob_map").rebuild(ExpertBank(module), layer)
    assert layer.extra["prob_map"][4] == [0, 1, 0]


@pytest.mark.parametrize("canonicalize", [True, False])
def test_only_canonicalize_sees_through_scale_and_sign(canonicalize):
    module = experts("qwen3", related=0)
    copy_expert(module, 2, 4)
    bank = ExpertBank(module)
    expert = copy.deepcopy(bank.read(4))
    scale_I = torch.linspace(0.3, 3, I) * torch.tensor([1.0, -1.0]).repeat(I // 2)
    expert.up_IH, expert.down_HI = expert.up_IH * scale_I[:, None], expert.down_HI / scale_I
    bank.write(4, expert)
    after, figures = rebuilt(module, keep=[0, 1, 2, 3, 5], alpha=0.99, canonicalize=canonicalize)
    if canonicalize:
        assert figures["moved"] == I
        torch.testing.assert_close(outputs(after), outputs(module), rtol=1e-4, atol=1e-4)
    else:
        assert figures["moved"] < I / 2


# -- invariants: counting, shapes, bits


@settings(max_examples=20, deadline=None)
@given(seed=seeds, family=st.sampled_from(FAMILIES), alphas=st.lists(st.floats(-1, 1), min_size=2, max_size=4))
def test_segments_are_conserved_and_fewer_move_as_alpha_grows(seed, family, alphas):
    module = experts(family, seed)
    figures = [rebuilt(module, alpha=alpha)[1] for alpha in sorted(alphas)]
    assert all(f["moved"] + f["discarded"] == len(DROP) * I for f in figures)
    moved = [f["moved"] for f in figures]
    assert moved == sorted(moved, reverse=True)
    assert rebuilt(module, alpha=-1)[1]["discarded"] == 0


@families
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("init", ["dedup", "paper", "own", "random"])
def test_rebuilt_experts_have_their_old_shape_and_dropped_ones_are_not_touched(family, dtype, init):
    module = experts(family, dtype=dtype)
    after, figures = rebuilt(module, alpha=0.3, init=init)
    assert figures["receivers"] > 0
    assert [(p.shape, p.dtype) for p in after.parameters()] == [(p.shape, p.dtype) for p in module.parameters()]
    assert all(p.isfinite().all() for p in after.parameters())
    assert same_weights(module, after, only=DROP)
    assert not same_weights(module, after, only=KEEP)


@pytest.mark.parametrize(
    ("family", "canonicalize"), [("qwen3", False), ("qwen3", True), ("gpt-oss", False), ("nemotron", False)]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_segment_alone_in_its_cluster_keeps_its_bits(family, dtype, canonicalize):
    module = experts(family, dtype=dtype, related=2)
    bank = ExpertBank(module)
    after, figures = rebuilt(module, alpha=0.6, canonicalize=canonicalize)
    known = set().union(*(rows(Segments.of(bank.read(e))) for e in range(E)))
    new = [rows(Segments.of(ExpertBank(after).read(r))) for r in KEEP]
    assert sum(len(expert & known) for expert in new) >= len(KEEP) * I - figures["merged_clusters"]
    assert 0 < figures["merged_clusters"] < len(KEEP) * I


def test_an_expert_that_receives_nothing_is_not_touched():
    module = experts("gpt-oss", dtype=torch.bfloat16, related=0)
    copy_expert(module, 2, 4)
    after, figures = rebuilt(module, alpha=0.9)
    assert (figures["receivers"], figures["moved"]) == (1, I)
    assert same_weights(module, after, only=[0, 3])


def test_down_bias_of_the_kept_expert_stays():
    module = experts("gpt-oss")
    after, _ = rebuilt(module, alpha=-1)
    assert torch.equal(module.down_proj_bias, after.down_proj_bias)
    assert not torch.equal(module.gate_up_proj_bias, after.gate_up_proj_bias)


@families
@pytest.mark.parametrize("init", ["dedup", "random"])
def test_two_runs_give_identical_weights_whatever_the_chunk(family, init):
    module = experts(family)
    runs = [rebuilt(module, alpha=0.3, init=init, chunk=chunk) for chunk in (4096, 4096, 1, 5, I, 2 * I)]
    assert all(same_weights(runs[0][0], run[0]) for run in runs)
    assert all(figures == pytest.approx(runs[0][1]) for _, figures in runs)


def test_random_initialisation_follows_its_seed():
    module = experts("qwen3")
    a, b = (rebuilt(module, alpha=0.3, init="random", seed=seed)[0] for seed in (0, 1))
    assert not same_weights(a, b)


def test_experts_without_importance_are_averaged_plainly():
    module = experts("qwen3")
    zero, uniform = copy.deepcopy(module), copy.deepcopy(module)
    nothing = plan()
    nothing.extra["importance"] = [0.0] * E
    Dern(alpha=0.3).rebuild(ExpertBank(zero), nothing)
    Dern(alpha=0.3, weights="uniform").rebuild(ExpertBank(uniform), plan())
    assert same_weights(zero, uniform)


# -- router modes and the rest of the method's contract


def test_prob_map_records_where_each_share_of_an_expert_went():
    module, layer = experts("qwen3", related=0), plan()
    copy_expert(module, 3, 5)
    method = Dern(alpha=0.9, router="prob_map")
    figures = method.rebuild(ExpertBank(module), layer)
    map_ER = torch.tensor(json.loads(json.dumps(layer.extra["prob_map"])))
    expected = torch.zeros(E, len(KEEP))
    expected[[0, 2, 3, 5], [0, 1, 2, 2]] = 1
    assert figures["moved"] == I
    assert torch.equal(map_ER, expected)
    assert "prob_map" in method.plain_checkpoint(layer)


def test_prob_map_gives_each_expert_its_share():
    home_PI = torch.tensor([[0, 0, 1, -1], [2, 2, 2, 2]])
    map_ER = redistribution(home_PI, keep=[0, 3, 4], drop=[1, 2])
    assert map_ER.tolist() == [[1, 0, 0], [0.5, 0.25, 0], [0, 0, 1], [0, 1, 0], [0, 0, 1]]


@pytest.mark.parametrize("router", ["slice", "stats"])
def test_other_router_modes_fit_a_plain_checkpoint(router):
    layer = plan()
    method = Dern(alpha=0.3, router=router)
    method.rebuild(ExpertBank(experts("qwen3")), layer)
    assert method.plain_checkpoint(layer) is None
    assert set(layer.extra) == {"importance"}


def test_mapped_routing_adds_the_dropped_probability_to_its_heirs():
    probability_TE = torch.tensor([[0.1, 0.4, 0.3, 0.2]])
    map_ER = torch.tensor([[1.0, 0.0, 0.0], [0.75, 0.25, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    weight_TK, index_TK = mapped_routing(probability_TE, map_ER, top_k=2)  # q = 0.4, 0.4, 0.2
    assert sorted(index_TK[0].tolist()) == [0, 1]
    torch.testing.assert_close(weight_TK, torch.tensor([[0.5, 0.5]]))


def layer_profile() -> LayerProfile:
    """100 tokens, top-2 with normalised gates; expert 3 is selected most, expert 0 has the most weight."""
    stats = {
        "count_E": torch.tensor([40, 10, 35, 60, 30, 25]),
        "gate_mass_E": torch.tensor([32.0, 3.0, 20.0, 25.0, 12.0, 8.0], dtype=torch.float64),
    }
    return LayerProfile(index=0, name="layer 0", experts=E, top_k=2, tokens=100, stats=stats)


def test_importance_is_the_mean_gate_weight_and_sums_to_one_if_gates_do():
    layer = plan()
    Dern().prepare(layer_profile(), layer)
    assert layer.extra["importance"] == pytest.approx([0.32, 0.03, 0.20, 0.25, 0.12, 0.08])
    assert sum(layer.extra["importance"]) == pytest.approx(1)
    json.dumps(layer.extra)


def test_the_selector_scores_and_importance_stays_the_gate_weight():
    method, layer = Dern(selector="frequency"), plan()
    method.prepare(layer_profile(), layer)
    assert method.score(layer_profile()).argmax() == 3
    assert Dern().score(layer_profile()).argmax() == 0
    assert layer.extra["importance"][0] == pytest.approx(0.32)
    assert set(method.observes()) == {SelectionCount, GateMass}
    assert Dern().observes() == (GateMass,)


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        ("down,up", ("up", "down")),
        ("gate", ("gate",)),
        (["up", "gate", "up"], ("gate", "up")),
        (" up , down,gate", ("gate", "up", "down")),
    ],
)
def test_sim_parts_are_read_from_lists_and_text(given, parts):
    assert get_method("dern", {"sim_parts": given}).sim_parts == parts


@pytest.mark.parametrize(
    "parameters",
    [
        {"sim_parts": ""},
        {"sim_parts": []},
        {"sim_parts": "up,side"},
        {"sim_parts": 3},
        {"alpha": 2.5},
        {"alpha": -1.1},
        {"init": "kmeans++"},
        {"max_iter": 0},
        {"chunk": 0},
        {"selector": "no-such-method"},
        {"selector": "dern"},
        {"temperature": 1},
    ],
)
def test_wrong_parameters_are_refused(parameters):
    with pytest.raises(UsageError):
        get_method("dern", parameters)


def test_parameters_survive_a_plan_file():
    method = get_method("dern", {"sim_parts": "down", "alpha": 0.3})
    assert get_method("dern", json.loads(json.dumps(method.model_dump(mode="json")))) == method


def test_a_plan_without_importance_is_refused_unless_weights_are_uniform():
    module = experts("qwen3")
    bare = LayerPlan(index=0, name="layer 0", experts=E, keep=KEEP)
    with pytest.raises(UsageError, match="layer 0"):
        Dern().rebuild(ExpertBank(module), bare)
    Dern(weights="uniform").rebuild(ExpertBank(module), bare)


@pytest.mark.parametrize("family", ["gpt-oss", "nemotron"])
def test_canonicalize_is_refused_where_it_would_change_the_function(family):
    module = experts(family)
    with pytest.raises(ModelError, match="canonicalize"):
        rebuilt(module, canonicalize=True)


def test_comparing_gates_is_refused_where_there_are_none():
    with pytest.raises(ModelError, match="sim_parts"):
        rebuilt(experts("nemotron"), sim_parts="gate")
    assert rebuilt(experts("nemotron"), sim_parts="gate,up,down", alpha=0.3)[1]["moved"] > 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("expert", [0, 1])
def test_weights_that_are_not_numbers_are_reported_before_anything_changes(value, expert):
    module = experts("qwen3")
    module.gate_up_proj.data[expert, 3, 5] = value  # in the gate, which the default comparison does not look at
    before = copy.deepcopy(module)
    with pytest.raises(CheckpointError, match=f"layer 0: expert {expert}"):
        Dern(alpha=-1).rebuild(ExpertBank(module), plan())
    assert all(torch.equal(a, b) for a, b in zip(module.down_proj, before.down_proj))


# -- the shared floor


def unit(seed: int, count: int, size: int = 5) -> Tensor:
    rows_NF = torch.randn(count, size, generator=torch.Generator().manual_seed(seed))
    normalise_rows_(rows_NF)
    return rows_NF


@settings(max_examples=30, deadline=None)
@given(seed=seeds, queries=st.integers(1, 30), keys=st.integers(1, 30), chunk=st.integers(1, 40))
def test_best_match_finds_the_largest_cosine_in_any_chunks(seed, queries, keys, chunk):
    a, b = unit(seed, queries), unit(seed + 1, keys)
    cosine_Q, index_Q = best_match(a, b, chunk)
    for q in range(queries):
        every = [float(torch.cosine_similarity(a[q], b[n], dim=0)) for n in range(keys)]
        assert cosine_Q[q] == pytest.approx(max(every), abs=1e-5)
        assert every[index_Q[q]] == pytest.approx(max(every), abs=1e-5)


def test_best_match_never_exceeds_one_and_ties_go_to_the_first():
    rows_NF = unit(0, 200, 64)
    cosine_Q, index_Q = best_match(rows_NF, torch.cat([rows_NF, rows_NF]))
    assert cosine_Q.max() <= 1
    assert torch.equal(index_Q, torch.arange(200))


@settings(max_examples=60, deadline=None)
@given(seed=seeds, groups=st.integers(1, 6), copies=st.integers(1, 5), data=st.data())
def test_first_distinct_is_the_greedy_choice(seed, groups, copies, data):
    rows_NF = unit(seed, groups, 3).repeat_interleave(copies, 0)
    rows_NF += 0.1 * unit(seed + 1, len(rows_NF), 3)  # tolerance 0.02 makes chains: a ~ b ~ c but not a ~ c
    normalise_rows_(rows_NF)
    order = torch.randperm(len(rows_NF), generator=torch.Generator().manual_seed(seed))
    count = data.draw(st.integers(1, len(rows_NF)))
    taken, passed = [], []
    for n in order.tolist():
        twin = any(float(rows_NF[n] @ rows_NF[t]) > 1 - 0.02 for t in taken)
        (passed if twin else taken).append(n)
    assert first_distinct(order, rows_NF, count, tolerance=0.02).tolist() == (taken + passed)[:count]


def test_first_distinct_passes_over_copies_only():
    rows_NF = torch.tensor([[1.0, 0.0], [1.0, 0.001], [1.0, 0.1], [0.0, 1.0]])
    normalise_rows_(rows_NF)
    assert first_distinct(torch.arange(4), rows_NF, 3).tolist() == [0, 2, 3]


def test_strongest_gates_come_first_and_ties_by_length():
    segments = Segments(
        up_NH=torch.tensor([[9.0, 0.0], [0.0, 1.0], [0.0, 2.0], [5.0, 0.0]]),
        down_NH=torch.zeros(4, 2),
        gate_NH=torch.tensor([[1.0, 1.0], [0.0, -3.0], [3.0, 0.0], [2.0, 2.0]]),
    )
    norm_N = normalise_rows_(segments.matrix())
    assert strongest_gate_first(segments, norm_N).tolist() == [2, 1, 3, 0]
    gateless = Segments(segments.up_NH, segments.down_NH)
    assert strongest_gate_first(gateless, normalise_rows_(gateless.matrix())).tolist() == [0, 3, 2, 1]


@settings(max_examples=50, deadline=None)
@given(seed=seeds, distinct=st.integers(1, 12), copies=st.integers(1, 4), data=st.data())
def test_clustering_leaves_no_cluster_empty(seed, distinct, copies, data):
    rows_NF = unit(seed, distinct).repeat(copies, 1)
    clusters = data.draw(st.integers(1, len(rows_NF)))
    cluster_N, rounds = spherical_kmeans(rows_NF, torch.ones(len(rows_NF)), torch.arange(clusters), max_iter=20)
    assert cluster_N.bincount(minlength=clusters).min() >= 1
    assert 1 <= rounds <= 20


def test_an_empty_cluster_gets_the_worst_represented_row():
    rows_NF = torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.9, 0.1, 0.0], [0.6, 0.0, 0.8], [0.0, 1.0, 0.0]])
    normalise_rows_(rows_NF)
    seed_C = torch.tensor([0, 1, 4])  # 0 and 1 are the same: cluster 1 stays empty
    assert spherical_kmeans(rows_NF, torch.ones(5), seed_C)[0].tolist() == [0, 0, 0, 1, 2]
    literal = spherical_kmeans(rows_NF, torch.ones(5), seed_C, reseed=False, max_iter=1)
    assert literal[0].tolist() == [0, 0, 0, 0, 2]
    # centre 0 has moved towards row 3 since; cluster 1 is back at its seed and takes the rest
    literal = spherical_kmeans(rows_NF, torch.ones(5), seed_C, reseed=False)
    assert literal[0].tolist() == [1, 1, 1, 0, 2]


@settings(max_examples=30, deadline=None)
@given(seed=seeds, clusters=st.integers(2, 6))
def test_clustering_ends_where_every_row_is_with_its_nearest_centre(seed, clusters):
    rows_NF, weight_N = unit(seed, 30), torch.rand(30, generator=torch.Generator().manual_seed(seed)) + 0.1
    cluster_N, rounds = spherical_kmeans(rows_NF, weight_N, torch.arange(clusters), max_iter=100)
    assert rounds < 100
    centre_CF = torch.stack([(weight_N[:, None] * rows_NF)[cluster_N == c].sum(0) for c in range(clusters)])
    normalise_rows_(centre_CF)
    cosine_NC = rows_NF @ centre_CF.T
    assert (cosine_NC.max(1).values - cosine_NC[torch.arange(30), cluster_N]).max() < 1e-5


def test_the_limit_on_rounds_holds():
    cluster_N, rounds = spherical_kmeans(unit(0, 200), torch.ones(200), torch.arange(20), max_iter=2)
    assert rounds == 2
    assert cluster_N.max() < 20


def test_means_have_the_mean_norm_and_weigh_directions_not_lengths():
    segments = Segments(up_NH=torch.tensor([[1.0, 0.0], [0.0, 9.0]]), down_NH=torch.zeros(2, 2))
    norm_N = normalise_rows_(segments.matrix())
    together, mean = torch.zeros(2, dtype=torch.long), functools.partial(equalised_means, segments, norm_N)
    torch.testing.assert_close(mean(torch.ones(2), together, 1).up_NH, torch.tensor([[2.5, 2.5]]))
    torch.testing.assert_close(mean(torch.tensor([3.0, 1.0]), together, 1).up_NH, torch.tensor([[3.75, 1.25]]))


def test_biases_are_averaged_with_their_segment_and_its_norm_factor():
    segments = Segments(
        up_NH=torch.tensor([[2.0], [6.0]]), down_NH=torch.zeros(2, 1), gate_NH=torch.zeros(2, 1),
        up_bias_N=torch.tensor([1.0, 1.0]), gate_bias_N=torch.tensor([0.0, 8.0]),
    )  # fmt: skip
    means = equalised_means(segments, torch.tensor([2.0, 6.0]), torch.tensor([1.0, 3.0]), torch.tensor([0, 0]), 1)
    # L = 4: factors 1/4 * 4/2 and 3/4 * 4/6
    torch.testing.assert_close(means.up_NH, torch.tensor([[4.0]]))
    torch.testing.assert_close(means.up_bias_N, torch.tensor([1.0]))
    torch.testing.assert_close(means.gate_bias_N, torch.tensor([4.0]))


def test_dead_segments_have_no_say_in_a_mean():
    segments = Segments(up_NH=torch.tensor([[3.0, 4.0], [0.0, 0.0]]), down_NH=torch.zeros(2, 2))
    means = equalised_means(segments, torch.tensor([5.0, 0.0]), torch.ones(2), torch.tensor([0, 0]), 1)
    torch.testing.assert_close(means.up_NH, segments.up_NH[:1])


def test_clusters_of_one_give_their_member_and_empty_ones_their_seed():
    segments = Segments(up_NH=torch.arange(8.0).view(4, 2), down_NH=torch.zeros(4, 2))
    means = Segments(up_NH=torch.full((3, 2), -1.0), down_NH=torch.full((3, 2), -1.0))
    new, several = means_or_members(means, segments, torch.tensor([0, 2, 0, 0]), torch.tensor([0, 3, 2]))
    assert new.up_NH.tolist() == [[-1, -1], [6, 7], [2, 3]]
    assert several == 1


def test_canonical_segments_are_the_same_neurons():
    module = experts("qwen3")
    bank = ExpertBank(module)
    segments = Segments.of(copy.deepcopy(bank.read(0)))
    segments.up_NH[3] = 0  # a dead neuron has no scale
    bank.write(0, segments.into(bank.read(0)))
    before = outputs(module)
    canonical = segments.canonical()
    bank.write(0, canonical.into(bank.read(0)))
    torch.testing.assert_close(outputs(module), before, rtol=1e-4, atol=1e-4)
    alive = torch.arange(I) != 3
    torch.testing.assert_close(canonical.up_NH.norm(dim=1)[alive], canonical.down_NH.norm(dim=1)[alive])
    assert (canonical.up_NH.gather(1, canonical.up_NH.abs().argmax(1, keepdim=True)) >= 0).all()


def test_cosines_are_computed_in_float32_for_bfloat16_storage():
    segments = Segments(up_NH=torch.ones(2, 3, dtype=torch.bfloat16), down_NH=torch.ones(2, 3, dtype=torch.bfloat16))
    assert segments.matrix().dtype == torch.float32
    assert segments.map(Tensor.double).matrix().dtype == torch.float64
