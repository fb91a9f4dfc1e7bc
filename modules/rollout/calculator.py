"""A calculator as an environment, for tasks in which a model should not reckon in its head."""

import ast
import operator
from fractions import Fraction

LONGEST = 200  # characters of an expression
OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


class Calculator:
    """Works out expressions; it keeps no state and gives no reward."""

    def reset(self) -> str | None:
        """Add nothing to the prompt."""
        return None

    def calculate(self, expression: str) -> str:
        """Work out an arithmetic expression exactly.

        Args:
            expression: Numbers with + - * / and parentheses, at most 200 characters.

        Returns:
            The value: a whole number, or a decimal.
        """
        if len(expression) > LONGEST:
            raise ValueError(f"the expression has more than {LONGEST} characters")
        value = evaluate(ast.parse(expression.strip(), mode="eval").body)
        return str(value.numerator) if value.denominator == 1 else str(float(value))


def evaluate(node: ast.expr) -> Fraction:
    """Return the value of a parsed expression. Raises ValueError for anything but numbers and + - * /."""
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return Fraction(str(node.value))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -evaluate(node.operand)
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        return Fraction(OPERATORS[type(node.op)](evaluate(node.left), evaluate(node.right)))
    raise ValueError("only numbers, + - * / and parentheses can be worked out")
