"""The pocket model and the demo texts keep what they promise: sizes, disjoint splits, right sums."""

import json
import re
import subprocess
import sys
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import get_args

import pytest

from coterie import assets
from coterie.assets import DOMAINS, SPLITS, arithmetic, demo_texts, pocket, write_demo_texts
from coterie.errors import DataError, OutputError, UsageError

VOLUME = {"calibration": (16_000, 20_000), "evaluation": (8_000, 10_000)}
FIRST_OF_SEED_7 = (
    "Question: In the garden Clara plants 8 rows of 14 pumpkins and then 24 carrots. "
    "How many vegetables are there in the garden?\n"
    "Answer: The rows hold 8 * 14 = 112 pumpkins.\n"
    "With the carrots there are 112 + 24 = 136 vegetables.\n"
    "#### 136"
)
# The same problems solved a second time, from the numbers of the question in their order (words like "twice" included).
SOLUTIONS = {
    "full_containers": lambda count, each: count * each,
    "ages": lambda age, difference: age - difference,
    "pages_per_day": lambda pages, days: pages // days,
    "three_sums_of_money": lambda *prices: sum(prices),
    "given_away": lambda count, each, given: count * each - given,
    "shared_with_friends": lambda mine, other, friends: (mine + other) // friends,
    "change_from_a_note": lambda count, price, note: note - count * price,
    "rows_of_vegetables": lambda rows, each, more: rows * each + more,
    "train_ride": lambda first, second, speed: first * speed + second * speed,
    "fewer_than": lambda many, fewer: 2 * many - fewer,
    "half_of_the_audience": lambda rows, each: rows * (each // 2),
    "remaining_distance": lambda way, daily, days: way - daily * days,
    "eggs_in_boxes": lambda eggs, broken, size: (eggs - broken) // size,
    "twice_as_heavy": lambda factor, weight: (factor + 1) * weight,
    "wages_and_bicycle": lambda hours, wage, weeks, spent: hours * wage * weeks - spent,
    "two_kinds_of_ticket": lambda adult, child, adults, children: adult * adults + child * children,
    "water_tank": lambda start, inflow, outflow, minutes: start + inflow * minutes - outflow * minutes,
    "three_children": lambda base, factor, more: base * (1 + 2 * factor) + more,
    "bakery_day": lambda trays, each, price, unsold: (trays * each - unsold) * price,
    "fence": lambda length, width, price: 2 * length * price + 2 * width * price,
    "buses_for_a_trip": lambda schools, each, teachers, seats: (schools * each + teachers) // seats,
    "saving_for_something": lambda price, months, saved, gift: price - months * saved - gift,
    "ribbon": lambda rolls, roll, pieces, piece: rolls * roll - pieces * piece,
    "average_score": lambda first, second, third: (first + second + third) // 3,
}
FACTORS = {"twice": "2", "three times": "3", "four times": "4", "five times": "5"}
EQUATION = re.compile(r"\d+(?: [-+*/] \d+)+ = \d+")


def sentences(text: str) -> set[str]:
    return {part.strip() for part in re.split(r"(?<=[.?!])\s|\n", text) if len(part.strip()) >= 40}


def evaluate(expression: str) -> Fraction:
    """Left to right, which is right for the terms the generator writes: they never mix * and +."""
    first, *rest = expression.split(" ")
    value = Fraction(first)
    for sign, number in zip(rest[::2], rest[1::2], strict=True):
        term = Fraction(number)
        value = {"+": value + term, "-": value - term, "*": value * term, "/": value / term}[sign]
    return value


def test_import_loads_no_torch():
    program = "import sys, coterie.assets; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_assets_fit_in_24_mebibytes():
    folder = Path(assets.__file__).parent
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) <= 24 * 2**20


def test_pocket_is_a_complete_checkpoint_with_both_names_of_the_expert_count():
    names = {file.name for file in pocket().iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "README.md"} <= names
    config = json.loads((pocket() / "config.json").read_text(encoding="utf-8"))
    assert config["num_experts"] == config["num_local_experts"] == 16


def test_pocket_weights_are_bfloat16_for_16_experts():
    from safetensors import safe_open

    with safe_open(pocket() / "model.safetensors", framework="pt") as weights:
        slices = {name: weights.get_slice(name) for name in weights.keys()}  # noqa: SIM118 (not a dict)
        assert {slice_.get_dtype() for slice_ in slices.values()} == {"BF16"}
        experts = {int(found[1]) for name in slices if (found := re.search(r"experts\.(\d+)\.", name))}
    assert experts == set(range(16))


