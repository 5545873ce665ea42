"""Writing checkpoints: folders that appear under their name only once they are complete.

A checkpoint takes minutes to write and is read by whoever finds its folder. So it is written into a hidden folder beside the wanted one,
which a rename (atomic within one file system) puts in its place at the very end. Within it, tensors are collected until a file is full.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from qplugins.checkpoints.reader import INDEX, MODELOPT, SINGLE

MAX_SHARD_SIZE = 1 << 30
SLACK = 1 << 20  # bytes for headers, index and config

# weights in other containers, which a copy of the folder would drag along
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".onnx_data", ".ot", ".tflite")
# what other producers say about how weights are stored, beside config.json
QUANTIZATION_FILES = (MODELOPT, "quantize_config.json", "quant_config.json")


@contextmanager
def staged(out: str | Path) -> Iterator[Path]:
    """Yields an empty folder `.<name>.partial-<pid>` beside `out`, and renames it to `out` when the block ends.

    Missing parents of `out` are made, and files get the permissions of the folder. If the block raises, Ctrl-C included, the folder is removed and `out` does not exist.
    Raises FileExistsError if `out` exists, before the block and again before the rename.
    """
    out = Path(os.path.abspath(out))
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}") if out.name else out
    refuse_existing(out)
    if partial.exists():
        raise FileExistsError(f"{partial} is left over from a run that was killed: remove it")
    try:
        partial.mkdir(parents=True)
        yield partial
        # safetensors makes its files readable by their owner alone; a checkpoint follows the umask, as its folder does
        for file in partial.rglob("*"):
            if file.is_file():
                file.chmod(partial.stat().st_mode & 0o666)
        refuse_existing(out)  # rename would replace a folder that is empty
        os.rename(partial, out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def refuse_existing(out: Path) -> None:
    """Raises FileExistsError where there is something of that name."""
    if os.path.lexists(out):
        raise FileExistsError(f"{out} already exists: choose another folder or remove it")


class TensorFiles:
    """Output files, each written when the next tensors no longer fit; they get their final names when their number is known."""

    def __init__(self, folder: Path, max_size: int) -> None:
        self.folder, self.max_size = folder, max_size
        self.pending: dict[str, Tensor] = {}
        self.size = self.total = self.count = 0
        self.file_of: dict[str, int] = {}

    def add(self, tensors: dict[str, Tensor]) -> None:
        """Takes the tensors of one layer, which stay in one file."""
        size = sum(t.nbytes for t in tensors.values())
        if self.pending and self.size + size > self.max_size:
            self._write()
        self.pending |= tensors
        self.size += size
        self.total += size

    def _write(self) -> None:
        self.count += 1
        with full_disk(self.folder):
            save_file({n: t.contiguous() for n, t in self.pending.items()}, self._part(self.count), metadata={"format": "pt"})
        self.file_of |= dict.fromkeys(self.pending, self.count)
        self.pending, self.size = {}, 0

    def _part(self, number: int) -> Path:
        return self.folder / f"part-{number}.safetensors"

    def close(self) -> int:
        """Writes what is left, and the index where there are several files. Returns their number."""
        self._write()
        if self.count == 1:
            self._part(1).rename(self.folder / SINGLE)
            return 1
        names = {i: f"model-{i:05d}-of-{self.count:05d}.safetensors" for i in range(1, self.count + 1)}
        for i, name in names.items():
            self._part(i).rename(self.folder / name)
        index = {"metadata": {"total_size": self.total}, "weight_map": {t: names[i] for t, i in sorted(self.file_of.items())}}
        with full_disk(self.folder):
            (self.folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
        return self.count


class full_disk:
    """Says of a write that failed for want of room that this was it, whichever library noticed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __enter__(self) -> None: ...

    def __exit__(self, kind, e, traceback) -> None:
        full = (isinstance(e, OSError) and e.errno == errno.ENOSPC) or (isinstance(e, SafetensorError) and "No space left" in str(e))
        if full:
            raise OSError(
                errno.ENOSPC,
                "the disk filled up while writing; what was written is removed again. Make room and start over",
                str(self.folder.parent),
            ) from e


def other_files(path: Path) -> list[Path]:
    """Tokenizer, generation config and whatever else the folder has that is no weight of the model; with a sentence-transformer's further modules,
    which `modules.json` lists, weights and all.

    Raises ValueError where that is no list of modules.
    """
    folders = {path / name for name in _sentence_modules(path / "modules.json")} - {path}
    return [f for f in sorted(path.rglob("*")) if f.is_file() and _is_other(f, path, folders)]


def _sentence_modules(file: Path) -> list[str]:
    try:
        return [module["path"] for module in json.loads(file.read_text())] if file.exists() else []
    except (ValueError, TypeError, KeyError) as e:
        raise ValueError(f"{file} is no list of modules with a path each: {e!r}") from None


def _is_other(file: Path, path: Path, modules: set[Path]) -> bool:
    if any(part.startswith(".") for part in file.relative_to(path).parts):
        return False
    if file.suffix in WEIGHT_SUFFIXES:
        return file.suffix == ".safetensors" and not modules.isdisjoint(file.parents)
    # these are about the model's own weights
    return file.parent != path or not (file.name in ("config.json", *QUANTIZATION_FILES) or file.name.endswith(".index.json"))


def check_room(out: Path, need: int) -> None:
    """Raises OSError where the disk of `out` has fewer than `need` bytes."""
    existing = next(p for p in out.absolute().parents if p.exists())
    free = shutil.disk_usage(existing).free
    if need + SLACK > free:
        raise OSError(
            errno.ENOSPC,
            f"writing needs {need + SLACK:,} bytes and {existing} has {free:,} free; make room or choose another disk",
            str(out),
        )


def write_others(folder: Path, config: dict[str, Any], source: Path, others: Sequence[Path]) -> None:
    """Writes config.json, and copies `others` from the folder `source`."""
    with full_disk(folder):
        (folder / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")
        for file in others:
            target = folder / file.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
