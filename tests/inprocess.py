"""The command line called inside a process: this one (no import costs), or a forked one that may be killed.

`cli(...)` runs `coterie.cli.main.main()` here and returns code, stdout and stderr. `start(...)` runs a function of a
test module in a child of a server process that has imported everything already: a real process, ready in a moment,
that can be killed by a signal and limited in memory.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import multiprocessing
import resource
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_PRELOAD = [
    "pytest",
    "torch",
    "pyarrow.parquet",
    "coterie.cli.main",
    "coterie.demo",
    "transformers.models.qwen3_moe.modeling_qwen3_moe",
    "transformers.models.deepseek_v3.modeling_deepseek_v3",
]
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(_PRELOAD)


@dataclass
class Outcome:
    """What a call ended with; an escaped exception is in `err` as a traceback."""

    code: int
    out: str
    err: str

    def json(self) -> Any:
        """Standard output, which must be one strict JSON document."""
        return json.loads(self.out, parse_constant=_not_json)


def _not_json(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def cli(*arguments: object) -> Outcome:
    """`coterie ARGUMENTS` in this process."""
    from coterie.cli import main

    out, err, before, code = io.StringIO(), io.StringIO(), sys.argv, 0
    sys.argv = ["coterie", *map(str, arguments)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                main.main()
            except SystemExit as exit_:
                code = exit_.code if isinstance(exit_.code, int) else int(exit_.code is not None)
            except BaseException:
                code = 1
                traceback.print_exc()
    finally:
        sys.argv = before
    return Outcome(code, out.getvalue(), err.getvalue())


def start(function: Callable[..., None], *arguments: object) -> Any:
    """Run a function in a forked child; returns the started process."""
    process = _context.Process(target=_child, args=(function, arguments), daemon=True)
    process.start()
    return process


def _child(function: Callable[..., None], arguments: tuple[object, ...]) -> None:
    import torch

    torch.set_num_threads(1)
    function(*arguments)


def limited(*arguments: object, seconds: float = 60, extra: int = 2 * 2**30) -> Outcome:
    """`coterie ARGUMENTS` in a child that may take `extra` bytes of address space and so many seconds.

    A call that needs more fails the test that made it.
    """
    receiver, sender = _context.Pipe(duplex=False)
    process = start(_limited, sender, extra, tuple(map(str, arguments)))
    sender.close()
    try:
        assert receiver.poll(seconds), f"not finished after {seconds} s: {arguments}"
        return receiver.recv()
    except EOFError:
        process.join()
        raise AssertionError(f"died with {process.exitcode}: {arguments}") from None
    finally:
        process.kill()
        process.join()


def _limited(sender: Any, extra: int, arguments: tuple[str, ...]) -> None:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + extra, used + extra))
    sender.send(cli(*arguments))


def until(condition: Callable[[], bool], seconds: float = 60) -> None:
    """Wait for something another process does."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not seen within {seconds} s"
        time.sleep(0.005)


def fingerprint(folder: Path, *, without: tuple[str, ...] = ()) -> dict[str, str]:
    """Names and digests of all files of a folder."""
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name not in without
    }


def copy_of(folder: Path, target: Path) -> Path:
    """A private copy of a checkpoint that a test may damage."""
    import shutil

    return Path(shutil.copytree(folder, target))
