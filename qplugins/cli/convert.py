"""qplugins convert SRC OUT"""

from pathlib import Path
from typing import Annotated

import typer

from qplugins.cli.shared import Json, megabytes, print_json, progress_bar

DTYPES = ("bfloat16", "float16", "float32")


def convert(
    src: Annotated[
        Path,
        typer.Argument(
            help="A checkpoint folder of AutoAWQ, GPTQ or ModelOpt, or a packed one; with --packed any quantized one; or the GGUF file of a Llama."
        ),
    ],
    out: Annotated[Path, typer.Argument(help="Folder to write; must not exist.")],
    packed: Annotated[bool, typer.Option("--packed", help="Store matrices as the GPU kernel reads them instead.")] = False,
    dtype: Annotated[str, typer.Option(help=f"Of a GGUF file's tensors: {', '.join(DTYPES)}.")] = "bfloat16",
    json: Json = False,
) -> None:
    """Rewrite a model of another kind: a quantized checkpoint in the compressed-tensors layout, with the same values, so that engines read it
    without qplugins; a GGUF file dequantized, with its tokenizer."""
    if dtype not in DTYPES:
        raise ValueError(f"--dtype {dtype!r} is none of {', '.join(DTYPES)}")
    if src.is_dir():
        _checkpoint(src, out, packed, json)
    elif packed:
        raise ValueError("--packed is for quantized checkpoints, which are folders")
    elif src.is_file():
        _gguf(src, out, dtype, json)
    else:
        raise ValueError(f"{src} is neither a folder nor a file")


def _checkpoint(src: Path, out: Path, packed: bool, json: bool) -> None:
    from qplugins.checkpoints.convert import convert as run
    from qplugins.checkpoints.reader import Checkpoint

    with progress_bar("converting", shown=not json) as progress:
        done = run(src, out, pack=packed, progress=progress)
    checkpoint = Checkpoint.open(out)
    if json:
        formats = [{"from": a, "to": b, "count": n} for (a, b), n in done.formats.items()]
        total = {"bytes": checkpoint.nbytes, "files": done.files, "rounding": done.rounding, "dropped": list(done.dropped)}
        print_json({"out": str(out), "formats": formats, **total})
        return
    for (a, b), n in sorted(done.formats.items()):
        print(f"{n} matrices: {a} -> {b}" if a != b else f"{n} matrices: {a}, as they were")
    if any(b.endswith("_act") for _, b in done.formats):
        print("groups keep their columns from everywhere (actorder 'group'): qplugins reads that, and not every engine without it does")
    if done.rounding:
        print(f"global scales differ by up to {done.rounding:.1e}, a reciprocal's rounding; all else is the same, bit for bit")
    if done.dropped:
        print(f"{len(done.dropped)} scales of activations or of the KV cache have no place there and are left out")
    print(f"{out}: {len(checkpoint.tensors)} tensors, {megabytes(checkpoint.nbytes)}")


def _gguf(file: Path, out: Path, dtype: str, json: bool) -> None:
    import torch

    from qplugins.checkpoints.gguf import convert as run
    from qplugins.checkpoints.reader import Checkpoint

    with progress_bar("converting", shown=not json, unit="tensors") as progress:
        run(file, out, dtype=getattr(torch, dtype), progress=progress)
    checkpoint = Checkpoint.open(out)
    if json:
        print_json({"out": str(out), "tensors": len(checkpoint.tensors), "bytes": checkpoint.nbytes})
    else:
        print(f"{out}: {len(checkpoint.tensors)} tensors, {megabytes(checkpoint.nbytes)}")
