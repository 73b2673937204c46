"""What ships inside the package, so that everything can be tried without a download: a pocket model and demo texts.

The pocket model is a small trained MoE (see `pocket/README.md`). The demo texts are short documents of six domains in
two disjoint splits, `calibration` and `evaluation`: prose, dialogue, Spanish and Dutch were written for this purpose
(their people, firms, films and events are invented), arithmetic is generated from a seed, and code is read from the
running interpreter's own standard library. They are enough to try a command and to compare methods on the pocket model;
they are far too little to calibrate a model that someone will use.

Importing this module loads no torch.
"""

import ast
import json
import sysconfig
from pathlib import Path
from typing import Final, Literal

from coterie.assets import arithmetic
from coterie.errors import DataError, OutputError, UsageError

__all__ = ["DOMAINS", "SPLITS", "demo_texts", "pocket", "write_demo_texts", "write_library_texts"]

Split = Literal["calibration", "evaluation"]

DOMAINS: Final = ("prose", "dialogue", "spanish", "dutch", "arithmetic", "code")
SPLITS: Final[tuple[Split, ...]] = ("calibration", "evaluation")

_FOLDER = Path(__file__).parent
_WRITTEN = DOMAINS[:4]
_VOLUME = {
    "calibration": 17_000,
    "evaluation": 8_900,
}  # characters of arithmetic and of code: what the other domains have
_SEED = {"calibration": 1, "evaluation": 2}
_PROBLEMS_PER_DOCUMENT = 4  # makes documents of about the same length as those of the other domains

# Pure Python, one file each, long enough for their share, and present in every CPython that Coterie supports.
# fmt: off
_MODULES = {
    "calibration": (
        "argparse", "calendar", "csv", "fractions", "heapq", "mailbox", "optparse", "queue", "shlex", "statistics",
        "tarfile", "textwrap",
    ),
    "evaluation": ("cmd", "configparser", "difflib", "functools", "graphlib", "random", "selectors", "tempfile"),
}
# fmt: on


def recipes() -> dict[str, Path]:
    """Recipes that ship with the package, by name."""
    folder = Path(__file__).parent / "recipes"
    return {file.stem: file for file in sorted(folder.glob("*.yaml"))}


def trainings() -> dict[str, Path]:
    """Configs of `coterie train` that ship with the package, by name."""
    folder = Path(__file__).parent / "training"
    return {file.stem: file for file in sorted(folder.glob("*.yaml"))}


def pocket() -> Path:
    """Folder of the pocket model: a Qwen3-MoE checkpoint of 11 M parameters with its tokenizer, 4 layers of 16 experts.

    Load it like any checkpoint: `AutoModelForCausalLM.from_pretrained(pocket())`. The folder belongs to the installed
    package and is not to be written to.
    """
    return _FOLDER / "pocket"


def demo_texts(split: Split) -> list[dict[str, str]]:
    """Documents of all six domains, domain after domain in the order of `DOMAINS`.

    Parameters
    ----------
    split : "calibration" or "evaluation"
        About 17,000 and 9,000 characters per domain, in documents of 500 to 2,000. No document is in both.

    Returns
    -------
    list of dict
        `{"domain": ..., "text": ...}` each. Every call gives the same; `code` depends on the interpreter's version.

    Raises
    ------
    UsageError
        There is no such split.
    DataError
        The interpreter has no standard library in source form to take `code` from.
    """
    if split not in SPLITS:
        raise UsageError(f"no split {split!r} of the demo texts", f"There are {' and '.join(SPLITS)}.")
    documents = [document for domain in _WRITTEN for document in _written(split, domain)]
    documents += [{"domain": "arithmetic", "text": text} for text in _arithmetic(split)]
    documents += [{"domain": "code", "text": text} for text in _code(split)]
    return documents


def write_demo_texts(folder: Path) -> tuple[Path, Path]:
    """Write the demo texts as `folder/calibration/<domain>.jsonl` and `folder/evaluation/<domain>.jsonl`.

    Parameters
    ----------
    folder : Path
        Made if it does not exist. Demo texts that are already there are replaced; other files are left alone.

    Returns
    -------
    tuple of Path
        The calibration and the evaluation folder, as the `--data` option takes them.

    Raises
    ------
    OutputError
        The folder cannot be written.
    DataError
        As `demo_texts`.
    """
    for split in SPLITS:
        documents = demo_texts(split)
        try:
            (folder / split).mkdir(parents=True, exist_ok=True)
            for domain in DOMAINS:
                lines = [json.dumps(d, ensure_ascii=False) + "\n" for d in documents if d["domain"] == domain]
                (folder / split / f"{domain}.jsonl").write_text("".join(lines), encoding="utf-8", newline="\n")
        except OSError as error:
            raise OutputError(
                f"cannot write the demo texts to {folder / split}: {error.strerror or error}", "Choose another folder."
            ) from error
    return folder / SPLITS[0], folder / SPLITS[1]


