"""The layout of DESIGN: which folder may import which, what is installed, and that the engine opens no file."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.resources
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ORDER = ("kernels", "engine", "weights", "analysis", "api")
"""Each folder may import those to its left."""
SOURCES = [path for folder in ORDER for path in sorted((ROOT / folder).rglob("*.py"))]
FILE_READERS = {"gguf", "glob", "h5py", "io", "mmap", "os", "pathlib", "pickle", "safetensors", "shutil", "tempfile"}
FILE_CALLS = {"open", "fdopen", "from_file", "fromfile", "load", "memmap", "read_bytes", "read_text", "save", "tofile"}


def imported_modules(source: str) -> set[str]:
    """What the source imports, at the top or inside a function: `a.b` for `import a.b` and for `from a import b`."""
    modules = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            modules |= {f"{node.module}.{alias.name}" for alias in node.names}
    return modules


def imported_folders(source: str) -> set[str]:
    """The folders that the source imports; what sits in `subcircuit` itself is `api`."""
    inside = [module.split(".") for module in imported_modules(source) if module.split(".")[0] == "subcircuit"]
    return {parts[1] if len(parts) > 1 and parts[1] in ORDER else "api" for parts in inside}


def wrong_imports(folder: str, source: str) -> set[str]:
    return imported_folders(source) - set(ORDER[: ORDER.index(folder) + 1])


def file_accesses(source: str) -> Iterator[str]:
    """Modules and calls by which the source could read or write a file."""
    yield from sorted(FILE_READERS & {module.split(".")[0] for module in imported_modules(source)})
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            called = node.func
            if ast.unparse(called) == "tl.load":  # Triton's, which reads a tensor
                continue
            name = (
                called.id if isinstance(called, ast.Name) else called.attr if isinstance(called, ast.Attribute) else ""
            )
            if name in FILE_CALLS:
                yield f"{name}() in line {node.lineno}"


def ids(paths: list[Path]) -> list[str]:
    return [str(path.relative_to(ROOT)) for path in paths]


@pytest.mark.parametrize("path", SOURCES, ids=ids(SOURCES))
def test_imports_point_one_way(path: Path) -> None:
    folder = path.relative_to(ROOT).parts[0]
    assert wrong_imports(folder, path.read_text(encoding="utf-8")) == set()


def test_an_import_against_the_direction_is_seen() -> None:
    assert wrong_imports("weights", "def f():\n    from subcircuit.analysis.tasks import task") == {"analysis"}
    assert wrong_imports("engine", "import subcircuit.weights.names") == {"weights"}
    assert wrong_imports("kernels", "from subcircuit import engine") == {"engine"}
    assert wrong_imports("analysis", "from subcircuit import load") == {"api"}
    assert wrong_imports("analysis", "import subcircuit") == {"api"}
    assert wrong_imports("analysis", "from subcircuit.engine.model import HookedTransformer") == set()


@pytest.mark.parametrize("path", SOURCES, ids=ids(SOURCES))
def test_folders_are_imported_by_their_installed_name(path: Path) -> None:
    tops = {module.split(".")[0] for module in imported_modules(path.read_text(encoding="utf-8"))}
    assert tops.isdisjoint(ORDER)


CALLS_COMPILERS = {ROOT / "kernels" / "native_build.py", ROOT / "kernels" / "aot.py"}
ENGINE = [p for p in SOURCES if p.relative_to(ROOT).parts[0] in ("kernels", "engine") and p not in CALLS_COMPILERS]


@pytest.mark.parametrize("path", ENGINE, ids=ids(ENGINE))
def test_engine_opens_no_file(path: Path) -> None:
    assert list(file_accesses(path.read_text(encoding="utf-8"))) == []


def test_an_opened_file_is_seen() -> None:
    assert list(file_accesses("import torch\ntorch.load(path)")) == ["load() in line 2"]
    assert list(file_accesses("def f():\n    from pathlib import Path")) == ["pathlib"]


def test_setup_lists_every_package() -> None:
    setup = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    folders = next(
        ast.literal_eval(node.value)
        for node in setup.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "FOLDERS"
    )
    found = {path.parent.relative_to(ROOT).as_posix() for path in SOURCES}
    assert sorted(folders.values()) == sorted(found)


@pytest.mark.parametrize("path", SOURCES, ids=ids(SOURCES))
def test_every_module_is_installed(path: Path) -> None:
    folder, *rest = path.relative_to(ROOT).parts
    installed = importlib.resources.files("subcircuit").joinpath(*rest if folder == "api" else (folder, *rest))
    if not installed.is_file():  # an editable install keeps each package in its own place
        package = ".".join(["subcircuit", *([] if folder == "api" else [folder]), *rest[:-1]])
        installed = importlib.resources.files(package).joinpath(path.name)
    assert installed.is_file(), f"setup.py does not install {path.relative_to(ROOT)}"


def test_type_marker_is_installed() -> None:
    assert importlib.resources.files("subcircuit").joinpath("py.typed").is_file()


def test_command_is_installed() -> None:
    scripts = importlib.metadata.distribution("subcircuit").entry_points.select(group="console_scripts")
    assert {script.name: script.value for script in scripts} == {"subcircuit": "subcircuit.cli:main"}
