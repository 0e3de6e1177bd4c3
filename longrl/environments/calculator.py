"""`Calculator`: the smallest environment, one tool that needs no media."""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable
from typing import Any

from longrl.environments.tool_calls import quoted
from longrl.environments.tool_environment import ToolEnvironment, ToolError

MAX_CHARS = 300
MAX_NODES = 100
_OPERATORS: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_SIGNS: dict[type, Callable[[Any], Any]] = {ast.UAdd: operator.pos, ast.USub: operator.neg}
_RULE = "numbers, + - * / // % **, and parentheses alone"


class Calculator(ToolEnvironment):
    """Works out arithmetic."""

    tool_names = ("calculate",)

    def calculate(self, expression: str) -> str:
        """Works out an arithmetic expression.

        Args:
            expression: Numbers, + - * / // % ** and parentheses, as in (3 + 4) * 2.
        """
        if len(expression) > MAX_CHARS:
            raise ToolError(f"expression may have {MAX_CHARS} characters, got {len(expression)}; take it apart")
        try:
            tree = ast.parse(expression.strip(), mode="eval")
        except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
            raise ToolError(f"expression must have {_RULE}, got {quoted(expression)}; correct it") from error
        if sum(1 for _ in ast.walk(tree)) > 3 * MAX_NODES:
            raise ToolError("expression is too long; take it apart")
        try:
            value = _value(tree.body)
        except ArithmeticError as error:  # a division by zero, too large a number
            raise ToolError(f"{quoted(expression)} has no value ({error}); correct it") from error
        if not math.isfinite(value):
            raise ToolError(f"{quoted(expression)} has no finite value; correct it")
        return f"{value:.15g}" if isinstance(value, float) else str(value)


def _value(node: ast.AST) -> int | float:
    """The value of an expression's tree; nothing in it is run.

    Raises:
        ToolError: it holds something else than arithmetic.
        ArithmeticError: it has no value.
    """
    value: int | float
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float) and not isinstance(node.value, bool):
        value = node.value
    elif isinstance(node, ast.UnaryOp) and type(node.op) in _SIGNS:
        value = _SIGNS[type(node.op)](_value(node.operand))
    elif isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        value = _OPERATORS[type(node.op)](_value(node.left), _value(node.right))
    elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow):
        power: Any = float(_value(node.left)) ** float(_value(node.right))  # of whole numbers the digits have no end
        if isinstance(power, complex):
            raise ToolError("a root of a negative number is no real number; correct the expression")
        value = int(power) if power.is_integer() and abs(power) < 2**53 else power
    else:
        raise ToolError(f"expression must have {_RULE}; write it with these")
    if abs(value) > 1e300:
        raise OverflowError("it is above 1e300")
    return value
