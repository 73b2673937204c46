"""A killed compression, started again, goes on after its last whole layer and ends with the very same bytes.

All runs are processes of their own. They are killed from outside at random moments, and from inside at every moment
that matters: behind each line of the journal, and at each step of giving the finished folder its name.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from families import saved, token_file
from inprocess import cli, fingerprint, start, until

KILLED = 9
MODES = ("reap", "plan", "dern", "propagate", "global")
SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-moe": {"num_hidden_layers": 5},  # layer 1 is dense
    "deepseek-v3": {"num_hidden_layers": 4},  # layer 0 is dense, groups, shared experts, router biases
}
MOE = {"qwen3-moe": [0, 2, 3, 4], "deepseek-v3": [1, 2, 3]}


# -- what runs in the children ------------------------------------------------------------------------------------


def run(arguments: tuple[str, ...], started: str) -> None:
    Path(started).touch()
    result = cli(*arguments)
    Path(started).with_suffix(".err").write_text(result.err)
    os._exit(result.code)


def run_watched(arguments: tuple[str, ...], report: str) -> None:
    """Also tells which tensors were read, and what the journal held at the end."""
    from coterie.streaming.checkpoint import Checkpoint
    from coterie.streaming.writer import Workspace

    read, publish = Checkpoint.read, Workspace.publish
    keys: list[str] = []
    journal: list[int] = []

    def watched_read(self: Checkpoint, key: str, *rest: Any, **options: Any) -> Any:
        keys.append(key)
        return read(self, key, *rest, **options)

    def watched_publish(self: Workspace, keep: Any) -> None:
        journal.extend(step["layer"] for step in self.journal() if "layer" in step)
        publish(self, keep)

    Checkpoint.read, Workspace.publish = watched_read, watched_publish  # type: ignore[method-assign]
    result = cli(*arguments)
    layers = {int(found[1]) for key in keys if (found := re.search(r"layers\.(\d+)\.", key))}
    Path(report).write_text(json.dumps({"layers": sorted(layers), "journal": journal, "err": result.err}))
    os._exit(result.code)


def run_and_die_behind_line(arguments: tuple[str, ...], lines: int) -> None:
    from coterie.streaming.writer import Workspace

    record, written = Workspace.record, 0

    def record_and_die(self: Workspace, step: dict[str, Any]) -> None:
        nonlocal written
        record(self, step)
        written += 1
        if written == lines:
            os._exit(KILLED)

    Workspace.record = record_and_die  # type: ignore[method-assign]
    os._exit(cli(*arguments).code)


def run_and_die_in_publish(arguments: tuple[str, ...], operation: int) -> None:
    """Dies before the given removal or renaming of `publish`; the system lists the folder in the worst order."""
    from coterie.streaming.writer import Workspace

    publish, done = Workspace.publish, 0

    def counted(function: Any) -> Any:
        def wrapper(*given: Any, **options: Any) -> Any:
            nonlocal done
            done += 1
            if done == operation:
                os._exit(KILLED)
            return function(*given, **options)

        return wrapper

    def worst_first(folder: Path) -> Any:
        worst = {"journal.jsonl": 0, "states": 2, "job.json": 3}
        return iter(sorted(iterdir(folder), key=lambda entry: (worst.get(entry.name, 1), entry.name)))

    iterdir = Path.iterdir

    def publish_and_die(self: Workspace, keep: Any) -> None:
        Path.iterdir = worst_first  # type: ignore[method-assign]
        for name in ("unlink", "rmdir", "rename"):
            setattr(os, name, counted(getattr(os, name)))
        publish(self, keep)

    Workspace.publish = publish_and_die  # type: ignore[method-assign]
    os._exit(cli(*arguments).code)


def ended(function: Any, *arguments: Any) -> int:
    process = start(function, *arguments)
    process.join(120)
    assert process.exitcode is not None, "still running after two minutes"
    return int(process.exitcode)


# -- jobs ---------------------------------------------------------------------------------------------------------


class Job:
    """One compression of one model, with the result of an undisturbed run."""

    def __init__(self, family: str, mode: str, folder: Path) -> None:
        folder.mkdir(parents=True)
        self.folder, self.moe = folder, MOE[family]
        self.model = saved(family, folder, **SHAPES[family])
        tokens = token_file(folder / "tokens.safetensors", rows=3, padded=True)
        options: tuple[Any, ...] = ("--keep", 0.5, "--tokens", tokens, "--method", "dern" if mode == "dern" else "reap")
        if mode == "propagate":
            options += ("--propagate",)
        if mode == "global":
            options += ("--scope", "global", "--protect", f"{MOE[family][0]}:0,{MOE[family][0]}:1")
        self.options = options
        if mode == "plan":
            assert ended(run, self.arguments(folder / "for-plan"), str(folder / "planned")) == 0
            shutil.copy(folder / "for-plan" / "plan.json", folder / "plan.json")
            self.options = ("--plan", folder / "plan.json")
        self.swept = mode != "plan"
        self.sweeps = 2 if mode == "global" else 1  # one that profiles, one that writes
        assert ended(run, self.arguments(folder / "plain"), str(folder / "started")) == 0
        self.plain = fingerprint(folder / "plain")
        names = {"config.json", "coterie.json", "plan.json", "README.md", "model.safetensors.index.json"}
        assert names <= self.plain.keys()

    def arguments(self, out: Path) -> tuple[str, ...]:
        return tuple(map(str, ("compress", self.model, out, "--no-report", "--shard-size", "300kB", *self.options)))

    def finish(self, out: Path) -> None:
        """Run it to the end; the result must be the undisturbed one."""
        started = self.folder / "finishing"
        code = ended(run, self.arguments(out), str(started))
        assert code == 0, started.with_suffix(".err").read_text()
        self.check(out)

    def check(self, out: Path) -> None:
        assert fingerprint(out) == self.plain
        assert not partial(out).exists()


def partial(out: Path) -> Path:
    return out.with_name(out.name + ".partial")


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    made: dict[tuple[str, str], Job] = {}
    folder = tmp_path_factory.mktemp("jobs")

    def job(family: str, mode: str) -> Job:
        if (family, mode) not in made:
            made[family, mode] = Job(family, mode, folder / f"{family}-{mode}")
        return made[family, mode]

    return job


# -- kills --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_ten_kills_at_random_moments_change_no_byte(mode, jobs, tmp_path):
    job, out, draw = jobs("qwen3-moe", mode), tmp_path / "out", random.Random(mode)
    began = time.monotonic()
    job.finish(out)
    usual = time.monotonic() - began
    shutil.rmtree(out)
    kills = 0
    while kills < 10:
        started = tmp_path / f"started-{kills}"
        process = start(run, job.arguments(out), str(started))
        until(started.exists)
        time.sleep(draw.uniform(0, 0.8 * usual))
        process.kill()
        process.join()
        kills += process.exitcode == -9
        if out.exists():  # it was faster than the kill: that is a result, too, and the job begins anew
            job.check(out)
            shutil.rmtree(out)
    job.finish(out)


@pytest.mark.parametrize("mode", MODES[:4])
@pytest.mark.parametrize("family", MOE)
def test_a_kill_behind_any_line_of_the_journal_costs_no_earlier_layer(family, mode, jobs, tmp_path):
    job = jobs(family, mode)
    for lines in range(1, len(job.moe) + 1):
        out, report = tmp_path / f"out-{lines}", tmp_path / f"report-{lines}"
        assert ended(run_and_die_behind_line, job.arguments(out), lines) == KILLED
        assert not out.exists()
        assert [json.loads(line)["layer"] for line in journal_of(out)] == job.moe[:lines]
        assert ended(run_watched, job.arguments(out), str(report)) == 0
        job.check(out)
        told = json.loads(report.read_text())
        assert "resumed" in told["err"]
        assert told["journal"][:lines] == job.moe[:lines]
        last = job.moe[lines - 1]  # a sweep runs its last layer again: its outputs were not kept yet
        first = last if job.swept else last + 1
        assert told["journal"][lines:] == [layer for layer in job.moe if layer >= first]
        assert told["layers"] == [
            layer for layer in range(job.moe[-1] + 1) if layer >= first or reads_again(job, layer)
        ]


def test_a_killed_global_job_profiles_no_layer_twice(jobs, tmp_path):
    job, out = jobs("deepseek-v3", "global"), tmp_path / "out"
    assert ended(run_and_die_behind_line, job.arguments(out), len(job.moe) + 1) == KILLED
    lines = [json.loads(line) for line in journal_of(out)]
    assert [line.get("seen", line.get("layer")) for line in lines] == [*job.moe, job.moe[0]]
    assert ended(run_watched, job.arguments(out), str(tmp_path / "report")) == 0
    told = json.loads((tmp_path / "report").read_text())
    assert told["layers"] == [0, *job.moe[1:]]  # the dense layer is copied again; the one already written is not read
    job.check(out)


def journal_of(out: Path) -> list[bytes]:
    return (partial(out) / "journal.jsonl").read_bytes().splitlines()


def reads_again(job: Job, layer: int) -> bool:
    """Dense layers are no step of a plan's run: a resumed one copies them once more."""
    return not job.swept and layer not in job.moe


