"""Choosing a layer map for a budget: predicted costs, the choice, the file, the command."""

import itertools
import json
import statistics
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3MoeConfig,
)
from typer.testing import CliRunner

from qplugins.checkpoints.budget import TOLERANCE, spend
from qplugins.checkpoints.choose import FORMATS, Candidates, choose
from qplugins.checkpoints.importance import LEAST, importance
from qplugins.checkpoints.quality import dequantized_model, divergence, next_token_logprobs, quantized_model
from qplugins.checkpoints.quantize import plan
from qplugins.checkpoints.reader import Checkpoint
from qplugins.checkpoints.sensitivity import Sensitivities, _fisher_root, _kl, sensitivities
from qplugins.cli import app
from qplugins.formats import CheckpointError, get_format
from qplugins.layer_map import Assignment, LayerMap, Module, Rule, to_yaml

VOCAB = "abcdefghijklmnopqrstuvwxyz .,\n"


def write_llama(folder: Path, tied: bool = False) -> Path:
    """A random Llama of three layers whose tokens are letters, in bfloat16."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(VOCAB), hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        tie_word_embeddings=tied, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    with torch.no_grad():
        for name, w in model.named_parameters():
            if w.dim() == 2:
                w.normal_(std=0.3 if "embed" in name else w.shape[1] ** -0.5)
    model.save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({c: i for i, c in enumerate(VOCAB)}, unk_token=" "))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return write_llama(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def tied(tmp_path_factory) -> Path:
    return write_llama(tmp_path_factory.mktemp("models") / "tied", tied=True)


def text(count: int, length: int) -> torch.Tensor:
    return torch.randint(len(VOCAB), (count, length), generator=torch.Generator().manual_seed(1))


# --- what is important


def test_importance_is_the_mean_square_of_a_layers_inputs(llama):
    model, tokens = dequantized_model(llama), text(3, 40)
    down, head = "model.layers.1.mlp.down_proj", "lm_head"
    found = importance(model, [down, head, "model.embed_tokens", "nothing"], tokens.tolist())
    assert found.keys() == {down, head}  # what a linear layer multiplies
    with torch.no_grad():
        seen = []
        handle = model.get_submodule(down).register_forward_hook(lambda m, x, y: seen.append(x[0]))
        want = {head: model.base_model(input_ids=tokens).last_hidden_state, down: seen[0]}
        handle.remove()
    for name, x in want.items():
        torch.testing.assert_close(found[name], x.square().sum((0, 1)), rtol=1e-4, atol=0)
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_a_column_that_the_text_never_uses_counts_a_little(llama):
    model = dequantized_model(llama)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[7] = 0
    found = importance(model, ["model.layers.0.mlp.down_proj"], text(1, 40).tolist())["model.layers.0.mlp.down_proj"]
    assert found[7] > 0 and found[7] == pytest.approx(LEAST * float(found.mean()), rel=1e-3)


def test_a_model_that_overflows_is_named(llama):
    model = dequantized_model(llama)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.fill_(torch.inf)
    with pytest.raises(ValueError, match=r"model.layers.0.mlp.down_proj: its inputs are not finite"):
        importance(model, ["model.layers.0.mlp.down_proj"], text(1, 40).tolist())


# --- predicted costs


def test_signs_are_a_root_of_the_fisher_information():
    logits = torch.randn(6, generator=torch.Generator().manual_seed(0)) * 2
    u = _fisher_root(logits.expand(200_000, 6), torch.Generator().manual_seed(0)).double()
    p = logits.double().softmax(0)
    # 200,000 draws, of numbers no larger than one: three standard errors are below 0.007
    assert (u.T @ u / len(u) - (p.diag() - p.outer(p))).abs().max() < 0.007
    assert u.mean(0).abs().max() < 0.007


def test_neighbours_are_weighed_as_newey_and_west_do():
    scores = torch.randn(3, 100, generator=torch.Generator().manual_seed(0)).double()
    weight = (1 - (torch.arange(100)[:, None] - torch.arange(100)).abs() / 32).clamp_min(0).double()
    want = torch.einsum("bs,st,bt->", scores, weight, scores) / (2 * scores.numel())
    assert _kl(scores) == pytest.approx(float(want))


def test_where_logits_are_linear_the_prediction_is_the_quadratic_form(llama):
    """The output head: z = D h exactly, and 1/2 z' F z can be written down. What is left is the noise of 16,000 random signs, a few percent."""
    source, model, windows = Checkpoint.open(llama), dequantized_model(llama), text(256, 64)
    fmt = get_format("int4_g32")
    predicted = sensitivities(source, model, {"lm_head": [fmt]}, windows).costs["lm_head"]["int4_g32"]
    with torch.no_grad():
        h = model.model(windows).last_hidden_state
        w = source.load("lm_head.weight")
        p, z = (h @ model.lm_head.weight.T).softmax(-1), h @ (fmt.quantize(w, None).dequantize() - w).T
        exact = float(((p * z * z).sum(-1) - (p * z).sum(-1) ** 2).mean() / 2)
    assert predicted == pytest.approx(exact, rel=0.1)


