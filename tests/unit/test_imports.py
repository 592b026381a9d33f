"""Imports point down, heavy modules load late, and each layer keeps to its own trade (design, section 1)."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import hlcli

ROOT = Path(hlcli.__file__).parent
# From the bottom up; a module may import what stands on its own line or above it.
FLOORS = (
    ("hlcli",),
    ("hlcli.exitcodes", "hlcli.sqlfiles", "hlcli.output"),
    ("hlcli.logs",),
    ("hlcli.settings",),
    ("hlcli.embedded",),
    ("hlcli.db",),
    ("hlcli.migrations",),
    ("hlcli.loader", "hlcli.reader"),
    ("hlcli.ledger", "hlcli.budget"),
    ("hlcli.http", "hlcli.s3"),
    ("hlcli.features",),
    ("hlcli.sources",),
    ("hlcli.jobs",),
    ("hlcli.sim", "hlcli.serve"),
    ("hlcli.cli",),
    ("hlcli.__main__",),
)
HEAVY = {
    "polars",
    "pyarrow",
    "boto3",
    "botocore",
    "msgspec",
    "requests",
    "fastapi",
    "pydantic",
    "uvicorn",
    "psycopg_pool",
    "pgpq",
    "tqdm",
    "rich",
}
# Itself imported only inside functions: whoever checks a frame has loaded polars already.
HEAVY_FILES = {
    "hlcli.loader.checks",
    *(f"hlcli.serve.{name}" for name in ("app", "models", "pool", "server")),
}
SQL = re.compile(
    r"\b(select|insert\s+into|update|delete\s+from|create|alter|drop)\b.*\b(from|values|set|table|into)\b",
    re.IGNORECASE | re.DOTALL,
)


def _modules():
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT.parent).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), ast.parse(path.read_text("utf-8"))


TREES = dict(_modules())


def imports(tree):
    """(module, whether at import time) of every import but those for the type checker."""

    def walk(node, top):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            if isinstance(child, ast.Import):
                yield from ((alias.name, top) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, "relative imports hide where they point"
                for alias in child.names:
                    whole = f"{child.module}.{alias.name}"
                    yield (whole if whole in TREES else child.module), top
            inner = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from walk(child, top and not inner)

    return list(walk(tree, top=True))


def floor(module):
    for number, names in reversed(list(enumerate(FLOORS))):
        if any(module == name or (name != "hlcli" and module.startswith(f"{name}.")) for name in names):
            return number
    raise AssertionError(f"{module} has no floor: add it to FLOORS")


def texts(tree):
    """Every string that is not a docstring."""
    spoken = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    return [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in spoken
    ]


def of(layer):
    found = [name for name in TREES if name == f"hlcli.{layer}" or name.startswith(f"hlcli.{layer}.")]
    assert found
    return found


@pytest.mark.parametrize("module", TREES)
def test_imports_point_down(module):
    upward = [
        name
        for name, _ in imports(TREES[module])
        if name.split(".")[0] == "hlcli" and floor(name) > floor(module)
    ]
    assert upward == []


@pytest.mark.parametrize("module", TREES)
def test_heavy_modules_are_imported_where_they_are_used(module):
    early = [name for name, top in imports(TREES[module]) if top and name.split(".")[0] in HEAVY]
    assert module in HEAVY_FILES or early == []


@pytest.mark.parametrize("module", ["hlcli", "hlcli.__main__", *of("cli"), "hlcli.exitcodes", "hlcli.logs"])
def test_the_way_to_help_loads_no_driver(module):
    assert [name for name, top in imports(TREES[module]) if top and name.split(".")[0] == "psycopg"] == []


@pytest.mark.parametrize("module", TREES)
def test_only_files_that_load_late_import_the_heavy_ones_early(module):
    """What may import polars at once must itself be imported late, or by something that is."""
    early = {name for name, top in imports(TREES[module]) if top and name in HEAVY_FILES}
    assert early == set() or module in LATE


def _late():
    """Modules that no command's start reaches: their importers import them inside functions."""
    reached, todo = set(), ["hlcli.__main__", *of("cli")]
    while todo:
        module = todo.pop()
        if module in reached:
            continue
        reached.add(module)
        # A package's __init__ runs before any of its modules.
        parents = {module.rpartition(".")[0]} & set(TREES)
        todo += [name for name, top in imports(TREES[module]) if top and name in TREES] + sorted(parents)
    return set(TREES) - reached


LATE = _late()


def test_the_check_of_lateness_sees_something():
    assert HEAVY_FILES <= LATE
    assert "hlcli.settings" not in LATE or "hlcli.exitcodes" not in LATE


@pytest.mark.parametrize("module", of("jobs"))
def test_jobs_know_neither_the_simulator_nor_the_command_line(module):
    strange = {"typer", "rich", "hlcli.sim", "hlcli.cli"}
    assert [
        name
        for name, _ in imports(TREES[module])
        if any(name == s or name.startswith(f"{s}.") for s in strange)
    ] == []


@pytest.mark.parametrize("module", of("sources"))
def test_sources_hold_no_sql_and_print_nothing(module):
    tree = TREES[module]
    assert [text for text in texts(tree) if SQL.search(text)] == []
    assert [name for name, _ in imports(tree) if name.split(".")[0] in {"psycopg", "typer"}] == []
    assert not any(isinstance(node, ast.Name) and node.id == "print" for node in ast.walk(tree))


@pytest.mark.parametrize("module", of("features"))
def test_features_do_no_io(module):
    assert {name.split(".")[0] for name, _ in imports(TREES[module])} & {
        "psycopg",
        "requests",
        "os",
        "pathlib",
        "socket",
    } == set()
    names = {node.id for node in ast.walk(TREES[module]) if isinstance(node, ast.Name)}
    assert not names & {"open", "print", "input"}


@pytest.mark.parametrize("module", of("cli"))
def test_the_command_line_speaks_to_no_server_itself(module):
    assert [
        name for name, _ in imports(TREES[module]) if name.split(".")[0] in {"psycopg", "requests", "urllib3"}
    ] == []


@pytest.mark.parametrize("module", of("cli"))
def test_the_command_line_holds_no_sql(module):
    assert [text for text in texts(TREES[module]) if SQL.search(text)] == []


@pytest.mark.parametrize(
    "module", [name for name in TREES if not name.startswith(("hlcli.sim", "hlcli.cli"))]
)
def test_only_the_command_line_and_the_simulator_know_the_simulator(module):
    assert [name for name, _ in imports(TREES[module]) if name.startswith("hlcli.sim")] == []


def test_the_sql_detector_detects():
    assert (
        SQL.search("select a\nfrom b")
        and SQL.search("DELETE FROM x") is not None
        or SQL.search("insert into a values (1)")
    )
    assert not SQL.search("Select a vault to follow.")
