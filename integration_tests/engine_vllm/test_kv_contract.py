"""What the KV side asks of vLLM and promises it, without a server: names, choice of the backend, refusals, the layouts of a model's layers, and
attention as the engine drives it, batch by batch, held against attention over the same keys and values unquantized.

Needs none of vLLM's compiled parts. `test_gpu_version.py` runs this file a second time, under the vLLM for GPUs on a machine without one.
"""

import json
import os
import sys
import types
from pathlib import Path

import pytest
import torch
import vllm
from torch import Tensor
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.attention.backend import AttentionType, CommonAttentionMetadata
from vllm.v1.attention.selector import AttentionSelectorConfig
from vllm.v1.worker.utils import customize_attention_spec

from integration_tests.engine_vllm.in_process import edited, load
from qplugins.kernels.attention.ref import attend
from qplugins.kv import KV_LAYOUTS

pytestmark = [pytest.mark.timeout(300), pytest.mark.usefixtures("plugins")]

MAPPED = {"qplugins": {"kv_layers": {"int8_sink": [0, -1], "k5v4_sink": [1]}}}


def config(folder: Path, kv_cache_dtype: str = "int4_sink", **options) -> VllmConfig:
    options = {"dtype": "float32", "enforce_eager": True, "max_model_len": 1024, "max_num_seqs": 8, **options}
    return EngineArgs(model=str(folder), kv_cache_dtype=kv_cache_dtype, skip_tokenizer_init=True, **options).create_engine_config()


def test_the_version_is_the_one_that_is_meant():
    assert vllm.__version__.startswith(os.environ.get("QPLUGINS_EXPECT_VLLM", ""))


# ---- names


@pytest.mark.parametrize("name", KV_LAYOUTS)
def test_name_is_known_on_the_command_line(name):
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    assert parser.parse_args(["--kv-cache-dtype", name]).kv_cache_dtype == name


def test_unknown_name_is_refused(tiny_llama):
    with pytest.raises(ValueError, match="int4_zinc"):
        config(tiny_llama, "int4_zinc")


# ---- choice of the backend


def chosen(platform, kv_cache_dtype: str, **options) -> str:
    asked = AttentionSelectorConfig(
        **{"head_size": 128, "dtype": torch.bfloat16, "block_size": None, "attn_type": AttentionType.DECODER, **options},
        kv_cache_dtype=kv_cache_dtype,
    )
    with set_current_vllm_config(VllmConfig()):
        return platform.get_attn_backend_cls(None, asked, 32)


@pytest.mark.parametrize("name", [*KV_LAYOUTS, "auto"])
def test_backend_of_a_cpu(name):
    from vllm.platforms.cpu import CpuPlatform

    assert chosen(CpuPlatform, name) == "qplugins.vllm.attention_cpu.CPUBackend"


@pytest.fixture(scope="module")
def hopper():
    """CUDA's choice for an H100 that is not there."""
    compiled = {"vllm._C_stable_libtorch": types.ModuleType("vllm._C_stable_libtorch")}
    missing = {name: module for name, module in compiled.items() if name not in sys.modules}
    sys.modules |= missing
    try:
        from vllm.platforms.cuda import CudaPlatformBase
    except ImportError as e:
        pytest.skip(f"this vLLM has no CUDA platform: {e}")
    finally:
        for name in missing:
            del sys.modules[name]
    from vllm.platforms.interface import DeviceCapability

    class Hopper(CudaPlatformBase):
        @classmethod
        def get_device_capability(cls, device_id: int = 0) -> DeviceCapability:
            return DeviceCapability(9, 0)

    return Hopper


@pytest.mark.parametrize(
    "options",
    [{}, {"block_size": 64}, {"block_size": 128}, {"has_sink": True}, {"has_sliding_window": True}, {"use_kv_connector": True}],
    ids=lambda o: "-".join(o) or "plain",
)
@pytest.mark.parametrize("name", KV_LAYOUTS)
def test_backend_of_cuda_follows_from_the_dtype(hopper, name, options):
    assert chosen(hopper, name, **options) == "qplugins.vllm.attention_cuda.CUDABackend"


@pytest.mark.parametrize("name", ["auto", "fp8"])
def test_backend_of_cuda_for_other_dtypes_is_vllms(hopper, name):
    assert chosen(hopper, name).startswith("vllm.v1.attention.backends.")