@pytest.mark.parametrize("mode", MODES)
def test_a_job_that_is_killed_behind_every_line_still_ends(mode, jobs, tmp_path):
    job, out = jobs("deepseek-v3", mode), tmp_path / "out"
    for _ in range(job.sweeps * len(job.moe) + 2):
        code = ended(run_and_die_behind_line, job.arguments(out), 2 if job.swept else 1)
        if code == 0:
            break
        assert code == KILLED
    if not out.exists():
        job.finish(out)
    job.check(out)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_kill_at_any_step_of_publishing_loses_nothing(overwrite, jobs, tmp_path):
    job, operation, code = jobs("qwen3-moe", "reap"), 0, KILLED
    while code == KILLED:
        operation += 1
        out = tmp_path / f"out-{operation}"
        arguments = job.arguments(out)
        if overwrite:
            out.mkdir()
            (out / "old.txt").write_text("the old result")
            arguments += ("--overwrite",)
        code = ended(run_and_die_in_publish, arguments, operation)
        assert code in (0, KILLED)
        if overwrite:  # the old one is there until the new one has its name
            aside = out.with_name(out.name + ".replaced")
            old = [place for place in (out, aside) if (place / "old.txt").exists()]
            assert old or fingerprint(out) == job.plain
        if code == KILLED and (overwrite or not out.exists()):
            assert ended(run, arguments, str(tmp_path / "again")) == 0
            assert not out.with_name(out.name + ".replaced").exists()
        job.check(out)
    assert operation > 5


