"""One way down, no way back: fails on an include or an import that points up.

The tables below are the architecture. A part may use what is named beside it and whatever those
may use in turn. A file that is in no table fails too: a new part is given its place first.
"""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# A part is `name.h` and `name.cc` together; one in a folder is "folder/name".
CPP_ALLOWED: dict[str, set[str]] = {
    "error": set(),
    "dlpack_abi": set(),
    "dtype": {"error", "dlpack_abi"},
    "strided": {"dtype"},
    "utf8": set(),
    "unique": set(),
    "format": {"strided", "dtype", "checksum", "utf8", "unique"},
    "checksum": {"error"},
    "file": {"error"},
    "workers": {"error"},
    "plan": {"format", "strided", "dtype"},
    "layout": {"plan", "checksum"},
    "fsd_layout": {"layout", "format"},
    "zip_layout": {"layout"},
    "safetensors_layout": {"layout"},
    "writer": {"layout", "plan", "format", "file", "checksum", "workers", "cuda/download"},
    "reader": {"safetensors", "torch_zip", "torch_pickle", "checksum", "workers"},
    "cuda/driver": {"error"},
    "cuda/ring": {"cuda/driver", "file"},
    "cuda/direct_storage": {"cuda/driver", "file"},
    "cuda/upload": {"cuda/ring", "cuda/direct_storage", "checksum", "workers"},
    "cuda/download": {"cuda/ring"},
    "pyobject": set(),
    "json_text": set(),
    "json": {"pyobject", "json_text", "utf8"},
    "zip": {"format", "file", "unique", "utf8"},
    "torch_zip": {"zip", "format", "file", "utf8"},
    "safetensors": {"format", "file", "json_text", "utf8", "unique"},
    "nesting": set(),
    "json_writer": set(),
    "pickle_graph": set(),
    "pickle_calls": {"pickle_graph", "format", "strided", "dtype"},
    "pickle_machine": {"pickle_calls", "utf8"},
    "torch_pickle": {"pickle_machine", "json_writer"},
    "tensor": {"format", "file", "dtype", "pyobject"},
    "bindings": {
        *("fsd_layout", "zip_layout", "safetensors_layout", "writer"),
        *("reader", "json", "nesting", "tensor", "torch_pickle", "cuda/upload"),
    },
}
# The only parts that may include pybind11.
CPP_PYBIND11 = {"bindings"}

# "formats" stands for the package and everything in it; "__init__" is the public face.
PYTHON_ALLOWED: dict[str, set[str]] = {
    "_core": set(),
    "errors": set(),
    "files": {"errors", "_core"},
    "gpu": {"errors", "_core"},
    "tensors": {"gpu", "_core"},
    "progress": set(),
    "upload": {"tensors", "progress", "_core"},
    "storages": {"upload", "_core"},
    "archive": {"storages", "_core"},
    "formats": {"archive", "files", "_core"},
    "tree": {"formats"},
    "placement": {"formats", "_core"},
    "names": {"errors"},
    "deferred": {"upload", "_core"},
    "into": {"deferred"},
    "pickled": {"formats", "names", "placement", "_core"},
    "to_safetensors": {"tree", "_core"},
    "saving": {"files", "to_safetensors", "placement", "pickled", "_core"},
    "through_torch": {"pickled", "_core"},
    "restore": {"tree", "placement", "pickled", "names", "_core"},
    "shards": {"saving", "_core"},
    "api": {"saving", "restore", "through_torch", "into", "_core"},
    "layouts": set(),
    "pieces": {"_core"},
    "transform": {"layouts", "tree"},
    "cast": {"pieces", "pickled", "tree", "_core"},
    "compare": {"pieces", "restore", "saving", "_core"},
    "content": {"api", "transform", "pieces", "_core"},
    "convert": {"content", "cast", "compare", "shards", "_core"},
    "__init__": {"convert"},
    "zoo": {"convert", "_core"},
    "bench": {"convert"},
    "summary": {"api"},
    "integrity": {"summary"},
    "diff": {"summary", "names"},
    "cli": {"zoo", "bench", "integrity", "diff", "__init__"},
    "__main__": {"cli"},
    "integrations": {"__init__"},
}
# Used only by those whose own line names it: the others go through them.
PYTHON_NOT_INHERITED = {"_core"}
# Uses only what its own line names, as any other user of the package would.
PYTHON_OUTSIDERS = {"integrations"}

INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*(["<])([^">]+)[">]', re.MULTILINE)


def below(allowed: dict[str, set[str]]) -> dict[str, set[str]]:
    """Everything each part may use, directly or through others. Raises ValueError on a cycle."""
    closed: dict[str, set[str]] = {}

    def visit(part: str, above: tuple[str, ...]) -> set[str]:
        if part in above:
            raise ValueError(f"the table has a cycle: {' <- '.join((*above, part))}")
        if part not in closed:
            direct = allowed[part]
            closed[part] = direct.union(*(visit(dep, (*above, part)) for dep in direct))
        return closed[part]

    for part in allowed:
        visit(part, ())
    return closed


def cpp_violations(csrc: Path) -> list[str]:
    """What is wrong with the includes below `csrc`, one line for each."""
    reach = below(CPP_ALLOWED)
    found = []
    for path in sorted([*csrc.rglob("*.h"), *csrc.rglob("*.cc")]):
        name = path.relative_to(csrc)
        part = name.with_suffix("").as_posix()
        if part not in reach:
            found.append(f"{name} has no place in CPP_ALLOWED")
            continue
        for quote, target in INCLUDE.findall(path.read_text(encoding="utf-8")):
            if target.startswith("pybind11") and part not in CPP_PYBIND11:
                found.append(f"{name} includes {target}")
            if quote == "<":
                continue
            base = path.parent if (path.parent / target).is_file() else csrc
            source = (base / target).resolve()
            if not source.is_file() or not source.is_relative_to(csrc.resolve()):
                found.append(f'{name} includes "{target}", which is not in {csrc.name}/')
                continue
            dep = source.relative_to(csrc.resolve()).with_suffix("").as_posix()
            if dep not in {part, *reach[part]}:
                found.append(f'{name} includes "{target}", which is not below it')
    return found


def imported_modules(path: Path, package: Path) -> list[tuple[int, str]]:
    """(line, dotted name inside the package) of each import of the package by the file."""
    # The folders between the package and the file: what a relative import starts from.
    here = path.relative_to(package).parent.parts
    modules = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            origin = node.module.split(".") if node.module else []
            if node.level:
                origin = [package.name, *here[: len(here) + 1 - node.level], *origin]
            # `from fastsd import api` may name a module or a public name; python_violations looks.
            names = [[*origin, alias.name] for alias in node.names]
        else:
            continue
        modules += [(node.lineno, ".".join(n[1:])) for n in names if n[0] == package.name]
    return modules


def python_violations(package: Path) -> list[str]:
    """What is wrong with the imports below `package`, one line for each."""
    reach = {part: deps - PYTHON_NOT_INHERITED for part, deps in below(PYTHON_ALLOWED).items()}
    reach |= {part: set() for part in PYTHON_OUTSIDERS}
    found = []
    for path in sorted([*package.rglob("*.py"), *package.rglob("*.pyi")]):
        name = path.relative_to(package)
        part = name.with_suffix("").parts[0]
        if part not in reach:
            found.append(f"{name} has no place in PYTHON_ALLOWED")
            continue
        for line, module in imported_modules(path, package):
            dep = module.partition(".")[0]
            # What is neither a part nor a file is a public name: the face is what is used.
            is_module = (
                dep in reach or (package / f"{dep}.py").is_file() or (package / dep).is_dir()
            )
            if not dep or not is_module:
                dep = "__init__"
            if dep not in {part, *PYTHON_ALLOWED[part], *reach[part]}:
                found.append(f"{name}:{line} imports {dep}, which is not below it")
    return found


def test_includes_point_down() -> None:
    assert (ROOT / "csrc" / "bindings.cc").is_file()
    assert cpp_violations(ROOT / "csrc") == []


def test_imports_point_down() -> None:
    assert (ROOT / "fastsd" / "__init__.py").is_file()
    assert python_violations(ROOT / "fastsd") == []


def plant(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return folder


def test_checker_accepts_arrows_that_point_down(tmp_path: Path) -> None:
    csrc = plant(
        tmp_path / "csrc",
        {
            "error.h": "#include <string>\n",
            "format.h": '#include "error.h"\n',
            "format.cc": '#include "format.h"\n',
            "bindings.cc": '#include <pybind11/pybind11.h>\n#include "format.h"\n',
        },
    )
    assert cpp_violations(csrc) == []
    package = plant(
        tmp_path / "fastsd",
        {
            "__init__.py": "from .api import save\n",
            "_core.pyi": "import os\n",
            "errors.py": "import json\n",
            "archive.py": "from . import _core\nfrom .errors import FastsdError\n",
            "formats/__init__.py": "from . import fsd\n",
            "formats/fsd.py": "from .. import _core\nfrom ..archive import Archive\n",
            "api.py": "import fastsd._core\nfrom fastsd.formats import fsd\n",
            "integrations/host.py": "import fastsd\nfrom fastsd import save\n",
        },
    )
    assert python_violations(package) == []


@pytest.mark.parametrize(
    ("files", "complaint"),
    [
        ({"error.h": '#include "format.h"\n', "format.h": ""}, "which is not below it"),
        ({"file.cc": '  # include "checksum.h"\n', "checksum.h": ""}, "which is not below it"),
        ({"format.cc": "#include <pybind11/pybind11.h>\n"}, "includes pybind11/pybind11.h"),
        ({"format.cc": '#include "../format.h"\n'}, "which is not in csrc/"),
        ({"stray.cc": ""}, "has no place in CPP_ALLOWED"),
        ({"cuda/stray.h": ""}, "has no place in CPP_ALLOWED"),
    ],
)
def test_checker_finds_bad_includes(tmp_path: Path, files: dict[str, str], complaint: str) -> None:
    (violation,) = cpp_violations(plant(tmp_path / "csrc", files))
    assert complaint in violation


@pytest.mark.parametrize(
    ("files", "complaint"),
    [
        ({"archive.py": "import os, fastsd.api\n"}, "archive.py:1 imports api"),
        ({"archive.py": "from .api import save\n"}, "archive.py:1 imports api"),
        ({"archive.py": "from . import api\n"}, "archive.py:1 imports api"),
        ({"archive.py": "from fastsd import load\n"}, "archive.py:1 imports __init__"),
        ({"errors.py": "import fastsd\n"}, "errors.py:1 imports __init__"),
        ({"errors.py": "def f():\n    from . import archive\n"}, "errors.py:2 imports archive"),
        ({"formats/fsd.py": "from .. import tree\n"}, "imports tree"),
        ({"formats/fsd.py": "from ..tree import flatten\n"}, "imports tree"),
        ({"tree.py": "from . import placement\n"}, "imports placement"),
        ({"tree.py": "from ._core import plan\n"}, "imports _core"),
        ({"api.py": "from .integrations import host\n"}, "imports integrations"),
        ({"integrations/host.py": "from fastsd.api import save\n"}, "imports api"),
        ({"stray.py": ""}, "has no place in PYTHON_ALLOWED"),
    ],
)
def test_checker_finds_bad_imports(tmp_path: Path, files: dict[str, str], complaint: str) -> None:
    (violation,) = python_violations(plant(tmp_path / "fastsd", files))
    assert complaint in violation


def test_checker_finds_a_cycle_in_its_table() -> None:
    with pytest.raises(ValueError, match="cycle"):
        below({"a": {"b"}, "b": {"a"}})
