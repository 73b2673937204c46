"""Do readers of the previous generation (transformers 4.57) see the right number of experts in what we write?

What it measures
    transformers 5 spells the number of experts `num_local_experts` for families whose readers knew it as
    `num_experts`; an older reader that does not find its key falls back to a default (128 for Qwen3-MoE) without a
    word. For tiny random Qwen3-MoE, OLMoE, Mixtral and DeepSeek-V3 checkpoints: the count that transformers 4.57's
    config class reads from our config.json, beside the count of the tensors on disk. Two control rows per family do
    the same with the unpruned checkpoint, once as plain transformers 5 saves it and once as Coterie copies it at
    keep 1.0; they show whether the trap is there at all. With --load the old reader also loads every checkpoint with
    its weights and runs it.

Why it is fair
    The old reader is the released package in its own environment; the count on disk is taken from the tensors' names,
    not from any config. Models come from the current transformers' own classes.

Run
    python benchmarks/old_readers.py                             # a minute; no torch in the old environment
    python benchmarks/old_readers.py --load                      # also loads and runs; installs torch there
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

from common import (
    TORCH_PIN,
    Workplace,
    common_options,
    coterie_command,
    ensure_venv,
    finish,
    machine,
    measure,
    print_machine,
    read_headers,
    table,
    tail,
    thread_environment,
    versions,
    write_tokens,
)

OLD = "transformers==4.57.*"
EXPERTS, VOCABULARY = 8, 256
FAMILIES = ("qwen3_moe", "olmoe", "mixtral", "deepseek_v3")
COUNT_NAMES = ("num_experts", "num_local_experts", "n_routed_experts")


def run_make(spec: dict[str, Any]) -> None:
    """Current transformers: save a tiny random model of each family."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    common = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 256,
        "num_experts_per_tok": 2,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    own: dict[str, dict[str, Any]] = {
        "qwen3_moe": {"num_experts": EXPERTS, "moe_intermediate_size": 32, "head_dim": 16},
        "olmoe": {"num_experts": EXPERTS},
        "mixtral": {"num_local_experts": EXPERTS},
        "deepseek_v3": {
            "n_routed_experts": EXPERTS,
            "moe_intermediate_size": 32,
            "first_k_dense_replace": 1,
            "n_group": 2,
            "topk_group": 1,
            "q_lora_rank": 32,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 16,
        },
    }
    for family in FAMILIES:
        torch.manual_seed(spec["seed"])
        config = AutoConfig.for_model(family, **common, **own[family])
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(Path(spec["folder"]) / family)


def run_read(spec: dict[str, Any]) -> None:
    """The old reader: what its config class says, and what loading does if asked to. Prints JSON."""
    from transformers import AutoConfig

    read: dict[str, Any] = {}
    for name, folder in spec["folders"].items():
        answer: dict[str, Any] = {}
        try:
            config = AutoConfig.from_pretrained(folder)
            counts = (getattr(config, name, None) for name in COUNT_NAMES)
            answer["count"] = next((count for count in counts if isinstance(count, int)), None)
            answer["class"] = type(config).__name__
        except Exception as error:  # a reader that fails is a result
            answer["error"] = _line(error)
        if spec["load"]:
            try:
                answer["load"] = _load(folder)
            except Exception as error:
                answer["load"] = _line(error)
        read[name] = answer
    print("READ " + json.dumps(read))


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:80]}"


