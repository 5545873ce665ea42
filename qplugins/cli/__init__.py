"""The command `qplugins`. A file a command; each imports what it needs when it runs, so that `--help` does not wait for torch."""

import typer

from qplugins.cli.bench import bench_linear
from qplugins.cli.choose import choose
from qplugins.cli.convert import convert
from qplugins.cli.doctor import doctor
from qplugins.cli.eval import eval_kv, eval_weights
from qplugins.cli.inspect import inspect
from qplugins.cli.quantize import quantize
from qplugins.cli.shared import guarded
from qplugins.cli.verify import verify

app = typer.Typer(
    name="qplugins", help="Mixed-precision checkpoints for unmodified vLLM and SGLang.", no_args_is_help=True, add_completion=False
)
for command in (choose, quantize, inspect, verify, convert, doctor):
    app.command(no_args_is_help=command is not doctor)(guarded(command))

evaluate = typer.Typer(help="Measure what quantization does to a model: of its KV cache, or of its weights.", no_args_is_help=True)
evaluate.command("kv", no_args_is_help=True)(guarded(eval_kv))
evaluate.command("weights", no_args_is_help=True)(guarded(eval_weights))
app.add_typer(evaluate, name="eval")

benchmark = typer.Typer(help="Time kernels on this machine's GPU, and choose their blocks by it.", no_args_is_help=True)
benchmark.command("linear")(guarded(bench_linear))
app.add_typer(benchmark, name="bench")

__all__ = ["app"]
