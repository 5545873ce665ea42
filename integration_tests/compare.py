"""Does a server compute what its checkpoint says? Its next-token log-probabilities against those of a transformers model that holds the
dequantized weights in float32.

The reference shares nothing with the engines: weights go through `Format.read(...).dequantize()` or `Format.quantize(...).dequantize()`, the
definitions, and the model is transformers' own (checkpoints/quality.py). Both sides compute in float32, so that what remains is the order of
summation: a mean KL around 1e-9. The bars, 1e-3 and 99 %, leave room for engines that compute in 16 bits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

# what servers are compared with
from qplugins.checkpoints.quality import dequantized_model as dequantized_model
from qplugins.checkpoints.quality import next_token_logprobs as next_token_logprobs
from qplugins.checkpoints.quality import quantized_model as quantized_model

MAX_MEAN_KL = 1e-3
MIN_TOP1 = 0.99
POSITIONS = 200
TOP = 500  # tokens a position that are asked for; the rest is one bucket

# Plain prose about no one thing, so that nothing in it is easy or hard throughout.
TEXT = """\
The lighthouse at the end of the harbour had not been lit for eleven years when the council voted to repair it. Some of the older
fishermen thought it a waste of money, since every boat now carried a receiver that knew its place on the water to within a few metres.
Others remembered the winter of the great storm, when the power failed along the whole coast and three crews came home by counting the
seconds between flashes. The engineer who was sent to look at the lamp found the lens whole under a sheet of canvas, and a notebook in
which the last keeper had written down the weather every morning, together with the names of the birds that he had seen. She spent an
afternoon cleaning the glass with warm water and vinegar. By the end of the week a new motor turned the old mirror, slowly at first, and
children came after school to watch the beam move over the roofs, the empty market and the sea. Nobody could say how far it reached, so
the baker's daughter took a small boat out to find the answer. She rowed until the houses were a row of yellow points, and further, until
there was only the dark water around her and, every twelve seconds, the light.
"""


def text_tokens(folder: Path, positions: int = POSITIONS) -> list[int]:
    """Token ids of TEXT under a checkpoint's tokenizer, one more than there are next tokens to compare."""
    tokens = AutoTokenizer.from_pretrained(folder)(TEXT.replace("\n", " "))["input_ids"]
    if len(tokens) <= positions:
        raise ValueError(f"the text has {len(tokens)} tokens, {positions + 1} are needed")
    return tokens[: positions + 1]


plain_model = dequantized_model  # of a plain checkpoint there is nothing to dequantize


def laid_out_model(src: Path, weights: Mapping[str, Tensor]) -> PreTrainedModel:
    """The model of a plain checkpoint with some of its matrices, by module name, exchanged for others."""
    model = plain_model(src)
    parameters = dict(model.named_parameters())
    for name, w in weights.items():
        parameters[f"{name}.weight"].data = w
    return model


@torch.inference_mode()
def greedy(model: PreTrainedModel, folder: Path, tokens: Sequence[int], count: int) -> str:
    """The text of the `count` likeliest tokens after `tokens`, one after the other."""
    text = list(tokens)
    for _ in range(count):
        text.append(int(model(torch.tensor([text])).logits[0, -1].argmax()))
    return AutoTokenizer.from_pretrained(folder).decode(text[len(tokens) :], skip_special_tokens=True)


@dataclass(frozen=True)
class Comparison:
    """Of two models' next-token distributions over a text.

    mean_kl, max_kl  nats, KL(reference || server), over positions
    top1             share of positions at which both have the same likeliest token
    rest             largest share of the reference's probability that was outside the server's list at a position
    perplexity, reference_perplexity  of the text's own tokens
    """

    positions: int
    mean_kl: float
    max_kl: float
    top1: float
    rest: float
    perplexity: float
    reference_perplexity: float

    def check(self) -> None:
        assert math.isfinite(self.mean_kl) and self.mean_kl <= MAX_MEAN_KL, f"mean KL {self.mean_kl:.2e} > {MAX_MEAN_KL}: {self}"
        assert self.top1 >= MIN_TOP1, f"equal top token at {self.top1:.1%} < {MIN_TOP1:.0%}: {self}"


def compare(listed: Sequence[Mapping[int, float]], reference: Tensor, tokens: Sequence[int]) -> Comparison:
    """listed     what `Server.prompt_logprobs(tokens, top)` gave
    reference  float32 [len(tokens) - 1, vocabulary], from `next_token_logprobs`

    The server names its likeliest tokens only, so the KL is taken over those and one bucket for all others. Merging tokens into a bucket
    can only lower a KL (data processing inequality): this is a lower bound, short by no more than what happens inside the bucket, whose
    probability under the reference is reported as `rest`.
    """
    if len(listed) != len(reference) or len(reference) != len(tokens) - 1:
        raise ValueError(f"{len(listed)} positions from the server, {len(reference)} from the reference, for {len(tokens)} tokens")
    kls, same, rests = [], 0, []
    for position, p_all in zip(listed, reference, strict=True):
        ids = torch.tensor(list(position))
        q = torch.tensor(list(position.values()), dtype=torch.float64)
        p = p_all[ids].to(torch.float64)
        p_rest, q_rest = (float((1 - x.exp().sum()).clamp_min(1e-12)) for x in (p, q))
        kls.append(float((p.exp() * (p - q)).sum()) + p_rest * math.log(p_rest / q_rest))
        same += int(ids[q.argmax()] == p_all.argmax())
        rests.append(p_rest)
    server_nll = [-position[token] for position, token in zip(listed, tokens[1:], strict=True)]
    reference_nll = -reference.gather(1, torch.tensor(tokens[1:])[:, None])
    return Comparison(
        positions=len(kls),
        mean_kl=sum(kls) / len(kls),
        max_kl=max(kls),
        top1=same / len(kls),
        rest=max(rests),
        perplexity=math.exp(sum(server_nll) / len(server_nll)),
        reference_perplexity=float(reference_nll.mean().exp()),
    )
