"""Which module gets which format."""

import pytest
from compressed_tensors.quantization import QuantizationConfig

from qplugins import serving
from qplugins.formats import FORMATS
from qplugins.layer_map import FUSED, PRESETS, LayerMap, Module, Rule, fused_siblings, is_name, match, to_config

PROJECTIONS = {"q_proj": (576, 576), "k_proj": (192, 576), "v_proj": (192, 576), "o_proj": (576, 576)}
MLP = {"gate_proj": (1536, 576), "up_proj": (1536, 576), "down_proj": (576, 1536)}


def smollm2(layers: int = 30, tied: bool = True) -> list[Module]:
    """SmolLM2-135M's matrices: hidden 576, intermediate 1536, 9 heads and 3 KV heads of 64, 49,152 tokens."""
    modules = [Module("model.embed_tokens", "Embedding", 49152, 576)]
    for i in range(layers):
        for block, parts in (("self_attn", PROJECTIONS), ("mlp", MLP)):
            modules += [Module(f"model.layers.{i}.{block}.{p}", "Linear", *shape) for p, shape in parts.items()]
    return modules if tied else [*modules, Module("lm_head", "Linear", 49152, 576)]


def layer_map(*rules: tuple[str, str], ignore: tuple[str, ...] = ()) -> LayerMap:
    return LayerMap(tuple(Rule((target,), (FORMATS[fmt],)) for target, fmt in rules), ignore)


# --- targets


def test_targets():
    name = "model.layers.3.mlp.up_proj"
    for target in (name, "Linear", "re:.*up_proj$", r"re:model\.layers\.3\."):
        assert match(target, name, "Linear")
    for target in ("model.layers.3.mlp", "up_proj", "Embedding", "re:up_proj", "re:.*UP_PROJ", "linear"):
        assert not match(target, name, "Linear")


def test_what_is_a_name():
    assert is_name("model.layers.0.mlp.up_proj") and is_name("lm_head")
    assert not is_name("Linear") and not is_name("re:model.layers")


def test_first_match_wins():
    m = layer_map(("re:.*down_proj$", "int4_g128"), ("model.layers.0.mlp.down_proj", "fp8"), ("Linear", "nvfp4"), ("re:.*up_proj$", "fp8"))
    assert m.format_for("model.layers.0.mlp.down_proj", "Linear", 576, 1536).name == "int4_g128"
    assert m.format_for("model.layers.0.mlp.up_proj", "Linear", 576, 1536).name == "nvfp4"
    assert m.format_for("model.embed_tokens", "Embedding", 576, 1536).name == "bf16"


def test_ignore_comes_before_rules():
    m = layer_map(("lm_head", "fp8"), ("Linear", "nvfp4"), ignore=("lm_head", "re:.*layers\\.0\\."))
    assert m.rule_for("lm_head") is None and m.rule_for("model.layers.0.mlp.up_proj") is None
    assert m.rule_for("model.layers.10.mlp.up_proj").formats[0].name == "nvfp4"


def test_lookup_agrees_with_reading_the_rules_in_order():
    targets = [("Linear", "re:.*q_proj$"), ("model.layers.1.mlp.up_proj", "Embedding"), ("re:.*\\.1\\.",), ("re:.*",)]
    rules = tuple(Rule(t, (FORMATS["fp8"],)) for t in targets)
    for order in (rules, rules[::-1], rules[1:] + rules[:1]):
        for m in smollm2(3):
            want = next((r for r in order if any(match(t, m.name, m.kind) for t in r.targets)), None)
            assert LayerMap(order).rule_for(m.name, m.kind) is want


def test_a_family_takes_the_first_member_that_fits():
    m = LayerMap((Rule(("Linear",), tuple(FORMATS[f] for f in ("int4_g128", "int4_g64", "int4_g32"))),))
    assert [m.format_for("x", "Linear", 8, k).name for k in (1536, 576, 96)] == ["int4_g128", "int4_g64", "int4_g32"]


