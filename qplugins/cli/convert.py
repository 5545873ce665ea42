"""qplugins convert gguf FILE OUT"""

from pathlib import Path
from typing import Annotated

import typer

from qplugins.cli.shared import Json, megabytes, print_json, progress_bar

DTYPES = ("bfloat16", "float16", "float32")


def convert_gguf(
    file: Annotated[Path, typer.Argument(help="GGUF file of a Llama model.")],
    out: Annotated[Path, typer.Argument(help="Folder to write; must not exist.")],
    dtype: Annotated[str, typer.Option(help=f"Of the written tensors: {', '.join(DTYPES)}.")] = "bfloat16",
    json: Json = False,
) -> None:
    """Dequantize a GGUF file into a Hugging Face checkpoint with its tokenizer."""
    if dtype not in DTYPES:
        raise ValueError(f"--dtype {dtype!r} is none of {', '.join(DTYPES)}")
    if not file.is_file():
        raise ValueError(f"{file} is not a file")
    import torch

    from qplugins.checkpoints.gguf import convert
    from qplugins.checkpoints.reader import Checkpoint

    with progress_bar("converting", shown=not json, unit="tensors") as progress:
        convert(file, out, dtype=getattr(torch, dtype), progress=progress)
    checkpoint = Checkpoint.open(out)
    if json:
        print_json({"out": str(out), "tensors": len(checkpoint.tensors), "bytes": checkpoint.nbytes})
    else:
        print(f"{out}: {len(checkpoint.tensors)} tensors, {megabytes(checkpoint.nbytes)}")
