"""qplugins quantize SRC OUT --map M"""

import re
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qplugins.cli.eval import read_windows, run_on
from qplugins.cli.shared import Json, megabytes, print_json, print_table, progress_bar

if TYPE_CHECKING:
    from torch import Tensor

    from qplugins.checkpoints.quantize import Report
    from qplugins.layer_map import LayerMap

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def quantize(
    src: Annotated[Path, typer.Argument(help="Checkpoint folder to read, 16 or 32 bits.")],
    out: Annotated[Path, typer.Argument(help="Folder to write; must not exist.")],
    map: Annotated[str, typer.Option("--map", help="A preset (balanced, nvfp4, mxfp4, int4, int8, fp8) or a YAML file.")],
    packed: Annotated[
        bool, typer.Option("--packed", help="Store matrices as the GPU kernel reads them, so that a server need not repack them.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False,
    device: Annotated[str, typer.Option(help="Where to quantize: cpu, cuda, cuda:1.")] = "cpu",
    max_shard_size: Annotated[str, typer.Option(help="Largest output file, as 1GiB or 500MB.")] = "1GiB",
    text: Annotated[
        list[Path] | None,
        typer.Option(help="A text like those that the model will see, in UTF-8, to tell which columns matter. May be given several times."),
    ] = None,
    windows: Annotated[int, typer.Option(help="Windows of each text.", min=1)] = 16,
    context_length: Annotated[int, typer.Option(help="Tokens of a window.", min=64)] = 512,
    dtype: Annotated[str, typer.Option(help="That the model runs in over the text; auto: float32 on a CPU, bfloat16 elsewhere.")] = "auto",
    json: Json = False,
) -> None:
    """Quantize a checkpoint: each layer in the format that the map gives it.

    With --text the model runs over it once, and an error in a weight counts by how large its inputs are there. Some thousand tokens are enough.
    Memory: the model, while it runs; otherwise a tensor and a file.
    """
    shard_bytes = parse_size(max_shard_size)
    from qplugins.checkpoints import quantize as q
    from qplugins.checkpoints.reader import Checkpoint

    source = Checkpoint.open(src)
    layer_map = read_map(map, source.num_layers)
    planned = q.plan(source, layer_map, pack=packed)
    if not json:
        print_plan(planned)
    if dry_run:
        if json:
            print_json({"dry_run": True, **report_json(planned)})
        return
    important = None
    if text:
        from qplugins.checkpoints.files import refuse_existing

        refuse_existing(out)  # before the model runs
        quantized = [x.name for x in planned.layers if x.format != "bf16"]
        important = importance_by(src, text, windows, context_length, device, dtype, quantized, shown=not json)
    with progress_bar("quantizing", shown=not json) as progress:
        report = q.quantize(
            src, out, layer_map, pack=packed, device=device, max_shard_size=shard_bytes, importance=important, progress=progress
        )
    weighed = None if important is None else len(important)
    if json:
        print_json({"dry_run": False, "out": str(out), "weighed_by_text": weighed, **report_json(report)})
    else:
        print_result(report, out)
        if weighed is not None:
            print(f"the text told which columns matter in {weighed} of {len(quantized)} quantized matrices")


def importance_by(
    src: Path, text: list[Path], windows: int, context_length: int, device: str, dtype: str, names: list[str], shown: bool
) -> "dict[str, Tensor]":
    """`importance.importance` of a checkpoint's matrices, over the first windows of text files."""
    how = run_on(device, model_dtype(dtype, device))
    cut = [w for file in text for w in read_windows(src, file, context_length, windows)]
    from qplugins.checkpoints.importance import importance
    from qplugins.checkpoints.quality import dequantized_model

    with progress_bar("running the model", shown, unit="windows") as progress:
        return importance(dequantized_model(src, **how), names, cut, progress=progress)


def model_dtype(dtype: str, device: str) -> str:
    """What --dtype auto means there."""
    return dtype if dtype != "auto" else "float32" if device == "cpu" else "bfloat16"


def parse_size(text: str, option: str = "--max-shard-size") -> int:
    """Bytes of "1GiB", "500 MB", "4096". Raises ValueError, naming the option."""
    m = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-zA-Z]*)", text.strip())
    size = int(float(m[1]) * UNITS[m[2].upper()]) if m and m[2].upper() in UNITS else 0
    if size <= 0:
        raise ValueError(f"{option} {text!r} is not a size; write it as 1GiB or 500MB")
    return size


def read_map(value: str, num_layers: int) -> "LayerMap":
    """A preset by its name, or a map file. Raises ValueError."""
    from qplugins.layer_map import PRESETS, LayerMap

    if value in PRESETS:
        return LayerMap.preset(value, num_layers)
    if Path(value).is_file():
        return LayerMap.from_yaml(value)
    raise ValueError(f"--map {value!r} is neither a file nor one of the presets {', '.join(PRESETS)}")


def report_json(report: "Report") -> dict:
    return {
        "bytes_before": report.nbytes_before,
        "bytes_after": report.nbytes_after,
        "bits_per_weight": report.bits_per_weight,
        "formats": dict(report.counts()),
        "files": report.files,
        "dropped": list(report.dropped),
        "other_tensors": {"count": report.other_tensors, "bytes": report.other_nbytes},
        "layers": [asdict(x) for x in report.layers],
    }


def print_plan(report: "Report") -> None:
    rows = []
    for fmt, count in report.counts().most_common():
        of = [x for x in report.layers if x.format == fmt]
        before, after = sum(x.nbytes_before for x in of), sum(x.nbytes_after for x in of)
        bits = 8 * after / sum(x.n * x.k for x in of)
        rows.append((fmt, count, megabytes(before), megabytes(after), f"{bits:.2f}"))
    if report.other_tensors:
        rows.append(("no matrix, copied", report.other_tensors, megabytes(report.other_nbytes), megabytes(report.other_nbytes), ""))
    rows.append(("all", "", megabytes(report.nbytes_before), megabytes(report.nbytes_after), f"{report.bits_per_weight:.2f}"))
    print_table("plan", ["format", " tensors", " before", " after", " bits per weight"], rows)
    for name in report.dropped:
        print(f"{name} is left out: the model ties it to the embedding")
    if report.other_nbytes > report.nbytes_before / 10:
        print(
            "Tensors that are no 2-D `weight` make up a good part of this model and stay as they are: experts joined in one tensor are not "
            "quantized.",
            file=sys.stderr,
        )


def print_result(report: "Report", out: Path) -> None:
    worst = report.worst(5)
    print_table(
        "largest relative errors",
        ["layer", "format", " N x K", " error"],
        [(x.name, x.format, f"{x.n} x {x.k}", f"{x.error:.4f}") for x in worst],
    )
    errors = [x.error for x in report.layers if x.error is not None]
    print(f"mean relative error {sum(errors) / len(errors):.4f} over {len(errors)} layers")
    print(
        f"{out}: {megabytes(report.nbytes_before)} -> {megabytes(report.nbytes_after)}, {report.bits_per_weight:.2f} bits per weight, "
        f"{report.files} file{'s' * (report.files != 1)}"
    )
