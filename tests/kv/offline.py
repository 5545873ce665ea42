"""Compiles the KV kernels for GPUs that are not here; reads one JSON case a line and prints it with what became of it. A process of its own:
under Triton's interpreter, where the other tests run on a CPU, nothing can be compiled."""

import json
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))

from tests.kernels.offline import TARGETS, resources  # noqa: E402


def compile_for(target: str, function, args: dict, constants: dict, warps: int, stages: int):
    """Pointers and all strides but the block table's and lse's count as multiples of 16."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    odd = ("stride_bt", "stride_lse")
    signature = {name: args.get(name, "constexpr") for name in function.arg_names}
    attrs = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(function.arg_names)
        if args.get(name, "").startswith("*") or (name in args and name.startswith("stride") and name not in odd)
    }
    source = ASTSource(function, signature, constants, attrs)
    return triton.compile(source, target=GPUTarget(*TARGETS[target]), options={"num_warps": warps, "num_stages": stages})


def compiled(kernel: str, target: str, text: str, group: int, queries: int):
    from qplugins.kernels.attention import decode, prefill
    from qplugins.kernels.kv import gather, tile, write
    from qplugins.kernels.kv.page import Page, _pow2

    page, ptx = Page.parse(text), target.startswith("sm_")
    rows = {"SP": max(16, _pow2(max(page.sinks, 1)))}
    meta = {"block_table": "*i32", "query_start_loc": "*i32", "seq_lens": "*i32"}
    strides = lambda names: dict.fromkeys([f"stride_{n}" for n in names.split()], "i32")  # noqa: E731
    if kernel == "decode":
        n = max(decode.rows_of(group, queries)[0], 8 if ptx else 16)
        launch = decode.launch_of(page, n)
        runs = tile.runs_of(page, launch.tokens)
        half = launch.halve and decode.half_empty(group, queries)
        args = {
            "q": "*bf16",
            "pages": "*u8",
            **meta,
            "sums": "*fp32",
            "ends": "*fp32",
            "counters": "*i32",
            "out": "*bf16",
            "lse": "*fp32",
            "sink_logits": "*bf16",
        }
        args |= {"B": "i32", **strides("q qh p ph bt o oh lse"), "scale": "fp32", "soft_cap": "fp32"}
        constants = {
            "GROUP": group, "WINDOW": 0, "SOFT_CAP": False, "HAS_LSE": True, "HAS_SINK": False, "W": runs, "T": page.page_size // runs, "N": n, "BB": 32,
            "LEAST": launch.pages, "LOG_FAN": launch.fan.bit_length() - 1, "ROUND": launch.round * (1 + half), "HALF": half, "AHEAD": launch.ahead if target == "sm_90" else 0,
            "PTX": ptx, "PDL": target == "sm_90",
        }  # fmt: skip
        return compile_for(target, decode.decode_kernel, args, constants | rows | tile.page_constants(page, runs), runs, launch.stages)
    if kernel == "prefill":
        args = {
            "q": "*bf16",
            "pages": "*u8",
            "block_table": "*i32",
            "context_lens": "*i32",
            "query_start_loc": "*i32",
            "out": "*bf16",
            "lse": "*fp32",
        }
        args |= {"sink_logits": "*bf16", **strides("q qh p ph bt o oh lse"), "scale": "fp32", "soft_cap": "fp32"}
        constants = {"GROUP": group, "WINDOW": 0, "SOFT_CAP": False, "HAS_SINK": False, "N": prefill.ROWS, "PTX": ptx}
        return compile_for(
            target, prefill.prefill_kernel, args, constants | rows | tile.page_constants(page, 1), prefill.WARPS, prefill.STAGES
        )
    if kernel == "gather":
        args = {
            "pages": "*u8",
            "block_table": "*i32",
            "starts": "*i32",
            "cu_lens": "*i32",
            "k": "*bf16",
            "v": "*bf16",
            "B": "i32",
            **strides("p ph bt k kh v vh"),
        }
        return compile_for(
            target, gather.gather_kernel, args, {"BB": 32, "PTX": ptx} | rows | tile.page_constants(page, 1), gather.warps_of(page), 1
        )
    dtype = "*fp32" if kernel == "write_float32" else "*bf16"
    args = {"k": dtype, "v": dtype, "pages": "*u8", "slot_mapping": "*i64", **meta, **strides("k kh v vh p ph bt")}
    constants = tile.page_constants(page, 1) | {"PDL": target == "sm_90"}
    if kernel == "write_few":
        rows, warps = write.few_launch(page, 1)
        constants |= {"TOKENS": rows // 8, "HEADS": 8, "W": warps}
        return compile_for(target, write.write_few_kernel, args | {"heads": "i32"}, constants, warps, 1)
    warps = write.warps_of(page)
    return compile_for(target, write.write_kernel, args | {"B": "i32"}, constants | {"ENOUGH": 16, "W": warps, "BB": 32}, warps, 1)


def main() -> None:
    for line in sys.stdin:
        case = json.loads(line)
        try:
            done = compiled(**case)
            found = resources(done) if case["target"].startswith("sm_") else {"mfma": done.asm["amdgcn"].count("v_mfma")}
        except Exception as e:
            found = {"error": f"{type(e).__name__}: {e}"}
        print(json.dumps(case | found), flush=True)


if __name__ == "__main__":
    main()
