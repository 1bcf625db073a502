"""Files are written to a temporary name and renamed: what is there is whole, or is what was there before."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["check_target", "written"]


def check_target(path: str | os.PathLike) -> Path:
    """The path, if a file can be written there: its folder exists, and what has its name, if anything, is a plain file.

    Raises ``ValueError``. A device or a pipe is refused too: renaming over it would replace it.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise ValueError(f"{path}: {path.parent} is not a folder")
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is there and is not a plain file: the name of a file is taken")
    return path


@contextmanager
def written(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary name beside ``path`` to write to; renamed to it at the end, removed if anything goes wrong."""
    path = check_target(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
