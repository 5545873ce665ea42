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
        if name in args and (args[name].startswith("*") or name in ("K", "stride_x", "stride_y"))
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
            found |= {"registers": int(m[1]), "stack": int(m[2])}
    return found


def linear(target: str, spec, dtype: str, tile) -> dict:
    """The linear kernel for one spec, compiled."""
    import torch

    from qplugins.kernels.linear.kernel import linear_kernel, powers
    from qplugins.kernels.linear.layout import scale_word_bits, tile_k

    scale = f"*i{scale_word_bits(spec)}" if spec.group else "*fp32"
    zero = f"*i{scale_word_bits(spec, zero=True)}" if spec.zero_point else "*fp32"
    args = {
        "x": f"*{dtype}",
        "codes": "*i16",
        "row": "*fp32",
        "scale": scale,
        "zero": zero,
        "bias": f"*{dtype}",
        "y": f"*{dtype}",
        "work": "*fp32",
        "locks": "*i32",
    }
    args |= dict.fromkeys(("M", "N", "K", "stride_x", "stride_y", "tiles_k", "pairs", "steps", "split_k", "stripe_m"), "i32")
    up, down = powers(spec, torch.bfloat16 if dtype == "bf16" else torch.float16)
    constants = {
        "CODE": spec.code, "SCALE": spec.scale if spec.group else "row", "GROUP": spec.group or 0, "ZERO": spec.zero_point, "BIAS": True, "UP": up, "OUT": 2.0**down,
        "EVEN_K": spec.k % (tile.step * tile_k(spec)) == 0, "BLOCK_N": tile.block_n, "BLOCK_M": tile.block_m, "STEP": tile.step,
        "SHARED_K": tile.split_k > 1, "PTX": target.startswith("sm_"),
    }  # fmt: skip
    compiled = compile_for(target, linear_kernel, args, constants, tile.warps, tile.stages)
    return (
        resources(compiled)
        if target.startswith("sm_")
        else {"shared": compiled.metadata.shared, "mfma": compiled.asm["amdgcn"].count("v_mfma")}
    )


def main() -> None:
    from qplugins.kernels.linear.spec import parse
    from qplugins.kernels.linear.tiles import Tile

    for line in sys.stdin:
        case = json.loads(line)
        spec = parse(f"triton {case['spec']}").shards[0].spec
        try:
            found = linear(case["target"], spec, case["dtype"], Tile(**case["tile"]))
        except Exception as e:
            found = {"error": f"{type(e).__name__}: {e}"}
        print(json.dumps(case | found), flush=True)


if __name__ == "__main__":
    main()
