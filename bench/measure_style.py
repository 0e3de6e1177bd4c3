"""How dense code is: lines, tokens, comments, functions, and which packages need each other.

    python bench/measure_style.py [PATHS...] --json FILE

A folder has a row for all its files, one for each folder in it and one for the files directly in it; a file has a row
of its own. What is counted:

- `files`: Python files with at least one code line. `code_lines`: lines with at least one token that is neither a
  comment nor of a string that stands alone (docstrings of modules, classes, functions and attributes).
- `tokens_per_line`: names, keywords, numbers and operators per code line. A string is none: its length is prose.
- `comments_percent`: lines with a comment, behind code or alone, per 100 code lines.
- `functions`: every `def` and `async def`, nested ones too. Their lengths (`median`, `p90`, `max`) are lines from the
  first decorator to the last line, docstring included.
- `package_edges`: pairs (A, B) where something in A imports something in B, anywhere in its files; A and B are folders
  and modules directly in the folder measured. `mutual`: pairs with edges both ways; `mutual_at_import`: those left
  without imports in functions and under TYPE_CHECKING.
"""

from __future__ import annotations

import argparse
import ast
import io
import statistics
import tokenize
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common import ROOT, Row, console, print_table, provenance, write_json

COUNTED = {tokenize.NAME, tokenize.NUMBER, tokenize.OP}
LAYOUT = {tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
# Python 3.12 and later take f-strings apart; they are strings all the same.
FSTRING = {"FSTRING_START": 1, "FSTRING_END": -1}
Function = ast.FunctionDef | ast.AsyncFunctionDef
Edge = tuple[str, str]


# ---- lines, tokens, functions ----


@dataclass
class Counts:
    """Of some source; `+=` adds more."""

    files: int = 0
    code_lines: int = 0
    tokens: int = 0
    comment_lines: int = 0
    lengths: list[int] = field(default_factory=list)

    def __iadd__(self, other: Counts) -> Counts:
        self.files += other.files
        self.code_lines += other.code_lines
        self.tokens += other.tokens
        self.comment_lines += other.comment_lines
        self.lengths += other.lengths
        return self

    def row(self, name: str) -> Row:
        """Of the table and the JSON."""
        lines, lengths = max(self.code_lines, 1), sorted(self.lengths) or [0]
        return {
            "name": name,
            "files": self.files,
            "code_lines": self.code_lines,
            "tokens_per_line": round(self.tokens / lines, 2),
            "comments_percent": round(100 * self.comment_lines / lines, 2),
            "functions": len(self.lengths),
            "median": statistics.median(lengths),
            "p90": lengths[int(0.9 * len(lengths))],
            "max": lengths[-1],
        }


def count(source: str) -> Counts:
    """Counts of one file."""
    tree = ast.parse(source)
    docs, code, comments = doc_lines(tree), set[int](), set[int]()
    tokens = depth = 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        depth += FSTRING.get(tokenize.tok_name[token.type], 0)
        if token.type == tokenize.COMMENT:
            comments.add(token.start[0])
        elif token.type not in LAYOUT and not (token.type == tokenize.STRING and token.start[0] in docs):
            code.update(range(token.start[0], token.end[0] + 1))
            tokens += token.type in COUNTED and depth == 0
    functions = [node for node in ast.walk(tree) if isinstance(node, Function)]
    return Counts(int(bool(code)), len(code), tokens, len(comments), [length(node) for node in functions])


def doc_lines(tree: ast.Module) -> set[int]:
    """Lines of strings that stand alone."""
    alone = [node for node in ast.walk(tree) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)]
    return {line for node in alone if isinstance(node.value.value, str) for line in lines_of(node)}


def lines_of(node: ast.stmt) -> range:
    """From its first line to its last."""
    return range(node.lineno, (node.end_lineno or node.lineno) + 1)


def length(function: Function) -> int:
    """Lines of a function with its decorators."""
    return lines_of(function).stop - min(node.lineno for node in (function, *function.decorator_list))


# ---- packages ----


def imports(node: ast.AST, at_import: bool = True) -> Iterator[tuple[str, bool]]:
    """(absolute name imported, whether importing the module imports it) below a node; `from a import b` is `a.b`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from ((alias.name, at_import) for alias in child.names)
        elif isinstance(child, ast.ImportFrom) and child.module and not child.level:
            yield from ((f"{child.module}.{alias.name}", at_import) for alias in child.names)
        for_types = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
        yield from imports(child, at_import and not for_types and not isinstance(child, Function))


def edges(package: Path) -> tuple[set[Edge], set[Edge]]:
    """All edges between what lies directly in `package`, and those at import."""
    every, at_import = set[Edge](), set[Edge]()
    inside = {path.stem for path in package.iterdir()}
    for path in sorted(package.rglob("*.py")):
        source = path.relative_to(package).with_suffix("").parts[0]
        for name, early in imports(ast.parse(path.read_text())):
            first, *rest = name.split(".")
            if first == package.name and rest[0] in inside - {source}:
                every.add((source, rest[0]))
                at_import |= {(source, rest[0])} if early else set()
    return every, at_import


def mutual(found: set[Edge]) -> list[Edge]:
    """Pairs with an edge each way."""
    return sorted((a, b) for a, b in found if a < b and (b, a) in found)


# ---- the command ----


def rows_of(path: Path) -> list[Row]:
    """The rows of one path: all of it first."""
    if path.is_file():
        return [count(path.read_text()).row(shown(path))]
    total, parts = Counts(), defaultdict[str, Counts](Counts)
    for file in sorted(path.rglob("*.py")):
        inner = file.relative_to(path).parts
        counts = count(file.read_text())
        parts[f"{inner[0]}/" if len(inner) > 1 else "(files)"] += counts
        total += counts
    return [total.row(f"{shown(path)}/"), *(parts[name].row(f"  {name}") for name in sorted(parts))]


def shown(path: Path) -> str:
    """As seen from the repository; elsewhere only the name."""
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.name


def packages_of(path: Path) -> dict[str, Any]:
    """Edges and mutual pairs of one folder."""
    every, at_import = edges(path)
    return {
        "package": shown(path),
        "package_edges": len(every),
        "mutual": [" <-> ".join(pair) for pair in mutual(every)],
        "mutual_at_import": [" <-> ".join(pair) for pair in mutual(at_import)],
    }


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("paths", nargs="*", type=Path, default=[ROOT / "longrl"], help="folders and files")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write what is printed")
    parser.add_argument("--quick", action="store_true", help="changes nothing: all of it takes seconds")
    arguments = parser.parse_args(argv)
    paths = [path.resolve() for path in arguments.paths]
    rows = [row for path in paths for row in rows_of(path)]
    packages = [packages_of(path) for path in paths if path.is_dir()]
    print_table(Path(__file__).stem, rows)
    for found in packages:
        console.print(f"{found['package']}: {found['package_edges']} edges between packages")
        for name in ("mutual", "mutual_at_import"):
            console.print(f"  {len(found[name])} {name}: {', '.join(found[name])}", soft_wrap=True, highlight=False)
    if arguments.json:
        origin = provenance("measure_style", arguments)
        command = " ".join([origin["command"], *map(shown, paths)])
        write_json(arguments.json, {**origin, "command": command, "rows": rows, "packages": packages})


if __name__ == "__main__":
    main()
