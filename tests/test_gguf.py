"""GGUF import: a tiny Llama is written as llama.cpp's converter would, converted back, and must be the model it was."""

import json
import os
import runpy
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from qplugins.checkpoints.files import staged
from qplugins.checkpoints.gguf import convert, undo_rotary_permutation

HIDDEN, FFN, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 64, 96, 2, 4, 2, 16

CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
USER_DEFINED = ["<think>"]
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
MERGES = ["Ġ t", "h e", "Ġt he", "1 2"]
TOKENS = CONTROL + USER_DEFINED + BYTES + [merge.replace(" ", "") for merge in MERGES]
TYPES = [gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.USER_DEFINED] + [gguf.TokenType.NORMAL] * (len(BYTES) + len(MERGES))
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"

GGUF_NAMES = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}  # fmt: skip


def permute(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """llama.cpp's side: within each head, row j goes to 2j and row j + d/2 to 2j + 1. Written row by row, unlike what undoes it."""
    d = weight.shape[0] // heads
    out = torch.full_like(weight, float("nan"))
    for head in range(heads):
        for j in range(d // 2):
            out[head * d + 2 * j] = weight[head * d + j]
            out[head * d + 2 * j + 1] = weight[head * d + d // 2 + j]
    return out


def llama(tie: bool) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(TOKENS), hidden_size=HIDDEN, intermediate_size=FFN, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS, max_position_embeddings=128, rms_norm_eps=1e-5, tie_word_embeddings=tie,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0}, initializer_range=0.3,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.1)  # norms would be all ones
            weight.copy_(weight.bfloat16())
    return model


def gguf_tensors(model: LlamaForCausalLM) -> dict[str, torch.Tensor]:
    tensors = {}
    for name, weight in model.named_parameters():
        name = name.removesuffix(".weight")
        if name.startswith("model.layers."):
            layer, _, rest = name.removeprefix("model.layers.").partition(".")
            heads = {"self_attn.q_proj": HEADS, "self_attn.k_proj": KV_HEADS}.get(rest)
            name, weight = f"blk.{layer}.{GGUF_NAMES[rest]}", permute(weight.detach(), heads) if heads else weight
        else:
            name = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}[name]
        tensors[f"{name}.weight"] = weight.detach()
    return tensors


