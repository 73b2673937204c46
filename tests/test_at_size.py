"""What is best at a size: chains are turned until they fit, carried out, and compared."""

from __future__ import annotations

import pytest

import coterie
from coterie.api.runtime import Runtime
from coterie.compression.fitting import DEFAULTS, Link, fit, relative
from coterie.compression.sizes import measure
from coterie.errors import UsageError
from families import FEW, saved, token_file
from inprocess import cli

pytestmark = pytest.mark.usefixtures("one_thread")

GROUPS = {"group_size": 32, "quantizer": "rtn"}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    made = {family: saved(family, folder) for family in FEW}
    return lambda family: made[family]


@pytest.fixture(scope="module")
def ids(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ids")
    return token_file(folder / "a.safetensors"), token_file(folder / "b.safetensors", seed=1)


CHAINS = [
    [Link("random", {}), Link("quantize", {**GROUPS, "bits": 8, "attention_bits": 4})],
    [Link("quantize", GROUPS)],
    [Link("pmq", {**GROUPS, "widths": [1, 2, 3, 4, 6, 8], "each_occurs": False})],
    [Link("quantmoe-random", {**GROUPS, "attention_bits": 4})],
]


@pytest.mark.parametrize("family", FEW)
@pytest.mark.parametrize("chain", CHAINS, ids=lambda chain: "+".join(link.name for link in chain))
def test_what_a_chain_writes_fits_and_one_step_more_would_not(family, chain, models, ids, tmp_path):
    source = models(family)
    size = measure(Runtime().open(str(source)))
    target = int(size.other_bytes * 0.9 + 0.22 * (size.bytes - size.other_bytes))
    fitted = fit(Runtime().open(str(source)), chain, target)
    steps = [{**step, "tokens": str(ids[0])} for step in fitted.steps]
    steps = [{k: v for k, v in s.items() if k != "tokens" or s["method"] == "pmq"} for s in steps]
    result = coterie.api.carry_out(str(source), str(tmp_path / "out"), steps)
    assert result.after.bytes <= target
    layers = Runtime().open(str(source)).moe.values()
    one_expert = size.bytes_of_expert * sum(layer.groups for layer in layers)
    assert result.after.bytes > target - max(one_expert, 0.15 * target)


def test_more_bits_than_a_size_allows_are_refused_with_what_it_takes(models):
    streamed = Runtime().open(str(models("mixtral")))
    with pytest.raises(UsageError, match="cannot be met"):
        fit(streamed, [Link("quantize", GROUPS)], 1000)
    with pytest.raises(UsageError, match="none has to go"):
        fit(streamed, [Link("random", {}), Link("quantize", {**GROUPS, "bits": 2})], 10**9)
    with pytest.raises(UsageError, match="top-k"):
        fit(streamed, [Link("random", {}), Link("quantize", {**GROUPS, "bits": 8})], 200_000)
    with pytest.raises(UsageError, match="bits have to be said"):
        fit(streamed, [Link("random", {}), Link("pmq", {})], 10**6)


@pytest.mark.parametrize("text", ["0x", "2x", "-1x", "ax"])
def test_a_share_of_the_original_is_above_nothing_and_at_most_all(text, models):
    with pytest.raises(UsageError, match="cannot read the size"):
        relative(text, Runtime().open(str(models("mixtral"))))


def test_target_sizes_may_be_shares_for_pruning_and_for_quantization(models, ids, tmp_path):
    source = str(models("mixtral"))
    whole = measure(Runtime().open(source)).bytes
    pruned = coterie.compress(source, str(tmp_path / "pruned"), method="random", target_size="0.6x")
    assert pruned.after.bytes <= 0.6 * whole
    parameters = {"group_size": 32}
    result = coterie.compress(
        source, str(tmp_path / "out"), method="pmq", parameters=parameters, target_size="0.4x", tokens=str(ids[0])
    )
    assert 0.35 * whole < result.after.bytes <= 0.4 * whole


def test_the_command_line_says_what_is_best_at_a_size(models, ids, tmp_path):
    given = ("--tokens", ids[0], "--eval-tokens", ids[1], "--target-size", "0.62x")
    chains = ("--methods", "random+quantize:bits=8,group_size=32", "--methods", "quantize:group_size=32")
    done = cli("compare", models("qwen3-moe"), *given, *chains, "--methods", "reap", "--out", tmp_path / "out")
    assert done.code == 0, done.err
    told = done.out + done.err
    assert "bits" in told
    assert (tmp_path / "out/comparison.html").is_file()
    assert not list(tmp_path.glob("coterie-compare-*"))
    entries = cli("compare", models("qwen3-moe"), *given, *chains, "--work", tmp_path / "work", "--json").json()
    ran = [c for c in entries["contenders"] if not c["refused"]]
    assert len(ran) == 2
    assert all(c["size"]["bytes"] <= 0.62 * entries["original"]["size"]["bytes"] for c in ran)
    assert len(list((tmp_path / "work").iterdir())) == 2
    done = cli("compare", models("qwen3-moe"), *given, "--keep", "0.5")
    assert done.code != 0
    assert "--keep would be ignored" in done.err
    assert len(DEFAULTS) == 5
