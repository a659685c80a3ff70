"""Imports run one way: a room of the package knows those below it, and no file is in a circle."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import vtp_kernels

PACKAGE = Path(vtp_kernels.__file__).parent

# From the bottom up. What stands in none of them is free to import any.
ROOMS = (
    "ops",
    "contract",
    "models.modules",
    "models.towers",
    "models.keys",
    "models.attention",
    "models.families",
    "models.pictures",
    "models.reports",
    "models.checks",
    "models.passage",
    "models",
    "methods",
)


def module_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports_of(module: str, everywhere: bool) -> set[str]:
    """The modules of the package that one imports: when it is imported, or anywhere in it. Those
    for types are among them."""
    tree = ast.parse(FILES[module].read_text())
    package = module if FILES[module].name == "__init__.py" else module.rpartition(".")[0]
    found = set()
    for node in ast.walk(tree) if everywhere else outside_functions(tree):
        if not isinstance(node, ast.ImportFrom):
            continue
        target = node.module or ""
        if node.level:
            above = ["vtp_kernels", *package.split(".")] if package else ["vtp_kernels"]
            above = above[: len(above) - node.level + 1]
            target = ".".join([*above, *([target] if target else [])])
        if target.partition(".")[0] != "vtp_kernels":
            continue
        target = target.partition(".")[2]
        for name in node.names:
            inner = f"{target}.{name.name}".lstrip(".")
            found.add(inner if inner in FILES else target)
    return found - {module}


def outside_functions(node: ast.AST):
    yield node
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.FunctionDef):
            yield from outside_functions(child)


def room_of(module: str) -> int | None:
    """The number of the innermost room that a module stands in."""
    rooms = [room for room in ROOMS if f"{module}.".startswith(f"{room}.")]
    return ROOMS.index(max(rooms, key=len)) if rooms else None


def test_rooms_know_only_those_below():
    upward = [
        f"{module} imports {target}"
        for module in FILES
        for target in imports_of(module, everywhere=True)
        if room_of(module) is not None
        and room_of(target) is not None
        and room_of(target) > room_of(module)
    ]
    assert not upward


def test_no_file_is_in_a_circle():
    graph = {module: imports_of(module, everywhere=False) for module in FILES}
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle
