"""Compiles the kernels for GPUs that are not here, and reports what became of them. Run as a program: prints one JSON line a case.

A process of its own, since under Triton's interpreter, where the other tests run on a CPU, nothing can be compiled.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

TARGETS = {"sm_80": ("cuda", 80, 32), "sm_90": ("cuda", 90, 32), "sm_100": ("cuda", 100, 32), "gfx942": ("hip", "gfx942", 64)}


def compile_for(target: str, function, args: dict, constants: dict, warps: int, stages: int):
    """function compiled; args: name -> Triton type of a run-time argument, in order. Pointers and sizes count as multiples of 16."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = function.arg_names
    signature = {name: args.get(name, "constexpr") for name in names}
    divisible = [["tt.divisibility", 16]]
    attrs = {
        (i,): divisible
        for i, name in enumerate(names)
        if name in args and (args[name].startswith("*") or name in ("K", "stride_x", "stride_y", "stride_scale"))
    }
    source = ASTSource(function, signature, constants, attrs)
    return triton.compile(source, target=GPUTarget(*TARGETS[target]), options={"num_warps": warps, "num_stages": stages})


def resources(compiled) -> dict:
    """Registers, spilled bytes and shared memory of a kernel compiled for NVIDIA, and how its tensor core operations take their operands."""
    from triton.backends import nvidia

    ptx = compiled.asm["ptx"]
    found = {
        "shared": compiled.metadata.shared,
        "wgmma": len(re.findall(r"wgmma\.mma_async", ptx)),
        "wgmma_from_registers": len(re.findall(r"wgmma\.mma_async[^;]*\}, \{", ptx)),
        "pending_products": len(re.findall(r"warp_group_dot_wait [^\n]*pendings = [1-9]", compiled.asm["ttgir"])),
        "mma": len(re.findall(r"\bmma\.sync", ptx)),
        "shared_stores": len(re.findall(r"st\.shared", ptx)),
        "async_copies": len(re.findall(r"cp\.async\.c[ag]", ptx)),
    }
    tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
    if tool.exists():
        with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
            f.write(compiled.asm["cubin"])
            f.flush()
            usage = subprocess.run([tool, "--dump-resource-usage", f.name], capture_output=True, text=True).stdout
        if m := re.search(r"REG:(\d+) STACK:(\d+)", usage):
            # a multiprocessor of compute capability 9.0 has 64 Ki registers, given out in 256 a warp, and 228 KiB of shared memory, of which each
            # program takes one more
            by_registers = 65536 // (-(-int(m[1]) // 8) * 256 * compiled.metadata.num_warps)
            found |= {"registers": int(m[1]), "stack": int(m[2]), "room": min(by_registers, 228 * 1024 // (found["shared"] + 1024))}
    return found


def _found(target: str, compiled) -> dict:
    if target.startswith("sm_"):
        return resources(compiled)
    return {"shared": compiled.metadata.shared, "mfma": compiled.asm["amdgcn"].count("v_mfma")}


def _product(target: str, spec, dtype: str, tile) -> tuple[dict, dict]:
    """Types of the arguments that `product` takes, and its constants."""
    import torch

    from qplugins.kernels.linear.layout import scale_word_bits
    from qplugins.kernels.linear.product import constants

    args = {
        "x": f"*{dtype}",
        "codes": "*i16" if spec.code else f"*{dtype}",
        "row": "*fp32" if spec.code else f"*{dtype}",
        "scale": f"*i{scale_word_bits(spec)}" if spec.group else "*fp32",
        "zero": f"*i{scale_word_bits(spec, zero=True)}" if spec.zero_point else "*fp32",
        "y": f"*{dtype}",
        "work": "*fp32",
        "locks": "*i32",
    }
    args |= dict.fromkeys(("N", "K", "stride_x", "stride_y", "tiles_k", "pairs", "steps", "split_k", "stripe_m"), "i32")
    fixed = constants(spec, torch.bfloat16 if dtype == "bf16" else torch.float16, tile)
    hopper = target == "sm_90"
    return args, fixed | {"SHARED_K": tile.split_k > 1, "PTX": target.startswith("sm_"), "HOPPER": hopper}


def linear(target: str, spec, dtype: str, tile) -> dict:
    """The linear kernel for one spec, compiled."""
    from qplugins.kernels.linear.kernel import linear_kernel

    args, fixed = _product(target, spec, dtype, tile)
    args |= {"bias": f"*{dtype}", "M": "i32"}
    return _found(
        target, compile_for(target, linear_kernel, args, fixed | {"BIAS": True, "PDL": target == "sm_90"}, tile.warps, tile.stages)
    )


def few(target: str, spec, dtype: str, tile) -> dict:
    """The product of very few rows, compiled with tile.stages."""
    import torch

    from qplugins.kernels.linear.few import WARPS, constants_of, few_kernel

    args, fixed = _product(target, spec, dtype, tile)
    args |= {"bias": f"*{dtype}", "M": "i32"}
    fixed |= {"BIAS": True} | constants_of(spec, torch.bfloat16 if dtype == "bf16" else torch.float16)
    args, fixed = ({name: of[name] for name in few_kernel.arg_names if name in of} for of in (args, fixed | {"PTX": True, "PDL": True}))
    return _found(target, compile_for(target, few_kernel, args, fixed, WARPS, tile.stages))


def experts(target: str, spec, dtype: str, tile) -> dict:
    """The experts' product for one spec, compiled."""
    from qplugins.kernels.moe.kernel import experts_kernel

    args, fixed = _product(target, spec, dtype, tile)
    args |= {"order": "*i32", "blocks": "*i32", "stride_scale": "i32", "blocks_m": "i32", "top_k": "i32"}
    return _found(target, compile_for(target, experts_kernel, args, fixed, tile.warps, tile.stages))


def experts_order(target: str, spec, dtype: str, tile) -> dict:
    """What sorts choices among 512 experts, compiled for a prefill."""
    from qplugins.kernels.moe.order import CHUNK, ROWS, order_kernel

    args = dict.fromkeys(("ids", "counts", "order", "blocks"), "*i32")
    args |= dict.fromkeys(("choices", "experts", "chunks", "block_m", "bound"), "i32")
    fixed = {"ONE": False, "CHUNK": CHUNK, "BINS": 512, "LOG_BINS": 9, "ROWS": ROWS, "PDL": target == "sm_90"}
    return _found(target, compile_for(target, order_kernel, args, fixed, tile.warps, tile.stages))


def fp8_few(target: str, spec, dtype: str, tile) -> dict:
    """The FP8 product of few rows, compiled."""
    from qplugins.kernels.linear.fp8_few import BLOCK_K, BLOCK_N, STAGES, few_kernel

    args = {"q": "*fp8e4nv", "scale": "*fp32", "weight": "*fp8e4nv", "row": "*fp32", "bias": f"*{dtype}", "y": f"*{dtype}"}
    args |= {"work": "*fp32", "locks": "*i32"} | dict.fromkeys(("M", "N", "K", "stride_y", "stride_row", "split_k", "steps"), "i32")
    fixed = {"BIAS": True, "BLOCK_N": BLOCK_N, "BLOCK_M": tile.block_m, "BLOCK_K": BLOCK_K, "SHARED_K": True, "PDL": True}
    return _found(target, compile_for(target, few_kernel, args, fixed, 4, STAGES[tile.block_m]))


def fp8_quantize(target: str, spec, dtype: str, tile) -> dict:
    """What rounds rows of x to e4m3, compiled for the longest row that it holds at once."""
    from qplugins.kernels.linear.fp8 import BLOCK, VALUES, quantize_kernel

    args = {"x": f"*{dtype}", "stored": "*fp32", "q": "*fp8e4nv", "scale": "*fp32", "locks": "*i32", "K": "i32", "stride_x": "i32"}
    fixed = {"STATIC": False, "ONCE": True, "BLOCK_K": BLOCK, "LOCKS": 512, "PDL": target == "sm_90"}
    return _found(target, compile_for(target, quantize_kernel, args, fixed, BLOCK // (32 * VALUES), 3))


def dense(target: str, spec, dtype: str, tile) -> dict:
    """What decodes a whole matrix for one spec, compiled."""
    from qplugins.kernels.linear.dense import decode_kernel

    args, fixed = _product(target, spec, dtype, tile)
    own = ("codes", "row", "scale", "zero", "N", "K", "tiles_k", "pairs")
    args = {name: t for name, t in args.items() if name in own} | {"out": f"*{dtype}", "first_row": "i32"}
    fixed = {name: fixed[name] for name in decode_kernel.arg_names if name in fixed}
    return _found(target, compile_for(target, decode_kernel, args, fixed, tile.warps, 1))


def _gluon(target: str, kernel, args: dict, fixed: dict) -> dict:
    """A kernel written in Gluon, compiled; with what its machine code does while products are under way. args: as `compile_for` has them."""
    import triton
    from triton.backends import nvidia
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon._runtime import GluonASTSource

    sys.path.append(str(Path(__file__).parent))
    import sass

    fixed = fixed | {"BIAS": True}
    options = {name: fixed.pop(name) for name in ("num_warps", "maxnreg")}
    names = kernel.arg_names
    args = dict.fromkeys((name for name in names if name not in fixed), "i32") | args
    attrs = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if args.get(name, "").startswith("*")}
    source = GluonASTSource(kernel, {name: args.get(name, "constexpr") for name in names}, fixed, attrs)
    compiled = triton.compile(source, target=GPUTarget(*TARGETS[target]), options=options)
    found = resources(compiled)
    tool = Path(nvidia.__file__).parent / "bin" / "nvdisasm"
    if tool.exists():
        with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
            f.write(compiled.asm["cubin"])
            f.flush()
            found |= sass.report(subprocess.run([tool, "-c", f.name], capture_output=True, text=True).stdout)
    return found


def wide(target: str, spec, dtype: str, tile) -> dict:
    """The product for many rows, compiled for Hopper."""
    import torch

    from qplugins.kernels.linear import wide
    from qplugins.kernels.linear.layout import scale_word_bits

    args = dict.fromkeys(("row", "scale", "zero", "work"), "*fp32") | {"bias": f"*{dtype}", "locks": "*i32"}
    if spec.zero_point:
        args["zero"] = f"*i{scale_word_bits(spec, zero=True)}"
    for name, (block, layout) in wide.blocks_of(spec, tile).items():
        of = dtype if name in ("x", "part", "y") else f"i{layout.element_bitwidth}"
        args[name] = f"tensordesc<{of}{block},{layout!r}>"
    fixed = wide.constants(spec, torch.bfloat16 if dtype == "bf16" else torch.float16, tile)
    return _gluon(target, wide.wide_kernel, args, fixed)


def fp8_wide(target: str, spec, dtype: str, tile) -> dict:
    """The FP8 product of more rows, compiled for Hopper."""
    from qplugins.kernels.linear import fp8_wide

    args = dict.fromkeys(("scale", "row", "work"), "*fp32") | {"bias": f"*{dtype}", "locks": "*i32"}
    for name, (block, layout) in fp8_wide.blocks_of(tile).items():
        args[name] = f"tensordesc<{dtype if name == 'y' else 'fp8e4nv'}{block},{layout!r}>"
    return _gluon(target, fp8_wide.fp8_wide_kernel, args, fp8_wide.constants(tile))


KERNELS = {
    "linear": linear,
    "dense": dense,
    "experts": experts,
    "experts_order": experts_order,
    "few": few,
    "fp8_few": fp8_few,
    "fp8_quantize": fp8_quantize,
    "fp8_wide": fp8_wide,
    "wide": wide,
}


def main() -> None:
    from qplugins.kernels.linear.spec import parse
    from qplugins.kernels.linear.tiles import Tile
    from qplugins.kernels.linear.wide import WideTile

    for line in sys.stdin:
        case = json.loads(line)
        spec = parse(f"triton {case['spec']}").shards[0].spec
        try:
            tile = (WideTile if case["kernel"] in ("wide", "fp8_wide") else Tile)(**case["tile"])
            found = KERNELS[case["kernel"]](case["target"], spec, case["dtype"], tile)
        except Exception as e:
            found = {"error": f"{type(e).__name__}: {e}"}
        print(json.dumps(case | found), flush=True)


if __name__ == "__main__":
    main()
