"""The routed experts of a layer, from a checkpoint's tensors to what they compute, and what a layer map may say of them."""

import json
import random

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import silu
from typer.testing import CliRunner

from qplugins.checkpoints.quantize import plan, quantize
from qplugins.checkpoints.verify import verify
from qplugins.cli import app
from qplugins.experts import IDS, LEAVES, MixedExperts, add_routers, leaves, parts, quantizes, remove_routers, spans
from qplugins.formats import FORMATS, CheckpointError
from qplugins.layer_map import PRESETS, LayerMap, Module, Rule, check_experts

HIDDEN, INTERMEDIATE, EXPERTS = 96, 64, 5
PREFIX = "model.layers.7.mlp.experts"
NAMES = LEAVES[0]


def rules(*pairs: tuple[str, str]) -> LayerMap:
    return LayerMap(tuple(Rule((target,), (FORMATS[fmt],)) for target, fmt in pairs))


def three(gate: str, up: str, down: str) -> LayerMap:
    return rules(("re:.*gate_proj", gate), ("re:.*up_proj", up), ("re:.*down_proj", down))


@pytest.fixture
def weights() -> dict[tuple[int, str], Tensor]:
    """Of every expert, by number and id. No two have the same largest magnitude."""
    shapes = dict(zip(IDS, [(INTERMEDIATE, HIDDEN)] * 2 + [(HIDDEN, INTERMEDIATE)], strict=True))
    return {(e, i): torch.randn(shapes[i]) * (0.1 + 0.05 * e + 0.02 * n) for e in range(EXPERTS) for n, i in enumerate(IDS)}


