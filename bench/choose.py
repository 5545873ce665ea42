"""What a text is worth to quantizing: presets with and without it, chosen maps beside them at the same bits, and predicted KL beside measured.

    python bench/choose.py [--model FOLDER] [--windows N] [--matrices N] [--out FILE]

Sensitivities are measured on one prose and one code text, maps are judged on two others: KL of the next token against the unquantized
model, float32, fp8 layers rounding their inputs as on a GPU. Bits are those of the matrices that are chosen for, scales included: every linear
layer but the output head.

    to choose by   paragraphs of NumPy's documentation, and the source of `tarfile`
    to judge by    those of bench/kv_ablation.py: Python's language reference, and the source of `argparse`

The text to choose by is also the one that tells which columns matter; each preset is judged without that too. Also: the KL of single matrices in
nvfp4 and int8, predicted and measured on the text to choose by.
"""

import argparse
import inspect
import json
import random
import re
import statistics
import sys
import tarfile
import time
from pathlib import Path

import numpy
import torch
from transformers import AutoTokenizer, logging

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))

from bench.common import commit  # noqa: E402
from bench.kv_ablation import default_texts  # noqa: E402
from qplugins.checkpoints.choose import FORMATS, Candidates, choose  # noqa: E402
from qplugins.checkpoints.importance import importance  # noqa: E402
from qplugins.checkpoints.quality import dequantized_model, divergence, next_token_logprobs, quantized_model  # noqa: E402
from qplugins.checkpoints.reader import Checkpoint  # noqa: E402
from qplugins.checkpoints.sensitivity import sensitivities  # noqa: E402
from qplugins.formats import get_format  # noqa: E402
from qplugins.layer_map import Assignment, LayerMap, Rule  # noqa: E402

PRESETS = ("nvfp4", "balanced", "mxfp4")  # beside each, what is chosen at its bits
BITS = (6, 7)
OTHERS = ("int4", "fp8")  # the least that there is, and 8 bits throughout
LENGTH, CHOOSE_WINDOWS = 512, 8  # of the text to choose by
CONTEXT = 1024  # of the text to judge by


def texts_to_choose_by() -> dict[str, str]:
    modules = (numpy, numpy.linalg, numpy.random, numpy.ma)
    docs = [inspect.cleandoc(d) for m in modules for n in sorted(dir(m)) if isinstance(d := getattr(getattr(m, n), "__doc__", None), str)]
    paragraphs = dict.fromkeys(" ".join(p.split()) for d in docs for p in re.split(r"\n\s*\n", d) if not p.startswith(" "))
    prose = [p for p in paragraphs if len(p.split()) > 40 and not any(mark in p for mark in (">>>", "::", "---"))]
    return {"prose": "\n\n".join(prose), "code": inspect.getsource(tarfile)[4000:]}  # behind its licence


def windows(tokenizer, text: str, length: int, count: int) -> list[list[int]]:
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"][: length * count]
    return [tokens[i : i + length] for i in range(0, length * count, length)]


def as_map(assignment: Assignment) -> LayerMap:
    return LayerMap(tuple(Rule((m.name,), (fmt,)) for m, fmt in assignment if fmt.quantized))


def rank_correlation(a: list[float], b: list[float]) -> float:
    """Spearman's; of numbers that are all different."""
    return statistics.correlation(*([sorted(x).index(value) for value in x] for x in (a, b)))