def test_what_lies_between_matrices():
    """Two matrices that do the same to the logits cost four times as much as one; two that do the opposite cost nothing."""
    score = torch.randn(2, 50, generator=torch.Generator().manual_seed(0))
    found = Sensitivities({"a": {"nvfp4": score}, "b": {"nvfp4": score}, "c": {"nvfp4": -score, "bf16": torch.zeros(2, 50)}})
    one = found.costs["a"]["nvfp4"]
    assert found.together({"a": "nvfp4", "b": "nvfp4", "c": "bf16"}) == pytest.approx(4 * one)
    assert found.together({"a": "nvfp4", "c": "nvfp4"}) == 0 and found.costs["c"] == {"nvfp4": pytest.approx(one), "bf16": 0}


@pytest.mark.parametrize("embeddings", [False, True])
def test_prediction_and_measurement(tied, embeddings):
    """Matrices alone, in a format that errs little and in one that rounds inputs too; also one that is both embedding and head."""
    source, model, windows = Checkpoint.open(tied), dequantized_model(tied), text(48, 96)
    candidates = Candidates.of(source, ["int8", "fp8", "bf16"], embeddings=embeddings)
    predicted = sensitivities(source, model, candidates.options, windows).costs
    reference, cut = [next_token_logprobs(model, w.tolist()) for w in windows], windows.tolist()
    assert ("model.embed_tokens" in predicted) == embeddings
    names = ["model.embed_tokens"] if embeddings else [n for n in predicted if ".1." in n]
    for fmt in ("int8", "fp8"):
        pairs = []
        for name in names:
            made = quantized_model(tied, LayerMap((Rule((name,), (get_format(fmt),)),)), round_inputs=True)
            pairs.append((predicted[name][fmt], divergence(reference, made, cut).kl))
        ratios = [a / b for a, b in pairs]
        # 4,608 tokens in sums of 32 are some 140 independent squares, whose mean is off by an eighth; a factor of two would be a mistake
        assert 0.75 < statistics.geometric_mean(ratios) < 1.33 and all(0.55 < r < 1.8 for r in ratios), ratios
    assert all(costs["bf16"] == 0 for costs in predicted.values())


