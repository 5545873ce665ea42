"""The command `qplugins`. A file a command; each imports what it needs when it runs, so that `--help` does not wait for torch."""

import typer

from qplugins.cli.convert import convert_gguf
from qplugins.cli.doctor import doctor
from qplugins.cli.eval import eval_kv
from qplugins.cli.inspect import inspect
from qplugins.cli.quantize import quantize
from qplugins.cli.shared import guarded
from qplugins.cli.verify import verify

app = typer.Typer(
    name="qplugins", help="Mixed-precision checkpoints for unmodified vLLM and SGLang.", no_args_is_help=True, add_completion=False
)
for command in (quantize, inspect, verify, doctor):
    app.command(no_args_is_help=command is not doctor)(guarded(command))

convert = typer.Typer(help="Rewrite a model of another kind as a Hugging Face checkpoint.", no_args_is_help=True)
convert.command("gguf", no_args_is_help=True)(guarded(convert_gguf))
app.add_typer(convert, name="convert")

evaluate = typer.Typer(help="Measure what quantization does to a model, through the engine that serves it.", no_args_is_help=True)
evaluate.command("kv", no_args_is_help=True)(guarded(eval_kv))
app.add_typer(evaluate, name="eval")

__all__ = ["app"]
