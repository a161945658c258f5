"""A fault in the code, found by its function and its syntax.

Layout, comments and line numbers play no part in where a mutant goes, so reformatting costs none.
"""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

KERNELS = "qlab_kernels/"
Block = list[ast.stmt]
BODIES = ("body", "orelse", "finalbody")


@dataclass(frozen=True)
class Mutant:
    """`old` becomes `new` within one function.

    file: of qlab/, or of kernels/. function: its name, behind that of its class; "" for the module.
    old, new: both an expression, or both statements. `...` as the body of a statement stands for
    whatever its body is. laws: the test files that ought to notice, of tests/laws/ where no folder
    is named.
    """

    name: str
    file: str
    function: str
    old: str
    new: str
    laws: str

    def path(self, tree: Path) -> Path:
        """The file in a copy of the tree."""
        return tree / ("kernels" if self.file.startswith(KERNELS) else "qlab") / self.file


def plant(source: str, mutant: Mutant) -> str:
    """The source with the fault in it; ValueError unless `old` occurs once in the function."""
    tree = ast.parse(source)
    scope = _function(tree, mutant)
    old, new = ast.parse(mutant.old).body, ast.parse(mutant.new).body
    if _is_expression(old) and _is_expression(new):
        count = _replace_expression(scope, old[0].value, new[0].value)
    else:
        count = _replace_statements(scope, old, new)
    if count != 1:
        where = f"{mutant.function or 'the module'} of {mutant.file}"
        raise ValueError(f"{mutant.name}: {mutant.old!r} occurs {count} times in {where}")
    return ast.unparse(ast.fix_missing_locations(tree))


def _function(tree: ast.Module, mutant: Mutant) -> ast.AST:
    scope: ast.AST = tree
    for name in filter(None, mutant.function.split(".")):
        inside = [n for n in ast.walk(scope) if getattr(n, "name", None) == name]
        if not inside:
            raise ValueError(f"{mutant.name}: {mutant.file} has no {mutant.function}")
        scope = inside[0]
    return scope


def _is_expression(block: Block) -> bool:
    return len(block) == 1 and isinstance(block[0], ast.Expr)


def _syntax(node: ast.AST) -> str:
    return ast.dump(node).replace("ctx=Store()", "ctx=Load()")


def _replace_expression(scope: ast.AST, old: ast.expr, new: ast.expr) -> int:
    """How often the expression occurs; each is replaced."""
    looked_for, places = _syntax(old), []
    for parent in ast.walk(scope):
        for field, value in ast.iter_fields(parent):
            for at, child in enumerate(value if isinstance(value, list) else [value]):
                if type(child) is type(old) and _syntax(child) == looked_for:
                    places.append((parent, field, at))
    for parent, field, at in places:
        value = getattr(parent, field)
        if isinstance(value, list):
            value[at] = new
        else:
            setattr(parent, field, new)
    return len(places)


def _replace_statements(scope: ast.AST, old: Block, new: Block) -> int:
    """How often the statements occur, one after another; each time they are replaced."""
    places = [
        (block, at)
        for block in _blocks(scope)
        for at in range(len(block) - len(old) + 1)
        if all(_matches(node, pattern) for node, pattern in zip(block[at:], old))
    ]
    for block, at in places:
        first = block[at]
        block[at : at + len(old)] = [_filled(statement, first) for statement in new]
    return len(places)


def _blocks(scope: ast.AST) -> Iterator[Block]:
    for node in ast.walk(scope):
        for field in BODIES:
            block = getattr(node, field, None)
            if isinstance(block, list):
                yield block


def _matches(node: ast.stmt, pattern: ast.stmt) -> bool:
    if type(node) is not type(pattern):
        return False
    if _is_open(pattern):
        fields = {name: value for name, value in ast.iter_fields(node) if name not in BODIES}
        node = type(node)(
            **fields, **{name: getattr(pattern, name) for name in pattern._fields if name in BODIES}
        )
    return _syntax(node) == _syntax(pattern)


def _is_open(pattern: ast.stmt) -> bool:
    """Whether the body is `...`, which stands for any."""
    body = getattr(pattern, "body", None)
    return isinstance(body, list) and [ast.unparse(line) for line in body] == ["..."]


def _filled(statement: ast.stmt, replaced: ast.stmt) -> ast.stmt:
    """The statement with the bodies of the one that it replaces, where its own is `...`."""
    if _is_open(statement):
        for name in BODIES:
            setattr(statement, name, getattr(replaced, name, []))
    return statement
