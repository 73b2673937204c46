"""The documentation says what the program does: commands parse, links resolve, generated pages are up to date."""

import importlib.util
import itertools
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from coterie.cli.common import all_verbs, parse_set, verb_first
from coterie.cli.main import app
from coterie.compression.methods import get_method
from coterie.profiling.observers import OBSERVERS
from inprocess import cli

ROOT = Path(__file__).parent.parent
GENERATED = ("methods", "parts", "statistics", "cli", "architectures", "reproductions")
HANDS = ("shrink", "quantize", "combine", "specialise", "understand", "train")
WRITTEN = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", *(f"docs/{name}.md" for name in HANDS))
PAGES = (*WRITTEN, *(f"docs/{name}.md" for name in GENERATED), "benchmarks/README.md")
FOLLOWED = ("README.md", *(f"docs/{name}.md" for name in HANDS))
VERBS = all_verbs(app)


pytestmark = pytest.mark.usefixtures("one_thread_each")


def read(page):
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page):
    """(language, text) of every fenced block."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", read(page), re.DOTALL | re.MULTILINE)


def outside_blocks(page):
    return re.sub(r"^```.*?^```$", "", read(page), flags=re.DOTALL | re.MULTILINE)


def steps(page):
    """What a reader does, in order: (words after `coterie`, printed lines) or (source of a Python block, None)."""
    variables = {}
    for language, text in blocks(page):
        if language == "python":
            yield text, None
        prompt = {"console": "$ ", "sh": ""}.get(language)
        lines = text.splitlines() if prompt is not None else []
        for number, line in enumerate(lines):
            words = shlex.split(line.removeprefix(prompt), comments=True) if line.startswith(prompt) else []
            if len(words) == 1 and re.fullmatch(r"[A-Z_]+=\S+", words[0]):
                variables.update([words[0].split("=", 1)])
            elif words and words[0] == "coterie":
                output = itertools.takewhile(lambda below: not below.startswith("$ "), lines[number + 1 :])
                yield [filled(word, variables) for word in words[1:]], list(output)


def filled(word, variables):
    return re.sub(r"\$([A-Z_]+)", lambda found: variables[found[1]], word)


def commands(page):
    """(words after `coterie`, printed lines) of every command a page shows."""
    return [(words, output) for words, output in steps(page) if output is not None]


def parsed(words):
    """The parameters a verb receives. Raises what the command line itself raises."""
    verb, rest = split(verb_first(list(words)))
    assert verb in VERBS, f"no verb {verb!r}"
    return VERBS[verb].make_context(verb, rest).params


def split(words):
    """(verb, the rest): some verbs are two words."""
    length = 2 if " ".join(words[:2]) in VERBS else 1
    return " ".join(words[:length]), words[length:]


def inline(page):
    return re.findall(r"`([^`\n]+)`", outside_blocks(page))


@pytest.mark.parametrize("page", WRITTEN)
def test_every_command_shown_is_one_the_program_takes(page):
    for words, _ in commands(page):
        given = parsed(words)
        if isinstance(given.get("method"), str):
            get_method(given["method"], parse_set(list(given.get("parameters") or ())))


def test_the_pages_that_teach_show_commands():
    shown = {page: [words[0] for words, _ in commands(page)] for page in FOLLOWED}
    assert {"inspect", "compress", "evaluate"} <= set(shown["README.md"])
    assert {"inspect", "compress", "evaluate", "profile", "plan", "methods"} <= set(shown["docs/shrink.md"])
    assert {"inspect", "profile"} <= set(shown["docs/understand.md"])


@pytest.mark.parametrize("page", [*WRITTEN, "docs/cli.md", "docs/methods.md", "docs/statistics.md"])
def test_every_verb_and_option_named_in_running_text_exists(page):
    options = {name for verb in VERBS.values() for p in verb.params for name in (*p.opts, *p.secondary_opts)}
    for text in inline(page):
        words = text.split()
        if words[0] == "coterie" and len(words) > 1 and not words[1].startswith("-") and words[1] != "VERB":
            verb, rest = split(words[1:])
            groups = {name.split()[0] for name in VERBS if " " in name}
            assert verb in VERBS or verb in groups, text
            own = {n for p in VERBS[verb].params for n in (*p.opts, *p.secondary_opts)} if verb in VERBS else set()
            assert {w for w in rest if w.startswith("--")} <= own | {"--help"}, text
        elif words[0].startswith("--"):
            assert words[0] in options, text
            for observer in [b for a, b in itertools.pairwise(words) if a == "--observe" and b != "NAME"]:
                assert observer in OBSERVERS, text


def anchors(page):
    """The fragments of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```$", "", page, flags=re.DOTALL | re.MULTILINE), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES)
def test_every_internal_link_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", outside_blocks(page)):
        if target.startswith(("http://", "https://")):
            continue
        name, _, fragment = target.partition("#")
        file = (ROOT / page).parent / name if name else ROOT / page
        assert file.exists(), f"{page} links to {target}"
        assert file.resolve().is_relative_to(ROOT.resolve()), f"{page} links to {target}"
        if fragment:
            assert fragment in anchors(file.read_text(encoding="utf-8")), f"{page} links to {target}"


@pytest.mark.parametrize("page", WRITTEN)
def test_every_script_named_in_running_text_is_there(page):
    for text in inline(page):
        if re.fullmatch(r"(benchmarks|reproductions|docs|tests|src)/[\w/.]+\.(py|md)", text) and "ean_ca" not in text:
            assert (ROOT / text).exists(), f"{page} names {text}"


def test_what_inspect_prints_is_what_the_pages_show():
    printed = [" ".join(line.split()) for line in cli("inspect", ROOT / "src/coterie/assets/pocket").out.splitlines()]
    shown = 0
    for page in FOLLOWED:
        for words, output in commands(page):
            if words[0] == "inspect":
                lines = [" ".join(line.split()) for line in output if line.strip()]
                assert [line for line in lines if line not in printed] == []
                shown += len(lines)
    assert shown


def test_the_readme_counts_architectures_as_the_generated_page_does():
    counts = re.search(r"(\d+ of \d+) work", read("docs/architectures.md"))[1]
    assert f"[{counts} work](docs/architectures.md)" in read("README.md")


def test_the_floors_described_are_the_floors_checked():
    contract = tomllib.loads(read("pyproject.toml"))["tool"]["importlinter"]["contracts"][0]
    floors = " > ".join(layer.replace("coterie.", "").replace(" | ", ", ") for layer in contract["layers"])
    assert floors in read("CONTRIBUTING.md")


def test_the_readme_is_short():
    assert len(read("README.md").splitlines()) <= 150


# -- generated pages ---------------------------------------------------------------------------------------------------


def generator():
    spec = importlib.util.spec_from_file_location("generate_docs", ROOT / "docs/generate.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # pydantic looks annotations up there
    spec.loader.exec_module(module)
    return module


def generate(*arguments, **environment):
    """In a process of its own, where no other test has registered a method."""
    command = [sys.executable, str(ROOT / "docs/generate.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})


def test_generated_pages_are_up_to_date_whatever_the_terminal():
    done = generate("--check", "methods", "statistics", "cli", COLUMNS="40", TERMINAL_WIDTH="40")
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_architectures_page_is_up_to_date():
    done = generate("--check", "architectures")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", GENERATED)
def test_a_generated_page_says_so_in_its_first_line(name):
    first = read(f"docs/{name}.md").splitlines()[0]
    assert "Generated by `python docs/generate.py`" in first


def test_a_stale_page_is_named_with_what_differs_and_what_to_do(tmp_path, monkeypatch, capsys):
    module = generator()
    monkeypatch.setattr(module, "DOCS", tmp_path)
    assert module.main(["--check", "statistics"]) == 1
    assert "docs/statistics.md is missing: run `python docs/generate.py`" in capsys.readouterr().err
    assert module.main(["statistics"]) == 0
    assert module.main(["--check", "statistics"]) == 0
    file = tmp_path / "statistics.md"
    file.write_text(file.read_text().replace("# Statistics", "# Numbers"))
    capsys.readouterr()
    assert module.main(["--check", "statistics"]) == 1
    message = capsys.readouterr().err
    assert "docs/statistics.md is stale: run `python docs/generate.py`" in message
    assert "-# Numbers" in message
    assert "+# Statistics" in message


def test_every_method_statistic_and_option_is_on_its_page():
    methods_page, statistics_page, cli_page = (read(f"docs/{n}.md") for n in ("methods", "statistics", "cli"))
    for name in ("dern", "ean", "frequency", "random", "reap", "soft-frequency"):
        assert f"\n## {name}\n" in methods_page
    for observer in OBSERVERS.values():
        assert f"\n## {observer.__name__}\n" in statistics_page
        assert all(f"| `{field}` |" in statistics_page for field in observer.fields)
    for verb, command in VERBS.items():
        assert f"\n## coterie {verb}\n" in cli_page
        names = [n for p in command.params if p.param_type_name == "option" for n in (*p.opts, *p.secondary_opts)]
        assert all(f"`{name}`" in cli_page for name in names)


RESULT = {
    "slug": "reap",
    "title": "REAP: pruned | kept",
    "claim": "It loses less.",
    "published": "1.0 against 2.0",
    "rule": "reproduced if lower",
    "columns": ["method", "loss"],
    "rows": [{"method": "reap", "loss": 0.25}, {"method": "random", "loss": 0.5}],
    "verdict": "reproduced",
    "command": "python reproductions/reap.py",
    "versions": {"coterie": "0.1.0"},
    "seeds": [0, 1, 2],
}


def test_reproductions_are_shown_as_recorded(tmp_path):
    module = generator()
    assert "No result was recorded yet." in module.reproductions_page(tmp_path)
    (tmp_path / "reap.json").write_text(json.dumps(RESULT))
    shown = module.reproductions_page(tmp_path)
    assert "Verdict: **reproduced**" in shown
    assert "| reap | 0.250 |" in shown
    assert "seeds: 0, 1, 2; coterie: 0.1.0" in shown
    assert "No result" not in shown


def test_a_file_that_is_no_result_is_named(tmp_path):
    module = generator()
    (tmp_path / "bad.json").write_text(json.dumps({**RESULT, "rule": None}))
    with pytest.raises(SystemExit, match=r"bad\.json.*(\n.*)*rule"):
        module.reproductions_page(tmp_path)


# -- the pages as a reader follows them --------------------------------------------------------------------------------


def test_the_python_of_the_readme_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    source = next(text for language, text in blocks("README.md") if language == "python" and "coterie" in text)
    smaller = (
        source.replace("length=256", "length=128").replace("samples=16", "samples=2").replace("samples=8", "samples=2")
    )
    assert smaller != source
    exec(smaller, {})
    assert "KL" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("page", FOLLOWED)
def test_a_page_can_be_followed_from_top_to_bottom(page, tmp_path, monkeypatch):
    """Every command and Python block, in order, as in a clone after `make demo`; an error is one the page shows."""
    from coterie.assets import write_demo_texts

    (tmp_path / "src").symlink_to(ROOT / "src")
    write_demo_texts(tmp_path / "coterie-demo/text")
    monkeypatch.chdir(tmp_path)
    names = {}
    for what, output in steps(page):
        if output is None:
            exec(what, names)
            continue
        done = cli(*what)
        refused = bool(output) and output[0].startswith("coterie ")
        assert done.code == (2 if refused else 0), (what, done.err)
        if refused:
            assert output[0] in done.err