def single_matrices(model, costs: dict, important: dict, cut: list[list[int]], count: int) -> dict:
    """Predicted and measured KL of `count` matrices, each alone in nvfp4 and in int8."""
    reference = [next_token_logprobs(model, w) for w in cut]
    found = {}
    for fmt in ("nvfp4", "int8"):
        rows = []
        for name in random.Random(0).sample([n for n, _ in model.named_modules() if n in costs], count):
            parameter = model.get_submodule(name).weight
            plain = parameter.data
            parameter.data = get_format(fmt).quantize(plain.to(torch.bfloat16), None, important[name]).dequantize()
            rows.append({"name": name, "predicted": costs[name][fmt], "measured": divergence(reference, model, cut).kl})
            parameter.data = plain
        ratios = [r["predicted"] / r["measured"] for r in rows]
        found[fmt] = {
            "rank_correlation": rank_correlation(*([r[key] for r in rows] for key in ("predicted", "measured"))),
            "ratio": statistics.geometric_mean(ratios),
            "spread": statistics.geometric_mean([max(x, 1 / x) for x in (r / statistics.geometric_mean(ratios) for r in ratios)]),
            "rows": rows,
        }
        print(fmt, {key: f"{found[fmt][key]:.3f}" for key in ("rank_correlation", "ratio", "spread")}, file=sys.stderr, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a checkpoint; SmolLM2-135M-Instruct by default")
    parser.add_argument("--windows", type=int, default=2, help=f"windows of {CONTEXT} tokens of each text to judge by")
    parser.add_argument("--matrices", type=int, default=40, help="single matrices to measure")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "choose.json")
    args = parser.parse_args()
    if args.model is None:
        from integration_tests.models import smollm2

        args.model = smollm2()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    source = Checkpoint.open(args.model)
    to_choose = [windows(tokenizer, t, LENGTH, CHOOSE_WINDOWS // 2) for t in texts_to_choose_by().values()]
    to_judge = {name: windows(tokenizer, t, CONTEXT, args.windows) for name, t in default_texts().items()}

    model, started = dequantized_model(args.model), time.monotonic()
    every = Candidates.of(source, (*FORMATS, "mxfp4", "fp8"))  # those of presets too, to predict them
    by = [w for cut in to_choose for w in cut]
    important = importance(model, every.options, by)
    found = sensitivities(source, model, every.options, torch.tensor(by), importance=important)
    costs = found.costs
    print(f"sensitivities: {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    reference = {name: [next_token_logprobs(model, w) for w in cut] for name, cut in to_judge.items()}
    result = {
        "command": f"python bench/choose.py --windows {args.windows} --matrices {args.matrices}",
        "model": args.model.name,
        "window": CONTEXT,
        "windows": args.windows,
        "choose_tokens": LENGTH * CHOOSE_WINDOWS,
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "commit": commit(),
        "rows": [],
        "single": single_matrices(model, costs, important, [cut[0] for cut in to_choose], args.matrices) if args.matrices else {},
    }
    del model

    candidates = Candidates.of(source, FORMATS)
    modules = [m for m, _ in choose(candidates, costs, bits=16).assignment]
    presets = {name: LayerMap.preset(name, source.num_layers).assign(modules, ["lm_head"]) for name in (*PRESETS, *OTHERS)}
    maps: list[tuple[str, bool, Assignment]] = []
    for name in PRESETS:
        chosen = choose(candidates, costs, bits=bits_of(candidates, presets[name])).assignment
        maps += [(name, False, presets[name]), (name, True, presets[name]), ("chosen", True, chosen)]
    maps += [("chosen", True, choose(candidates, costs, bits=bits).assignment) for bits in BITS]
    maps += [(name, by_text, presets[name]) for name in OTHERS for by_text in ((False,) if name == "fp8" else (False, True))]
    for name, by_text, assignment in maps:
        model = quantized_model(args.model, as_map(assignment), round_inputs=True, importance=important if by_text else None)
        formats = {m.name: f.name for m, f in assignment if m.name in candidates.options}
        # what is predicted is with the text; scales of fp8 follow from the largest magnitudes, whatever is important
        predicts = by_text or name == "fp8"
        row = {
            "map": name,
            "by_text": by_text,
            "bits": bits_of(candidates, assignment),
            "formats": dict(assignment.counts()),
            "sum_of_kl": sum(costs[n][f] for n, f in formats.items()) if predicts else None,
            "predicted_kl": found.together(formats) if predicts else None,
        }
        for text, cut in to_judge.items():
            d = divergence(reference[text], model, cut)
            row[text] = {"kl": d.kl, "top1": d.top1, "perplexity": d.perplexity}
            result.setdefault("unquantized", {})[text] = d.reference_perplexity
        result["rows"].append(row)
        told = "".join(f"  {text} KL {row[text]['kl']:.4f}, perplexity {row[text]['perplexity']:.2f}" for text in to_judge)
        predicted = "" if row["predicted_kl"] is None else f"  predicted {row['predicted_kl']:.4f}"
        print(f"{name:10}{' by text' * by_text:8}{row['bits']:7.3f} bits{predicted}{told}", flush=True)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")


def bits_of(candidates: Candidates, assignment: Assignment) -> float:
    return 8 * sum(f.nbytes(m.n, m.k) for m, f in assignment if m.name in candidates.options) / candidates.weights


if __name__ == "__main__":
    main()
