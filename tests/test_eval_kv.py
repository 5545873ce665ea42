"""`qplugins eval kv` without an engine: what is made of the engine's answers."""

import json
import math

import numpy as np
import pytest
from typer.testing import CliRunner

from qplugins.cli import app, eval

TOKENS, TOP = 40, 8


def answers(logits: np.ndarray, top: int = TOP, **more) -> dict[str, np.ndarray]:
    """What vllm/evaluate.py gives for a model that says `logits` [windows, positions, vocabulary] of a text that is all zeros."""
    lp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    ids = np.argsort(-lp, -1)[..., :top].astype(np.int32)
    plain = {"answers": np.array([], dtype=str), "bytes_per_token": np.array(100.0), "tokens": np.array(5)}
    return {"ids": ids, "logprobs": np.take_along_axis(lp, ids, -1).astype(np.float32), "next": lp[..., 0], **plain, **more}


@pytest.fixture
def logits() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(2, 9, TOKENS)) * 3


def test_same_answers_have_no_divergence(logits):
    row, curve = eval.compare(answers(logits), answers(logits), slice(0, 2), 9, None)
    assert row["kl"] == pytest.approx(0, abs=1e-7) and row["top1"] == 1 and curve.shape == (9,)


def test_divergence_is_a_lower_bound_that_closes_with_more_tokens(logits):
    other = logits + np.random.default_rng(1).normal(size=logits.shape) * 0.3
    p, q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (logits, other))
    exact = float((np.exp(p) * (p - q)).sum(-1).mean())
    some, all_of_them = (eval.compare(answers(logits, n), answers(other, n), slice(0, 2), 9, None)[0]["kl"] for n in (TOP, TOKENS))
    assert 0 < some < exact and all_of_them == pytest.approx(exact, rel=1e-5)


def test_perplexity_is_of_the_text(logits):
    row, _ = eval.compare(answers(logits), answers(logits), slice(1, 2), 9, None)
    p = logits[1] - np.log(np.exp(logits[1]).sum(-1, keepdims=True))
    assert row["perplexity"] == pytest.approx(math.exp(-p[:, 0].mean()))


def test_table_json_and_plot(monkeypatch, tmp_path, logits):
    """The command, with an engine that says what it is told to."""
    transformers = pytest.importorskip("transformers")

    class Tokenizer:
        chat_template = None

        def __call__(self, text, **_):
            return {"input_ids": [ord(c) for c in text]}

        def decode(self, ids):
            return "".join(map(chr, ids))

    seen = []

    def ask(request, name, shown):
        seen.append(request)
        said = np.array([f"it is {eval.NUMBER}" if name == "auto" or i % 2 else "no" for i in range(len(request["prompts"]))])
        return answers(np.resize(logits, (len(request["windows"]), 299, TOKENS)) + (name != "auto") * 0.1 * np.arange(TOKENS), answers=said)

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *_: Tokenizer())
    monkeypatch.setattr(eval, "ask", ask)
    (tmp_path / "text").write_text("words " * 200)
    command = ["eval", "kv", "model", "--text", str(tmp_path / "text"), "--context-lengths", "200,300", "--needle"]
    done = CliRunner().invoke(app, [*command, "--json", "--plot", str(tmp_path / "kl.png")])
    assert done.exit_code == 0, done.output
    rows = json.loads(done.stdout)["rows"]
    assert [(r["kv_cache_dtype"], r["context"], r["recalled"]) for r in rows] == [
        ("auto", 200, 10), ("int4_sink", 200, 5), ("auto", 300, 10), ("int4_sink", 300, 5),
    ]  # fmt: skip
    assert [len(w) for w in seen[0]["windows"]] == [200, 200, 300, 300]
    assert all(eval.NEEDLE.format(eval.NUMBER) in "".join(map(chr, p)) for p in seen[0]["prompts"])
    assert (tmp_path / "kl.png").read_bytes().startswith(b"\x89PNG")
    assert "recalled" in CliRunner().invoke(app, command).stdout


@pytest.mark.parametrize(
    "options, why", [(["--context-lengths", "4000"], "has 1200 tokens"), (["--context-lengths", "a"], "should be numbers")]
)
def test_refused(monkeypatch, tmp_path, options, why):
    transformers = pytest.importorskip("transformers")
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *_: lambda text, **_: {"input_ids": list(text)})
    (tmp_path / "text").write_text("words " * 200)
    done = CliRunner().invoke(app, ["eval", "kv", "model", "--text", str(tmp_path / "text"), *options])
    assert done.exit_code == 2 and why in done.output