def test_fused_siblings():
    assert fused_siblings("model.layers.0.self_attn.k_proj") == tuple(
        f"model.layers.0.self_attn.{p}" for p in ("q_proj", "k_proj", "v_proj")
    )
    assert fused_siblings("a.experts.3.w3") == ("a.experts.3.w1", "a.experts.3.w3")
    assert fused_siblings("a.o_proj") == ("a.o_proj",) and fused_siblings("lm_head") == ("lm_head",)
    parts = [p for group in FUSED for p in group]
    assert len(parts) == len(set(parts))


# --- refusals


def test_target_that_matches_nothing():
    with pytest.raises(
        ValueError, match=r"target 're:\.\*down_porj' in the rule for fp8 matches no module of this model; its modules are named like model"
    ):
        layer_map(("Linear", "nvfp4"), ("re:.*down_porj", "fp8")).assign(smollm2(1))
    with pytest.raises(ValueError, match=r"target 'lm_haed' in ignore matches no module"):
        layer_map(("Linear", "nvfp4"), ignore=("lm_haed",)).assign(smollm2(1, tied=False))


def test_shape_that_no_format_of_a_rule_can_hold():
    with pytest.raises(
        ValueError,
        match=r"^a\.b: K = 100 is not a multiple of 16, the group size of nvfp4\. Give this layer another format, or name it under ignore",
    ):
        layer_map(("Linear", "nvfp4")).assign([Module("a.b", "Linear", 8, 100)])


def test_tied_head_may_be_ignored_but_has_no_format():
    modules = smollm2(1)
    assert layer_map(("Linear", "fp8"), ignore=("lm_head",)).assign(modules, ["lm_head"]).counts() == {"fp8": 7, "bf16": 1}
    for target in ("lm_head", "re:lm_head$"):
        with pytest.raises(
            ValueError,
            match="the rule for fp8 gives lm_head a format, but in this model lm_head is tied to the embedding and has no matrix",
        ):
            layer_map((target, "fp8")).assign(modules, ["lm_head"])


def test_bad_expression():
    with pytest.raises(ValueError, match=r"target 're:\*down' is not a regular expression: nothing to repeat"):
        layer_map(("re:*down", "fp8"))


# --- files


def write(tmp_path, text: str):
    path = tmp_path / "map.yaml"
    path.write_text(text)
    return path


def test_yaml(tmp_path):
    m = LayerMap.from_yaml(
        write(
            tmp_path,
            'rules:\n  - {targets: ["re:.*down_proj$"], format: int4}\n  - {targets: [Linear], format: nvfp4}\nignore: [lm_head]\n',
        )
    )
    assert m.assign(smollm2(2, tied=False)).counts() == {"bf16": 2, "int4_g128": 2, "nvfp4": 12}
    assert m.ignore == ("lm_head",) and m.strict


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rules: [{targets: [Linear], format: int5}]", "unknown format 'int5'; there are int4, bf16"),
        ("rules: [{targets: [Linear], formt: int4}]", r"rules\.0\.format: Field required; rules\.0\.formt: Extra inputs are not permitted"),
        ("rules: [{targets: Linear, format: int4}]", r"rules\.0\.targets: Input should be a valid list"),
        ("ignore: [lm_head]", "rules: Field required"),
        ("rules: [", "while parsing"),
        ("", "top level: Input should be a valid dictionary"),
        ('rules: [{targets: ["re:("], format: fp8}]', r"target 're:\(' is not a regular expression"),
    ],
)
def test_yaml_errors_name_file_and_place(tmp_path, text, message):
    path = write(tmp_path, text)
    with pytest.raises(ValueError, match=message) as e:
        LayerMap.from_yaml(path)
    assert str(e.value).startswith(f"{path} is not a layer map: ")


# --- presets


