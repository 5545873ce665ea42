"""qplugins eval kv MODEL --kv-cache-dtype int4_sink,fp8 --text FILE,  qplugins eval weights SRC CKPT --text FILE"""

import json as _json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qplugins.cli.shared import Json, megabytes, print_json, print_table, progress_bar

if TYPE_CHECKING:
    import numpy as np

NEEDLE, NUMBER = "The number of the locker at the old station is {}.", 7421
QUESTION = "What is the number of the locker at the old station? Answer with the number."
DEPTHS = 10
DTYPES = ("float32", "bfloat16", "float16")


def eval_kv(
    model: Annotated[str, typer.Argument(help="Checkpoint folder.")],
    text: Annotated[Path, typer.Option(help="A text to judge, in UTF-8.")],
    kv_cache_dtype: Annotated[str, typer.Option(help="What to compare, separated by commas: int4_sink,k5v4_sink,fp8.")] = "int4_sink",
    context_lengths: Annotated[str, typer.Option(help="Tokens of a window, separated by commas.")] = "2048",
    windows: Annotated[int, typer.Option(help="Windows of the text, for each length.", min=1)] = 2,
    needle: Annotated[bool, typer.Option("--needle", help="Also hide a fact at ten depths of the text and ask for it.")] = False,
    chunk: Annotated[int, typer.Option(help="Tokens that are computed at once; those before are read from the cache.", min=16)] = 128,
    top: Annotated[int, typer.Option(help="Likeliest tokens at a position that are compared; the others are one bucket.", min=2)] = 256,
    dtype: Annotated[str, typer.Option(help="Of activations. bfloat16's own noise hides differences below about 0.001.")] = "auto",
    engine_args: Annotated[str, typer.Option(help="Further arguments of vllm.LLM, a JSON object.")] = "{}",
    plot: Annotated[Path | None, typer.Option(help="Draw the KL over the position as a PNG.")] = None,
    json: Json = False,
) -> None:
    """Compare KV cache dtypes with an unquantized cache, through vLLM: KL of the next token, perplexity, top-1 agreement, bytes a token."""
    from transformers import AutoTokenizer

    names = [n.strip() for n in kv_cache_dtype.split(",") if n.strip()]
    try:
        lengths = sorted({int(n) for n in context_lengths.split(",")})
    except ValueError:
        raise ValueError(f"--context-lengths should be numbers separated by commas, is {context_lengths!r}") from None
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokens = tokenizer(text.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
    cut = {n: cut_windows(tokens, n, windows, text) for n in reversed(lengths)}
    prompts = {n: hide(tokenizer, tokens, n) for n in lengths} if needle else {n: [] for n in lengths}
    request = {
        "model": model,
        "windows": [w for n in lengths for w in cut[n]],
        "prompts": [p for n in lengths for p in prompts[n]],
        "top": top,
        "chunk": chunk,
        "engine": {"dtype": dtype, **_json.loads(engine_args)},
    }
    found = {name: ask(request | {"kv_cache_dtype": name}, name, shown=not json) for name in dict.fromkeys(["auto", *names])}
    rows: list[dict[str, Any]] = []
    curves: dict[str, np.ndarray] = {}
    w, p = 0, 0
    for n in lengths:
        at, asked = slice(w, w + len(cut[n])), slice(p, p + len(prompts[n]))
        w, p = at.stop, asked.stop
        for name in found:
            row, kl = compare(found["auto"], found[name], at, n - 1, asked if needle else None)
            rows.append({"kv_cache_dtype": name, "context": n, **row})
            if name != "auto" and n == lengths[-1]:
                curves[name] = kl
    if plot is not None:
        draw(plot, curves)
    if json:
        print_json({"model": model, "text": str(text), "windows": windows, "chunk": chunk, "top": top, "rows": rows})
        return
    print_table(
        f"{model}: KV caches against the model's own dtype, {windows} windows, chunks of {chunk} tokens",
        ["KV cache", " context", " KL", " perplexity", " top-1", " bytes a token", " tokens that fit", *([" recalled"] if needle else [])],
        [
            (
                r["kv_cache_dtype"], r["context"], f"{r['kl']:.5f}", f"{r['perplexity']:.3f}", f"{r['top1']:.2%}",
                f"{r['bytes_per_token']:,.0f}", f"{r['tokens']:,}", *([f"{r['recalled']}/{DEPTHS}"] if needle else []),
            )
            for r in rows
        ],
    )  # fmt: skip


def eval_weights(
    src: Annotated[Path, typer.Argument(help="The unquantized checkpoint.")],
    ckpt: Annotated[Path, typer.Argument(help="The checkpoint that was made from it.")],
    text: Annotated[Path, typer.Option(help="A text to judge, in UTF-8.")],
    context_length: Annotated[int, typer.Option(help="Tokens of a window.", min=2)] = 2048,
    windows: Annotated[int, typer.Option(help="Windows of the text.", min=1)] = 2,
    device: Annotated[str, typer.Option(help="Where the models run, one after the other: cpu, cuda, cuda:1.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="That they run in. bfloat16's own noise hides a KL below about 0.001.")] = "float32",
    json: Json = False,
) -> None:
    """Compare a quantized checkpoint's weights with the original's, through transformers: KL of the next token, perplexity, top-1 agreement.

    No engine is needed, and the KV cache is not quantized. fp8 layers round their inputs as GPUs do. For benchmark tasks:
    lm_eval --model vllm --model_args pretrained=CKPT,quantization=qplugins --tasks gsm8k
    """
    from qplugins.checkpoints.reader import Checkpoint

    checkpoints = [Checkpoint.open(path).check() for path in (src, ckpt)]
    how = run_on(device, dtype)
    cut = read_windows(src, text, context_length, windows)
    from qplugins.checkpoints import quality

    with progress_bar("running", shown=not json, unit="models") as progress:
        progress(0, 2, str(src))
        model = quality.dequantized_model(src, **how)
        reference = [quality.next_token_logprobs(model, w).cpu() for w in cut]
        del model
        progress(1, 2, str(ckpt))
        found = quality.divergence(reference, quality.dequantized_model(ckpt, round_inputs=True, **how), cut)
    rows = []
    for checkpoint, kl, top1, perplexity in zip(
        checkpoints, (0.0, found.kl), (1.0, found.top1), (found.reference_perplexity, found.perplexity), strict=True
    ):
        modules = checkpoint.modules()
        bits = 8 * sum(m.nbytes for m in modules) / sum(m.n * m.k for m in modules)
        figures = {"bytes": checkpoint.nbytes, "bits_per_weight": bits, "kl": kl, "perplexity": perplexity, "top1": top1}
        rows.append({"checkpoint": str(checkpoint.path), **figures})
    if json:
        print_json({"text": str(text), "context": context_length, "windows": len(cut), "positions": found.positions, "rows": rows})
        return
    print_table(
        f"{found.positions} next tokens of {text}",
        ["checkpoint", " bytes", " bits per weight", " KL", " perplexity", " top-1"],
        [
            (
                r["checkpoint"], megabytes(r["bytes"]), f"{r['bits_per_weight']:.2f}", f"{r['kl']:.5f}", f"{r['perplexity']:.3f}",
                f"{r['top1']:.2%}",
            )
            for r in rows
        ],
    )  # fmt: skip


def read_windows(model: str | Path, text: Path, length: int, count: int) -> list[list[int]]:
    """The first `count` windows of a text file, in tokens of a checkpoint's tokenizer; fewer, where the text ends."""
    from transformers import AutoTokenizer, logging

    logging.set_verbosity_error()  # a text may be longer than the model's context: it is cut
    logging.disable_progress_bar()
    tokens = AutoTokenizer.from_pretrained(model)(text.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
    return cut_windows(tokens, length, count, text)


def cut_windows(tokens: list[int], length: int, count: int, text: Path) -> list[list[int]]:
    if len(tokens) < length:
        raise ValueError(f"{text} has {len(tokens)} tokens, and a window of {length} is asked for")
    return [tokens[i : i + length] for i in range(0, len(tokens) - length + 1, length)][:count]


def run_on(device: str, dtype: str) -> dict[str, Any]:
    """How quality.py is to load a model. Raises ValueError for a device or dtype that cannot be."""
    import torch

    from qplugins.checkpoints.quantize import check_device

    if dtype not in DTYPES:
        raise ValueError(f"--dtype {dtype!r} is none of {', '.join(DTYPES)}")
    check_device(device)
    return {"device": device, "dtype": getattr(torch, dtype)}


def hide(tokenizer: Any, tokens: list[int], length: int) -> list[list[int]]:
    """Prompts of about `length` tokens that hold the fact at ten depths, from the beginning to the end."""
    fact = NEEDLE.format(NUMBER)
    room = length - 120  # for the fact, the question and the chat template
    if room < 20:
        raise ValueError(f"a context of {length} tokens has no room for --needle; take one of 160 or more")
    prompts = []
    for depth in range(DEPTHS):
        cut = round(room * depth / (DEPTHS - 1))
        body = f"{tokenizer.decode(tokens[:cut])}\n\n{fact}\n\n{tokenizer.decode(tokens[cut:room])}\n\n{QUESTION}"
        if tokenizer.chat_template:
            body = tokenizer.apply_chat_template([{"role": "user", "content": body}], tokenize=False, add_generation_prompt=True)
        else:
            body = f"{body}\nThe number of the locker at the old station is"
        prompts.append(tokenizer(body, add_special_tokens=not tokenizer.chat_template)["input_ids"])
    return prompts


def ask(request: dict[str, Any], name: str, shown: bool) -> dict[str, "np.ndarray"]:
    """Runs vllm/evaluate.py in a process of its own, so that each engine starts on an empty device."""
    import numpy as np

    with tempfile.TemporaryDirectory() as folder, progress_bar(name, shown, unit="windows") as progress:
        question, answer, log = (Path(folder) / file for file in ("request.json", "result.npz", "log"))
        question.write_text(_json.dumps(request))
        command = [sys.executable, "-P", "-m", "qplugins.vllm.evaluate", str(question), str(answer)]
        with log.open("w") as errors, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                done, _, total = line.partition(" ")
                if done.isdigit() and total.strip().isdigit():
                    progress(int(done), int(total), "")
        if process.returncode or not answer.exists():
            lines = [line for line in log.read_text(errors="replace").splitlines() if "Error" in line] or ["it wrote no error"]
            raise RuntimeError(f"vLLM failed with --kv-cache-dtype {name}: {lines[-1].strip()}")
        with np.load(answer) as result:
            return dict(result)


def compare(
    reference: dict[str, "np.ndarray"], other: dict[str, "np.ndarray"], windows: slice, positions: int, prompts: slice | None
) -> tuple[dict[str, Any], "np.ndarray"]:
    """A row of figures, and the mean KL at each position. KL over the tokens that both list and one bucket for all others: a lower bound."""
    import numpy as np

    kls, same = np.zeros((windows.stop - windows.start, positions)), 0
    for i, w in enumerate(range(windows.start, windows.stop)):
        for j in range(positions):
            p, q = (
                dict(zip(x["ids"][w, j].tolist(), x["logprobs"][w, j].astype(np.float64).tolist(), strict=True)) for x in (reference, other)
            )
            both = [t for t in p.keys() & q.keys() if t >= 0]
            lp, lq = np.array([p[t] for t in both]), np.array([q[t] for t in both])
            rest = [max(1e-12, 1 - float(np.exp(x).sum())) for x in (lp, lq)]
            kls[i, j] = float((np.exp(lp) * (lp - lq)).sum()) + rest[0] * np.log(rest[0] / rest[1])
            same += int(reference["ids"][w, j, 0] == other["ids"][w, j, 0])
    row = {
        "kl": float(kls.mean()),
        "perplexity": float(np.exp(-other["next"][windows, :positions].mean(dtype=np.float64))),
        "top1": same / kls.size,
        "bytes_per_token": float(other["bytes_per_token"]),
        "tokens": int(other["tokens"]),
    }
    if prompts is not None:
        row["recalled"] = sum(str(NUMBER) in str(a) for a in other["answers"][prompts])
    return row, kls.mean(0)


def draw(file: Path, curves: dict[str, "np.ndarray"], buckets: int = 32) -> None:
    """KL over the position, both means over a bucket, the KL on a logarithmic scale."""
    import numpy as np
    from PIL import Image, ImageDraw, ImageFont

    width, height, left, right, top, bottom = 1000, 600, 90, 180, 30, 60
    image = Image.new("RGB", (width, height), "white")
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(15)
    n = max((len(c) for c in curves.values()), default=1)
    edges = np.linspace(0, n, min(buckets, n) + 1).astype(int)
    means = {name: np.array([max(1e-7, c[a:b].mean()) for a, b in zip(edges, edges[1:], strict=False)]) for name, c in curves.items()}
    low = np.floor(np.log10(min((m.min() for m in means.values()), default=1e-3)))
    high = max(low + 1, np.ceil(np.log10(max((m.max() for m in means.values()), default=1))))

    def x(position: float) -> float:
        return left + (width - left - right) * position / n

    def y(kl: float) -> float:
        return top + (height - top - bottom) * (high - np.log10(kl)) / (high - low)

    for power in range(int(low), int(high) + 1):
        pen.line([(left, y(10.0**power)), (width - right, y(10.0**power))], fill="#dddddd")
        pen.text((left - 10, y(10.0**power)), f"1e{power}", fill="black", font=font, anchor="rm")
    for i in range(5):
        pen.text((x(n * i / 4), height - bottom + 12), f"{n * i // 4}", fill="black", font=font, anchor="ma")
    pen.text(((left + width - right) / 2, height - 22), "position in the context, tokens", fill="black", font=font, anchor="mm")
    pen.text((left, 6), "KL of the next token against an unquantized cache", fill="black", font=font)
    colours = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
    for i, (name, m) in enumerate(means.items()):
        points = [(x((a + b) / 2), y(v)) for a, b, v in zip(edges, edges[1:], m, strict=False)]
        colour = colours[i % len(colours)]
        pen.line(points, fill=colour, width=3, joint="curve")
        pen.line([(width - right + 15, top + 14 + 26 * i), (width - right + 40, top + 14 + 26 * i)], fill=colour, width=3)
        pen.text((width - right + 48, top + 14 + 26 * i), name, fill="black", font=font, anchor="lm")
    image.save(file)
