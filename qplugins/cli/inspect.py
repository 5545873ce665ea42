"""qplugins inspect CKPT"""

import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qplugins.cli.shared import Json, megabytes, print_json, print_table

if TYPE_CHECKING:
    from qplugins.checkpoints.reader import StoredModule
    from qplugins.formats import Format
    from qplugins.kernels.linear import Spec

ENGINE = "the engine's own"


def inspect(
    ckpt: Annotated[Path, typer.Argument(help="Checkpoint folder.")],
    all: Annotated[bool, typer.Option("--all", help="A row for each matrix, rather than for those that are alike.")] = False,
    json: Json = False,
) -> None:
    """Show what each layer is stored as, its bytes, and the kernel that will run it on this machine."""
    from qplugins.checkpoints.reader import Checkpoint
    from qplugins.dispatch import Machine

    machine = Machine.current()
    checkpoint = Checkpoint.open(ckpt).check()
    modules = sorted(checkpoint.modules(), key=lambda m: natural(m.name))
    rows = [describe(m, machine) for m in modules]
    weights = sum(m.n * m.k for m in modules)
    bits = 8 * sum(m.nbytes for m in modules) / max(1, weights)
    rest = checkpoint.nbytes - sum(m.nbytes for m in modules)
    if json:
        totals = {"bytes": checkpoint.nbytes, "bytes_other": rest, "weights": weights, "bits_per_weight": bits}
        print_json({"path": str(ckpt), "machine": machine.name, **totals, "modules": rows})
        return
    shown = [{**r, "count": 1} for r in rows] if all else collapse(rows)
    print_table(
        f"{ckpt}, on {machine.name}",
        ["module", " count", "format", " N x K", " bytes", " bits per weight", "kernel"],
        [
            (
                r["name"], r["count"], r["format"], f"{r['n']} x {r['k']}", megabytes(r["bytes"]),
                f"{8 * r['bytes'] / (r['count'] * r['n'] * r['k']):.2f}", r["kernel"] or "none",
            )
            for r in shown
        ],
    )  # fmt: skip
    reasons = {(r["format"], r["kernel"] or "nothing", *r["refusals"].items()) for r in rows if r["refusals"]}
    for fmt, kernel, *refusals in sorted(reasons, key=str):
        print(f"{fmt} runs on {kernel}: " + "; ".join(f"not {name}, {why}" for name, why in refusals))
    print(f"{megabytes(checkpoint.nbytes)}, of which {megabytes(rest)} are no matrices; {weights:,} weights at {bits:.2f} bits")
    if checkpoint.tied:
        print("lm_head is the embedding (tie_word_embeddings)")


def spec(fmt: "Format", n: int, k: int, dtype) -> "Spec":
    """The kernels' description of an n x k matrix in a quantized format; dtype: of scales that follow the model's."""
    import torch

    from qplugins.kernels.linear import spec_of

    fmt = fmt.twin or fmt  # the same values; and what it reads has shapes without values, as here
    stored = {p.name: torch.empty(p.shape(n, k), dtype=p.dtype or dtype, device="meta") for p in fmt.params if not p.optional}
    return spec_of(fmt.read(stored, n, k), fmt.activation)


def describe(module: "StoredModule", machine) -> dict:
    """A module as a row: kernel is None where nothing here runs it; refusals say why those that come before were not taken."""
    import torch

    from qplugins.dispatch import explain
    from qplugins.layer_map import EXPERT

    kernel, refusals = ENGINE, {}
    if module.format.quantized:
        kernel = None
        scales = (p.name for p in module.format.params if p.dtype is None and p.name in module.tensors)
        dtype = next((module.tensors[name].dtype for name in scales), torch.bfloat16)
        activations = torch.float16 if dtype == torch.float16 else torch.bfloat16
        form, operation = spec(module.format, module.n, module.k, dtype), "linear"
        if EXPERT.fullmatch(module.name):  # what multiplies an expert stays in 16 bits
            form, operation = replace(form, activation=None), "experts"
        for name, why in explain(form, machine, activations, operation):
            if why is None:
                kernel = name
                break
            # what is for plain matrices says nothing of a quantized one
            if name != "torch":
                refusals[name] = why
    return {
        "name": module.name, "kind": module.kind, "format": module.format.name, "n": module.n, "k": module.k, "bytes": module.nbytes,
        "bits_per_weight": 8 * module.nbytes / (module.n * module.k), "kernel": kernel, "refusals": refusals,
        "tensors": {p: {"dtype": str(e.dtype).removeprefix("torch."), "shape": list(e.shape), "file": e.file.name} for p, e in module.tensors.items()},
    }  # fmt: skip


def natural(name: str) -> list[tuple[int, str]]:
    """A sorting key that counts: layers.2 before layers.10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def collapse(rows: list[dict]) -> list[dict]:
    """Rows that differ in numbers within the name only become one, with a count, bytes of all, and ranges in the name."""
    from qplugins.layer_map import ranges

    groups: dict[tuple, list[dict]] = {}
    for r in rows:
        pattern = re.sub(r"(?<=\.)\d+(?=\.|$)", "*", r["name"])
        groups.setdefault((pattern, r["format"], r["n"], r["k"], r["kernel"], tuple(r["refusals"].items())), []).append(r)
    collapsed = []
    for (pattern, *_), members in groups.items():
        numbers = zip(*(re.findall(r"(?<=\.)\d+(?=\.|$)", r["name"]) for r in members), strict=True)
        name = pattern
        for of_one_place in numbers:
            name = name.replace("*", ranges(map(int, of_one_place)), 1)
        collapsed.append({**members[0], "name": name, "count": len(members), "bytes": sum(r["bytes"] for r in members)})
    return collapsed