def test_backend_whose_place_is_taken_still_answers_for_its_own(hopper):
    from vllm.v1.attention.backends.turboquant_attn import TurboQuantAttentionBackend

    assert chosen(hopper, "turboquant_k8v4") == "qplugins.vllm.attention_cuda.CUDABackend"
    from qplugins.vllm.attention_cuda import CUDABackend

    for name in ("get_builder_cls", "get_name", "supported_kv_cache_layouts", "get_supported_kernel_block_sizes"):
        assert getattr(CUDABackend, name)() == getattr(TurboQuantAttentionBackend, name)()
    with pytest.raises(ValueError, match="sinks not supported"):
        chosen(hopper, "turboquant_k8v4", has_sink=True)


# ---- refusals, all before a model is loaded


@pytest.mark.parametrize(
    "options, why",
    [
        ({"block_size": 32}, "int4_sink has pages of 64 or 128 tokens, not 32; use a page or block size of 128"),
        (
            {"additional_config": {"qplugins": {"kv_layers": {"int8_sink": [4]}}}},
            "gives int8_sink to layer 4, and this model has layers 0 to 3",
        ),
        ({"additional_config": {"qplugins": {"kv_layers": {"int8_sink": [3], "k8v4_sink": [-1]}}}}, "names layer 3 twice"),
        ({"additional_config": {"qplugins": {"kv_layers": {"int9": [0]}}}}, "unknown KV layout 'int9'; there are int4_sink"),
        ({"additional_config": {"qplugins": {"kv_layers": ["int8_sink"]}}}, "kv_layers should be an object like"),
        ({"additional_config": {"qplugins": {"kv_sinks": 200}}}, "keeps at most 16 sink tokens, and 200 were asked for; lower"),
        ({"additional_config": {"qplugins": {"sinks": 2}}}, "should be an object with kv_layers or kv_sinks"),
        (
            {"kv_cache_dtype": "auto", "additional_config": {"qplugins": {"kv_layers": {"int8_sink": [0]}}}},
            "add --kv-cache-dtype int4_sink",
        ),
        ({"kv_cache_dtype_skip_layers": ["0"]}, "would mix 16-bit pages with ours; give the layers that must not change int8_sink"),
    ],
)
def test_refused_with_a_way_out(tiny_llama, options, why):
    with pytest.raises(ValueError, match=why):
        config(tiny_llama, **options)


def test_head_dim_that_is_not_offered_is_refused(tiny_llama, tmp_path):
    folder = edited(tiny_llama, tmp_path / "model", head_dim=48)
    with pytest.raises(ValueError, match="stores heads of 64, 80, .* and head_dim is 48; leave this layer's KV cache in the model's dtype"):
        config(folder)


def test_latent_attention_is_refused(tmp_path):
    from transformers import DeepseekV2Config

    DeepseekV2Config(num_hidden_layers=2, architectures=["DeepseekV2ForCausalLM"]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"multi-head latent attention \(MLA\) .* use --kv-cache-dtype fp8 or auto"):
        config(tmp_path)


def test_encoder_attention_is_refused(tmp_path):
    from transformers import BertConfig

    BertConfig(num_hidden_layers=2, architectures=["BertModel"]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="attention is encoder_only, and only a decoder's is served; leave --kv-cache-dtype out"):
        config(tmp_path, max_model_len=512)


# ---- layouts of a model's layers


def loaded(vllm_config: VllmConfig) -> tuple[torch.nn.Module, dict[str, Attention]]:
    model = load(vllm_config)
    return model, {name: m for name, m in vllm_config.compilation_config.static_forward_context.items() if isinstance(m, Attention)}


def specs(vllm_config: VllmConfig, layers: dict[str, Attention]) -> dict:
    with set_current_vllm_config(vllm_config):
        from vllm.platforms import current_platform

        current_platform.update_block_size_for_backend(vllm_config)
        return {name: customize_attention_spec(m.get_attn_backend(), m.get_kv_cache_spec(vllm_config)) for name, m in layers.items()}


@pytest.mark.parametrize("name", KV_LAYOUTS)
@pytest.mark.parametrize("block_size", [None, 64])
def test_page_of_the_engine_is_the_layouts(world, tiny_llama, name, block_size):
    run = config(tiny_llama, name, **({"block_size": block_size} if block_size else {}))
    found = specs(run, loaded(run)[1])
    for spec in found.values():
        assert spec.block_size == (block_size or 128)
        assert spec.page_size_bytes == 2 * KV_LAYOUTS[name].page_bytes(64, block_size or 128)