@pytest.mark.parametrize("family", ["gemma2", "qwen2", "qwen3_moe"])
def test_other_models(tmp_path, family):
    """Gemma scales what it looks up and caps its logits; Qwen2 has biases; a mixture's attention can be measured, if not its
    experts. Here a token has all of them: that a router chooses otherwise is no small change, and not predicted."""
    torch.manual_seed(0)
    small = dict(
        vocab_size=30, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        tie_word_embeddings=family == "gemma2",
    )  # fmt: skip
    config = {
        "gemma2": lambda: Gemma2Config(**small, head_dim=32, final_logit_softcapping=4.0),
        "qwen2": lambda: Qwen2Config(**small),
        "qwen3_moe": lambda: Qwen3MoeConfig(**small, head_dim=32, num_experts=4, num_experts_per_tok=4, moe_intermediate_size=64),
    }[family]()
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, w in model.named_parameters():
            if "norm" not in name:
                w.normal_(std=0.1 if w.dim() == 1 else 0.3 if "embed" in name else w.shape[1] ** -0.5)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "model")
    source, model, windows = Checkpoint.open(tmp_path / "model"), dequantized_model(tmp_path / "model"), text(48, 96)
    fmt = get_format("int8")
    names = ["model.embed_tokens", "model.layers.0.self_attn.q_proj"]
    names.append("model.layers.1.self_attn.o_proj" if family == "qwen3_moe" else "model.layers.1.mlp.down_proj")
    predicted = sensitivities(source, model, {name: [fmt] for name in names}, windows).costs
    reference = [next_token_logprobs(model, w.tolist()) for w in windows]
    for name in names:
        made = quantized_model(tmp_path / "model", LayerMap((Rule((name,), (fmt,)),)))
        assert 0.55 < predicted[name]["int8"] / divergence(reference, made, windows.tolist()).kl < 1.8, name


def test_model_is_left_as_it_was(llama):
    source, model, windows = Checkpoint.open(llama), dequantized_model(llama), text(2, 64)
    before = next_token_logprobs(model, windows[0].tolist())
    options = Candidates.of(source, ["nvfp4"]).options
    first, second = (sensitivities(source, model, options, windows) for _ in range(2))
    assert first.costs == second.costs  # deterministic
    assert torch.equal(before, next_token_logprobs(model, windows[0].tolist()))
    assert not any(m._forward_hooks or m.training for m in model.modules())
    assert not any(m.gradient_checkpointing for m in model.modules() if hasattr(m, "gradient_checkpointing"))


def test_divergence(llama):
    model, cut = dequantized_model(llama), text(2, 40).tolist()
    reference = [next_token_logprobs(model, w) for w in cut]
    same = divergence(reference, model, cut)
    assert same.kl == pytest.approx(0, abs=1e-9) and same.top1 == 1 and same.positions == 78
    assert same.perplexity == pytest.approx(same.reference_perplexity)
    made = quantized_model(llama, LayerMap.preset("nvfp4", 3))
    found = divergence(reference, made, cut)
    p, q = torch.cat(reference), torch.cat([next_token_logprobs(made, w) for w in cut])
    following = torch.tensor([t for w in cut for t in w[1:]])[:, None]
    assert found.kl == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)
    assert found.top1 == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).float().mean()))
    assert found.perplexity == pytest.approx(float((-q.gather(1, following).mean()).exp()), rel=1e-5)


# --- the choice

ITEMS = st.lists(
    st.lists(st.tuples(st.floats(0, 1) | st.sampled_from([0.0, 0.5]), st.integers(1, 40)), min_size=1, max_size=4), min_size=1, max_size=6
)


@settings(max_examples=300, deadline=None)
@given(ITEMS, st.integers(0, 200))
def test_no_choice_is_better(items, budget):
    losses, sizes = ([[option[part] for option in item] for item in items] for part in (0, 1))
    every = [
        sum(loss[j] for loss, j in zip(losses, c, strict=True))
        for c in itertools.product(*(range(len(item)) for item in items))
        if sum(size[j] for size, j in zip(sizes, c, strict=True)) <= budget
    ]
    if not every:
        with pytest.raises(ValueError, match=f"the smallest choice has {sum(map(min, sizes))} bytes, the budget is {budget}"):
            spend(losses, sizes, budget)
        return
    found = spend(losses, sizes, budget)
    assert sum(size[j] for size, j in zip(sizes, found, strict=True)) <= budget
    assert sum(loss[j] for loss, j in zip(losses, found, strict=True)) <= min(every) * (1 + 2 * TOLERANCE) + 1e-12