def write_gguf(
    path: Path, tensors, *, arch="llama", tokenizer="gpt2", pre="smollm", tokens=TOKENS, merges=MERGES, quantize=None, **overrides
) -> Path:
    """`tensors` as F32, or where `quantize(name)` names a type as that. `overrides`: `writer.add_<key>(value)`, None to leave the key out."""
    writer = gguf.GGUFWriter(path, arch)
    sizes = dict(block_count=LAYERS, context_length=128, embedding_length=HIDDEN, feed_forward_length=FFN, head_count=HEADS, head_count_kv=KV_HEADS,
                 rope_dimension_count=HEAD_DIM, rope_freq_base=5000.0, layer_norm_rms_eps=1e-5) | overrides  # fmt: skip
    for key, value in sizes.items():
        if value is not None:
            getattr(writer, f"add_{key}")(value)
    writer.add_tokenizer_model(tokenizer)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(TYPES)
    writer.add_token_merges(merges)
    for role, i in {"bos": 1, "eos": 2, "pad": 2, "unk": 0}.items():
        getattr(writer, f"add_{role}_token_id")(i)
    writer.add_chat_template(TEMPLATE)
    for name, weight in tensors.items():
        values, kind = weight.float().numpy(), quantize and quantize(name)
        writer.add_tensor(name, gguf.quantize(values, kind) if kind else values, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("heads, head_dim", [(1, 2), (3, 8), (4, 64)])
def test_rotary_permutation_is_undone(heads, head_dim):
    weight = torch.randn(heads * head_dim, 5)
    undone = undo_rotary_permutation(permute(weight, heads), heads)
    assert torch.equal(undone, weight) and undone.is_contiguous()


def test_rotary_permutation_of_one_head_by_hand():
    stored = torch.tensor([[0], [10], [1], [11], [2], [12]])
    assert undo_rotary_permutation(stored, 1).flatten().tolist() == [0, 1, 2, 10, 11, 12]


@pytest.mark.parametrize("tie", [False, True], ids=["untied", "tied"])
def test_converted_model_is_the_model_that_was_written(tmp_path, tie):
    model = llama(tie)
    steps = []
    out = convert(write_gguf(tmp_path / "m.gguf", gguf_tensors(model)), tmp_path / "sub" / "out", progress=lambda *step: steps.append(step))

    assert out == tmp_path / "sub" / "out"
    assert sorted(file.name for file in out.iterdir()) == [
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    saved, wanted = load_file(out / "model.safetensors"), dict(model.named_parameters())
    assert saved.keys() == wanted.keys()
    assert ("lm_head.weight" in saved) is not tie
    for name, weight in wanted.items():
        assert saved[name].dtype == torch.bfloat16
        assert torch.equal(saved[name].float(), weight), name  # the weights were bfloat16 values to begin with
    assert [step[:2] for step in steps] == [(i + 1, len(wanted)) for i in range(len(wanted))]
    assert {step[2] for step in steps} == wanted.keys()

    loaded = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    ids = torch.arange(4, 68)[None]
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)  # equal only if theta, eps and head sizes came through as well
    assert loaded.generation_config.eos_token_id == 2


def test_quantized_tensors_are_what_gguf_makes_of_them(tmp_path):
    tensors = gguf_tensors(llama(tie=False))
    kinds = {"attn_q": gguf.GGMLQuantizationType.Q8_0, "ffn_up": gguf.GGMLQuantizationType.Q4_1, "attn_v": gguf.GGMLQuantizationType.F16,
             "attn_output": gguf.GGMLQuantizationType.BF16}  # fmt: skip
    path = write_gguf(tmp_path / "m.gguf", tensors, quantize=lambda name: kinds.get(name.split(".")[-2]))
    saved = load_file(convert(path, tmp_path / "out", dtype=torch.float32) / "model.safetensors")

    def rounded(name):
        kind = kinds[name.split(".")[-2]]
        return torch.from_numpy(gguf.dequantize(gguf.quantize(tensors[name].numpy(), kind), kind).astype(np.float32))

    for gguf_name, name in [("ffn_up", "mlp.up_proj"), ("attn_v", "self_attn.v_proj"), ("attn_output", "self_attn.o_proj")]:
        assert torch.equal(saved[f"model.layers.1.{name}.weight"], rounded(f"blk.1.{gguf_name}.weight"))
    assert torch.equal(permute(saved["model.layers.1.self_attn.q_proj.weight"], HEADS), rounded("blk.1.attn_q.weight"))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float32"


def test_head_dim_need_not_be_hidden_over_heads(tmp_path):
    tensors = gguf_tensors(llama(tie=True))
    tensors["blk.0.attn_q.weight"], tensors["blk.1.attn_q.weight"] = torch.randn(2, 128, HIDDEN)  # 8 heads of 16, twice as wide as hidden
    tensors["blk.0.attn_output.weight"], tensors["blk.1.attn_output.weight"] = torch.randn(2, HIDDEN, 128)
    path = write_gguf(tmp_path / "m.gguf", tensors, head_count=8, key_length=16, value_length=16)
    out = convert(path, tmp_path / "out")
    config = json.loads((out / "config.json").read_text())
    assert (config["hidden_size"], config["head_dim"], config["num_attention_heads"], config["num_key_value_heads"]) == (64, 16, 8, 2)
    q = load_file(out / "model.safetensors")["model.layers.1.self_attn.q_proj.weight"].float()
    assert torch.equal(q, undo_rotary_permutation(tensors["blk.1.attn_q.weight"], 8).bfloat16().float())


@pytest.fixture(scope="module")
def tiny_tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    return AutoTokenizer.from_pretrained(convert(write_gguf(folder / "m.gguf", gguf_tensors(llama(tie=True))), folder / "out"))


TEXTS = [
    "the  the\tthe",
    " leading and trailing ",
    "naïve façade — 東京 🦙",
    "def f(x):\n    return x[0] += 1\n",
    "3.14159 12 1,000",
    "I'm <think>",
]


@pytest.mark.parametrize("text", TEXTS)
def test_tokenizer_gives_text_back(tiny_tokenizer, text):
    assert tiny_tokenizer.decode(tiny_tokenizer(text).input_ids) == text


def test_tokenizer_cuts_as_llama_cpp_does(tiny_tokenizer):
    cut = lambda text: tiny_tokenizer.convert_ids_to_tokens(tiny_tokenizer(text).input_ids)  # noqa: E731
    assert cut(" the he") == ["Ġthe", "Ġ", "he"]
    assert cut("12") == ["1", "2"]  # a merge exists, but smollm keeps digits apart
    assert cut("a<|im_end|>\n<think>b") == ["a", "<|im_end|>", "Ċ", "<think>", "b"]
    assert tiny_tokenizer.decode(tiny_tokenizer("a<|im_end|><think>").input_ids, skip_special_tokens=True) == "a<think>"


def test_tokenizer_roles_and_chat_template(tiny_tokenizer):
    roles = ("bos_token", "eos_token", "pad_token", "unk_token")
    assert [getattr(tiny_tokenizer, role) for role in roles] == ["<|im_start|>", "<|im_end|>", "<|im_end|>", "<|endoftext|>"]
    chat = tiny_tokenizer.apply_chat_template([{"role": "user", "content": "the"}], tokenize=False)
    assert chat == "<|im_start|>user\nthe<|im_end|>\n"
    assert len(tiny_tokenizer) == len(TOKENS) and tiny_tokenizer.model_max_length == 128


def test_gpt2_pre_tokenizer_bos_and_end_of_turn(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", gguf_tensors(llama(tie=True)), pre="gpt-2", add_bos_token=True, eot_token_id=0)
    out = convert(path, tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.convert_ids_to_tokens(tokenizer("12").input_ids) == ["<|im_start|>", "12"]
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == [2, 0]


def without(name):
    return lambda tensors: tensors.pop(name)


def resized(name):
    return lambda tensors: tensors.update({name: tensors[name][:-1]})


def added(name):
    return lambda tensors: tensors.update({name: torch.ones(HIDDEN)})


REFUSALS = {
    "another architecture": (dict(arch="gemma"), None, "general.architecture is 'gemma', only 'llama' can be read"),
    "sentencepiece": (dict(tokenizer="llama"), None, "tokenizer.ggml.model is 'llama', only 'gpt2' (byte-level BPE) can be read"),
    "unknown cut": (dict(pre="llama-bpe"), None, "tokenizer.ggml.pre is 'llama-bpe', only 'gpt-2' and 'smollm' can be read"),
    "rope scaling": (dict(rope_scaling_factor=4.0), None, "llama.rope.scaling.factor = 4.0 is a setting that this reader does not know"),
    "partial rotary": (dict(rope_dimension_count=8), None, "llama.rope.dimension_count is 8, only the whole head (here 16) can be read"),
    "heads not grouped": (dict(head_count_kv=3), None, "4 heads of 16 with 3 KV heads are not a Llama attention"),
    "sizes by layer": (dict(feed_forward_length=[96, 128]), None, "llama.feed_forward_length should be one int, is [96, 128]"),
    "no context length": (dict(context_length=None), None, "metadata llama.context_length is missing"),
    "bias": ({}, added("blk.0.attn_q.bias"), "tensor blk.0.attn_q.bias is not part of a plain Llama with llama.block_count 2"),
    "rope factors": ({}, added("rope_freqs.weight"), "tensor rope_freqs.weight is not part of a plain Llama with llama.block_count 2"),
    "a layer too many": (dict(block_count=1), None, "tensor blk.1.attn_q.weight is not part of a plain Llama with llama.block_count 1"),
    "a tensor missing": ({}, without("blk.1.ffn_up.weight"), "tensor blk.1.ffn_up.weight is missing; if this is one part of a split file"),
    "no embedding": ({}, without("token_embd.weight"), "tensor token_embd.weight is missing"),
    "wrong shape": ({}, resized("blk.0.attn_k.weight"), "tensor blk.0.attn_k.weight should be (32, 64), is (31, 64)"),
    "fewer rows than tokens": ({}, resized("token_embd.weight"), f"tokenizer.ggml.tokens has {len(TOKENS)} tokens, token_embd.weight only"),
    "id past the end": (dict(eot_token_id=9999), None, "tokenizer.ggml.eot_token_id is 9999, tokenizer.ggml.tokens has only"),
    "token twice": (dict(tokens=[*TOKENS[:-1], "t"]), None, "tokenizer.ggml.tokens has 't' twice"),
    "merge of nothing": (dict(merges=["x y"]), None, "tokenizer.ggml.merges has 'x y', which is not two tokens whose sum is a token"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refused_before_anything_is_written(tmp_path, case):
    settings, change, message = REFUSALS[case]
    tensors = gguf_tensors(llama(tie=True))
    if change:
        change(tensors)
    path = write_gguf(tmp_path / "m.gguf", tensors, **settings)
    with pytest.raises(ValueError) as refusal:
        convert(path, tmp_path / "out")
    assert str(refusal.value).startswith(f"{path}: {message}")
    assert list(tmp_path.iterdir()) == [path]


def test_tensor_type_without_dequantizer_is_refused(tmp_path):
    tensors = gguf_tensors(llama(tie=True))
    path = tmp_path / "m.gguf"
    write_gguf(path, tensors)
    reader = gguf.GGUFReader(path, "r+")
    (tensor,) = (t for t in reader.tensors if t.name == "output_norm.weight")
    tensor.field.parts[4][0] = gguf.GGMLQuantizationType.I32
    reader.data.flush()
    with pytest.raises(ValueError, match="tensor output_norm.weight is I32, which the package gguf cannot dequantize"):
        convert(path, tmp_path / "out")


@pytest.mark.parametrize("kept", [0.0, 0.01, 0.05, 0.1, 0.3, 0.5, 0.9, 0.999])
def test_truncated_file_is_refused(tmp_path, kept):
    path = write_gguf(tmp_path / "m.gguf", gguf_tensors(llama(tie=True)))
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * kept)])
    with pytest.raises(ValueError, match="is not a complete GGUF file"):
        convert(path, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [path]


def test_something_else_than_gguf_is_refused(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"PK\x03\x04" * 100)
    with pytest.raises(ValueError, match="is not a complete GGUF file"):
        convert(path, tmp_path / "out")


def test_existing_folder_is_refused_and_kept(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", gguf_tensors(llama(tie=True)))
    (tmp_path / "out").mkdir()
    with pytest.raises(FileExistsError, match="out already exists: choose another folder or remove it"):
        convert(path, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_interrupted_conversion_leaves_nothing(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", gguf_tensors(llama(tie=True)))

    def stop(done, total, name):
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(path, tmp_path / "out", progress=stop)
    assert list(tmp_path.iterdir()) == [path]


class TestStaged:
    def test_appears_only_when_the_block_ends(self, tmp_path):
        out = tmp_path / "a" / "b"
        with staged(out) as folder:
            assert folder == tmp_path / "a" / f".b.partial-{os.getpid()}"
            (folder / "x").write_text("1")
            assert not out.exists()
        assert (out / "x").read_text() == "1" and list((tmp_path / "a").iterdir()) == [out]

    def test_folder_that_appeared_meanwhile_is_kept(self, tmp_path):
        with pytest.raises(FileExistsError, match="already exists"), staged(tmp_path / "out") as folder:
            (folder / "x").touch()
            (tmp_path / "out").mkdir()
        assert [p.name for p in tmp_path.iterdir()] == ["out"] and not any((tmp_path / "out").iterdir())

    def test_dangling_link_is_not_replaced(self, tmp_path):
        (tmp_path / "out").symlink_to(tmp_path / "nowhere")
        with pytest.raises(FileExistsError, match="already exists"), staged(tmp_path / "out"):
            pass

    def test_left_over_of_a_killed_run_is_named_not_removed(self, tmp_path):
        partial = tmp_path / f".out.partial-{os.getpid()}"
        partial.mkdir()
        with pytest.raises(FileExistsError, match="left over from a run that was killed"), staged(tmp_path / "out"):
            pass
        assert partial.exists()

    def test_files_follow_the_umask(self, tmp_path):
        with staged(tmp_path / "out") as folder:
            (folder / "private").touch(mode=0o600)
        assert (tmp_path / "out" / "private").stat().st_mode & 0o777 == (tmp_path / "out").stat().st_mode & 0o666


@pytest.fixture(scope="module")
def smollm2():
    return runpy.run_path(str(Path(__file__).parents[1] / "integration_tests" / "models.py"))["smollm2"]()


@pytest.mark.real_model
@pytest.mark.parametrize(
    "text", [*TEXTS, "Привет, мир! ½ ≠ 0.5", "\r\n\n   mixed \u00a0 spaces\u2003", "e\u0301 vs \u00e9", "<|im_start|>user\nHi 42<|im_end|>"]
)
def test_smollm2_tokenizer_gives_text_back(smollm2, text):
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    assert tokenizer.decode(tokenizer(text).input_ids) == text


@pytest.mark.real_model
def test_smollm2_tokens(smollm2):
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    cut = lambda text: tokenizer.convert_ids_to_tokens(tokenizer(text).input_ids)  # noqa: E731
    assert cut("Hello world 1234, it's 5pm") == ["Hello", "Ġworld", "Ġ", "1", "2", "3", "4", ",", "Ġit", "'s", "Ġ", "5", "pm"]
    assert tokenizer("<|im_start|><|im_end|>").input_ids == [1, 2]
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_start|>", "<|im_end|>", 2)


@pytest.mark.real_model
def test_smollm2_knows_the_capital_of_france(smollm2):
    tokenizer, model = AutoTokenizer.from_pretrained(smollm2), AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**prompt, max_new_tokens=24, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer) and answer[-1] == tokenizer.eos_token_id  # it also ends its turn
