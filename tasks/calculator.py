"""The calculator the model may call: four operations on numbers, exact, and safe on any string."""

from __future__ import annotations

import ast
import re
from fractions import Fraction

MAX_LENGTH = 64


def calculate(expression: str) -> str | None:
    """The value of an arithmetic expression ("48/2" -> "24"), rounded to six decimals; None when it is not one.

    Numbers, + - * / and parentheses, at most 64 characters; thousands commas, `$` and `%` are dropped.
    """
    source = re.sub(r"[,$%]", "", expression[: MAX_LENGTH + 1]).strip()
    if len(expression) > MAX_LENGTH or not re.fullmatch(r"[0-9.+\-*/() ]+", source):
        return None
    # Python reads 007 as a syntax error
    source = re.sub(r"(?<![0-9.])0+(?=[0-9])", "", source)
    try:
        value = _value(ast.parse(source, mode="eval").body)
    except (SyntaxError, ValueError, ZeroDivisionError):
        return None
    scaled = round(value * 10**6)
    whole, decimals = divmod(abs(scaled), 10**6)
    return ("-" if scaled < 0 else "") + f"{whole}.{decimals:06d}".rstrip("0").rstrip(".")


def _value(node: ast.expr) -> Fraction:
    match node:
        case ast.Constant(value=int() | float() as number):
            return Fraction(str(number))
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand)
        case ast.UnaryOp(op=ast.UAdd(), operand=operand):
            return _value(operand)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return _value(left) + _value(right)
        case ast.BinOp(left=left, op=ast.Sub(), right=right):
            return _value(left) - _value(right)
        case ast.BinOp(left=left, op=ast.Mult(), right=right):
            return _value(left) * _value(right)
        case ast.BinOp(left=left, op=ast.Div(), right=right):
            return _value(left) / _value(right)
    raise ValueError("not arithmetic")
