"""Turns a C source beside this file into a library for the processor it runs on, once per machine and user.

The compiler is the system's (`CC`, cc, gcc or clang). The result lies in the user's cache directory under a name made
of everything that it depends on: source, compiler, options, processor. Its last bytes are its own checksum, so that a
damaged file is made again instead of being loaded, and it gets its name only when whole, so that processes that start
together do not meet half of one. Installing Coterie builds nothing.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_name("grouped.c")
DENSE = Path(__file__).with_name("dense.c")
FLAGS = ("-O3", "-march=native", "-shared", "-fPIC", "-fno-math-errno")
COMPILERS = ("cc", "gcc", "clang")


class BuildError(Exception):
    """There is no library, and why."""


def library(flags: tuple[str, ...] = FLAGS, cache: Path | None = None, source: Path = SOURCE) -> ctypes.CDLL:
    """The kernels of a source, built if they are not in the cache. Raises BuildError."""
    compiler = _compiler()
    key = hashlib.sha256("\0".join([source.read_text(), *_identity(compiler), *flags, _processor()]).encode())
    file = (cache or cache_directory()) / f"{source.stem}-{key.hexdigest()[:32]}.so"
    if not _whole(file):
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            _build(compiler, flags, source, file)
        except OSError:  # a home that cannot be written to: build for this process alone
            with tempfile.TemporaryDirectory(prefix="coterie-kernel-") as folder:
                file = Path(folder) / file.name
                _build(compiler, flags, source, file)
                return _loaded(file)  # the open file outlives its name
    return _loaded(file)


def cache_directory() -> Path:
    """Where libraries are kept: below XDG_CACHE_HOME, or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "coterie" / "kernels"


def _compiler() -> str:
    given = os.environ.get("CC")
    for name in [given] if given else COMPILERS:
        if found := shutil.which(name):
            return found
    raise BuildError(f"there is no C compiler ({given or ', '.join(COMPILERS)}) on the PATH")


def _identity(compiler: str) -> tuple[str, str]:
    done = subprocess.run([compiler, "--version"], capture_output=True, text=True, errors="replace")
    return compiler, done.stdout


def _processor() -> str:
    """What -march=native depends on. Homes are shared between machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return platform.machine() + platform.processor()
    wanted = ("vendor_id", "cpu family", "model", "stepping", "flags", "Features", "CPU part", "CPU implementer")
    return platform.machine() + "".join(line for line in lines if line.startswith(wanted))


def _build(compiler: str, flags: tuple[str, ...], source: Path, file: Path) -> None:
    handle, name = tempfile.mkstemp(dir=file.parent, prefix=file.stem, suffix=".part")
    os.close(handle)
    part = Path(name)
    try:
        for threads in (("-fopenmp",), ()):  # a compiler without OpenMP makes a kernel of one thread
            command = [compiler, *flags, *threads, "-o", name, str(source)]
            done = subprocess.run(command, capture_output=True, text=True, errors="replace")
            if done.returncode == 0:
                break
        else:
            raise BuildError(f"`{' '.join(command)}` failed: {done.stderr.strip()[-400:]}")
        content = part.read_bytes()
        part.write_bytes(content + hashlib.sha256(content).digest())  # loaders do not look behind the last section
        part.chmod(0o755)
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)


def _whole(file: Path) -> bool:
    """Whether a file is there and ends in the checksum of what comes before."""
    try:
        content = file.read_bytes()
    except OSError:
        return False
    return hashlib.sha256(content[:-32]).digest() == content[-32:]


def _loaded(file: Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(file))
    except OSError as error:
        raise BuildError(f"{file} cannot be loaded: {error}") from error
