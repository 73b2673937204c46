"""The command line as a user types it: every verb's forms, its JSON, its options, its sources of text."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from families import each_tensor, run_cli, saved, token_file
from inprocess import Outcome, cli, fingerprint

DOMAINS = ("prose", "code")
SMALL = ("--samples", 3, "--length", 32)


pytestmark = pytest.mark.usefixtures("one_thread_each")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return saved("qwen3-moe", tmp_path_factory.mktemp("model"), vocab_size=4096)


def documents(domain: str, count: int = 8) -> list[str]:
    line = {
        "prose": "The boat {i} left at dawn and came back late, empty as before.",
        "code": "def f{i}(x): return x * {i} + 1",
    }
    return [" ".join(line[domain].format(i=j) for j in range(i, i + 6)) for i in range(count)]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """One file of two domains."""
    file = tmp_path_factory.mktemp("data") / "calibration.jsonl"
    rows = [{"text": text, "domain": domain} for domain in DOMAINS for text in documents(domain)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="module")
def profiled(model, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("profiles") / "profile"
    works("profile", model, "--data", data, "--out", folder, *SMALL)
    return folder


def works(*arguments: object) -> Outcome:
    result = cli(*arguments)
    assert result.code == 0, result.err
    return result


def same_tensors(one: Path, two: Path) -> bool:
    a, b = each_tensor(one), each_tensor(two)
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# -- the command itself -------------------------------------------------------------------------------------------


def test_help_and_version_load_neither_torch_nor_transformers():
    code = """
import sys
from coterie.cli.main import main
for arguments in (["--help"], ["compress", "--help"], ["--version"]):
    sys.argv = ["coterie", *arguments]
    try:
        main()
    except SystemExit as exit:
        assert not exit.code, exit.code
