"""The marks in a module, and the module without one of its checks.

A mark trails the head of a statement, or stands alone above it where there is no room:

    if nonce in seen:  # CHECK: nonce-fresh
        raise Replay

What goes is that one statement, the outermost there: all of an ``if`` without an ``else``, a call
for its refusal alone, a ``raise`` or a ``return``.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

_MARK = re.compile(r"#\s*CHECK\b(.*)")
_NAME = re.compile(r": ([a-z0-9]+(?:-[a-z0-9]+)*)")
CHECKS = "__checks__"
"""A builtin, where modules are rewritten."""


class BadMark(Exception):
    """A mark has no name, one that is taken, or no statement that could go."""


@dataclass(frozen=True, slots=True)
class Mark:
    """One check: its name, and where it stands.

    Args:
        name: of the check.
        path: of its module, below the root.
        line: of its statement.
        lone: it is a ``raise`` that no ``if`` leads to, in an ``except``, say. What follows has
            nothing to go on with, so that without it nearly any test that gets there crashes.
    """

    name: str
    path: Path
    line: int
    lone: bool = False

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.name}"


def find(root: Path, packages: Iterable[str]) -> list[Mark]:
    """Return all marks in packages below a root, by path and line.

    Raises:
        BadMark: one is malformed, stands at no removable statement, or has a name that is taken.
    """
    marks: dict[str, Mark] = {}
    for package in packages:
        for path in sorted((root / package).rglob("*.py")):
            for mark in marks_of(path.read_text(), path.relative_to(root)):
                if mark.name in marks:
                    raise BadMark(f"{mark} is the name of {marks[mark.name]}, too")
                marks[mark.name] = mark
    return list(marks.values())


def marks_of(source: str, path: Path) -> list[Mark]:
    """Return a module's marks, each held against the statement that it stands at.

    Raises:
        BadMark: one is malformed, or stands at no removable statement.
    """
    named = _named_lines(source, path)
    if not named:
        return []
    tree = ast.parse(source)
    heads = _heads(tree)
    guarded = {inner for node in ast.walk(tree) if isinstance(node, ast.If) for inner in node.body}
    marks = []
    for line, name in named:
        check = heads.get(line)
        mark = Mark(name, path, line, isinstance(check, ast.Raise) and check not in guarded)
        if not _is_removable(check):
            raise BadMark(f"{mark} stands at no statement that could be left out")
        marks.append(mark)
    return marks


def _named_lines(source: str, path: Path) -> list[tuple[int, str]]:
    """Return the line and the name of what is marked."""
    found = []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and (mark := _MARK.match(token.string)):
            name = _NAME.fullmatch(mark[1])
            line = token.start[0]
            if name is None:
                raise BadMark(f"{path}:{line}: {token.string!r} is not '# CHECK: a-name'")
            alone = not token.line[: token.start[1]].strip()
            found.append((line + alone, name[1]))
    return found


def _heads(tree: ast.Module) -> dict[int, ast.stmt]:
    """Return the outermost statement of each line: all of it, or what stands before its body."""
    found: dict[int, ast.stmt] = {}
    for node in _statements(tree):
        inner = min((n.lineno for n in _statements(node) if n is not node), default=None)
        end = max(inner or (node.end_lineno or 0) + 1, node.lineno + 1)
        for line in range(node.lineno, end):
            found.setdefault(line, node)
    return found


def _statements(node: ast.AST) -> list[ast.stmt]:
    return [inner for inner in ast.walk(node) if isinstance(inner, ast.stmt)]  # breadth first


def _is_removable(statement: ast.stmt | None) -> bool:
    match statement:
        case ast.If():
            return not statement.orelse
        case ast.Expr():
            return not isinstance(statement.value, ast.Constant)
        case _:
            return isinstance(statement, (ast.Raise, ast.Assert, ast.Return))


def rewritten(source: str, path: Path) -> ast.Module:
    """Return a module in which ``CHECKS`` decides of each check whether it stands.

    One that does, and does not run to its end, tells ``CHECKS`` that it refused something.
    """
    return _Rewriting(source, path).module()


_CHECK = """
if {checks}.stands({name!r}):
    passed_{label} = False
    try:
        passed_{label} = True
    finally:
        if not passed_{label}:
            {checks}.refused({name!r})
"""


def _watched(check: ast.stmt, name: str) -> ast.stmt:
    label = name.replace("-", "_")
    (watched,) = ast.parse(_CHECK.format(checks=CHECKS, name=name, label=label)).body
    match watched:
        case ast.If(body=[_, ast.Try() as attempt]):
            attempt.body.insert(0, check)
    return watched


class _Rewriting(ast.NodeTransformer):
    def __init__(self, source: str, path: Path) -> None:
        self._tree = ast.parse(source)
        heads = _heads(self._tree)
        self._names = {heads[mark.line]: mark.name for mark in marks_of(source, path)}

    def module(self) -> ast.Module:
        return ast.fix_missing_locations(self.visit(self._tree))

    def generic_visit(self, node: ast.AST) -> ast.AST:
        node = super().generic_visit(node)
        if isinstance(node, ast.stmt) and node in self._names:
            return _watched(node, self._names[node])
        return node
