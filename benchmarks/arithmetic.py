"""Arithmetic in GSM8K's notation, ``<<48/2=24>>``: equations to learn from, and which of a text's equations hold."""

from __future__ import annotations

import ast
import math
import operator
import random
import re
from collections.abc import Iterable, Iterator
from fractions import Fraction

OPERATIONS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


def drills(rows: int) -> Iterator[str]:
    """Texts of 60 drawn equations each, whole numbers below 1000, in GSM8K's notation."""
    rng = random.Random(2)

    def number(digits: int) -> int:
        return int(10 ** rng.uniform(0, digits))

    def equation() -> str:
        sign = rng.choice("+-*/")
        a, b = number(3), number(2 if sign in "*/" else 3)
        if sign == "/":
            a *= b
        elif sign == "-":
            a, b = max(a, b), min(a, b)
        result = value(f"{a}{sign}{b}")
        return f"{a} {sign} {b} = <<{a}{sign}{b}={result}>>{result}"

    for _ in range(rows):
        yield "\n".join(equation() for _ in range(60))


def value(expression: str) -> Fraction | None:
    """Of an expression in numbers, the four operations and brackets; None for any other text."""

    def of(node: ast.expr) -> Fraction:
        if isinstance(node, ast.BinOp) and type(node.op) in OPERATIONS:
            return OPERATIONS[type(node.op)](of(node.left), of(node.right))
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return -of(node.operand)
        if isinstance(node, ast.Constant) and type(node.value) in (int, float):
            return Fraction(str(node.value))
        raise ValueError

    try:
        return of(ast.parse(expression.replace(",", ""), mode="eval").body)
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError):
        return None


def equations(texts: Iterable[str]) -> dict[str, float]:
    """Equations ``<<left=right>>`` of the texts that can be evaluated: how many, the share that holds within 0.01, its standard error.

    Equations of a text are not independent, so the error is that of a ratio of sums over texts.
    """
    counts = []
    for text in texts:
        pairs = [(value(left), value(right)) for left, right in re.findall(r"<<([^<>=]+)=([^<>=]+)>>", text)]
        held = [abs(left - right) < 0.01 for left, right in pairs if left is not None and right is not None]
        counts.append((sum(held), len(held)))
    right, total = (sum(column) for column in zip(*counts, strict=True))
    share = right / max(total, 1)
    error = math.sqrt(sum((r - share * n) ** 2 for r, n in counts)) / max(total, 1)
    return {"written": total, "right": share, "standard_error": error}