def _load(folder: str) -> str:
    """'' if every weight found its place and the model runs, else what went wrong."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    wrong = [f"{len(info[kind])} {kind.replace('_', ' ')}" for kind in info if info[kind]]
    if wrong:
        return ", ".join(wrong)
    with torch.no_grad():
        logits = model(torch.arange(16)[None]).logits
    return "" if bool(logits.isfinite().all()) else "logits are not finite"


ROLES = {"make": run_make, "read": run_read}


def counted(folder: Path) -> int | None:
    """Experts on disk: the highest expert number in the tensor names plus one, or the first axis of fused tensors."""
    headers = read_headers(folder)
    numbers = [int(m[1]) for name in headers if (m := re.search(r"\.experts\.(\d+)\.", name))]
    if numbers:
        return max(numbers) + 1
    fused = [entry["shape"][0] for name, entry in headers.items() if ".experts." in name and len(entry["shape"]) == 3]
    return fused[0] if fused else None


def main(arguments: list[str]) -> int:
    """Run the benchmark; 1 if the old reader miscounts anything that Coterie wrote."""
    if arguments and arguments[0].startswith("--as-"):
        ROLES[arguments[0][5:]](json.loads(arguments[1]))
        return 0
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common_options(parser)
    parser.add_argument("--load", action="store_true", help="the old reader also loads the weights and runs the model")
    options = parser.parse_args(arguments)

    facts = machine()
    print_machine(facts)
    requirements = (OLD, TORCH_PIN) if options.load else (OLD,)
    old = ensure_venv("transformers-4.57" + ("-torch" if options.load else ""), requirements, options.cache)
    ours = Path(sys.executable)
    names = ("coterie", "transformers", "torch")
    installed = {"old": versions(old, names), "ours": versions(ours, names)}
    for side, packages in installed.items():
        print(f"{side}:", ", ".join(f"{k} {v}" for k, v in packages.items()))
    environment = thread_environment(options.threads)

    with Workplace(options, "old-readers") as work:
        run = measure(
            [ours, __file__, "--as-make", json.dumps({"folder": str(work), "seed": options.seed})],
            log=work / "make.log",
            environment=environment,
        )
        if run.returncode:
            raise SystemExit(f"making the models failed:\n{tail(run.log)}")
        tokens = work / "tokens.safetensors"
        write_tokens(tokens, vocabulary=VOCABULARY, samples=4, length=64, seed=options.seed)
        command = coterie_command()
        if command is None:
            print("no `coterie` command beside this Python or on PATH: control rows only")
        folders: dict[str, Path] = {}
        failures: dict[str, str] = {}
        for family in FAMILIES:
            folders[f"{family}, plain transformers"] = work / family
            for keep in (1.0, 0.5) if command else ():
                name, output = f"{family}, coterie keep {keep:g}", work / f"{family}-{keep:g}"
                run = measure(
                    [
                        *command,  # type: ignore[misc]
                        *("compress", work / family, output, "--method", "reap", "--keep", str(keep)),
                        *("--tokens", tokens, "--threads", str(options.threads)),
                    ],
                    log=work / f"{family}-{keep:g}.log",
                    environment=environment,
                )
                if run.returncode:
                    failures[name] = tail(run.log)
                else:
                    folders[name] = output
        spec = {"folders": {name: str(folder) for name, folder in folders.items()}, "load": options.load}
        run = measure([old, __file__, "--as-read", json.dumps(spec)], log=work / "read.log", environment=environment)
        lines = [x for x in Path(run.log).read_text(errors="replace").splitlines() if x.startswith("READ ")]
        if not lines:
            raise SystemExit(f"the old reader failed:\n{tail(run.log)}")
        answers = json.loads(lines[0][5:])
        results = {}
        for name, folder in folders.items():
            raw = json.loads((folder / "config.json").read_text())
            keys = {key: raw[key] for key in COUNT_NAMES if key in raw}
            disk, answer = counted(folder), answers[name]
            right = "error" not in answer and answer["count"] == disk and not answer.get("load")
            results[name] = {**answer, "disk": disk, "keys": keys, "right": right}

    rows = [
        (
            name,
            ", ".join(f"{k}={v}" for k, v in r["keys"].items()),
            r["disk"],
            r.get("error", r.get("count")),
            *((("ok" if r.get("load") == "" else r.get("load", "-")),) if options.load else ()),
            "yes" if r["right"] else "NO",
        )
        for name, r in results.items()
    ]
    loads = ("loads",) if options.load else ()
    header = ("checkpoint", "config.json says", "on disk", f"{installed['old']['transformers']} reads", *loads, "right")
    print("\n" + table(header, rows))
    for name, note in failures.items():
        print(f"\n{name} was not written:\n{note}")
    mine = {name: r["right"] for name, r in results.items() if "coterie" in name}
    good = bool(mine) and all(mine.values()) and not failures
    if mine or failures:
        print(f"\nwhat Coterie wrote is counted right by the old reader: {'yes' if good else 'NO'}")
    finish(
        {
            "benchmark": "old_readers",
            "machine": facts,
            "versions": installed,
            "results": results,
            "failures": failures,
            "right": good,
        },
        options.json,
    )
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
