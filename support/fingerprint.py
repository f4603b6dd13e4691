"""Which source the fast ways of support/ were made for.

    python -m support.fingerprint    after a change of mnist_resnet9.py: writes its fingerprint here

The fingerprint is of what defines the computation, the sections from "Random numbers" to
"Training": of their syntax, without comments and docstrings. Where it is MADE_FOR, the fast ways
compute what the script says, as the tests have shown. Where it is not, they have to show it
themselves: support/proof.py.

A statement below these sections counts if it touches a name that they define: it may replace it.
"""

import ast
import hashlib
from pathlib import Path

from support import ROOT

MADE_FOR = "4e505caea1877ca6"

FIRST, BEHIND = "# ── Random numbers ", "# ── Main "  # the headings of sections
NO_MATTER = ("ctx", "kind", "type_comment")
DEFINITIONS = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def fingerprint_of(source):
    """The fingerprint of the script with this text. Without the two headings, that of all of it."""
    lines = source.splitlines()
    first = [i for i, line in enumerate(lines, 1) if line.startswith(FIRST)]
    behind = [i for i, line in enumerate(lines, 1) if line.startswith(BEHIND)]
    tree = ast.parse(source)
    if first and behind:
        inside = [node for node in tree.body if first[0] <= node.lineno < behind[-1]]
        below = [node for node in tree.body if node.lineno > behind[-1]]
        defined = {name for node in inside for name in defines(node)}
        tree.body = inside + [node for node in below if not defined.isdisjoint(touches(node))]
    words = []
    outline(tree, words)
    return hashlib.sha256(" ".join(words).encode()).hexdigest()[:16]


def defines(node):
    """The names that a statement of the module gives a meaning."""
    if isinstance(node, DEFINITIONS):
        return {node.name}
    stored = (ast.Store, ast.Del)
    return {
        name.id
        for name in ast.walk(node)
        if isinstance(name, ast.Name) and isinstance(name.ctx, stored)
    }


def touches(node):
    """What a statement of the module could replace: the names in it, strings too, for setattr().

    A function computes only when it is called: its own name, its decorators and what it declares
    global."""
    parts, found = list(ast.walk(node)), set()
    if isinstance(node, DEFINITIONS):
        found.add(node.name)
        parts = [part for part in parts if isinstance(part, ast.Global)]
        parts += [part for one in node.decorator_list for part in ast.walk(one)]
    for part in parts:
        for _, value in ast.iter_fields(part):
            found.update(value if isinstance(value, list) else [value])
    return found


def outline(node, words):
    """Adds the words of a syntax tree: the same in every version of Python."""
    if isinstance(node, ast.AST):
        words += ["(", type(node).__name__]
        for name in node._fields:
            value = getattr(node, name, None)
            if value is None or value == [] or name in NO_MATTER:
                continue
            if name == "body" and isinstance(node, DEFINITIONS) and ast.get_docstring(node, False):
                value = value[1:]
            words.append(name)
            outline(value, words)
        words.append(")")
    elif isinstance(node, list):
        for part in node:
            outline(part, words)
    else:
        words.append(repr(node))


def renew():
    """Writes the fingerprint of the script as it is now into this file."""
    found = fingerprint_of((ROOT / "mnist_resnet9.py").read_text(encoding="utf-8"))
    here = Path(__file__).resolve()
    text = here.read_text(encoding="utf-8")
    here.write_text(text.replace(f'\nMADE_FOR = "{MADE_FOR}"\n', f'\nMADE_FOR = "{found}"\n'))
    print(f"MADE_FOR is {found}" + (", as before." if found == MADE_FOR else "."))


if __name__ == "__main__":
    renew()