def test_pocket_has_learned_the_demo_texts_domains():
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(pocket())
    model = AutoModelForCausalLM.from_pretrained(pocket(), dtype=torch.float32).eval()
    for domain in DOMAINS:
        texts = [d["text"] for d in demo_texts("evaluation") if d["domain"] == domain]
        ids_T = [token for text in texts for token in (0, *tokenizer(text)["input_ids"])]
        ids_BL = torch.tensor(ids_T[: 4 * 256]).view(4, 256)
        with torch.no_grad():
            loss = model(input_ids=ids_BL, labels=ids_BL).loss.item()
        assert loss < 6.0, domain  # guessing among 4096 tokens costs 8.3


@pytest.mark.parametrize("split", SPLITS)
def test_every_domain_is_there_in_the_promised_volume(split):
    volume, sizes = Counter(), Counter()
    for document in demo_texts(split):
        assert set(document) == {"domain", "text"}
        assert 500 <= len(document["text"]) <= 2000
        volume[document["domain"]] += len(document["text"].encode())
        sizes[document["domain"]] += 1
    assert set(volume) == set(DOMAINS)
    low, high = VOLUME[split]
    assert all(low <= bytes_ <= high for bytes_ in volume.values()), volume
    assert all(number >= 8 for number in sizes.values()), sizes


@pytest.mark.parametrize("split", SPLITS)
def test_every_line_of_the_files_parses(split):
    for file in sorted((Path(assets.__file__).parent / "text" / split).glob("*.jsonl")):
        for line in file.read_text(encoding="utf-8").splitlines():
            document = json.loads(line)
            assert document["domain"] == file.stem
            assert document["text"] == document["text"].strip()


def test_splits_share_no_document_and_no_sentence():
    for domain in DOMAINS:
        calibration, evaluation = ([d["text"] for d in demo_texts(s) if d["domain"] == domain] for s in SPLITS)
        assert not set(calibration) & set(evaluation)
        assert len(set(calibration + evaluation)) == len(calibration + evaluation)
        if domain in ("prose", "dialogue", "spanish", "dutch"):
            assert not set().union(*map(sentences, calibration)) & set().union(*map(sentences, evaluation))


def test_splits_share_no_arithmetic_problem():
    calibration, evaluation = (
        [p.strip() for d in demo_texts(s) if d["domain"] == "arithmetic" for p in d["text"].split("\n\n")]
        for s in SPLITS
    )
    assert len(set(calibration + evaluation)) == len(calibration + evaluation)


@pytest.mark.parametrize("split", SPLITS)
def test_demo_texts_are_the_same_every_time(split):
    assert demo_texts(split) == demo_texts(split)


def test_arithmetic_of_a_seed_never_changes():
    assert arithmetic.generate(7, 1)[0] == FIRST_OF_SEED_7


@pytest.mark.parametrize("make", arithmetic.TEMPLATES, ids=lambda make: make.__name__)
def test_worked_answers_are_right(make):
    draws = arithmetic.Draws(11)
    for _ in range(300):
        problem = make(draws)
        given = {int(n) for n in re.findall(r"\d+", problem.question)}
        assert 1 <= len(problem.steps) <= 3
        for step in problem.steps:
            (equation,) = EQUATION.findall(step)
            left, right = equation.split(" = ")
            assert evaluate(left) == int(right)
            assert int(right) > 0
            given.add(int(right))
        assert problem.result == int(right)
        assert str(problem).endswith(f"\n#### {problem.result}")
        assert all(n > 0 for n in given)


@pytest.mark.parametrize("make", arithmetic.TEMPLATES, ids=lambda make: make.__name__)
def test_results_answer_the_question(make):
    draws = arithmetic.Draws(13)
    for _ in range(300):
        problem = make(draws)
        question = problem.question
        for word, digit in FACTORS.items():
            question = question.replace(word, digit)
        numbers = [int(n) for n in re.findall(r"\d+", question)]
        assert problem.result == SOLUTIONS[make.__name__](*numbers), str(problem)


