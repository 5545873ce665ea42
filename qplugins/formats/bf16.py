"""bf16: not quantized. The matrix stays in the model's own 16-bit dtype, and its layer runs as the engine runs it."""

from qplugins.formats.base import Format, Param

BF16 = Format("bf16", params=(Param("weight", None, (1, 1)),))
