"""qplugins verify CKPT [--against SRC]"""

from pathlib import Path
from typing import Annotated

import typer

from qplugins.cli.shared import Json, print_json, print_table, progress_bar


def verify(
    ckpt: Annotated[Path, typer.Argument(help="Checkpoint folder.")],
    against: Annotated[Path | None, typer.Option(help="The unquantized checkpoint that it was made from.")] = None,
    json: Json = False,
) -> None:
    """Look for damage: structure, NaN, scales; with --against also each layer's error. Exits with 1 when it finds any."""
    from qplugins.checkpoints.verify import verify as run

    with progress_bar("reading", shown=not json) as progress:
        result = run(ckpt, against, progress=progress)
    if json:
        layers = [{"name": n, "format": result.formats[n], "error": e} for n, e in result.errors.items()]
        print_json({"problems": result.problems, "tensors": result.tensors, "mean_error": result.mean_error, "layers": layers})
    else:
        if result.errors:
            rows = [(n, result.formats[n], f"{e:.4f}") for n, e in list(result.errors.items())[:10]]
            print_table("largest relative errors", ["layer", "format", " error"], rows)
            if result.mean_error is not None:
                print(f"mean relative error of quantized layers {result.mean_error:.4f}")
        for problem in result.problems:
            print(f"problem: {problem}")
        print(f"{ckpt}: {result.tensors} tensors read, {len(result.problems) or 'no'} problem{'s' * (len(result.problems) != 1)}")
    if result.problems:
        raise typer.Exit(1)
