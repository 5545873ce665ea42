"""Folders that appear under their name only once they are complete.

A checkpoint takes minutes to write and is read by whoever finds its folder. So it is written into a hidden folder beside the wanted one,
which a rename (atomic within one file system) puts in its place at the very end.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def staged(out: str | Path) -> Iterator[Path]:
    """Yields an empty folder `.<name>.partial-<pid>` beside `out`, and renames it to `out` when the block ends.

    Missing parents of `out` are made, and files get the permissions of the folder. If the block raises, Ctrl-C included, the folder is removed and `out` does not exist.
    Raises FileExistsError if `out` exists, before the block and again before the rename.
    """
    out = Path(os.path.abspath(out))
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}") if out.name else out
    _refuse_existing(out)
    if partial.exists():
        raise FileExistsError(f"{partial} is left over from a run that was killed: remove it")
    try:
        partial.mkdir(parents=True)
        yield partial
        # safetensors makes its files readable by their owner alone; a checkpoint follows the umask, as its folder does
        for file in partial.rglob("*"):
            if file.is_file():
                file.chmod(partial.stat().st_mode & 0o666)
        _refuse_existing(out)  # rename would replace a folder that is empty
        os.rename(partial, out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _refuse_existing(out: Path) -> None:
    if os.path.lexists(out):
        raise FileExistsError(f"{out} already exists: choose another folder or remove it")
