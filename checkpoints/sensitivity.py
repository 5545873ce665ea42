"""What storing a matrix in a format costs the model: the KL divergence of its next-token distribution, for all matrices and formats at once.

Let p be the model's distribution of the next token and q that of the model with one matrix W stored as W + D. To second order

    KL(p || q) = 1/2 z' F z,    F = diag(p) - p p',    z = the change of the logits, to first order J D

because the slope of KL at D = 0 is zero and its curvature is the Fisher information F, carried from the logits to W by the Jacobian J
(Martens, arXiv 1412.1193). F has a square root: with r = sqrt(p) and signs e,

    u = r * e - p (r . e),    E[u] = 0,    E[u u'] = F

so that one backward pass of the logits' gradient u gives u' z for every matrix and error: at a layer with input x and output gradient g it is
g . (D x), a number a token, and half its mean square estimates the KL. Random signs in place of sampled tokens are curvature propagation
(Martens, Sutskever and Swersky, arXiv 1206.6464); at positions where the model is nearly sure a sampled token says something once in a hundred
times, the signs every time. D x is the change of the layer's output; where a format also rounds the layer's input, that is in it too.

An error in W is the same at every token, and what it does to keys and values meets again in attention: the numbers of neighbouring tokens are
correlated, and squared one by one they miss up to four fifths of what an error in v_proj costs. Summed over a whole window before they are
squared they miss nothing, but one window is then one sample. In between lies the estimator of a correlated series' variance by Newey and West
(Econometrica 55, 1987): products of tokens that are less than LAGS apart, with weights that fall to zero.

What is neglected: the third order and beyond. A choice is made as though the costs of matrices added up, as in HIGGS (arXiv 2411.17525), which
measures each layer's by running the model; `together` then has what lies between the matrices of one map too, since to first order their z
add up. FIT (arXiv 2210.08502) takes the Fisher information of single weights without their products, and so without x and g.
`bench/choose.py` compares with measured KL.

One forward and one backward pass over all windows at once, with activations recomputed a decoder layer at a time: memory is the model, a
hidden state a layer and token, and a layer's activations. Each error D is made when its matrix's turn comes and kept no longer.

Not seen is what jumps: a mixture's router that chooses other experts.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import ModelOutput

from qplugins.checkpoints.quality import rounded
from qplugins.checkpoints.reader import Checkpoint
from qplugins.formats import Format

# Of 1 to 512 on SmolLM2-135M: ranks of 40 matrices in nvfp4 then correlate with those of their measured KL by 0.86 after 1,000 tokens, by 0.93
# after 3,000 and by 0.95 after 6,000. Without lags it is 0.70 after 1,000 and never more than 0.75.
LAGS = 32

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Sensitivities:
    """scores: module name -> format name -> float32 [B, T], the number u' z of each token where that matrix alone is stored in that format."""

    scores: Mapping[str, Mapping[str, Tensor]]

    @cached_property
    def costs(self) -> dict[str, dict[str, float]]:
        """Module name -> format name -> predicted KL in nats a token, of storing that matrix alone in that format."""
        return {name: {fmt: _kl(s) for fmt, s in of.items()} for name, of in self.scores.items()}

    def together(self, formats: Mapping[str, str]) -> float:
        """Predicted KL of a whole map, name -> format name: to second order with all that lies between matrices, since their z add up."""
        return _kl(sum(self.scores[name][fmt].to(torch.float64) for name, fmt in formats.items()))