def write_library_texts(folder: Path) -> tuple[Path, Path]:
    """Text enough to train a small model on: the running interpreter's standard library, several million characters.

    Two domains: `code`, modules without their strings of documentation, and `documentation`, those strings. One module
    in sixteen is for evaluation. Which modules there are depends on the interpreter: what is trained on it can be
    compared on one machine, not between machines.

    Returns
    -------
    tuple of Path
        The training and the evaluation folder, as the `--data` option takes them.

    Raises
    ------
    OutputError
        The folder cannot be written.
    DataError
        The interpreter has no standard library in source form.
    """
    library = Path(sysconfig.get_path("stdlib"))
    names = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "lib2to3", "encodings"}
    files = [f for f in sorted(library.rglob("*.py")) if not names & set(f.relative_to(library).parts[:-1])]
    if len(files) < 50:
        raise DataError(
            f"{len(files)} Python sources in {library}: too few to train on",
            "Use an interpreter that has its standard library as .py files, or pass your own text.",
        )
    for place in ("train", "evaluate"):
        chosen = [file for i, file in enumerate(files) if (i % 16 == 0) == (place == "evaluate")]
        documents = [_code_and_documentation(file) for file in chosen]
        try:
            (folder / place).mkdir(parents=True, exist_ok=True)
            for number, domain in enumerate(("code", "documentation")):
                texts = (parts[number] for parts in documents if len(parts[number]) > 200)
                lines = [json.dumps({"domain": domain, "text": text}, ensure_ascii=False) + "\n" for text in texts]
                (folder / place / f"{domain}.jsonl").write_text("".join(lines), encoding="utf-8", newline="\n")
        except OSError as error:
            raise OutputError(f"cannot write texts to {folder / place}: {error.strerror or error}") from error
    return folder / "train", folder / "evaluate"


def _code_and_documentation(file: Path) -> tuple[str, str]:
    """A module's lines outside of its documentation strings, and these strings; of one that does not parse, its lines
    alone."""
    source = file.read_text(encoding="utf-8", errors="replace")
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return source, ""
    lines, strings = source.splitlines(keepends=True), []
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node)
            if text:
                strings.append(text)
                string: ast.stmt = node.body[0]
                for number in range(string.lineno - 1, string.end_lineno or string.lineno):
                    lines[number] = ""
    return "".join(lines), "\n\n".join(strings)


def _written(split: Split, domain: str) -> list[dict[str, str]]:
    """The documents of one file of the package."""
    with (_FOLDER / "text" / split / f"{domain}.jsonl").open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def _arithmetic(split: Split) -> list[str]:
    """Word problems, several to a document. The evaluation split avoids all problems of the calibration split."""
    known: list[str] = []
    if split == "evaluation":
        known = arithmetic.generate(_SEED["calibration"], _VOLUME["calibration"])
    problems = arithmetic.generate(_SEED[split], _VOLUME[split], known)
    starts = range(0, len(problems) - _PROBLEMS_PER_DOCUMENT + 1, _PROBLEMS_PER_DOCUMENT)
    return ["\n\n".join(problems[i : i + _PROBLEMS_PER_DOCUMENT]) + "\n" for i in starts]


def _code(split: Split) -> list[str]:
    """One stretch of whole lines per module, verbatim, from its first top-level definition on."""
    library = Path(sysconfig.get_path("stdlib"))
    files = [file for name in _MODULES[split] if (file := library / f"{name}.py").is_file()]
    if not files:
        raise DataError(
            f"no Python source in {library}: the code domain of the demo texts is read from the standard library",
            "Use an interpreter that has its standard library as .py files, or pass your own text.",
        )
    share = _VOLUME[split] // len(files)
    return [_stretch(file.read_text(encoding="utf-8"), share) for file in files]


def _stretch(source: str, size: int) -> str:
    """Whole lines of a module, `size` characters or part of a line more; the header with its history is left out."""
    lines = source.splitlines(keepends=True)
    first = next((i for i, line in enumerate(lines) if line.startswith(("def ", "class "))), 0)
    text = ""
    for line in lines[first:]:
        if len(text) >= size:
            break
        text += line
    return text