def test_thousands_of_matrices_take_seconds():
    generator = torch.Generator().manual_seed(0)
    bits = [4.125, 4.3125, 4.5, 4.625, 8.01, 16.0]
    scale = torch.randn(2000, 1, generator=generator).exp() * torch.tensor([4**-b for b in bits])
    losses = (scale * torch.rand(2000, len(bits), generator=generator).add(0.5)).tolist()
    sizes = [[int(n * b / 8) for b in bits] for n in torch.randint(10**5, 10**8, (2000,), generator=generator).tolist()]
    budget = sum(int(s[2] * 1.1) for s in sizes)
    found = spend(losses, sizes, budget)
    assert 0.9999 * budget < sum(s[j] for s, j in zip(sizes, found, strict=True)) <= budget


def made_up_costs(candidates: Candidates) -> dict[str, dict[str, float]]:
    """Each matrix with a sensitivity of its own, each format with the error of its bits."""
    return {
        x.name: {
            f.name: 0.0 if not f.quantized else (1 + i % 5) ** 3 * 4.0 ** -(8 * f.nbytes(x.n, x.k) / (x.n * x.k))
            for f in candidates.options[x.name]
        }
        for i, x in enumerate(candidates.chosen_for)
    }


@pytest.mark.parametrize("embeddings", [False, True])
@pytest.mark.parametrize("name", ["llama", "tied"])
@pytest.mark.parametrize("bits", [4.7, 5.5, 8, 12, 16])
def test_budget_is_kept_by_the_maps_own_account(request, tmp_path, name, embeddings, bits):
    source = Checkpoint.open(request.getfixturevalue(name))
    candidates = Candidates.of(source, FORMATS, embeddings=embeddings)
    choice = choose(candidates, made_up_costs(candidates), bits=bits)
    (tmp_path / "map.yaml").write_text(to_yaml(choice.assignment))
    if bits == 16:
        assert set(choice.assignment.counts()) == {"bf16"} and choice.kl == 0
        return
    planned = plan(source, LayerMap.from_yaml(tmp_path / "map.yaml"))
    assert {x.name: x.format for x in planned.layers} == {m.name: f.name for m, f in choice.assignment}
    chosen = [x for x in planned.layers if x.name in candidates.options]
    spent = 8 * sum(x.nbytes_after for x in chosen) / sum(x.n * x.k for x in chosen)
    assert planned.nbytes_after == choice.nbytes and spent == pytest.approx(choice.bits) and bits * 0.97 < spent <= bits
    assert len(chosen) == 21 + embeddings * (1 if name == "tied" else 2)
    # the same budget, told in bytes of the whole checkpoint
    assert choose(candidates, made_up_costs(candidates), nbytes=choice.nbytes).assignment == choice.assignment


def test_costs_that_are_not_finite_are_named(llama):
    candidates = Candidates.of(Checkpoint.open(llama), ["nvfp4", "bf16"])
    costs = {name: {"nvfp4": 1e-6, "bf16": 0.0} for name in candidates.options}
    costs["model.layers.1.self_attn.k_proj"]["nvfp4"] = float("nan")
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.k_proj: its costs are nan, 0, so the model overflowed"):
        choose(candidates, costs, bits=8)


def test_siblings_of_a_fused_layer_get_formats_of_their_own(llama):
    candidates = Candidates.of(Checkpoint.open(llama), ["nvfp4", "int8", "bf16"])
    costs = {name: {"nvfp4": 1e-6, "int8": 1e-7, "bf16": 0.0} for name in candidates.options}
    costs["model.layers.1.self_attn.k_proj"] |= {"nvfp4": 1.0, "int8": 0.5}
    costs["model.layers.1.self_attn.v_proj"] |= {"nvfp4": 1.0}
    formats = {m.name: f.name for m, f in choose(candidates, costs, bits=5.2).assignment}
    assert [formats[f"model.layers.1.self_attn.{x}_proj"] for x in "qkv"] == ["nvfp4", "bf16", "int8"]


def test_ignored_stays_and_is_not_counted(llama):
    candidates = Candidates.of(Checkpoint.open(llama), ["nvfp4"], ignore=["re:.*o_proj$"])
    choice = choose(candidates, {n: {"nvfp4": 1.0} for n in candidates.options}, bits=4.6)
    assert choice.assignment.counts() == {"nvfp4": 18, "bf16": 5} and choice.bits < 4.6


