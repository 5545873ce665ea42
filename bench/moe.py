"""The routed experts of a layer against other people's: Qwen3-30B-A3B, with many small experts, and Mixtral 8x7B, with few large ones.

Tokens choose experts at random, all as often: more experts than in a real batch, whose tokens agree more, so more weights to read. Calls
that take turns have other choices each, enough of them that the weights come from memory and not from the L2 cache. Every result is
compared with float32 before it is timed. See README.md in this folder.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.nn.functional import silu  # noqa: E402

from bench import rivals  # noqa: E402
from bench.common import Row, rel_rms, save, table  # noqa: E402
from qplugins.kernels import linear, moe  # noqa: E402
from qplugins.kernels.common.timing import bandwidth, copies, time_us  # noqa: E402
from qplugins.kernels.linear import workload  # noqa: E402
from qplugins.kernels.quantized import QuantizedTensor  # noqa: E402


@dataclass(frozen=True)
class Model:
    """hidden size, rows of gate and of up, experts, experts of a token"""

    hidden: int
    intermediate: int
    experts: int
    top_k: int


MODELS = {"qwen3-30b-a3b": Model(2048, 768, 128, 8), "mixtral-8x7b": Model(4096, 14336, 8, 2)}
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096)
TOLERANCE = 0.02  # of |y|: weights, gate, up, their product, the parts and the sum rounded to bf16, 0.002 each and more where sums cancel
CHECKED = 64  # tokens

Call = Callable[[Tensor, Tensor, Tensor], Tensor]  # x, topk_weights, topk_ids -> y


@dataclass
class Experts:
    """The matrices of one layer: gate_up [2 I, K] with gate's rows first, down [K, I]."""

    gate_up: list[QuantizedTensor]
    down: list[QuantizedTensor]

    @classmethod
    def random(cls, name: str, m: Model) -> "Experts":
        return cls(
            [workload.random_matrix(name, 2 * m.intermediate, m.hidden) for _ in range(m.experts)],
            [workload.random_matrix(name, m.hidden, m.intermediate) for _ in range(m.experts)],
        )

    def __call__(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        """float32"""
        y = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        for e in ids.unique().tolist():
            token, choice = (ids == e).nonzero(as_tuple=True)
            gate, up = (x[token].float() @ self.gate_up[e].dequantize().T).chunk(2, 1)
            y.index_add_(0, token, silu(gate) * up @ self.down[e].dequantize().T * weights[token, choice, None])
        return y


def own(layer: Experts) -> tuple[Call, int]:
    """qplugins' operator, and the bytes of one expert."""
    stacks = [moe.stack((moe.pack(q, "triton") for q in qs), len(qs)) for qs in (layer.gate_up, layer.down)]
    tensors = [t for w in stacks for t in w.tensors]
    plans = [linear.plan([(w.implementation, w.spec)]) for w in stacks]
    nbytes = sum(w.nbytes for w in stacks) // len(layer.down)
    return lambda x, weights, ids: moe.experts(x, weights, ids, tensors, *plans, "silu"), nbytes


def vllm_bf16(layer: Experts) -> Call:
    """vLLM's Triton kernel over bf16 experts, with the tiles that vLLM has tuned for this GPU and shape, if it has."""
    from vllm.model_executor.layers.fused_moe.fused_moe import fused_experts

    rivals._vllm_world()
    w13, w2 = (torch.stack([q.dequantize().to(torch.bfloat16) for q in qs]) for qs in (layer.gate_up, layer.down))
    return lambda x, weights, ids: fused_experts(x, w13, w2, weights, ids)


def marlin(layer: Experts) -> Call:
    """vLLM's Marlin kernel for experts, weights repacked as its methods for NVFP4 and for GPTQ do."""
    from vllm.model_executor.layers.fused_moe.experts.marlin_moe import fused_marlin_moe
    from vllm.model_executor.layers.quantization.utils.marlin_utils import marlin_make_workspace_new
    from vllm.scalar_type import scalar_types

    rivals._vllm_world()
    q = layer.down[0]
    if (q.code, q.scale.dtype) == ("e2m1", torch.float8_e4m3fn):
        w13, s13, g13, w2, s2, g2 = _marlin_nvfp4(layer)
        kind, more = scalar_types.float4_e2m1f, {"global_scale1": g13, "global_scale2": g2}
    elif q.code == "int4" and q.zero_point is None:
        (w13, s13), (w2, s2) = _marlin_int4(layer.gate_up), _marlin_int4(layer.down)
        kind, more = scalar_types.uint4b8, {}
    else:
        raise NotImplementedError(f"its call is not written for {linear.spec_of(q)}")
    more["workspace"] = marlin_make_workspace_new(w13.device, 4)

    def call(x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        return fused_marlin_moe(x, w13, w2, None, None, s13, s2, weights, ids, quant_type_id=kind.id, **more)

    return call


def _packed(q: QuantizedTensor) -> Tensor:
    """uint8 [N, K / 2], a row's even codes in the low halves."""
    return (q.codes[:, 0::2] | (q.codes[:, 1::2] << 4)).contiguous()


def _marlin_nvfp4(layer: Experts) -> tuple[Tensor, ...]:
    from vllm.model_executor.layers.quantization.utils.marlin_utils_fp4 import prepare_nvfp4_moe_layer_for_marlin

    shell = torch.nn.Module()
    shell.num_experts, shell.params_dtype = len(layer.down), torch.bfloat16
    shell.hidden_size, shell.intermediate_size_per_partition = layer.down[0].shape
    stored = [
        torch.stack(t)
        for qs in (layer.gate_up, layer.down)
        for t in ([_packed(q) for q in qs], [q.scale for q in qs], [q.global_scale for q in qs])
    ]
    return prepare_nvfp4_moe_layer_for_marlin(shell, *stored, is_act_and_mul=True)


def _marlin_int4(qs: list[QuantizedTensor]) -> tuple[Tensor, Tensor]:
    from vllm import _custom_ops as ops
    from vllm.model_executor.layers.quantization.utils.marlin_utils import marlin_moe_permute_scales

    n, k = qs[0].shape
    words = torch.stack([_packed(q).view(torch.int32).T.contiguous() for q in qs])  # GPTQ's: [E, K / 8, N]
    scales = torch.stack([q.scale.T.contiguous() for q in qs])
    return ops.gptq_marlin_moe_repack(words, k, n, 4), marlin_moe_permute_scales(scales, k, n, qs[0].group_size)


RIVALS: dict[str, Callable[[Experts], Call]] = {"vllm bf16": vllm_bf16, "marlin": marlin}


def choices(m: Model, tokens: int, count: int) -> list[tuple[Tensor, Tensor]]:
    """`count` random (topk_weights, topk_ids), a token's experts different and its weights adding up to one."""
    found = []
    for _ in range(count):
        ids = torch.rand(tokens, m.experts, device="cuda").argsort(1)[:, : m.top_k].to(torch.int32)
        found.append((torch.rand(tokens, m.top_k, device="cuda").softmax(1), ids.contiguous()))
    return found


def run(formats: list[str], models: list[str], tokens: list[int], only: list[str] | None, rep_ms: float) -> list[Row]:
    """Every implementation on every case: checked against float32 first, then timed."""
    rate = bandwidth()
    print(f"copy bandwidth {rate / 1e12:.2f} TB/s; floor = (packed experts that were chosen + x + y) / that")
    found: list[Row] = []
    for name in formats:
        for model in models:
            m = MODELS[model]
            layer = Experts.random(name, m)
            call, nbytes = own(layer)
            routed, xs, want, floor = {}, {}, {}, {}
            for t in tokens:
                used = min(m.experts, t * m.top_k) * nbytes
                routed[t] = choices(m, t, min(64, copies(used)))
                read = sum(ids.unique().numel() for _, ids in routed[t]) / len(routed[t]) * nbytes
                xs[t] = torch.randn(t, m.hidden, dtype=torch.bfloat16, device="cuda")
                want[t] = layer(xs[t][:CHECKED], *(r[:CHECKED] for r in routed[t][0]))
                floor[t] = (read + 4 * t * m.hidden) / rate * 1e6
            for impl in ("qplugins", *RIVALS):
                if only and not any(impl.startswith(o) for o in only):
                    continue
                rows = [Row("moe", {"format": name, "model": model, "tokens": t}, impl, None, floor[t]) for t in tokens]
                found += rows
                try:
                    other = call if impl == "qplugins" else RIVALS[impl](layer)
                except Exception as e:
                    print(f"{name} {model} {impl}: does not run: {type(e).__name__}: {str(e)[:120]}")
                    for row in rows:
                        row.note = f"{type(e).__name__}: {e}"[:200]
                    continue
                for t, row in zip(tokens, rows, strict=True):
                    try:
                        row.error = rel_rms(other(xs[t], *routed[t][0])[:CHECKED], want[t])
                        if not row.error < TOLERANCE:
                            raise ArithmeticError(f"is off by {row.error:.2g} of the result")
                        row.us = time_us([lambda x=xs[t], r=r, f=other: f(x, *r) for r in routed[t]], rep_ms)
                    except Exception as e:
                        row.note = f"{type(e).__name__}: {e}"[:200]
                        print(f"{name} {model} {impl}, {t} tokens: {row.note}")
                del other
                torch.cuda.empty_cache()
            print(f"\n{name} {model}, microseconds\n" + _times(found, name, model), flush=True)
    return found


def _times(found: list[Row], name: str, model: str) -> str:
    """One line a number of tokens, one column an implementation."""
    mine = [r for r in found if (r.case["format"], r.case["model"]) == (name, model)]
    cells = {(r.impl, r.case["tokens"]): r for r in mine}
    impls, tokens = (list(dict.fromkeys(c[i] for c in cells)) for i in (0, 1))

    def cell(us: float | None) -> str:
        return "-" if us is None else f"{us:.1f}"

    lines = [[t, cell(cells[impls[0], t].floor_us), *(cell(cells[i, t].us) for i in impls)] for t in tokens]
    return table(["tokens", "floor", *impls], lines)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--formats", nargs="+", default=["nvfp4", "int4_g128"], choices=list(workload.FORMATS))
    p.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    p.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    p.add_argument("--only", nargs="+", help="implementations whose name begins so: qplugins vllm marlin")
    p.add_argument("--rep", type=float, default=20, help="milliseconds that a timing takes, ten times over")
    p.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    a = p.parse_args()
    if not torch.cuda.is_available():
        sys.exit("no GPU here: the benchmark times kernels on one")
    torch.manual_seed(0)
    save(a.out / "moe.json", run(a.formats, a.models, a.tokens, a.only, a.rep))


if __name__ == "__main__":
    main()