def build(layer_map: LayerMap, rank: int = 0, size: int = 1, plain: bool = False) -> MixedExperts:
    own = spans(HIDDEN, INTERMEDIATE // size, rank, size)
    found = parts(layer_map, PREFIX, NAMES, EXPERTS, own)
    return MixedExperts([f"{PREFIX}.{e}" for e in range(EXPERTS)], found, "silu", torch.float32, plain)


def stored(layer_map: LayerMap, weights: dict[tuple[int, str], Tensor]) -> list[tuple[str, Tensor, str, int]]:
    """A checkpoint's tensors in any order: parameter, tensor, id, expert."""
    found = []
    for (e, i), w in weights.items():
        fmt = layer_map.format_for(f"{PREFIX}.{e}.{NAMES[IDS.index(i)]}", "Linear", *w.shape)
        tensors = fmt.store(fmt.quantize(w, None)) if fmt.quantized else {"weight": w}
        found += [(p, t, i, e) for p, t in tensors.items()]
    random.shuffle(found)
    return found


def decoded(layer_map: LayerMap, weights: dict[tuple[int, str], Tensor]) -> dict[tuple[int, str], Tensor]:
    found = {}
    for (e, i), w in weights.items():
        fmt = layer_map.format_for(f"{PREFIX}.{e}.{NAMES[IDS.index(i)]}", "Linear", *w.shape)
        found[e, i] = fmt.quantize(w, None).dequantize() if fmt.quantized else w
    return found


def mixture(w: dict[tuple[int, str], Tensor], x: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    for t in range(len(x)):
        for weight, e in zip(topk_weights[t], topk_ids[t].tolist(), strict=True):
            if e >= 0:
                y[t] += weight * (w[e, "w2"] @ (silu(w[e, "w1"] @ x[t]) * (w[e, "w3"] @ x[t])))
    return y


def chosen(tokens: int = 9) -> tuple[Tensor, Tensor, Tensor]:
    """x, and two experts a token, of which some are another rank's."""
    ids = torch.stack([torch.randperm(EXPERTS + 1)[:2] - 1 for _ in range(tokens)])
    return torch.randn(tokens, HIDDEN), torch.rand(tokens, 2), ids


@pytest.mark.parametrize(
    ("gate", "up", "down", "products"),
    [
        ("nvfp4", "nvfp4", "int4_g32_asym", 1),
        ("int8", "mxfp4", "fp8", 2),
        ("bf16", "int4_g32", "bf16", 2),
        ("fp8_tensor", "fp8_a16", "int8_plain", 1),  # what multiplies experts stays in 16 bits, and then these are alike
    ],
)
def test_experts_compute_with_their_dequantized_matrices(weights, gate, up, down, products):
    layer_map = three(gate, up, down)
    experts = build(layer_map)
    for param, tensor, i, e in stored(layer_map, weights):
        experts.load(param, tensor, i, e)
    experts.finish()
    assert len(experts.plans[0].split("; ")) == products
    x, topk_weights, topk_ids = chosen()
    want = mixture(decoded(layer_map, weights), x, topk_weights, topk_ids)
    # both sum in float32, in another order
    torch.testing.assert_close(experts(x, topk_weights, topk_ids), want, rtol=1e-4, atol=1e-4)


def test_two_ranks_make_up_the_whole(weights):
    layer_map = three("int4_g32", "int8", "int4_g32_asym")
    x, topk_weights, topk_ids = chosen()
    want = mixture(decoded(layer_map, weights), x, topk_weights, topk_ids)
    got = torch.zeros_like(want)
    for rank in range(2):
        experts = build(layer_map, rank, 2)
        for param, tensor, i, e in stored(layer_map, weights):
            experts.load(param, tensor, i, e)
        experts.finish()
        got += experts(x, topk_weights, topk_ids)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_group_that_does_not_divide_a_rank_is_refused():
    with pytest.raises(ValueError, match=rf"{PREFIX}.0.down_proj: K = 32 is not a multiple of 64.*This rank holds columns 32..64 of 64"):
        build(three("int8", "int8", "int4_g64"), 1, 2)


def test_plain_experts_become_what_a_quantized_checkpoint_holds(weights):
    layer_map = three("nvfp4", "nvfp4", "int8")
    while_loading, fmt = build(layer_map, plain=True), FORMATS["nvfp4"]
    for (e, i), w in random.sample(list(weights.items()), len(weights)):
        while_loading.load("weight", w, i, e)
    while_loading.finish()
    from_checkpoint = build(layer_map)
    for (e, i), w in weights.items():
        # gate and up share the scale of a whole matrix
        amax = torch.stack([weights[e, g].abs().amax() for g in ("w1", "w3")]).amax()
        q = FORMATS["int8"].quantize(w, None) if i == "w2" else fmt.quantize(w, amax)
        for param, tensor in (FORMATS["int8"] if i == "w2" else fmt).store(q).items():
            from_checkpoint.load(param, tensor, i, e)
    from_checkpoint.finish()
    assert while_loading.plans == from_checkpoint.plans
    for mine, theirs in zip(while_loading.operands, from_checkpoint.operands, strict=True):
        # a checkpoint holds the reciprocal of a global scale: a rounding of float32
        torch.testing.assert_close(mine.data, theirs.data, rtol=2.4e-7 * (mine.dtype == torch.float32), atol=0)


def test_no_more_is_kept_than_has_begun_to_arrive(weights):
    layer_map = three("int8", "int8", "int8")
    experts = build(layer_map)
    for e in range(EXPERTS):
        for param, tensor, i, _ in stored(layer_map, {(e, i): weights[e, i] for i in IDS}):
            experts.load(param, tensor, i, e)
            assert {number for number, _ in experts.arriving} <= {e}
        assert not experts.arriving
    assert not list(experts.parameters())
    experts.finish()
    assert not experts.packed


@pytest.mark.parametrize("part", range(3))
def test_missing_matrix_is_named(weights, part):
    layer_map = three("int8", "nvfp4", "int4_g32_asym")
    experts = build(layer_map)
    for param, tensor, i, e in stored(layer_map, weights):
        if (e, i) != (3, IDS[part]):
            experts.load(param, tensor, i, e)
    with pytest.raises(CheckpointError, match=rf"{PREFIX}.3.{NAMES[part]}: weight_packed, .* not found in the checkpoint"):
        experts.finish()


def test_missing_tensor_is_named(weights):
    layer_map = three("int8", "int8", "int8")
    experts = build(layer_map)
    for param, tensor, i, e in stored(layer_map, weights):
        if (e, i, param) != (0, "w3", "weight_scale"):
            experts.load(param, tensor, i, e)
    with pytest.raises(CheckpointError, match=rf"{PREFIX}.0.up_proj: weight_scale not found in the checkpoint"):
        experts.finish()


def test_experts_joined_in_one_tensor_are_refused():
    experts = build(three("int8", "int8", "int8"), plain=True)
    with pytest.raises(CheckpointError, match=r"joined in one tensor \[5, 96, 64\]"):
        experts.load("weight", torch.zeros(EXPERTS, HIDDEN, INTERMEDIATE), "w2", 0)


def test_damaged_scale_is_named(weights):
    layer_map = three("int8", "int8", "int8")
    with pytest.raises(CheckpointError, match=rf"{PREFIX}.4.down_proj.weight_scale: 1 of 96 scales are NaN"):
        experts = build(layer_map)
        for param, tensor, i, e in stored(layer_map, weights):
            if (e, i, param) == (4, "w2", "weight_scale"):
                tensor[7] = torch.nan
            experts.load(param, tensor, i, e)


def test_random_experts_compute_something():
    experts = build(three("nvfp4", "int8", "int4_g32_asym"))
    experts.load_random()
    experts.finish()
    y = experts(*chosen())
    assert y.isfinite().all() and y.abs().max() > 0


def test_engines_reach_experts_through_routers(weights):
    layer_map = three("nvfp4", "int8", "fp8")
    experts, layer = build(layer_map), nn.Module()
    mine = {20 + e: e for e in range(EXPERTS)}
    add_routers(layer, experts, lambda e: mine.get(e, -1))
    assert set(dict(layer.named_parameters())) == {
        "w13_weight_packed", "w13_weight_scale", "w13_weight_global_scale", "w13_weight_shape", "w13_input_global_scale",
        "w2_weight", "w2_weight_scale",
    }  # fmt: skip
    for param, tensor, i, e in stored(layer_map, weights):
        router = getattr(layer, f"{'w2' if i == 'w2' else 'w13'}_{param}")
        # by position, as SGLang's models do, and by name, as vLLM's layers do
        assert router.weight_loader(router, tensor, "any", i, 3, return_success=True) is False
        loaded = router.weight_loader(
            param=router, loaded_weight=tensor, weight_name="any", shard_id=i, expert_id=20 + e, return_success=True
        )
        assert loaded is True
    remove_routers(layer, experts)
    assert not list(layer.parameters())
    experts.finish()


# --- what a map may say


def test_a_layers_experts_share_a_format():
    one = FORMATS["int8"], FORMATS["nvfp4"]
    fine = [(f"{PREFIX}.{e}.{leaf}", one[leaf == "up_proj"]) for e in range(9) for leaf in NAMES]
    check_experts([*fine, ("model.layers.8.mlp.experts.0.gate_proj", FORMATS["fp8"]), ("model.layers.7.mlp.gate", FORMATS["bf16"])])
    with pytest.raises(ValueError, match=rf"{PREFIX}: up_proj is nvfp4 in 0..8 and fp8 in 9..10. The experts of a layer"):
        check_experts([*fine, *((f"{PREFIX}.{e}.up_proj", FORMATS["fp8"]) for e in (10, 9))])


def test_layer_that_is_quantized_in_part_is_refused_where_it_is_built():
    layer_map = rules((rf"re:{PREFIX}.3.down_proj", "int8"))
    assert quantizes(layer_map, PREFIX, NAMES, EXPERTS) and not quantizes(layer_map, "model.layers.6.mlp.experts", NAMES, EXPERTS)
    with pytest.raises(ValueError, match="down_proj is bf16 in 0..2,4 and int8 in 3"):
        build(layer_map)


@pytest.mark.parametrize(
    ("prefix", "target", "found"),
    [
        ("model.layers.0.mlp.experts", "Linear", NAMES),
        ("model.layers.0.mlp.experts", "re:.*down_proj$", NAMES),
        ("model.layers.0.mlp.experts", "re:.*experts.*w2$", IDS),
        ("model.layers.0.block_sparse_moe.experts", "Linear", IDS),
        ("model.layers.0.block_sparse_moe.experts", "re:.*down_proj$", NAMES),
        ("model.layers.0.block_sparse_moe.experts", "model.layers.0.block_sparse_moe.experts.0.w3", IDS),
    ],
)
def test_experts_are_called_what_the_map_calls_them(prefix, target, found):
    assert tuple(leaves(rules((target, "int8")), prefix)) == tuple(found)


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_leave_routers_alone_and_know_every_name_of_down(preset):
    layer_map = LayerMap.preset(preset, 40)
    for block in ("mlp", "block_sparse_moe"):
        for leaf in ("gate", "router", "gate.wg", "router.layer", "shared_expert_gate"):
            assert layer_map.rule_for(f"model.layers.20.{block}.{leaf}") is None
        for shared in ("shared_expert", "shared_experts"):
            assert layer_map.rule_for(f"model.layers.20.{block}.{shared}.gate_proj") is not None
    down = [layer_map.rule_for(f"model.layers.20.{name}") for name in ("mlp.experts.3.down_proj", "block_sparse_moe.experts.3.w2")]
    assert down[0] == down[1] is not None
    assert layer_map.rule_for("model.layers.20.mlp.experts.3.gate_proj") is not None


# --- checkpoints


@pytest.fixture
def source(tmp_path):
    torch.manual_seed(0)
    tensors = {"model.embed_tokens.weight": torch.randn(32, HIDDEN)}
    for layer in range(2):
        tensors[f"model.layers.{layer}.mlp.gate.weight"] = torch.randn(12, HIDDEN)
        for e in range(12):
            for leaf in NAMES:
                shape = (HIDDEN, INTERMEDIATE) if leaf == "down_proj" else (INTERMEDIATE, HIDDEN)
                tensors[f"model.layers.{layer}.mlp.experts.{e}.{leaf}.weight"] = torch.randn(shape)
    (tmp_path / "src").mkdir()
    save_file({name: t.to(torch.bfloat16) for name, t in tensors.items()}, tmp_path / "src" / "model.safetensors", {"format": "pt"})
    (tmp_path / "src" / "config.json").write_text(json.dumps({"num_hidden_layers": 2, "tie_word_embeddings": True}))
    return tmp_path / "src"


def test_a_map_that_tells_experts_of_a_layer_apart_is_refused_before_anything_is_written(source, tmp_path):
    with pytest.raises(ValueError, match=r"model.layers.0.mlp.experts: up_proj is nvfp4 in 0..1,4..11 and int8 in 2..3"):
        plan(source, rules(("re:.*layers.0.*experts.(2|3).up_proj", "int8"), ("re:.*experts", "nvfp4")))


def test_experts_are_quantized_verified_and_shown_a_line_for_all_that_are_alike(source, tmp_path):
    layer_map = rules(("re:.*layers.0.*down_proj", "int8"), ("re:.*down_proj", "int4_g32"), ("re:.*experts", "nvfp4"))
    report = quantize(source, tmp_path / "out", layer_map)
    assert report.counts() == {"nvfp4": 48, "int8": 12, "int4_g32": 12, "bf16": 3}
    assert not verify(tmp_path / "out", source).problems
    shown = CliRunner().invoke(app, ["inspect", str(tmp_path / "out")]).output
    lines = [line.split()[:3] for line in shown.splitlines() if ".experts." in line]
    assert sorted(lines) == [
        ["model.layers.0..1.mlp.experts.0..11.gate_proj", "24", "nvfp4"],
        ["model.layers.0..1.mlp.experts.0..11.up_proj", "24", "nvfp4"],
        ["model.layers.0.mlp.experts.0..11.down_proj", "12", "int8"],
        ["model.layers.1.mlp.experts.0..11.down_proj", "12", "int4_g32"],
    ]


def test_inspect_asks_what_runs_experts_and_not_what_runs_layers():
    from qplugins.checkpoints.reader import StoredModule
    from qplugins.cli.inspect import describe
    from qplugins.dispatch import Machine

    hopper, module = Machine("cuda", (9, 0), "H100"), Module("model.layers.0.mlp.experts.0.up_proj", "Linear", 256, 256)
    expert = StoredModule(module.name, module.kind, module.n, module.k, FORMATS["fp8"])
    layer = StoredModule("model.layers.0.mlp.up_proj", module.kind, module.n, module.k, FORMATS["fp8"])
    assert (describe(expert, hopper)["kernel"], describe(layer, hopper)["kernel"]) == ("triton", "scaled_mm")