def test_map_gives_each_layer_its_page(world, tiny_llama):
    run = config(tiny_llama, additional_config=MAPPED)
    _, layers = loaded(run)
    wanted = ["int8_sink", "k5v4_sink", "int4_sink", "int8_sink"]
    assert [m.kv_cache_dtype for m in layers.values()] == wanted
    assert [s.page_size_bytes for s in specs(run, layers).values()] == [2 * KV_LAYOUTS[n].page_bytes(64, 128) for n in wanted]


def test_scheme_and_map_of_a_checkpoint_are_followed(tiny_llama, tmp_path):
    from qplugins.checkpoints.quantize import quantize
    from qplugins.layer_map import LayerMap

    quantize(tiny_llama, tmp_path / "plain", LayerMap.preset("int8", 4))
    described = json.loads((tmp_path / "plain" / "config.json").read_text())["quantization_config"]
    described |= {"kv_cache_scheme": {"num_bits": 4, "type": "int"}, "qplugins": {"kv_layers": {"int8_sink": [0]}}}
    folder = edited(tmp_path / "plain", tmp_path / "ckpt", quantization_config=described)
    from qplugins.vllm.kv import kv_map

    run = config(folder, "auto", quantization="qplugins")
    assert run.cache_config.cache_dtype == "int4_sink"
    assert kv_map(run).resolve(4) == ["int8_sink", "int4_sink", "int4_sink", "int4_sink"]
    assert kv_map(config(folder, "k8v4_sink", quantization="qplugins")).resolve(4) == ["k8v4_sink"] * 4
    assert config(folder, "bfloat16", quantization="qplugins", dtype="bfloat16").cache_config.cache_dtype == "bfloat16"


# ---- attention, batch by batch


