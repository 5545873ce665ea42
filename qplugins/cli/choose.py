"""qplugins choose SRC OUT.yaml --bits 5 --text FILE"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qplugins.cli.eval import read_windows, run_on
from qplugins.cli.quantize import model_dtype, parse_size
from qplugins.cli.shared import Json, megabytes, print_json, print_table, progress_bar

if TYPE_CHECKING:
    from qplugins.checkpoints.choose import Candidates, Choice


def choose(
    src: Annotated[Path, typer.Argument(help="Checkpoint folder to read, 16 or 32 bits.")],
    out: Annotated[Path, typer.Argument(help="Map file to write; must not exist.")],
    text: Annotated[list[Path], typer.Option(help="A text like those that the model will see, in UTF-8. May be given several times.")],
    bits: Annotated[
        float | None, typer.Option(help="Budget: bits a weight, scales included, over the matrices that are chosen for; bf16 counts 16.")
    ] = None,
    size: Annotated[str | None, typer.Option("--bytes", help="Or the budget as a size of the whole checkpoint: 4.5GB.")] = None,
    formats: Annotated[
        str | None, typer.Option(help="What to choose from, separated by commas; by default formats from 4.12 to 16 bits.")
    ] = None,
    ignore: Annotated[
        list[str] | None, typer.Option(help="A target that stays unquantized, as in a map. May be given several times.")
    ] = None,
    embeddings: Annotated[bool, typer.Option("--embeddings", help="Choose for embeddings and the output head too.")] = False,
    windows: Annotated[int, typer.Option(help="Windows of each text.", min=1)] = 16,
    context_length: Annotated[int, typer.Option(help="Tokens of a window.", min=64)] = 512,
    device: Annotated[str, typer.Option(help="Where the model runs: cpu, cuda, cuda:1.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="That the model runs in; auto: float32 on a CPU, bfloat16 elsewhere.")] = "auto",
    measure: Annotated[
        bool, typer.Option("--measure", help="Also run the model with the chosen map, to see what it costs in truth.")
    ] = False,
    json: Json = False,
) -> None:
    """Choose each layer's format for a budget: the map of least predicted KL from the original, measured on a text.

    Some thousand tokens of text are enough. What is predicted is what `qplugins quantize` with the same --text makes. Judge it with another text:
    `qplugins eval weights`.
    Memory: the model, a hidden state a layer and token, one layer's activations for all tokens.
    """
    budget = {"bits": bits, "nbytes": None if size is None else parse_size(size, "--bytes")}
    if (bits is None) == (size is None):
        raise ValueError("give the budget as --bits or as --bytes")
    if out.exists():
        raise ValueError(f"{out} already exists: choose another file or remove it")
    if not out.absolute().parent.is_dir():
        raise ValueError(f"{out.absolute().parent} is not a folder, and {out.name} is to be written there")
    import torch

    from qplugins.checkpoints import choose as c
    from qplugins.checkpoints.reader import Checkpoint
    from qplugins.layer_map import LayerMap, to_yaml

    how = run_on(device, model_dtype(dtype, device))
    source = Checkpoint.open(src)
    candidates = c.Candidates.of(source, [f.strip() for f in formats.split(",")] if formats else c.FORMATS, ignore or (), embeddings)
    # of nothing known yet but sizes: refuses what cannot be done before the work starts
    c.choose(candidates, {name: {f.name: 0.0 for f in options} for name, options in candidates.options.items()}, **budget)
    cut = [w for file in text for w in read_windows(src, file, context_length, windows)]

    from qplugins.checkpoints import quality
    from qplugins.checkpoints.importance import importance
    from qplugins.checkpoints.sensitivity import sensitivities

    model = quality.dequantized_model(src, **how)
    reference = [quality.next_token_logprobs(model, w).cpu() for w in cut] if measure else []
    important = importance(model, candidates.options, cut)
    with progress_bar("measuring", shown=not json, unit="matrices") as progress:
        tokens = torch.tensor(cut, device=device)
        found = sensitivities(source, model, candidates.options, tokens, importance=important, progress=progress)
    del model
    costs = found.costs
    choice = c.choose(candidates, costs, **budget)
    predicted = found.together({m.name: f.name for m, f in choice.assignment if m.name in costs})
    out.write_text(to_yaml(choice.assignment, comment(src, choice, candidates, predicted, len(cut) * context_length)), encoding="utf-8")
    measured = None
    if measure:
        made = quality.quantized_model(src, LayerMap.from_yaml(out), round_inputs=True, importance=important, **how)
        measured = quality.divergence(reference, made, cut).kl
    if json:
        layers = [
            {"name": m.name, "format": f.name, "kl": costs[m.name]} for m, f in choice.assignment if m.name in candidates.options
        ]  # fmt: skip
        figures = {"bits": choice.bits, "bits_per_weight": choice.assignment.bits_per_weight, "bytes": choice.nbytes}
        print_json(
            {"out": str(out), **figures, "predicted_kl": predicted, "sum_of_kl": choice.kl, "measured_kl": measured, "layers": layers}
        )
        return
    print_choice(candidates, costs, choice)
    print(f"predicted KL {predicted:.4f} nats a token" + (f", measured {measured:.4f}" if measured is not None else ""))
    print(f"{out}: {choice.bits:.3f} bits a weight in {len(candidates.options)} matrices, {megabytes(choice.nbytes)} in all")


def comment(src: Path, choice: "Choice", candidates: "Candidates", predicted: float, tokens: int) -> str:
    return (
        f"Chosen for {src.name} by `qplugins choose`, from {tokens:,} tokens of text; to be quantized with the same --text.\n"
        f"{choice.bits:.3f} bits a weight in {len(candidates.options)} matrices, {choice.nbytes:,} bytes in all, predicted KL {predicted:.4f} nats a token."
    )


def print_choice(candidates: "Candidates", costs: dict[str, dict[str, float]], choice: "Choice") -> None:
    rows = []
    chosen = [(m, f) for m, f in choice.assignment if m.name in candidates.options]
    for fmt in dict.fromkeys(sorted((f for _, f in chosen), key=lambda f: f.nbytes(4096, 4096))):
        of = [m for m, f in chosen if f == fmt]
        here = sum(costs[m.name][fmt.name] for m in of)
        fits = all(fmt.name in costs[m.name] for m, _ in chosen)
        weights = sum(m.n * m.k for m in of) / candidates.weights
        rows.append(
            (fmt.name, len(of), f"{weights:.1%}", f"{here:.4f}", f"{sum(costs[m.name][fmt.name] for m, _ in chosen):.4f}" if fits else "")
        )
    print_table("chosen", ["format", " matrices", " of the weights", " predicted KL", " if it were everywhere"], rows)
