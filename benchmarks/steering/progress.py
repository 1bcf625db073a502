"""Progress of a run of hours: work done, work left, and the time that it will take at the pace so far."""

from __future__ import annotations

import sys
import time

__all__ = ["Bar", "hours"]

EVERY = 60.0  # seconds between lines where there is no terminal


def hours(seconds: float) -> str:
    """3 h 05 min, 12 min, 40 s."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


class Bar:
    """total: estimated seconds of all work, what is kept already included. On a terminal a bar, elsewhere a line a minute."""

    def __init__(self, total: float, until: float | None = None):
        from rich.progress import BarColumn, Progress, TextColumn

        self.total, self.done, self.until = total, 0.0, until
        self.expected = self.spent = 0.0  # of what was drawn in this run
        self.shown = time.monotonic()
        self.bar = None
        if sys.stderr.isatty():
            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:.0f} %, {task.fields[left]}"))
            self.bar = Progress(*columns, transient=True)
            self.task = self.bar.add_task("", total=max(total, 1.0), left="")
            self.bar.start()

    def advance(self, expected: float, what: str, took: float | None) -> None:
        """expected: estimated seconds of one unit; took: what it took, None if it was there already."""
        self.done += expected
        if took is not None:
            self.expected, self.spent = self.expected + expected, self.spent + took
        pace = self.spent / self.expected if self.expected else 1.0
        left = f"{hours(max(self.total - self.done, 0.0) * pace)} left"
        if self.bar:
            self.bar.update(self.task, completed=min(self.done, self.total), description=what, left=left)
        elif took is not None and time.monotonic() - self.shown >= EVERY:
            self.shown = time.monotonic()
            print(
                f"{time.strftime('%H:%M')}  {100 * self.done / max(self.total, 1.0):.0f} %, {left}  ({what})",
                file=sys.stderr,
                flush=True,
            )

    def close(self) -> None:
        if self.bar:
            self.bar.stop()