def sensitivities(
    source: Checkpoint,
    model: nn.Module,
    candidates: Mapping[str, Sequence[Format]],
    windows: Tensor,
    *,
    importance: Mapping[str, Tensor] | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Sensitivities:
    """Of every candidate in each of its formats.

    source      the unquantized checkpoint, from which matrices are quantized as `qplugins quantize` does with the same importance
    model       its transformers model, a causal language model in which each candidate is the weight of modules that are linear in it
    candidates  module name -> the formats to try, each of which can store the matrix; one that is not quantized costs nothing
    windows     int64 [B, T] tokens on the model's device
    importance  as `quantize.quantize` takes it
    progress    called after each matrix with (matrices done, matrices in all, its name)
    Raises ValueError where the model has no module of a candidate's name, or it is no Linear or Embedding, or does not run.
    """
    probe = _Probe(source, candidates, windows, importance or {}, progress)
    model.requires_grad_(False)
    generator = torch.Generator(windows.device).manual_seed(seed)
    with _recomputed(model), probe.attached(model), torch.enable_grad():
        output = model.base_model(input_ids=windows, use_cache=False)
        hidden = output.last_hidden_state
        gradient = torch.empty_like(hidden)
        for b in range(len(windows)):  # logits are large: a window's at a time
            part = slice(b, b + 1)
            h = hidden[part].detach().requires_grad_()
            probe.rows = part
            logits = _head(model, replace(output, last_hidden_state=h), windows[part])
            logits.backward(_fisher_root(logits.detach(), generator))
            gradient[part] = h.grad
        probe.rows = slice(None)
        hidden.backward(gradient)
    if unused := candidates.keys() - probe.seen:
        raise ValueError(f"{min(unused)}: transformers does not run it over a text, so that it cannot be measured; name it under --ignore")
    return Sensitivities(probe.scores)


def _kl(scores: Tensor) -> float:
    """[B, T] numbers g . (D x) -> nats a token. Products of numbers l tokens apart weigh 1 - l / LAGS, which is the mean square of sums that
    slide over the window, LAGS numbers at a time, beginning and ending with one."""
    sums = nn.functional.pad(scores.to(torch.float64), (LAGS, LAGS - 1)).cumsum(1)
    return float((sums[:, LAGS:] - sums[:, :-LAGS]).square().sum()) / LAGS / (2 * scores.numel())


def _fisher_root(logits: Tensor, generator: torch.Generator) -> Tensor:
    """A random u, of the shape of `logits` [..., V], with E[u u'] = diag(p) - p p' at every position and independent between positions."""
    r = torch.softmax(logits.to(torch.float32), -1).sqrt_()
    u = torch.empty_like(r).bernoulli_(0.5, generator=generator).mul_(2).sub_(1).mul_(r)
    return u.sub_(r.square_().mul_(u.sum(-1, keepdim=True))).to(logits.dtype)


def _head(model: nn.Module, output: ModelOutput, tokens: Tensor) -> Tensor:
    """Logits of the body's output, by the model's own forward pass: some models scale or cap them behind the head."""
    body = model.base_model
    body.forward = lambda *_, **__: output
    try:
        return model(input_ids=tokens, use_cache=False).logits
    finally:
        del body.forward  # the instance's attribute; that of its class shows again


@contextmanager
def _recomputed(model: nn.Module) -> Iterator[None]:
    """Decoder layers keep only their input in the forward pass, and are computed again when the backward pass comes to them."""
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    if model.supports_gradient_checkpointing:
        # reentrant: the first pass then builds no graph, so that hooks see which of the two they are in
        model.gradient_checkpointing_enable({"use_reentrant": True})
        for layer in layers:
            layer.training = True  # the layer itself, which asks for it; what is in it stays in evaluation
    else:
        model.enable_input_require_grads()
    try:
        yield
    finally:
        for layer in layers:
            layer.training = False
        if model.supports_gradient_checkpointing:
            model.gradient_checkpointing_disable()
        model.disable_input_require_grads()


class _Probe:
    """Hooks that, when a module's output gradient comes by, note g . (D x) of each token for the errors D of all its formats.

    scores  see Sensitivities; uses of one matrix, as of a tied embedding, add up
    seen    the matrices whose turn has come
    rows    the windows that are passing through the model
    """

    def __init__(
        self,
        source: Checkpoint,
        candidates: Mapping[str, Sequence[Format]],
        windows: Tensor,
        importance: Mapping[str, Tensor],
        progress: Progress | None,
    ) -> None:
        self.source, self.candidates, self.importance, self.progress = source, candidates, importance, progress
        nothing = torch.zeros(windows.shape, device=windows.device)
        self.scores = {name: {f.name: nothing.clone() if f.quantized else nothing for f in of} for name, of in candidates.items()}
        self.seen: set[str] = set()
        self.rows = slice(None)
        self.held: tuple[str, dict[str, Tensor]] | None = None

    @contextmanager
    def attached(self, model: nn.Module) -> Iterator[None]:
        """Hooks at every module whose weight is a candidate's."""
        names = {id(_weight(model, name)): name for name in self.candidates}
        uses = [(m, names[id(m.weight)]) for m in model.modules() if id(getattr(m, "weight", None)) in names]
        handles = [module.register_forward_hook(partial(self.watch, name)) for module, name in uses]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def watch(self, name: str, module: nn.Module, inputs: tuple, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(lambda g: self.score(name, module, inputs[0].detach(), g))

    @torch.no_grad()
    def score(self, name: str, module: nn.Module, x: Tensor, g: Tensor) -> None:
        errors = self.errors(name, module.weight)
        for fmt in self.candidates[name]:
            if fmt.quantized:
                change = _apply(module, errors[fmt.name], x)
                if fmt.activation == "token" and x.is_floating_point():
                    change += _apply(module, module.weight + errors[fmt.name], rounded(x) - x)
                rows = self.scores[name][fmt.name][self.rows]
                rows += (change * g).sum(-1, dtype=torch.float32).view(rows.shape)

    def errors(self, name: str, weight: Tensor) -> dict[str, Tensor]:
        """Format -> D, in the dtype of the model. Those of the last matrix are kept: a head is passed once for each window."""
        if self.held is None or self.held[0] != name:
            self.held = None
            w = self.source.load(f"{name}.weight").to(weight.device)
            # A matrix's own largest magnitude. Fused siblings may have to share a larger one, which moves the range of e4m3 scales, not
            # their precision
            important = self.importance.get(name)
            made = {
                f.name: f.quantize(w, None, important).dequantize().sub_(w).to(weight.dtype) for f in self.candidates[name] if f.quantized
            }
            self.held = name, made
            self.seen.add(name)
            if self.progress is not None:
                self.progress(len(self.seen), len(self.candidates), name)
        return self.held[1]


def _weight(model: nn.Module, name: str) -> nn.Parameter:
    try:
        module = model.get_submodule(name)
    except AttributeError:
        module = None
    if not isinstance(module, (nn.Linear, nn.Embedding)):
        what = "has no module of that name" if module is None else f"runs it in a {type(module).__name__}"
        raise ValueError(f"{name}: transformers {what}, so that it cannot be measured; name it under --ignore")
    return module.weight


def _apply(module: nn.Module, weight: Tensor, x: Tensor) -> Tensor:
    """What `module` makes of x with another weight and without its bias."""
    replaced = {"weight": weight}
    if getattr(module, "bias", None) is not None:
        replaced["bias"] = torch.zeros_like(module.bias)
    return functional_call(module, replaced, (x,))