print("LOADED", sorted({"torch", "transformers", "numpy", "datasets", "sklearn"} & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "LOADED []"
    for verb in ("inspect", "profile", "plan", "compress", "evaluate", "methods", "demo"):
        assert verb in done.stdout
    assert "--keep-experts" in done.stdout


def test_the_command_is_installed_and_a_module():
    from coterie import __version__

    script = Path(sys.executable).with_name("coterie")
    done = subprocess.run([script, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"coterie {__version__}"
    assert run_cli("--version", check=True).stdout == done.stdout


@pytest.mark.parametrize("arguments", [(), ("compress",), ("inspect",)])
def test_a_command_without_arguments_shows_its_help(arguments):
    result = cli(*arguments)
    assert result.code in (0, 2)
    assert "Usage: coterie" in result.out + result.err


def test_each_verb_explains_itself():
    for verb in ("inspect", "profile", "plan", "compress", "evaluate", "methods", "demo"):
        text = works(verb, "--help").out
        assert "Global options" in text
        assert "--json" in text


@pytest.mark.parametrize(
    "arguments",
    [
        ("--json", "inspect", "MODEL"),
        ("inspect", "MODEL", "--json"),
        ("inspect", "--json", "MODEL"),
        ("--threads", "1", "--device=cpu", "--json", "inspect", "MODEL"),
        ("--compute-dtype", "bfloat16", "inspect", "MODEL", "--memory", "1GiB", "--offline", "--json"),
        ("-v", "inspect", "MODEL", "--json", "--allow-nonfinite", "--trust-remote-code"),
    ],
)
def test_global_options_stand_before_or_after_the_verb(arguments, model, monkeypatch):
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):  # --offline sets them for the process
        monkeypatch.setenv(name, "0")
    told = works(*(str(model) if a == "MODEL" else a for a in arguments)).json()
    assert told["experts"] == 8


def test_compute_dtype_and_threads_reach_the_run(model, data, tmp_path):
    options = ("--data", data, *SMALL, "--method", "frequency", "--json", "--compute-dtype", "bfloat16")
    told = works("--threads", 1, "profile", model, "--out", tmp_path / "p", *options).json()
    assert told["settings"]["compute_dtype"] == "bfloat16"
    assert told["settings"]["threads"] == 1


# -- verbs --------------------------------------------------------------------------------------------------------


def test_inspect(model):
    text = works("inspect", model).out
    for part in ("Qwen3MoeForCausalLM", "3: 2 MoE, 1 dense", "8 per layer, 2 per token", "4096"):
        assert part in text
    told = works("inspect", model, "--json").json()
    assert [layer["layer"] for layer in told["moe_layers"]] == [0, 2]
    assert told["dense_layers"] == [1]
    assert told["bytes"] == sum(t.nbytes for t in each_tensor(model).values())


def test_profile(model, data, tmp_path):
    options = ("--samples", 2, "--length", 24, "--batch-size", 1, "--seed", 5)
    text = works("profile", model, "--data", data, "--out", tmp_path / "a", *options).out
    assert "expert load" in text
    told = works("profile", model, "--data", data, "--out", tmp_path / "b", *options, "--json").json()
    assert told["domains"] == sorted(DOMAINS)
    assert told["settings"]["tokens"] == dict.fromkeys(sorted(DOMAINS), 48)
    assert [layer["layer"] for layer in told["layers"]] == [0, 2]
    assert (tmp_path / "a" / "profile.safetensors").read_bytes() == (
        tmp_path / "b" / "profile.safetensors"
    ).read_bytes()


def test_profile_records_only_what_is_asked_for(model, data, tmp_path):
    works("profile", model, "--data", data, "--out", tmp_path / "a", *SMALL, "--observe", "SelectionCount")
    assert {key.partition(".")[2] for key in each_tensor(tmp_path / "a")} == {"count_E"}
    works("profile", model, "--data", data, "--out", tmp_path / "b", *SMALL, "--method", "dern", "--method", "reap")
    works(
        "compress", model, tmp_path / "c", "--profile", tmp_path / "b", "--keep", 0.5, "--method", "dern", "--no-report"
    )


def test_plan(model, profiled, tmp_path):
    file = tmp_path / "plan.json"
    arguments = ("plan", model, "--profile", profiled, "--method", "reap", "--keep", 0.5, "--out", file)
    assert "4 of 8" in works(*arguments, "--set", "renormalise=false").out
    written = json.loads(file.read_text())
    assert written["parameters"] == {"renormalise": False}
    assert [len(layer["keep"]) for layer in written["layers"]] == [4, 4]
    told = works(*arguments, "--set", "renormalise=false", "--json").json()
    assert told["layers"] == written["layers"]
    assert told["plan"] == str(file)


def test_plan_protects_and_excludes(model, profiled, tmp_path):
    file = tmp_path / "plan.json"
    options = ("--keep-experts", 4, "--exclude-layers", "2", "--protect", "0:6,0:7")
    works("plan", model, "--profile", profiled, *options, "--out", file)
    first, second = json.loads(file.read_text())["layers"]
    assert {6, 7} <= set(first["keep"])
    assert len(first["keep"]) == 4
    assert second["keep"] == list(range(8))


def test_compress_in_one_command(model, data, tmp_path):
    out = tmp_path / "out"
    before = fingerprint(model)
    result = works("compress", model, out, "--method", "reap", "--keep", 0.5, "--data", data, *SMALL)
    assert "needs about" in result.err
    assert "experts per layer" in result.out
    names = {file.name for file in out.iterdir()}
    assert names >= {"model.safetensors", "config.json", "coterie.json", "plan.json", "README.md", "report.html"}
    assert names >= {"tokenizer.json", "tokenizer_config.json"}
    assert fingerprint(model) == before
    assert works("inspect", out, "--json").json()["experts"] == 4


def test_profile_plan_apply_equals_one_sweep(model, data, profiled, tmp_path):
    for method in ("reap", "dern"):
        swept, planned, short = (tmp_path / f"{method}-{name}" for name in ("swept", "planned", "short"))
        plan = tmp_path / f"{method}.json"
        budget = ("--method", method, "--keep", 0.5)
        works("compress", model, swept, *budget, "--data", data, *SMALL, "--no-report")
        works("plan", model, "--profile", profiled, *budget, "--out", plan)
        works("compress", model, planned, "--plan", plan, "--no-report")
        works("compress", model, short, *budget, "--profile", profiled, "--no-report")
        assert same_tensors(swept, planned)
        assert same_tensors(swept, short)
        kept = [
            [layer["keep"] for layer in json.loads((f / "plan.json").read_text())["layers"]] for f in (swept, planned)
        ]
        assert kept[0] == kept[1]


def test_compress_by_recipe_equals_compress_by_options(model, data, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {model}\ndata: [{data}]\nsamples: 3\nlength: 32\nsteps:\n"
        "  - method: reap\n    parameters: {renormalise: false}\n    budget: {keep_experts: 5, protect: ['0:1']}\n"
    )
    works("compress", model, tmp_path / "a", "--recipe", recipe, "--no-report")
    options = ("--keep-experts", 5, "--protect", "0:1", "--set", "renormalise=false", "--data", data, *SMALL)
    works("compress", model, tmp_path / "b", *options, "--no-report")
    assert fingerprint(tmp_path / "a") == fingerprint(tmp_path / "b")


def test_a_recipe_of_two_steps_is_two_compressions(model, data, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"data: [{data}]\nsamples: 3\nlength: 32\nsteps:\n"
        "  - {method: frequency, budget: {keep_experts: 6}}\n  - {method: dern, budget: {keep_experts: 4}}\n"
    )
    done = works("compress", model, tmp_path / "a", "--recipe", recipe, "--no-report")
    assert "step 1 of 2" in done.out + done.err
    assert not list(tmp_path.glob("a.*"))
    works("compress", model, tmp_path / "b", "--keep-experts", 6, "--method", "frequency", "--data", data, *SMALL)
    works("compress", tmp_path / "b", tmp_path / "c", "--keep-experts", 4, "--method", "dern", "--data", data, *SMALL)
    assert same_tensors(tmp_path / "a", tmp_path / "c")
    record = json.loads((tmp_path / "a" / "coterie.json").read_text())
    assert [step["recipe"]["method"] for step in [*record["earlier_steps"], record]] == ["frequency", "dern"]


def test_a_recipe_killed_between_steps_goes_on(model, data, tmp_path, monkeypatch):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"data: [{data}]\nsamples: 3\nlength: 32\nsteps:\n"
        "  - {method: frequency, budget: {keep_experts: 6}}\n  - {method: reap, budget: {keep_experts: 4}}\n"
    )
    from coterie.api import shrink
    from coterie.errors import OutputError

    original, calls = shrink.compress, []

    def failing(source, out, **options):
        calls.append(out)
        if len(calls) == 2:
            raise OutputError("the disk is full")
        return original(source, out, **options)

    monkeypatch.setattr(shrink, "compress", failing)
    assert cli("compress", model, tmp_path / "a", "--recipe", recipe, "--no-report").code == 1
    assert (tmp_path / "a.step1").is_dir()
    works("compress", model, tmp_path / "a", "--recipe", recipe, "--no-report")
    assert [Path(out).name for out in calls] == ["a.step1", "a", "a"]
    assert not (tmp_path / "a.step1").exists()


def test_compress_to_a_size(model, data, tmp_path):
    size = works("inspect", model, "--json").json()["bytes"]
    told = works(
        "compress", model, tmp_path / "out", "--target-size", f"{0.95 * size / 1e6}MB", "--data", data, *SMALL, "--json"
    )
    after = told.json()["after"]
    assert 0.85 * size < after["bytes"] <= 0.95 * size
    assert after["bytes"] == sum(t.nbytes for t in each_tensor(tmp_path / "out").values())


def test_compress_tells_its_record_as_json(model, data, tmp_path):
    out = tmp_path / "out"
    told = works("compress", model, out, "--keep", 0.5, "--data", data, *SMALL, "--evaluate", data, "--json").json()
    record = json.loads((out / "coterie.json").read_text())
    assert {key: told[key] for key in record} == record
    assert told["out"] == str(out)
    assert told["redundancy"]["dropped_load"] > 0
    assert [q["model"] for q in told["quality"]] == [str(model), str(out)]
    assert told["recipe"]["seed"] == 0


def test_a_dry_run_tells_what_is_needed_and_writes_nothing(model, data, tmp_path):
    out = tmp_path / "out"
    arguments = ("compress", model, out, "--keep", 0.5, "--data", data, *SMALL, "--dry-run")
    told = works(*arguments, "--json").json()
    size = works("inspect", model, "--json").json()["bytes"]
    assert 0 < told["disk_bytes"] < size
    assert told["memory_bytes"] > size
    assert told["bytes_to_read"] == size
    assert told["seconds"] > 0
    assert told["sweeps"] == 1
    assert 0 < told["redundancy"]["dropped_saliency"] < 1
    text = works(*arguments).err
    for part in ("of memory", "of disk", "reads", "minutes", "dropped saliency"):
        assert part in " ".join(text.split())
    assert list(tmp_path.iterdir()) == []


def test_the_forecast_of_disk_is_what_is_written(model, data, tmp_path):
    told = works(
        "compress", model, tmp_path / "out", "--keep", 0.5, "--data", data, *SMALL, "--dry-run", "--json"
    ).json()
    works("compress", model, tmp_path / "out", "--keep", 0.5, "--data", data, *SMALL, "--no-report")
    assert told["disk_bytes"] == sum(t.nbytes for t in each_tensor(tmp_path / "out").values())


def test_evaluate(model, data, tmp_path):
    out = tmp_path / "out"
    works("compress", model, out, "--keep", 0.5, "--method", "random", "--no-report")
    alone = works("evaluate", model, "--data", data, *SMALL, "--json").json()
    assert len(alone) == 1
    assert [d["domain"] for d in alone[0]["domains"]] == sorted(DOMAINS)
    told = works("evaluate", model, model, out, "--data", data, *SMALL, "--json").json()
    assert told[0]["mean"]["loss"] == alone[0]["mean"]["loss"]
    assert told[1]["mean"]["agreement"] == 1
    assert abs(told[1]["mean"]["kl"]) < 1e-6
    assert told[2]["mean"]["kl"] > 0
    text = works("evaluate", model, out, "--data", data, *SMALL).out
    assert "loss" in text
    assert "KL" in text


def test_methods():
    text = works("methods").out
    told = works("methods", "--json").json()
    for entry in told:
        assert entry["name"] in text
        assert entry["summary"]
        assert entry["paper"]
    assert {"reap", "dern", "frequency", "random"} <= {entry["name"] for entry in told}
    (dern,) = works("methods", "dern", "--json").json()
    alpha = next(p for p in dern["parameters"] if p["name"] == "alpha")
    assert (alpha["minimum"], alpha["maximum"], alpha["default"]) == (-1, 2, 0.5)
    assert "alpha" in works("methods", "dern").out


def test_json_is_all_there_is_on_standard_output(model, data, tmp_path):
    """Of a real process: libraries that print past sys.stdout would be seen."""
    done = run_cli("compress", model, tmp_path / "out", "--keep", 0.5, "--data", data, *SMALL, "--json", check=True)
    assert json.loads(done.stdout)["after"]["experts"] == 4


def test_demo(tmp_path, monkeypatch):
    """The command and its shape; a short text instead of the real one, which takes minutes."""
    import coterie.demo

    monkeypatch.setattr(coterie.demo, "LENGTH", 32)
    monkeypatch.setattr(coterie.demo, "PROMPTS", coterie.demo.PROMPTS[:1])
    told = works("demo", "--out", tmp_path / "demo", "--keep", 0.25, "--json").json()
    assert Path(told["report"]).exists()
    assert len(told["quality"]) == 4
    assert len(told["generated"]) == 1
    for method in ("frequency", "reap", "dern"):
        assert json.loads((tmp_path / "demo" / method / "config.json").read_text())["model_type"] == "qwen3_moe"
        assert works("inspect", tmp_path / "demo" / method, "--json").json()["experts"] == 4


# -- text ---------------------------------------------------------------------------------------------------------


def write_text(kind: str, folder: Path) -> Path:
    """The same documents as any kind of source; their domain is "text" where a file's name says so."""
    texts = documents("prose")
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    file = folder / f"text.{kind}"
    if kind == "jsonl":
        file.write_text(lines)
    elif kind == "jsonl.gz":
        file.write_bytes(gzip.compress(lines.encode()))
    elif kind == "parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), file)
    elif kind == "folder":
        (folder / "texts" / "deeper").mkdir(parents=True)
        (folder / "texts" / "deeper" / "text.jsonl").write_text(lines)
        (folder / "texts" / "ignored.csv").write_text("text\nnot this\n")
        return folder / "texts"
    else:
        file.write_text(" ".join(texts))
    return file


def profile_of(model: Path, out: Path, *options: object) -> dict[str, Any]:
    result = works("profile", model, "--out", out, "--observe", "SelectionCount", *options, "--json").json()
    return {**result, **json.loads((out / "profile.json").read_text())}


def test_the_same_documents_from_any_kind_of_file_are_the_same_samples(model, tmp_path):
    found = {}
    for kind in ("jsonl", "jsonl.gz", "parquet", "folder"):
        (tmp_path / kind).mkdir()
        source = write_text(kind, tmp_path / kind)
        found[kind] = profile_of(model, tmp_path / f"p-{kind}", "--data", source, *SMALL)
    assert len({told["data_digest"] for told in found.values()}) == 1
    assert all(told["domains"] == ["text"] for told in found.values())


@pytest.mark.parametrize("kind", ["txt", "md"])
def test_plain_text_is_one_document(kind, model, tmp_path):
    told = profile_of(model, tmp_path / "p", "--data", write_text(kind, tmp_path), *SMALL)
    assert told["domains"] == ["text"]
    assert told["settings"]["tokens"] == {"text": 96}


def test_domains_come_from_a_field_or_from_the_name_of_the_file(model, data, tmp_path):
    (tmp_path / "letters.txt").write_text(" ".join(documents("prose")))
    sources = ("--data", data, "--data", tmp_path / "letters.txt")
    told = profile_of(model, tmp_path / "p", *sources, *SMALL)
    assert told["domains"] == ["code", "letters", "prose"]
    assert told["settings"]["tokens"] == dict.fromkeys(told["domains"], 96)


def test_unpacked_documents_are_cut_and_padded(model, data, tmp_path):
    from transformers import AutoTokenizer

    from coterie import api

    sizes = [
        len(ids) for ids in AutoTokenizer.from_pretrained(model)([*documents("prose"), *documents("code")])["input_ids"]
    ]
    told = profile_of(model, tmp_path / "p", "--data", data, "--samples", 8, "--length", 256, "--no-pack")
    start = 1  # each document gets a start token
    assert sum(told["settings"]["tokens"].values()) == sum(min(size + start, 256) for size in sizes)
    found = api.calibration(str(model), [str(data)], samples=8, length=40, pack=False)
    assert found is not None
    assert found.length <= 40
    packed = api.calibration(str(model), [str(data)], samples=2, length=40)
    assert packed is not None
    assert all(batch.mask_BL is None for batch in packed.batches)


def test_too_little_text_for_all_samples_is_said(model, data, tmp_path):
    options = ("--keep", 0.5, "--data", data, "--samples", 1000, "--length", 32, "--no-report")
    text = " ".join(works("compress", model, tmp_path / "out", *options).err.split())
    assert "warning: domain 'code' gives only" in text
    assert "of 1000 samples of 32 tokens" in text


def test_seeds_choose_documents(model, data, tmp_path):
    digests = [
        profile_of(model, tmp_path / f"p{i}", "--data", data, *SMALL, "--seed", seed)["data_digest"]
        for i, seed in enumerate((0, 0, 1))
    ]
    assert digests[0] == digests[1] != digests[2]


def test_token_ids_instead_of_text(model, tmp_path):
    tokens = token_file(tmp_path / "ids.safetensors", padded=True)
    told = profile_of(model, tmp_path / "p", "--tokens", tokens)
    assert told["domains"] == ["ids"]
    assert told["settings"]["tokens"] == {"ids": sum(32 - 3 * row - 1 for row in range(4))}


def test_profiles_merge_to_the_profile_of_both_texts(model, tmp_path):
    from coterie.profiling.profile import Profile

    for domain in DOMAINS:
        (tmp_path / f"{domain}.txt").write_text(" ".join(documents(domain)))
    options = (
        *SMALL,
        "--batch-size",
        1,
        "--observe",
        "DomainCount",
        "--observe",
        "OutputNorm",
        "--observe",
        "MeanOutput",
    )
    parts = []
    for domain in DOMAINS:
        works("profile", model, "--data", tmp_path / f"{domain}.txt", "--out", tmp_path / domain, *options)
        parts.append(Profile.load(tmp_path / domain))
    sources = [o for domain in DOMAINS for o in ("--data", tmp_path / f"{domain}.txt")]
    works("profile", model, *sources, "--out", tmp_path / "both", *options)
    both, merged = Profile.load(tmp_path / "both"), parts[0].merge(parts[1])
    order = [merged.domains.index(domain) for domain in both.domains]
    for index, layer in both.layers.items():
        other = merged.layers[index]
        assert other.tokens == layer.tokens
        assert torch.equal(other.count_DE[order], layer.count_DE)
        assert torch.equal(other.tokens_D[order], layer.tokens_D)
        assert torch.equal(other.output_norm_max_E, layer.output_norm_max_E)
        torch.testing.assert_close(other.output_norm_E, layer.output_norm_E, rtol=1e-12, atol=0)
        torch.testing.assert_close(other.output_sum_EH, layer.output_sum_EH)
    merged.save(tmp_path / "merged")
    works(
        "compress",
        model,
        tmp_path / "out",
        "--profile",
        tmp_path / "merged",
        "--method",
        "random",
        "--keep",
        0.5,
        "--no-report",
    )