def test_balanced_on_smollm2():
    """first and last two layers fp8, down projections int4, the others nvfp4; by hand, in bytes"""
    a = LayerMap.preset("balanced", 30).assign(smollm2(), ["lm_head"])
    assert a.counts() == {"bf16": 1, "fp8": 28, "int4_g32_asym": 26, "nvfp4": 156}
    embedding = 49152 * 576
    down, others, outputs = 576 * 1536, 2 * 576 * 576 + 2 * 192 * 576 + 2 * 1536 * 576, 2 * 576 + 2 * 192 + 2 * 1536
    fp8 = 4 * (down + others + 4 * (outputs + 576))  # a float32 scale a row
    int4 = 26 * (down // 2 + 2 * down // 32 + down // 64)  # a 16-bit scale and a 4-bit zero point every 32
    nvfp4 = 26 * (others // 2 + others // 16 + 4 * 6)  # an 8-bit scale every 16, a float32 a matrix
    assert a.nbytes == 2 * embedding + fp8 + int4 + nvfp4
    assert a.bits_per_weight == pytest.approx(8 * a.nbytes / (embedding + 30 * (down + others))) == pytest.approx(7.315, abs=1e-3)


@pytest.mark.parametrize("layers", [1, 2, 3, 4, 5])
def test_balanced_on_few_layers(layers):
    counts = LayerMap.preset("balanced", layers).assign(smollm2(layers)).counts()
    assert (
        counts["fp8"] == 7 * min(layers, 4) and counts["nvfp4"] == 6 * max(0, layers - 4) and counts["int4_g32_asym"] == max(0, layers - 4)
    )


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_leave_head_routers_and_towers_alone(preset):
    modules = [
        *smollm2(6, tied=False),
        Module("model.layers.2.mlp.gate", "Linear", 8, 576),
        Module("model.layers.2.block_sparse_moe.gate", "Linear", 8, 576),
        Module("model.layers.2.mlp.shared_expert_gate", "Linear", 1, 576),
        Module("model.visual.blocks.0.mlp.up_proj", "Linear", 64, 52),
        Module("vision_tower.layers.2.fc1", "Linear", 64, 52),
        Module("model.layers.2.mlp.experts.0.down_proj", "Linear", 576, 1536),
    ]
    formats = {m.name: f.name for m, f in LayerMap.preset(preset, 6).assign(modules)}
    plain = {name for name, f in formats.items() if f == "bf16"}
    assert plain == {"lm_head", "model.embed_tokens", *(m.name for m in modules[-6:-1])}


def test_unknown_preset():
    with pytest.raises(ValueError, match="unknown preset 'best'; there are balanced, nvfp4"):
        LayerMap.preset("best", 2)


# --- configs


def test_config_round_trip():
    a = LayerMap.preset("balanced", 6).assign(smollm2(6, tied=False))
    config = to_config(a)
    assert config["format"] == "mixed-precision" and sorted(config["ignore"]) == ["lm_head", "model.embed_tokens"]
    back = LayerMap.from_config(config)
    assert {m.name: f for m, f in a} == {m.name: back.format_for(m.name, m.kind, m.n, m.k) for m in a.modules}
    one = to_config(layer_map(("Linear", "nvfp4")).assign(smollm2(1)))
    assert one["format"] == "nvfp4-pack-quantized" and one["quant_method"] == "compressed-tensors"


def test_library_parses_the_config():
    config = QuantizationConfig.model_validate(to_config(LayerMap.preset("balanced", 6).assign(smollm2(6, tied=False))))
    assert {g.format for g in config.config_groups.values()} == {"float-quantized", "pack-quantized", "nvfp4-pack-quantized"}


def test_more_definite_targets_win_in_a_config():
    def group(fmt, *targets):
        return {"targets": list(targets), **FORMATS[fmt].scheme}

    config = {
        "config_groups": {"a": group("nvfp4", "Linear"), "b": group("int4_g128", "re:.*down_proj"), "c": group("fp8", "m.0.down_proj")}
    }
    m = LayerMap.from_config({**config, "ignore": ["lm_head"]})
    assert [m.rule_for(n).formats[0].name for n in ("m.0.up_proj", "m.1.down_proj", "m.0.down_proj")] == ["nvfp4", "int4_g128", "fp8"]
    assert m.rule_for("lm_head") is None


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "quantization_config has no config_groups"),
        ({"config_groups": {"g": {"weights": FORMATS["fp8"].scheme["weights"]}}}, "quantization_config, g: 'targets' is missing"),
        (
            {"config_groups": {"g": {"targets": ["Linear"], "weights": {"num_bits": 3}}}},
            "quantization_config, g: no format stores pack-quantized weights",
        ),
        ({"transform_config": {"config_groups": {"r": 1}}, "config_groups": {}}, "has a transform_config, which is not supported"),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}, "config_groups": {}}, "has a sparsity_config, which is not supported"),
    ],
)
def test_config_errors(config, message):
    with pytest.raises(ValueError, match=message):
        LayerMap.from_config(config)


