"""The shape of the package: imports point downwards only, heavy ones wait, nothing names the machine it grew on."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import fewbits

PACKAGE = Path(fewbits.__file__).parent
ROOT = Path(__file__).parent.parent
FRONT_DOOR = "fewbits itself"  # ``import fewbits`` names what is below it
ORDER = (  # the folders of the design, top first; a folder imports from itself and from those below it
    *("cli", "recipes", FRONT_DOOR, "report", "tasks", "train", "deploy", "losses"),
    *("allocate", "cost", "layers", "quantizers", "plan", "errors"),
)
LEVEL = {name: level for level, name in enumerate(ORDER)}
HEAVY = {
    "fairlearn",
    "torchvision",
    "timm",
    "transformers",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "plotly",
    "sklearn",
    "matplotlib",
}
FILES = sorted(PACKAGE.rglob("*.py"))


def imported(tree: ast.AST, package: str) -> Iterator[tuple[int, str]]:
    """Yield (line, full name) of everything imported; ``package`` is what relative imports start from."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*parents, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def upwards(source: str, path: str) -> list[str]:
    """Return what the file at ``path`` (inside the package) imports but must not, one line each."""
    folder = Path(path).parts[0].removesuffix(".py")
    if folder not in LEVEL:
        return [f"{path}: folder {folder!r} has no place in the design"]
    package = ".".join(("fewbits", *Path(path).parts[:-1]))
    found = []
    for line, name in imported(ast.parse(source), package):
        parts = name.split(".")
        if parts[0] != "fewbits" or name == "fewbits.__version__":
            continue
        target = parts[1] if len(parts) > 1 and parts[1] in LEVEL else FRONT_DOOR
        if LEVEL[target] <= LEVEL[folder] and target != folder:
            found.append(f"{path}:{line} imports {name}")
    return found


def module_level(tree: ast.Module) -> Iterator[ast.stmt]:
    """Yield the statements that run when the module is imported, but not those under TYPE_CHECKING."""
    pending: list[ast.stmt] = list(tree.body)
    while pending:
        node = pending.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            pending += node.orelse
            continue
        yield node
        pending += [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)]


@pytest.mark.parametrize(
    ("path", "source", "allowed"),
    [
        ("layers/swap.py", "from fewbits.quantizers import Codes", True),
        ("layers/swap.py", "from fewbits.layers.base import run", True),
        ("layers/swap.py", "import fewbits.deploy.pack", False),
        ("layers/swap.py", "def f():\n    from fewbits import train", False),
        ("layers/swap.py", "from ..deploy import pack", False),
        ("layers/swap.py", "from . import base", True),
        ("layers/swap.py", "from fewbits import quantize", False),
        ("plan.py", "from fewbits.errors import PlanError", True),
        ("errors.py", "from fewbits.plan import Plan", False),
        ("unknown/x.py", "", False),
        ("deploy/pack.py", "from fewbits import __version__", True),
        ("deploy/pack.py", "import fewbits", False),
        ("recipes/run.py", "import fewbits", True),
        ("recipes/run.py", "import fewbits.cli", False),
        ("cli.py", "from fewbits.recipes.run import run", True),
    ],
)
def test_the_rule_itself(path: str, source: str, allowed: bool) -> None:
    assert (upwards(source, path) == []) is allowed


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_downwards_only(path: Path) -> None:
    relative = path.relative_to(PACKAGE).as_posix()
    if relative in ("__init__.py", "__main__.py"):  # the front door names everything, lazily (see the test below)
        return
    assert upwards(path.read_text(encoding="utf-8"), relative) == []


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_heavy_packages_are_imported_inside_functions(path: Path) -> None:
    statements = [
        node
        for node in module_level(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, (ast.Import, ast.ImportFrom))
    ]
    names = {name.split(".")[0] for node in statements for _, name in imported(node, "fewbits")}
    assert not names & HEAVY


def test_import_fewbits_is_light() -> None:
    code = (
        "import sys, fewbits; heavy = {'torch', 'numpy', 'rich', 'typer'} & set(sys.modules);"
        "assert not heavy, heavy; assert fewbits.TensorPlan(4).bits == 4"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_allocate_can_be_called_also_after_the_folder_of_that_name_was_imported() -> None:
    code = "import fewbits, fewbits.allocate as _; fewbits.Budget; assert callable(fewbits.allocate)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_every_public_name_is_there() -> None:
    for name in fewbits.__all__:
        assert callable(getattr(fewbits, name)), name
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        fewbits.quantise  # noqa: B018


def written_files() -> list[Path]:
    """Return the text files of the repository, without what tools generate."""
    tops = [ROOT / name for name in ("fewbits", "tests", "docs", "examples", "benchmarks", "hardware", ".ci")]
    inside = [p for top in tops for p in top.rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    above = [p for p in ROOT.iterdir() if p.is_file()]
    return [p for p in (*inside, *above) if p.stat().st_size < 2_000_000]


SOMEWHERE = "|".join(("work", "tmp", "root", "home"))
MACHINE_PATH = re.compile(rf"(?<![\w.}}>/-])/(?:{SOMEWHERE})(?:/|\b(?![\w-]))".encode())


def test_no_file_mentions_a_path_of_this_machine() -> None:
    files = written_files()
    assert len(files) > 40
    found = []
    for path in files:
        data = path.read_bytes()
        if b"\0" in data[:1024]:
            continue
        for number, line in enumerate(data.splitlines(), start=1):
            if MACHINE_PATH.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line[:100]!r}")
    assert not found


def test_what_counts_as_a_path_of_this_machine() -> None:
    for name in ("work", "tmp", "home", "root"):
        assert MACHINE_PATH.search(f'open("/{name}/x")'.encode()) and MACHINE_PATH.search(f"in /{name}".encode())
        assert not MACHINE_PATH.search(f".github/{name}flows and a/{name}/b and /{name}er".encode())