class Engine:
    """One layer of attention and its cache, driven as the engine drives them. `sequences` has all that each was ever given."""

    def __init__(
        self, folder: Path, dtype: str, num_heads: int = 4, num_kv_heads: int = 2, dim: int = 64, spec_tokens: int = 0, **impl
    ) -> None:
        speculative = {"method": "ngram", "num_speculative_tokens": spec_tokens, "prompt_lookup_max": 2}
        self.config = config(folder, dtype, **({"speculative_config": speculative} if spec_tokens else {}))
        self.heads, self.kv_heads, self.dim = num_heads, num_kv_heads, dim
        with set_current_vllm_config(self.config):
            self.layer = Attention(
                num_heads,
                dim,
                dim**-0.5,
                num_kv_heads,
                cache_config=self.config.cache_config,
                prefix="model.layers.0.self_attn.attn",
                logits_soft_cap=impl.get("soft_cap"),
                per_layer_sliding_window=impl.get("window"),
                **({"sinks": impl["sinks"]} if "sinks" in impl else {}),
            )
            self.layer.process_weights_after_loading(torch.float32)
        (self.spec,) = specs(self.config, {self.layer.layer_name: self.layer}).values()
        blocks = 64
        self.layer.kv_cache = torch.full((blocks, num_kv_heads, 128, self.spec.state_content_bytes), 255, dtype=torch.uint8)
        builder = self.layer.get_attn_backend().get_builder_cls()
        self.builder = builder(self.spec, [self.layer.layer_name], self.config, torch.device("cpu"))
        self.free = torch.randperm(blocks, generator=torch.Generator().manual_seed(0)).tolist()
        self.blocks: dict[str, list[int]] = {}
        self.sequences: dict[str, list[Tensor]] = {}
        self.options = {"window": impl.get("window") or 0, "soft_cap": impl.get("soft_cap") or 0.0, "sink_logits": impl.get("sinks")}

    def step(self, new: dict[str, Tensor], padding: int = 0) -> dict[str, Tensor]:
        """new: q, k, v [tokens, heads + 2 * kv_heads, dim] of some sequences, decodes first. Returns what attention gave to each."""
        slots, lens, tables = [], [], []
        for name, qkv in new.items():
            had = sum(len(x) for x in self.sequences.get(name, []))
            self.sequences.setdefault(name, []).append(qkv)
            table = self.blocks.setdefault(name, [])
            while len(table) * 128 < had + len(qkv):
                table.append(self.free.pop())
            slots += [table[p // 128] * 128 + p % 128 for p in range(had, had + len(qkv))]
            lens.append(had + len(qkv))
            tables.append(torch.tensor(table + [0] * (8 - len(table)), dtype=torch.int32))
        starts = torch.tensor([0, *(len(x) for x in new.values())], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        slot_mapping = torch.tensor(slots + [-1] * padding)
        m = CommonAttentionMetadata(
            query_start_loc=starts,
            query_start_loc_cpu=starts,
            seq_lens=torch.tensor(lens, dtype=torch.int32),
            seq_lens_cpu_upper_bound=torch.tensor(lens, dtype=torch.int32),
            num_reqs=len(new),
            num_actual_tokens=len(slots),
            max_query_len=int((starts[1:] - starts[:-1]).max()),
            max_seq_len=max(lens),
            block_table_tensor=torch.stack(tables),
            slot_mapping=slot_mapping,
        )
        name = self.layer.layer_name
        tokens = torch.cat([*new.values(), torch.full((padding, self.heads + 2 * self.kv_heads, self.dim), torch.nan)])
        q, k, v = (x.contiguous() for x in tokens.split([self.heads, self.kv_heads, self.kv_heads], dim=1))
        out = torch.full_like(q, torch.nan)
        with set_forward_context({name: self.builder.build(0, m)}, self.config, slot_mapping={name: slot_mapping}):
            self.layer.impl.do_kv_cache_update(self.layer, k, v, self.layer.kv_cache, slot_mapping)
            self.layer.impl.forward(self.layer, q, k, v, self.layer.kv_cache, self.builder.build(0, m), out)
        return dict(zip(new, out[: len(slots)].split([len(x) for x in new.values()]), strict=True))

    def wanted(self, name: str, last: int) -> Tensor:
        """Attention of a sequence's last tokens over all of it, in float32 and unquantized."""
        qkv = torch.cat(self.sequences[name])
        q, k, v = qkv.split([self.heads, self.kv_heads, self.kv_heads], dim=1)
        i, t = torch.arange(len(qkv) - last, len(qkv))[:, None], torch.arange(len(qkv))[None, :]
        window = self.options["window"]
        visible = (t <= i) & (t > i - window) if window else t <= i
        return attend(q[-last:], k, v, visible, self.dim**-0.5, self.options["soft_cap"], self.options["sink_logits"])[0]


def qkv(tokens: int, seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, 8, 64, generator=g)
    x[:, 4:6] += 3 * torch.randn(64, generator=torch.Generator().manual_seed(9))  # channels of keys that stand out, as they do
    return x


def error(got: Tensor, want: Tensor) -> float:
    assert torch.isfinite(got).all()
    return float((got - want).norm() / want.norm())


# What 8 and 4 bits leave of an average over values of unit variance; 8 bits bound what no bug of the batch's bookkeeping would meet.
BOUND = {"int8_sink": 0.02, "int4_sink": 0.25}
KINDS = {
    "plain": {},
    "window": {"window": 150},
    "window_in_a_page": {"window": 20},
    "soft_cap": {"soft_cap": 5.0},
    "sinks": {"sinks": torch.tensor([1.0, -2.0, 3.0, 0.0])},
}


@pytest.mark.parametrize("dtype", ["int8_sink", "int4_sink"])
@pytest.mark.parametrize("kind", KINDS)
def test_prompts_chunks_and_decodes_in_mixed_batches(world, tiny_llama, dtype, kind):
    e = Engine(tiny_llama, dtype, **KINDS[kind])
    bound = BOUND[dtype]

    def check(out: dict[str, Tensor], exact: tuple[str, ...] = ()) -> None:
        for name, got in out.items():
            want = e.wanted(name, len(got))
            assert error(got, want) < (1e-5 if name in exact else bound), name

    check(e.step({"a": qkv(300, 1)}, padding=3), exact=("a",))  # one chunk: never quantized
    check(e.step({"a": qkv(1, 2), "b": qkv(200, 3)}), exact=("b",))
    check(e.step({"a": qkv(1, 4), "b": qkv(1, 5), "c": qkv(70, 6)}, padding=5), exact=("c",))
    check(e.step({"a": qkv(1, 7), "c": qkv(100, 8), "d": qkv(40, 9)}), exact=("d",))  # c's second chunk beside d's first
    check(e.step({"d": qkv(2, 10), "c": qkv(300, 11)}))
    for i in range(3):
        check(e.step({name: qkv(1, 20 + 4 * i + j) for j, name in enumerate("abcd")}))


def test_several_query_tokens_decode_when_speculating(world, tiny_llama):
    e = Engine(tiny_llama, "int8_sink", spec_tokens=3)
    assert e.builder.reorder_batch_threshold == 4
    e.step({"a": qkv(130, 1), "b": qkv(126, 2)})
    out = e.step({"a": qkv(4, 3), "b": qkv(2, 4)})
    assert all(error(out[n], e.wanted(n, len(out[n]))) < BOUND["int8_sink"] for n in out)


def test_rejected_tokens_are_written_over(world, tiny_llama):
    """Speculated tokens that were not accepted leave nothing behind, also where they had opened a page."""
    e = Engine(tiny_llama, "int8_sink", spec_tokens=3)
    e.step({"a": qkv(127, 1)})
    e.step({"a": qkv(4, 2)})
    e.sequences["a"][-1] = e.sequences["a"][-1][:1]  # three rejected, two of them in a new page
    out = e.step({"a": qkv(4, 3)})
    assert error(out["a"], e.wanted("a", 4)) < BOUND["int8_sink"]


def test_chunks_as_small_as_one_token_give_what_one_chunk_gives(world, tiny_llama):
    whole, small = (Engine(tiny_llama, "int8_sink") for _ in range(2))
    x, last = qkv(200, 1), qkv(1, 2)
    whole.step({"a": x})
    for part in x.split(7):
        small.step({"a": part})
    assert error(small.step({"a": last})["a"], whole.step({"a": last})["a"]) < BOUND["int8_sink"]


def test_neighbours_in_a_batch_change_nothing(world, tiny_llama):
    alone, together = (Engine(tiny_llama, "int4_sink") for _ in range(2))
    for size, seed in ((150, 1), (1, 2), (1, 3)):
        x = qkv(size, seed)
        want = alone.step({"a": x})["a"]
        got = together.step({**({"b": qkv(1, seed + 10)} if size == 1 else {}), "a": x, **({} if size == 1 else {"b": qkv(90, 7)})})["a"]
        torch.testing.assert_close(got, want, rtol=0, atol=1e-6)


def test_metadata_asks_the_device_nothing(world, tiny_llama):
    """Its numbers come from vLLM's copies on the host: on the meta device, any look at a value raises."""
    e = Engine(tiny_llama, "int4_sink")
    host = torch.tensor([0, 1, 400], dtype=torch.int32)
    lens = torch.tensor([300, 900], dtype=torch.int32)
    m = CommonAttentionMetadata(
        query_start_loc=host.to("meta"),
        query_start_loc_cpu=host,
        seq_lens=lens.to("meta"),
        seq_lens_cpu_upper_bound=lens,
        num_reqs=2,
        num_actual_tokens=400,
        max_query_len=399,
        max_seq_len=900,
        block_table_tensor=torch.zeros(2, 8, dtype=torch.int32, device="meta"),
        slot_mapping=torch.zeros(400, dtype=torch.int64, device="meta"),
    )
    built = e.builder.build(0, m)
    assert (built.num_decodes, built.num_decode_tokens) == (1, 1)
    assert (built.prefill.tokens, built.prefill.max_query_len, built.prefill.max_context_len) == (399, 399, 501)


def test_gathered_slices_give_what_pages_give(world, tiny_llama, monkeypatch):
    """Slices of the context as plain values, merged one after the other, against attention to pages, which layers with windows have."""
    from qplugins.kv import context

    monkeypatch.setattr(context, "TOKENS", 256)
    plain, gathered = (Engine(tiny_llama, "int4_sink") for _ in range(2))
    plain.layer.impl.window = 1 << 20  # which leaves nothing out
    steps = [{"a": qkv(500, 1)}, {"b": qkv(300, 2)}, {"a": qkv(100, 3), "b": qkv(120, 4), "c": qkv(130, 5)}]
    for new in steps:
        want, got = plain.step(new), gathered.step(new)
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-5, atol=1e-5)
