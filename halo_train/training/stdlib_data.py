"""Real text that is on every machine: (function source -> docstring) pairs from Python's own standard library.

The pairs depend on the Python version alone, so the cache file carries it in its name.
"""

from __future__ import annotations

import ast
import json
import os
import platform
import sysconfig
import textwrap
import warnings
from collections.abc import Iterator
from pathlib import Path

from .errors import UserError

MAX_PROMPT_CHARS = 600
"""Longer functions are left out: most of their body says little about the docstring."""
MAX_COMPLETION_CHARS = 400
MIN_COMPLETION_CHARS = 24

_SKIPPED_DIRS = {
    "__pycache__",
    "_bundled",
    "_vendor",
    "_vendored",
    "dist-packages",
    "idle_test",
    "lib-dynload",
    "site-packages",
    "test",
    "tests",
    "turtledemo",
}
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def stdlib_pairs_file(cache_dir: Path) -> Path:
    """The JSONL file of prompt/completion rows for the running interpreter, built on first use.

    Args:
        cache_dir: folder of the file, made when missing. The file appears whole or not at all.

    Returns:
        ``cache_dir/python-<version>-docstrings.jsonl``

    Raises:
        UserError: the interpreter comes without the sources of its standard library.
    """
    path = cache_dir / f"python-{platform.python_version()}-docstrings.jsonl"
    if path.exists():
        return path
    root = Path(sysconfig.get_path("stdlib"))
    lines = [json.dumps(pair, ensure_ascii=False) + "\n" for pair in extract_pairs(root)]
    if not lines:
        raise UserError(
            f"data.train=stdlib: no documented function under {root}; this Python comes without the sources of its "
            "standard library; set data.train to a JSONL file"
        )
    cache_dir.mkdir(parents=True, exist_ok=True)
    temporary = cache_dir / f".{path.name}.{os.getpid()}.tmp"  # two runs may start at once
    temporary.write_text("".join(lines), encoding="utf-8")
    os.replace(temporary, path)
    return path


def extract_pairs(root: Path) -> list[dict[str, str]]:
    """Rows ``{"prompt": source without its docstring, "completion": docstring, "source": file:line}`` under ``root``.

    In path order; a row whose prompt or completion occurred before is left out, so that no docstring is in both the
    training and the validation split.
    """
    rows: list[dict[str, str]] = []
    seen: set[str] = set()
    for path in sorted(_python_files(root)):
        try:
            text = path.read_text(encoding="utf-8")
            tree = _parse(text)
        except (SyntaxError, ValueError):
            continue  # sources kept broken or in another encoding on purpose, such as lib2to3's
        lines = text.split("\n")  # not splitlines(): ast does not count a form feed as the end of a line
        for node in ast.walk(tree):
            if not isinstance(node, _FUNCTIONS):
                continue
            pair = _pair(node, lines)
            if pair is None or not seen.isdisjoint(pair):
                continue
            seen.update(pair)
            prompt, completion = pair
            where = f"{path.relative_to(root).as_posix()}:{node.lineno}"
            rows.append({"prompt": prompt, "completion": completion, "source": where})
    return rows


def _python_files(root: Path) -> Iterator[Path]:
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _SKIPPED_DIRS]
        yield from (Path(folder, name) for name in files if name.endswith(".py"))


def _pair(node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> tuple[str, str] | None:
    docstring = ast.get_docstring(node, clean=True)
    if docstring is None or len(node.body) < 2:
        return None
    completion = docstring.split("\n\n")[0].strip()
    doc, following = node.body[0], node.body[1]
    end = node.end_lineno or node.lineno
    if _first_line(following) == doc.end_lineno or doc.lineno == node.lineno:
        return None  # docstring and code share a line
    body = lines[node.lineno - 1 : doc.lineno - 1] + lines[doc.end_lineno : end]
    prompt = textwrap.dedent("\n".join(body)).rstrip() + "\n"
    if len(prompt) > MAX_PROMPT_CHARS or not MIN_COMPLETION_CHARS <= len(completion) <= MAX_COMPLETION_CHARS:
        return None
    try:
        _parse(prompt)
    except SyntaxError:
        return None  # a multi-line string that starts left of the function's body
    return prompt, completion


def _parse(source: str) -> ast.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in old sources
        return ast.parse(source)


def _first_line(statement: ast.stmt) -> int:
    decorators = getattr(statement, "decorator_list", [])
    return min([statement.lineno, *(decorator.lineno for decorator in decorators)])
