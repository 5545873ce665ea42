"""What `Checkpoint.open` and `check` find wrong with a checkpoint, each named by its message: file or tensor, expected, found, what to do."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from qplugins.checkpoints.quantize import quantize
from qplugins.checkpoints.reader import Checkpoint, kind_of
from qplugins.formats import FORMATS, CheckpointError
from qplugins.layer_map import LayerMap, Rule

Q = "model.layers.1.self_attn.q_proj"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def quantized(src, tmp_path):
    """int4 down projections, the rest nvfp4"""
    rules = (Rule(("re:.*down_proj$",), (FORMATS["int4_g128"],)), Rule(("Linear",), (FORMATS["nvfp4"],)))
    quantize(src, tmp_path / "quantized", LayerMap(rules, ("lm_head",)))
    return tmp_path / "quantized"


def change(folder, tensors=None, config=None):
    """Rewrites the tensors, or the quantization_config, by a function that changes them in place."""
    if tensors:
        loaded = {n: t.clone() for n, t in load_file(folder / "model.safetensors").items()}
        tensors(loaded)
        save_file(loaded, folder / "model.safetensors")
    if config:
        data = json.loads((folder / "config.json").read_text())
        config(data["quantization_config"])
        (folder / "config.json").write_text(json.dumps(data))


def refused(folder, message):
    with pytest.raises(CheckpointError) as e:
        Checkpoint.open(folder).check()
    assert re.search(message, str(e.value)), str(e.value)


# --- what is there


def test_plain(src, helpers):
    c = Checkpoint.open(src).check()
    tensors = helpers.make_tensors()
    assert c.tensors.keys() == tensors.keys() and c.nbytes == sum(t.nbytes for t in tensors.values())
    assert c.layer_map is None and not c.tied and c.num_layers == helpers.layers
    modules = {m.name: m for m in c.modules()}
    assert len(modules) == 7 * helpers.layers + 2  # no norms, no biases
    assert (modules[Q].kind, modules[Q].n, modules[Q].k, modules[Q].format.name) == ("Linear", 128, 128, "bf16")
    assert modules["model.embed_tokens"].kind == "Embedding" and modules["lm_head"].kind == "Linear"
    for name, want in tensors.items():
        assert c.load(name).equal(want)
    assert c.load(f"{Q}.weight", (5, 9)).equal(tensors[f"{Q}.weight"][5:9])


@pytest.mark.parametrize(
    "name", ["transformer.wte", "model.embed_tokens", "gpt_neox.embed_in", "bert.embeddings.word_embeddings", "shared"]
)
def test_embeddings_by_name(name):
    assert kind_of(name) == "Embedding"


def test_quantized(quantized, src, helpers):
    modules = {m.name: m for m in Checkpoint.open(quantized).check().modules()}
    assert modules.keys() == {m.name for m in Checkpoint.open(src).modules()}
    for name, shape in helpers.shapes.items():
        m = modules[f"model.layers.1.{name}"]
        assert (m.n, m.k) == shape and m.format.name == ("int4_g128" if name.endswith("down_proj") else "nvfp4")
    assert set(modules[Q].tensors) == {"weight_packed", "weight_scale", "weight_global_scale"}
    assert modules["lm_head"].format.name == modules["model.embed_tokens"].format.name == "bf16"


@pytest.mark.parametrize("with_index", [True, False])
def test_shards(tmp_path, helpers, with_index):
    tensors = helpers.make_tensors()
    folder = helpers.write_model(tmp_path / "m", tensors, shards=3)
    if not with_index:
        (folder / INDEX).unlink()
    c = Checkpoint.open(folder).check()
    assert c.tensors.keys() == tensors.keys() and len({e.file for e in c.tensors.values()}) == 3
    assert c.load(f"{Q}.weight").equal(tensors[f"{Q}.weight"])


def test_tied(tied_src):
    c = Checkpoint.open(tied_src).check()
    assert c.tied and "lm_head" not in {m.name for m in c.modules()}


@pytest.mark.parametrize("head", ["lm_head", "language_model.lm_head"])
@pytest.mark.parametrize(
    ("config", "tied"),
    [
        ({}, False),
        ({"tie_word_embeddings": True}, True),
        ({"text_config": {"num_hidden_layers": 3}}, False),
        ({"text_config": {"num_hidden_layers": 3, "tie_word_embeddings": False}, "tie_word_embeddings": True}, False),
        ({"text_config": {"num_hidden_layers": 3}, "tie_word_embeddings": True}, True),
    ],
)
def test_a_head_counts_where_the_language_model_says_so_or_nobody_says_otherwise(tmp_path, helpers, head, config, tied):
    tensors = {name.replace("lm_head", head): t for name, t in helpers.make_tensors().items()}
    assert Checkpoint.open(helpers.write_model(tmp_path / "src", tensors, **config)).tied == tied


def test_a_class_in_the_config_does_not_claim_plain_matrices(quantized):
    """Routers and position tables are no Linear in the model, which only their being stored plainly shows."""

    def classes(config):
        for group in config["config_groups"].values():
            group["targets"] = ["Linear"] if group["weights"]["type"] == "float" else ["re:.*down_proj$"]

    change(quantized, lambda t: t.update({"model.layers.1.mlp.gate.weight": torch.ones(4, 128, dtype=torch.bfloat16)}), classes)
    assert {m.name: m.format.name for m in Checkpoint.open(quantized).check().modules()}["model.layers.1.mlp.gate"] == "bf16"


# --- files


def test_no_folder(tmp_path):
    refused(tmp_path / "nothing", r"nothing is not a folder; a checkpoint is a folder with config.json")


def test_no_config(src):
    (src / "config.json").unlink()
    refused(src, r"src/config\.json is missing")


@pytest.mark.parametrize(("file", "text", "message"), [
    ("config.json", "{", r"config\.json: expected JSON, found Expecting property name"),
    ("config.json", "[]", r"config\.json: expected a JSON object, found list"),
    (INDEX, "nope", r"index\.json: expected JSON, found"),
    (INDEX, '{"weight_map": []}', r"expected a weight_map of tensor names to file names, found list"),
])  # fmt: skip
def test_damaged_json(src, file, text, message):
    (src / file).write_text(text)
    refused(src, message)


@pytest.mark.parametrize("with_index", [True, False])
def test_shard_missing(tmp_path, helpers, with_index):
    folder = helpers.write_model(tmp_path / "m", helpers.make_tensors(), shards=3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    if not with_index:
        (folder / INDEX).unlink()
    refused(folder, r"m/model-00002-of-00003\.safetensors is missing, .*; download or copy the checkpoint again")


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_shard_truncated(tmp_path, helpers, keep):
    folder = helpers.write_model(tmp_path / "m", helpers.make_tensors(), shards=2)
    file = folder / "model-00002-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    refused(
        folder,
        rf"m/model-00002-of-00002\.safetensors: {file.stat().st_size} bytes, truncated or no safetensors file .*; download or copy it again",
    )


def test_lfs_pointer(src):
    (src / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    refused(src, r"model\.safetensors is a Git LFS pointer, not the file itself; run `git lfs pull`")


def test_index_names_a_tensor_that_no_shard_has(tmp_path, helpers):
    folder = helpers.write_model(tmp_path / "m", helpers.make_tensors(), shards=2)
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["model.extra.weight"] = "model-00001-of-00002.safetensors"
    (folder / INDEX).write_text(json.dumps(index))
    refused(folder, r"^model\.extra\.weight: .*index\.json places it in .*m/model-00001-of-00002\.safetensors, which does not have it")


def test_only_pickles(src):
    (src / "model.safetensors").unlink()
    refused(
        src,
        r"src has pytorch_model\.bin and no safetensors file; only safetensors are read, since unpickling runs code\. Load the model with transformers",
    )
    (src / "pytorch_model.bin").unlink()
    refused(src, r"src has no safetensors file")


# --- tensors


@pytest.mark.parametrize("param", ["weight_packed", "weight_scale", "weight_global_scale"])
def test_tensor_missing(quantized, param):
    change(quantized, lambda t: t.pop(f"{Q}.{param}"))
    refused(quantized, rf"^{Q}\.{param}: missing; a layer in nvfp4 has weight_packed, weight_scale, weight_global_scale")


def test_layer_missing(quantized):
    change(quantized, lambda t: [t.pop(n) for n in list(t) if n.startswith(f"{Q}.weight")])
    refused(quantized, rf"^{Q}: quantization_config stores it as nvfp4, but .* has no tensor of it; the checkpoint is incomplete")


def test_wrong_shape(quantized):
    change(quantized, lambda t: t.update({f"{Q}.weight_scale": t[f"{Q}.weight_scale"][:-1].clone()}))
    refused(quantized, rf"^{Q}\.weight_scale: expected shape \[128, 8\] for a 128 x 128 weight, found \[127, 8\]")


def test_codes_that_are_no_matrix(quantized):
    change(quantized, lambda t: t.update({f"{Q}.weight_packed": t[f"{Q}.weight_packed"][None].clone()}))
    refused(quantized, rf"^{Q}\.weight_packed: expected a matrix, found shape \[1, 128, 64\]")


def test_wrong_dtype(quantized):
    change(quantized, lambda t: t.update({f"{Q}.weight_scale": t[f"{Q}.weight_scale"].float()}))
    refused(quantized, rf"^{Q}\.weight_scale: expected torch\.float8_e4m3fn, found torch\.float32")


def test_shape_that_the_format_cannot_hold(quantized):
    down = "model.layers.0.mlp.down_proj"
    change(quantized, lambda t: t.update({f"{down}.weight_packed": t[f"{down}.weight_packed"][:, :-1].clone()}))
    refused(quantized, rf"^{down}: K = 248 is not a multiple of 128, the group size of int4_g128")


def test_tensor_that_the_format_does_not_have(quantized):
    change(quantized, lambda t: t.update({f"{Q}.weight_zero_point": torch.zeros(16, 8, dtype=torch.int32)}))
    refused(quantized, rf"^{Q}\.weight_zero_point: a layer in nvfp4 has no such tensor, only ")


def test_quantized_layer_that_no_target_matches(quantized):
    change(quantized, config=lambda c: [g["targets"].remove(Q) for g in c["config_groups"].values() if Q in g["targets"]])
    refused(
        quantized,
        rf"^{Q}\.weight_\w+: expected a weight that is not quantized, since no target of quantization_config matches it, found .*; add {Q} to",
    )


def test_quantized_layers_without_a_config(quantized):
    data = json.loads((quantized / "config.json").read_text())
    del data["quantization_config"]
    (quantized / "config.json").write_text(json.dumps(data))
    refused(quantized, r"expected a weight that is not quantized, since config\.json has no quantization_config, found")


def test_plain_layer_that_the_config_names(quantized, src):
    shutil.copy(src / "model.safetensors", quantized / "model.safetensors")
    refused(quantized, r"\.weight_packed: missing; a layer in \S+ has weight_packed")


def test_unsupported_dtype(src):
    change(src, lambda t: t.update({f"{Q}.weight": t[f"{Q}.weight"].to(torch.float64)}))
    refused(src, rf"^{Q}\.weight: expected torch\.bfloat16 or torch\.float16 or torch\.float32, found torch\.float64")


# --- config


def test_unknown_scheme(quantized):
    change(quantized, config=lambda c: c["config_groups"]["group_0"]["weights"].update(num_bits=3))
    refused(
        quantized, r"config\.json: quantization_config, group_0: no format stores \S+ weights with .*'num_bits': 3.*; supported are fp8"
    )


def test_other_quantization_method(quantized):
    change(quantized, config=lambda c: c.update(quant_method="hqq"))
    refused(quantized, r"config\.json: expected quant_method compressed-tensors, awq, gptq, modelopt; found 'hqq', which is not read here")


def test_load_of_nothing(src):
    with pytest.raises(CheckpointError, match="^no.such: missing in "):
        Checkpoint.open(src).load("no.such")
