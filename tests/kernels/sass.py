"""Reads a kernel's machine code for Hopper: what happens to registers while the tensor core still reads or writes them.

The instruction that multiplies returns at once. Its accumulators, and its first operand where that is in registers, belong to it until a wait
says that it is done. Compilers have got that wrong (`wait_for_dot` in kernels/common/device.py), and it shows as a wrong sum now and then.
"""

import re
from dataclasses import dataclass

PRODUCTS = ("HGMMA", "QGMMA")  # of 16- and of 8-bit floats
_LINE = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(@!?U?P\d+\s+)?([A-Za-z0-9_.]+)\s*([^;]*);")


@dataclass(frozen=True)
class Instruction:
    conditional: bool
    opcode: str
    operands: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.opcode} {', '.join(self.operands)}"


def instructions(text: str) -> tuple[list[Instruction], dict[str, int]]:
    """Of one function as nvdisasm prints it, and label -> the number of the instruction that follows it."""
    found: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if m := re.match(r"^(\.L_x_\d+):", line):
            labels[m[1]] = len(found)
        elif m := _LINE.match(line):
            found.append(Instruction(m[1] is not None, m[2], tuple(o.strip() for o in m[3].split(","))))
    return found, labels


def product_loops(code: list[Instruction], labels: dict[str, int]) -> list[range]:
    """The innermost loops that multiply."""
    found = []
    for i, one in enumerate(code):
        if one.opcode.startswith("BRA") and one.conditional and (m := re.search(r"\.L_x_\d+", " ".join(one.operands))):
            loop = range(labels[m[0]], i + 1)
            if any(code[j].opcode.startswith(PRODUCTS) for j in loop):
                found.append(loop)
    return [a for a in found if not any(a != b and a.start <= b.start and b.stop <= a.stop for b in found)]


def _registers(operand: str, count: int) -> set[int]:
    m = re.match(r"^-?\|?R(\d+)\b", operand)
    return set(range(int(m[1]), int(m[1]) + count)) if m else set()


def _written(one: Instruction) -> set[int]:
    if one.opcode.startswith(("ST", "RED", "BAR", "BRA")):
        return set()
    wide = one.opcode.startswith("CS2R") and ".32" not in one.opcode
    return _registers(one.operands[0], 4 if ".128" in one.opcode else 2 if wide or ".64" in one.opcode or ".WIDE" in one.opcode else 1)


def conflicts(code: list[Instruction], loop: range) -> tuple[list[str], int]:
    """Instructions of the loop, and after it until nothing is under way, that touch what a product under way has; and how many groups of
    products are under way at the same time."""
    under_way: list[tuple[set[int], set[int]]] = []  # groups: first operands, accumulators
    a, acc = set(), set()
    found, most = [], 0
    for i in [*loop, *loop, *loop, *range(loop.stop, len(code))]:
        one = code[i]
        if i >= loop.stop and not under_way:
            break
        if one.opcode.startswith(PRODUCTS):
            columns = int(re.search(r"\.64x(\d+)x", one.opcode)[1])
            a, acc = a | _registers(one.operands[1], 4), acc | _registers(one.operands[0], columns // 2)
            if "gsb0" in one.operands:
                under_way.append((a, acc))
                a, acc = set(), set()
                most = max(most, len(under_way))
        elif one.opcode.startswith("WARPGROUP.DEPBAR"):
            left = int(one.operands[1], 16)
            under_way = under_way[max(0, len(under_way) - left) :]
        else:
            of_operands, of_sums = (s.union(*(group[k] for group in under_way)) for k, s in enumerate((a, acc)))
            read = set().union(*(_registers(o, 1) for o in one.operands))
            if _written(one) & (of_operands | of_sums) or read & of_sums:
                found.append(str(one))
    return found, most


def report(text: str) -> dict:
    """Of a kernel with one such loop or more: how many, the products in them, what waits they have, the groups under way, and conflicts."""
    code, labels = instructions(text)
    loops = product_loops(code, labels)
    checked = [conflicts(code, loop) for loop in loops]
    return {
        "loops": len(loops),
        "products": sum(code[i].opcode.startswith(PRODUCTS) for loop in loops for i in loop),
        "instructions": sum(map(len, loops)),
        "waits": [int(code[i].operands[1], 16) for loop in loops for i in loop if code[i].opcode.startswith("WARPGROUP.DEPBAR")],
        "groups_under_way": max((most for _, most in checked), default=0),
        "conflicts": [c for found, _ in checked for c in found],
    }
