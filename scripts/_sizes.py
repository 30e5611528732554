"""Fails when a source file exceeds 500 lines, a Python function 60, or a class 20 methods."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 60
MAX_METHODS = 20
SUFFIXES = {".py", ".h", ".cpp", ".cu", ".cuh"}


def main() -> int:
    """Prints each excess and returns the number of them, at most 1."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    excesses = []
    for name in listed.stdout.splitlines():
        path = Path(name)
        if path.is_file() and (path.suffix in SUFFIXES or path.parts[0] in {"scripts", ".ci"}):
            excesses += excesses_of(path)
    print("\n".join(excesses) if excesses else "every file, function and class is within its limit")
    return 1 if excesses else 0


def excesses_of(path: Path) -> list[str]:
    """What is too long in one file."""
    text = path.read_text()
    num_lines = text.count("\n")
    found = (
        [f"{path}: {num_lines} lines, the limit is {MAX_FILE_LINES}"] if num_lines > MAX_FILE_LINES else []
    )
    if path.suffix != ".py":
        return found
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > MAX_FUNCTION_LINES:
                found.append(
                    f"{path}:{node.lineno}: {node.name} has {length} lines, the limit is {MAX_FUNCTION_LINES}"
                )
        if isinstance(node, ast.ClassDef) and path.parts[0] != "tests":
            methods = sum(isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef) for item in node.body)
            if methods > MAX_METHODS:
                found.append(
                    f"{path}:{node.lineno}: {node.name} has {methods} methods, the limit is {MAX_METHODS}"
                )
    return found


if __name__ == "__main__":
    sys.exit(main())
