"""qplugins bench"""

from typing import Annotated

import typer

from qplugins.cli.shared import Json, print_json, print_table, progress_bar


def bench_linear(
    save: Annotated[bool, typer.Option("--save", help="Use what won on this machine's GPU from now on.")] = False,
    format: Annotated[str, typer.Option(help="Of the weights; the table serves all formats.")] = "nvfp4",
    models: Annotated[str, typer.Option(help="Whose layers: 8b, 70b, or both with a comma between.")] = "8b,70b",
    rep: Annotated[float, typer.Option(help="Milliseconds that a timing takes.")] = 4,
    json: Json = False,
) -> None:
    """Time the weight-only product in every way that it can be cut into blocks, and show which win on this GPU. Takes some minutes.

    GPUs that qplugins was not measured on start with blocks that fit anywhere; this finds better ones.
    """
    from dataclasses import asdict

    import torch
    import triton

    from qplugins.kernels.linear import tune, workload
    from qplugins.kernels.linear.tiles import multiprocessors, save_table, table_file, table_of

    chosen = models.split(",")
    if unknown := [m for m in chosen if m not in workload.MODELS]:
        raise ValueError(f"--models {','.join(unknown)}: there are {', '.join(workload.MODELS)}")
    four_bits = [name for name, (code, *_) in workload.FORMATS.items() if code in ("e2m1", "int4")]
    if format not in four_bits:
        raise ValueError(f"--format {format}: there are {', '.join(four_bits)}")
    if not torch.cuda.is_available():
        raise ValueError("bench linear times kernels on a GPU, and there is none here")
    device = torch.device("cuda", torch.cuda.current_device())
    sms, file = multiprocessors(device), table_file(torch.cuda.get_device_name(device))
    with progress_bar("timing", not json, unit="shapes") as progress:
        timings = tune.measure(format, chosen, rep_ms=rep, progress=progress)
    table = tune.best(timings, sms)
    now, then = (tune.mean_us(timings, t, sms) for t in (table_of(device), table))
    about = {"device": torch.cuda.get_device_name(device), "torch": torch.__version__, "triton": triton.__version__, "format": format}
    if save:
        save_table(file, table, **about)
    if json:
        rows = [{"rows": m, "us": then[m], "us_now": now[m]} for m in then]
        print_json(about | {"saved": str(file) if save else None, "entries": [asdict(e) for e in table], "means": rows})
        return
    lines = [
        (m, e.few, e.most, e.many, f"{then[m]:.1f}", "" if now[m] is None else f"{now[m]:.1f}") for m, e in zip(then, table, strict=True)
    ]
    columns = ["up to rows", "few blocks", " share K", "many blocks", " us", " us as it is now"]
    print_table(f"{about['device']}, {format}, geometric means over the layers", columns, lines)
    print(f"saved as {file}" if save else "nothing was saved; --save has this GPU use it")
