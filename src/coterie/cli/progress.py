"""One progress bar for a sweep: layer, tokens per second, resident memory, time left."""

import time
from types import TracebackType

import psutil
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from coterie.cli.common import notes


class Bar:
    """The sweep's progress on standard error; silent where that is no terminal.

    Used as a context manager. It has the methods of `coterie.streaming.lockstep.Progress`, without importing torch.
    """

    def __init__(self, title: str, *, enabled: bool = True) -> None:
        self.title = title
        self._process = psutil.Process()
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TextColumn("{task.fields[memory]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=notes,
            transient=True,
            disable=not (enabled and notes.is_terminal),
        )
        self._task: TaskID | None = None
        self._seen, self._began = 0, 0.0

    def __enter__(self) -> "Bar":
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def start(self, what: str, layers: int, first: int = 0) -> None:
        if self._task is not None:
            self._bar.remove_task(self._task)
        self._task = self._bar.add_task(f"{self.title}: {what}", total=layers, completed=first, rate="", memory="")
        self._seen, self._began = 0, time.monotonic()

    def tokens(self, count: int) -> None:
        self._seen += count
        self._show()

    def layer(self, index: int) -> None:
        if self._task is not None:
            self._bar.update(self._task, completed=index + 1)
        self._show()

    def done(self) -> None:
        self._show()

    def _show(self) -> None:
        if self._task is not None and not self._bar.disable:
            rate = self._seen / max(time.monotonic() - self._began, 1e-6)
            memory = self._process.memory_info().rss / 1e9
            text = f"{rate:,.0f} tok/s" if self._seen else ""
            self._bar.update(self._task, rate=text, memory=f"{memory:.1f} GB")