@pytest.mark.parametrize("make", arithmetic.TEMPLATES, ids=lambda make: make.__name__)
def test_worked_answers_use_only_known_numbers(make):
    """Every operand was given in the question or computed in an earlier step; 2 halves and doubles, 3 averages."""
    draws = arithmetic.Draws(12)
    words = {"twice": 2, "half": 2, "three": 3, "four": 4, "five": 5, "long": 2}
    for _ in range(300):
        problem = make(draws)
        known = {int(n) for n in re.findall(r"\d+", problem.question)}
        known |= {number for word, number in words.items() if word in problem.question}
        for step in problem.steps:
            left, right = EQUATION.findall(step)[0].split(" = ")
            assert {int(n) for n in re.findall(r"\d+", left)} <= known, str(problem)
            known.add(int(right))


@pytest.mark.parametrize("split", SPLITS)
def test_the_demo_texts_use_every_arithmetic_template(split, monkeypatch):
    used = Counter()

    def counted(make):
        def draw(draws):
            used[make.__name__] += 1
            return make(draws)

        return draw

    names = {make.__name__ for make in arithmetic.TEMPLATES}
    monkeypatch.setattr(arithmetic, "TEMPLATES", [counted(make) for make in arithmetic.TEMPLATES])
    arithmetic.generate(assets._SEED[split], assets._VOLUME[split])
    assert set(used) == names
    assert max(used.values()) - min(used.values()) <= 1


def test_known_problems_are_not_generated_again():
    first = arithmetic.generate(3, 2000)
    assert not set(first) & set(arithmetic.generate(3, 2000, known=first))


def test_an_inexact_division_is_refused():
    with pytest.raises(ArithmeticError):
        arithmetic.over(7, 2)


def test_code_is_verbatim_from_the_standard_library():
    import sysconfig

    library = Path(sysconfig.get_path("stdlib"))
    sources = {
        name: (library / f"{name}.py").read_text(encoding="utf-8")
        for names in assets._MODULES.values()
        for name in names
    }
    for split in SPLITS:
        texts = [d["text"] for d in demo_texts(split) if d["domain"] == "code"]
        assert len(texts) == len(assets._MODULES[split])
        for name, text in zip(assets._MODULES[split], texts, strict=True):
            assert text in sources[name]
    assert not set(assets._MODULES["calibration"]) & set(assets._MODULES["evaluation"])


def test_missing_modules_are_replaced_by_more_of_the_others(tmp_path, monkeypatch):
    for name in assets._MODULES["evaluation"][:5]:
        (tmp_path / f"{name}.py").write_text(f"# {name}\ndef f():\n" + "    pass\n" * 500, encoding="utf-8")
    monkeypatch.setattr(assets.sysconfig, "get_path", lambda _: str(tmp_path))
    texts = assets._code("evaluation")
    assert len(texts) == 5
    assert 8_000 <= sum(map(len, texts)) <= 10_000
    assert all(text.startswith("def f") for text in texts)


def test_an_interpreter_without_sources_is_a_data_error(tmp_path, monkeypatch):
    monkeypatch.setattr(assets.sysconfig, "get_path", lambda _: str(tmp_path))
    with pytest.raises(DataError, match="standard library"):
        demo_texts("calibration")


def test_an_unknown_split_is_a_usage_error():
    with pytest.raises(UsageError, match="train"):
        demo_texts("train")
    assert get_args(assets.Split) == SPLITS


def test_written_files_hold_the_demo_texts(tmp_path):
    folders = write_demo_texts(tmp_path / "new" / "demo")
    assert folders == (tmp_path / "new" / "demo" / "calibration", tmp_path / "new" / "demo" / "evaluation")
    write_demo_texts(tmp_path / "new" / "demo")  # a second time replaces them
    for split, folder in zip(SPLITS, folders, strict=True):
        assert {file.name for file in folder.iterdir()} == {f"{domain}.jsonl" for domain in DOMAINS}
        lines = [line for d in DOMAINS for line in (folder / f"{d}.jsonl").read_text(encoding="utf-8").splitlines()]
        assert [json.loads(line) for line in lines] == demo_texts(split)
    assert "\\u" not in (folders[0] / "spanish.jsonl").read_text(encoding="utf-8")


def test_a_folder_that_cannot_be_written_is_an_output_error(tmp_path):
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    with pytest.raises(OutputError, match="calibration"):
        write_demo_texts(tmp_path / "file")
