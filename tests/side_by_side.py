"""The same text run over the standard library's object and over ours: what came of it must be the same."""

import ast
from typing import Any


def outcomes(text: str, names: dict[str, Any]) -> list[Any]:
    """What each statement of `text` gave: an expression's value with its type, or the type of what it raised, with the
    errno of an OSError. A statement that raises does not end it. `names` is the namespace, and keeps what is assigned.
    """
    return [_outcome(statement, names) for statement in ast.parse(text).body]


def _outcome(statement: ast.stmt, names: dict[str, Any]) -> Any:
    try:
        if not isinstance(statement, ast.Expr):
            exec(compile(ast.Module([statement], []), "<statement>", "exec"), names)
            return "done"
        value = eval(compile(ast.Expression(statement.value), "<expression>", "eval"), names)
    except OSError as error:
        return "raised", type(error).__name__, error.errno
    except Exception as error:
        return "raised", type(error).__name__
    return type(value).__name__, value