@pytest.mark.parametrize(
    ("formats", "more", "budget", "why"),
    [
        (["nvfp4", "int8"], {}, {"bits": 4.25}, r"a budget of 4\.25 bits a weight is too small: the least that nvfp4, int8 come to is 4\.5\d+ bits"),
        (["nvfp4"], {}, {"nbytes": 1000}, r"a budget of 1,000 bytes is too small: the least that nvfp4 come to is \d\d,\d{3} bytes, of which"),
        (["nvfp5"], {}, {}, "unknown format 'nvfp5'; there are"),
        (["fp8_static"], {}, {}, "fp8_static can only be read"),
        (["nvfp4"], {"ignore": ["re:.*o_porj"]}, {}, "--ignore 're:.*o_porj' matches no module"),
        (["int4_g128"], {}, {}, "K = 64 is not a multiple of 128"),
    ],
)  # fmt: skip
def test_refused(llama, formats, more, budget, why):
    with pytest.raises(ValueError, match=why):
        candidates = Candidates.of(Checkpoint.open(llama), formats, **more)
        choose(candidates, {name: {f.name: 1.0 for f in options} for name, options in candidates.options.items()}, **budget)


def test_smallest_budget_that_is_named_is_enough(llama):
    candidates = Candidates.of(Checkpoint.open(llama), ["nvfp4", "int8"])
    costs = made_up_costs(candidates)
    with pytest.raises(ValueError, match="come to is") as e:
        choose(candidates, costs, bits=4)
    choose(candidates, costs, bits=float(str(e.value).split()[-4]))


def test_quantized_source_is_refused(llama, tmp_path):
    run("quantize", llama, tmp_path / "out", "--map", "nvfp4", "--json")
    with pytest.raises(CheckpointError, match="is quantized already"):
        Candidates.of(Checkpoint.open(tmp_path / "out"), ["nvfp4"])


# --- the file


def test_map_is_compact():
    names = ["embed_tokens", *(f"layers.{i}.{part}" for i in range(12) for part in ("attn.q_proj", "attn.k_proj", "mlp.down_proj"))]
    modules = [Module(f"model.{n}", "Embedding" if n == "embed_tokens" else "Linear", 64, 64) for n in names]
    formats = {"attn.k_proj": "int8", "mlp.down_proj": "nvfp4", "attn.q_proj": "nvfp4", "embed_tokens": "fp8"}
    special = {"model.layers.2.attn.q_proj": "int8", "model.layers.10.attn.q_proj": "int8", "model.layers.3.mlp.down_proj": "bf16"}
    chosen = [special.get(m.name) or next(f for part, f in formats.items() if m.name.endswith(part)) for m in modules]
    written = to_yaml(Assignment(tuple(modules), tuple(map(get_format, chosen))), "Made\nby hand")
    assert written == (
        "# Made\n# by hand\nrules:\n"
        "  - format: fp8\n    targets:\n      - 'model.embed_tokens'\n"
        "  - format: int8\n    targets:\n"
        "      - 're:model\\.layers\\.(2|10)\\.attn\\.q_proj$'\n"
        "      - 're:model\\.layers\\.\\d+\\.attn\\.k_proj$'\n"
        "  - format: nvfp4\n    targets: [Linear]\n"
        "ignore:\n  - 're:model\\.layers\\.3\\.mlp\\.down_proj$'\n"
    )


MODULES = [
    Module("model.embed_tokens", "Embedding", 96, 64),
    *(Module(f"model.layers.{i}.{p}", "Linear", 64, 64) for i in range(11) for p in ("attn.q_proj", "attn.k_proj", "mlp.up_proj")),
    Module("lm_head", "Linear", 96, 64),
]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from(["nvfp4", "int8", "bf16", "fp8"]), min_size=len(MODULES), max_size=len(MODULES)))
def test_map_gives_the_assignment_again(tmp_path_factory, names):
    assignment = Assignment(tuple(MODULES), tuple(get_format(n) for n in names))
    file = tmp_path_factory.mktemp("map") / "map.yaml"
    file.write_text(to_yaml(assignment))
    assert LayerMap.from_yaml(file).assign(MODULES) == assignment


# --- the commands


def run(*args, code: int = 0):
    result = CliRunner().invoke(app, [str(a) for a in args])
    assert result.exit_code == code, result.output
    return result


@pytest.fixture
def words(tmp_path) -> Path:
    (tmp_path / "words.txt").write_text("".join(VOCAB[i] for i in text(1, 1000)[0]))
    return tmp_path / "words.txt"


def test_choose_quantize_evaluate(llama, tmp_path, words):
    out = tmp_path / "map.yaml"
    command = ["choose", llama, out, "--text", words, "--bits", "5.5", "--context-length", "128", "--windows", "4"]
    said = json.loads(run(*command, "--measure", "--json").stdout)
    assert 5.2 < said["bits"] <= 5.5 and len(said["layers"]) == 21 and 0.3 < said["predicted_kl"] / said["measured_kl"] < 3
    assert "Chosen for llama by `qplugins choose`, from 512 tokens" in out.read_text()
    by_text = ["--text", words, "--context-length", "128", "--windows", "4"]
    quantized = json.loads(run("quantize", llama, tmp_path / "made", "--map", out, *by_text, "--json").stdout)
    assert quantized["weighed_by_text"] == sum(x["format"] != "bf16" for x in said["layers"])
    # a checkpoint also has every int4 matrix's shape, 16 bytes that nothing reads
    assert 0 <= Checkpoint.open(tmp_path / "made").nbytes - said["bytes"] <= 21 * 16
    evaluate = ["eval", "weights", llama, tmp_path / "made", "--text", words, "--context-length", "128", "--windows", "4"]
    plain, made = json.loads(run(*evaluate, "--json").stdout)["rows"]
    assert plain["kl"] == 0 and plain["bits_per_weight"] == 16 and made["bytes"] < plain["bytes"]
    assert made["kl"] == pytest.approx(said["measured_kl"], rel=1e-3)
    out.unlink()
    assert "if it were everywhere" in run(*command).stdout and "top-1" in run(*evaluate).stdout
    assert "in 21 of 21 quantized matrices" in run("quantize", llama, tmp_path / "more", "--map", "nvfp4", *by_text).stdout
    assert "already exists" in run("quantize", llama, tmp_path / "more", "--map", "nvfp4", *by_text, code=2).stderr


@pytest.mark.parametrize(
    ("more", "why"),
    [
        (["--bits", "5", "--bytes", "1GB"], "give the budget as --bits or as --bytes"),
        ([], "give the budget as --bits or as --bytes"),
        (["--bits", "3"], "a budget of 3 bits a weight is too small"),
        (["--bytes", "much"], "--bytes 'much' is not a size"),
        (["--bits", "5", "--context-length", "2000"], "has 1000 tokens, and a window of 2000 is asked for"),
        (["--bits", "5", "--dtype", "int3"], "--dtype 'int3' is none of"),
        (["--bits", "5", "--device", "tpu"], "device 'tpu' cannot be used here"),
    ],
)
def test_command_refuses(llama, tmp_path, words, more, why):
    result = run("choose", llama, tmp_path / "map.yaml", "--text", words, *more, code=2)
    assert why in " ".join(result.stderr.split()) and not (tmp_path / "map.yaml").exists()


def test_command_refuses_before_it_works(llama, tmp_path, words):
    assert "is not a folder" in run("choose", tmp_path / "none", tmp_path / "m.yaml", "--text", words, "--bits", "5", code=2).stderr
    assert "already exists" in run("choose", llama, words, "--text", words, "--bits", "5", code=2).stderr
    assert "is not a folder" in run("choose", llama, tmp_path / "a" / "m.yaml", "--text", words, "--bits", "5", code=2).stderr
