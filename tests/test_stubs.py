"""fastsd/_core.pyi says what the extension is.

mypy's stubtest compares names. It cannot see the signatures of compiled functions, so these are
read from the first line of each docstring, which pybind11 writes, and compared argument by
argument. Types are not compared: pybind11 spells them its own way.

A class of the extension is `class Name(metaclass=_pybind11_type)` in the stub, which declares
_pybind11_type as a @type_check_only subclass of type: stubtest wants pybind11's metaclass named.
"""

import ast
import importlib.util
import inspect
import subprocess
import sys
import types
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
STUB = ROOT / "fastsd" / "_core.pyi"

# The same for a stub's `def` and a docstring's: (argument, kind, has a default) in order.
Signature = list[tuple[str, str, bool]]


def signature(function: ast.FunctionDef) -> Signature:
    args = function.args
    positional = [*args.posonlyargs, *args.args]
    kinds = ["positional"] * len(args.posonlyargs) + ["any"] * len(args.args)
    required = len(positional) - len(args.defaults)
    found = [
        (arg.arg, kind, index >= required)
        for index, (arg, kind) in enumerate(zip(positional, kinds, strict=True))
    ]
    if args.vararg:
        found.append((args.vararg.arg, "*", False))
    found += [
        (arg.arg, "keyword", default is not None)
        for arg, default in zip(args.kwonlyargs, args.kw_defaults, strict=True)
    ]
    if args.kwarg:
        found.append((args.kwarg.arg, "**", False))
    return found


def definitions(body: list[ast.stmt], prefix: str = "") -> dict[str, list[ast.FunctionDef]]:
    """Every function and method below `body`, by dotted name; overloads in order."""
    found: dict[str, list[ast.FunctionDef]] = {}
    for node in body:
        if isinstance(node, ast.FunctionDef):
            found.setdefault(prefix + node.name, []).append(node)
        elif isinstance(node, ast.ClassDef):
            found |= definitions(node.body, f"{prefix}{node.name}.")
    return found


def is_property(function: ast.FunctionDef) -> bool:
    return any(
        ast.unparse(decorator) == "property" or ast.unparse(decorator).endswith(".setter")
        for decorator in function.decorator_list
    )


def documented(doc: str, name: str) -> list[ast.FunctionDef]:
    """The signatures at the head of a pybind11 docstring: one, or one for each overload."""
    lines = doc.splitlines()
    if lines and "Overloaded function." in doc:
        lines = [line.split(". ", 1)[1] for line in lines if line[:1].isdigit() and ". " in line]
    else:
        lines = lines[:1]
    return [
        ast.parse(f"def {line}: ...").body[0]  # type: ignore[misc]
        for line in lines
        if line.startswith(f"{name}(")
    ]


def mismatches(stub: str, core: object) -> list[str]:
    """Each function of the stub whose arguments are not those of the compiled one."""
    found = []
    for dotted, declared in definitions(ast.parse(stub).body).items():
        if any(is_property(function) for function in declared):
            continue
        target = core
        for word in dotted.split("."):
            # Not getattr: a class answers for its metaclass too.
            target = inspect.getattr_static(target, word, None)
        target = getattr(target, "__func__", target)  # a static method
        doc = inspect.getdoc(target) if target is not None else None
        compiled = documented(doc or "", dotted.rpartition(".")[2])
        if not compiled:
            continue  # written in Python, inherited, or missing, which stubtest reports
        want, have = [signature(f) for f in declared], [signature(f) for f in compiled]
        if want != have:
            found.append(f"{dotted}: the stub says {want}, the extension {have}")
    return found


def test_names_match_the_extension() -> None:
    if importlib.util.find_spec("mypy") is None:
        pytest.skip("mypy is not installed")
    done = subprocess.run(
        [sys.executable, "-m", "mypy.stubtest", "fastsd._core"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_signatures_match_the_extension() -> None:
    from fastsd import _core

    assert mismatches(STUB.read_text(encoding="utf-8"), _core) == []


def test_the_check_sees_functions_of_the_extension() -> None:
    """Were pybind11's docstrings ever switched off, the comparison would pass by seeing nothing."""
    from fastsd import _core

    functions = [f for f in vars(_core).values() if isinstance(f, types.BuiltinFunctionType)]
    assert functions
    assert all(documented(f.__doc__ or "", f.__name__) for f in functions)


@pytest.mark.parametrize(
    ("stub", "agrees"),
    [
        ("def f(a: int, b: str = ...) -> None: ...", True),
        ("def f(a: int, b: str) -> None: ...", False),
        ("def f(b: int, a: str = ...) -> None: ...", False),
        ("def f(a: int, *, b: str = ...) -> None: ...", False),
        ("def f(a: int) -> None: ...", False),
    ],
)
def test_the_check_finds_a_wrong_signature(stub: str, agrees: bool) -> None:
    module = types.SimpleNamespace(f=types.SimpleNamespace())
    module.f.__doc__ = "f(a: typing.SupportsInt, b: str = 'x') -> None\n\nDoes something.\n"
    assert (mismatches(stub, module) == []) == agrees