DAMAGE = {
    "cut line": lambda raw: raw + b'{"layer": 3, "plan": {"ind',
    "cut last line": lambda raw: raw[:-20],
    "zeros": lambda raw: raw + bytes(512),
    "a line of zeros": lambda raw: raw + bytes(64) + b"\n",
    "a damaged line in the middle": lambda raw: b"\n".join([raw.split(b"\n")[0], b"{?", *raw.split(b"\n")[1:]]),
    "a number": lambda raw: raw + b"17\n",
    "empty": lambda raw: b"",
}


@pytest.mark.parametrize("mode", ["reap", "plan"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_journal_is_tolerated(damage, mode, jobs, tmp_path):
    job, out = jobs("qwen3-moe", mode), tmp_path / "out"
    assert ended(run_and_die_behind_line, job.arguments(out), 2) == KILLED
    file = partial(out) / "journal.jsonl"
    file.write_bytes(DAMAGE[damage](file.read_bytes()))
    # lines of a second run behind the damage must count in a third
    code = ended(run_and_die_behind_line, job.arguments(out), 2)
    assert code == KILLED
    assert all(isinstance(json.loads(line), dict) for line in journal_of(out))
    job.finish(out)


def test_a_lost_journal_beside_kept_states_is_noticed(jobs, tmp_path):
    job, out = jobs("qwen3-moe", "reap"), tmp_path / "out"
    assert ended(run_and_die_behind_line, job.arguments(out), 3) == KILLED
    (partial(out) / "journal.jsonl").unlink()
    job.finish(out)


@pytest.mark.parametrize("raw", [b"", b"{", bytes(100)])
def test_a_damaged_identity_starts_afresh(raw, jobs, tmp_path):
    job, out = jobs("qwen3-moe", "reap"), tmp_path / "out"
    assert ended(run_and_die_behind_line, job.arguments(out), 2) == KILLED
    (partial(out) / "job.json").write_bytes(raw)
    job.finish(out)


@pytest.mark.parametrize("place", ["states", "shard", "building"])
def test_half_written_files_of_a_killed_run_do_no_harm(place, jobs, tmp_path):
    job, out = jobs("qwen3-moe", "reap"), tmp_path / "out"
    assert ended(run_and_die_behind_line, job.arguments(out), 2) == KILLED
    if place == "states":  # layer 2 was kept half when the process died: a folder that has not got its name yet
        (partial(out) / "states" / "building").mkdir(exist_ok=True)
        (partial(out) / "states" / "building" / "000000.safetensors").write_bytes(b"half")
    elif place == "shard":  # written, but not finished: tensors of the interrupted layer
        shard = sorted(partial(out).glob("*.safetensors"))[-1]
        with shard.open("r+b") as stream:
            stream.seek(-5000, os.SEEK_END)
            stream.write(b"\xff" * 5000)
    else:
        (partial(out) / "config.json.tmp").write_text("{")
    job.finish(out)
