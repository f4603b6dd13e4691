"""Which source the fast ways of support/ were made for.

    python -m support.fingerprint    after a change of mnist_resnet9.py: writes its fingerprint here

The fingerprint is of what defines the computation, the sections from "Random numbers" to
"Training": of their syntax, without comments and docstrings. Where it is MADE_FOR, the fast ways
compute what the script says, as the tests have shown. Where it is not, they have to show it
themselves: support/proof.py.
"""

import ast
import hashlib
from pathlib import Path

from support import ROOT

MADE_FOR = "ec6c5b4a5e35b5c9"

FIRST, BEHIND = "# ── Random numbers ", "# ── Main "  # the headings of sections
DEFINITIONS = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def fingerprint_of(source):
    """The fingerprint of the script with this text. Without the two headings, that of all of it."""
    lines = source.splitlines()
    first = [i for i, line in enumerate(lines, 1) if line.startswith(FIRST)]
    behind = [i for i, line in enumerate(lines, 1) if line.startswith(BEHIND)]
    tree = ast.parse(source)
    if first and behind:
        between = range(first[0], behind[-1])
        tree.body = [node for node in tree.body if node.lineno in between]
    return hashlib.sha256(repr(outline(tree)).encode()).hexdigest()[:16]


def outline(node):
    """A part of a syntax tree as lists that are the same in every version of Python."""
    if isinstance(node, list):
        return [outline(part) for part in node]
    if not isinstance(node, ast.AST):
        return repr(node)
    parts = {name: value for name, value in ast.iter_fields(node) if value not in (None, [])}
    if isinstance(node, DEFINITIONS) and ast.get_docstring(node, clean=False) is not None:
        parts["body"] = node.body[1:]
    if isinstance(node, ast.Constant):
        parts.pop("kind", None)  # u"…"
    return [type(node).__name__, *([name, outline(parts[name])] for name in sorted(parts))]


def renew():
    """Writes the fingerprint of the script as it is now into this file."""
    found = fingerprint_of((ROOT / "mnist_resnet9.py").read_text(encoding="utf-8"))
    here = Path(__file__).resolve()
    text = here.read_text(encoding="utf-8")
    here.write_text(text.replace(f'\nMADE_FOR = "{MADE_FOR}"\n', f'\nMADE_FOR = "{found}"\n'))
    print(f"MADE_FOR is {found}" + (", as before." if found == MADE_FOR else "."))


if __name__ == "__main__":
    renew()