def test_a_config_that_names_every_module_of_a_large_model_is_quick():
    """20,000 names, as a mixture of experts has: look-ups, not comparisons of all with all. It would take minutes otherwise."""
    names = [f"model.layers.{i // 400}.mlp.experts.{i % 400}.up_proj" for i in range(20_000)]
    m = LayerMap.from_config({"config_groups": {"g": {"targets": names, **FORMATS["nvfp4"].scheme}}, "ignore": [n + "x" for n in names]})
    assert all(m.rule_for(n) and m.rule_for(n + "x") is None for n in names)


def test_rename():
    m = LayerMap.preset("nvfp4", 2).rename(lambda t: t.replace("Linear", "Conv"))
    assert m.rules[0].targets == ("Conv", "Linear") and not m.strict


def test_names_that_an_engine_changes():
    """Names with and without a dot, in rules and under ignore; classes and expressions stay. What it does not really change counts too."""
    m = layer_map(("model.layers.0.mlp.up_proj", "nvfp4"), ("Linear", "fp8"), ignore=("lm_head", "re:.*gate$", "model.visual.proj"))
    changes = {"lm_head.": "language_model.lm_head.", "model.layers.": "language_model.model.layers.", "model.visual.": "visual."}

    def renamed(name: str) -> str:
        return next((new + name.removeprefix(old) for old, new in changes.items() if name.startswith(old)), name)

    found = serving.rename(m, renamed)
    for name in ("language_model.lm_head", "lm_head", "language_model.model.layers.0.mlp.gate", "visual.proj", "model.visual.proj"):
        assert found.rule_for(name) is None
    for name in ("language_model.model.layers.0.mlp.up_proj", "model.layers.0.mlp.up_proj"):
        assert found.rule_for(name).formats[0].name == "nvfp4"
    assert found.rule_for("language_model.model.layers.0.mlp.down_proj").formats[0].name == "fp8"
    assert serving.rename(m, lambda name: None).rule_for("lm_head") is None  # of a weight that the engine drops


@pytest.mark.parametrize(
    ("stored", "built", "refused"),
    [
        (["model.layers.0.a"], {"x.layers.0.a": False, "x.layers.1.a": False}, True),
        (["model.layers.0.a"], {"x.layers.0.a": False, "x.layers.1.a": True}, False),
        (["model.layers.0.a"], {"model.layers.61.a": False, "model.layers.61.b": False}, False),  # a draft model
        ([], {"x.layers.0.a": False, "x.layers.1.a": False}, False),
    ],
)
def test_a_model_in_which_nothing_is_quantized(stored, built, refused):
    problem = serving.nothing_quantized(stored, built)
    assert ("x.layers.0.a" in problem and "1 matrices" in problem) if refused else problem is None
