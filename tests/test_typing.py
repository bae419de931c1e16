"""Types: of the public API as a type checker sees them, of its annotations at run time, of the compiled extensions.

Docstrings and imports belong here too: names that documents and signatures share, and what an import costs.
"""

import ast
import importlib.util
import inspect
import os
import re
import subprocess
import sys
import typing
from pathlib import Path

import pytest

import rlvr_fast as rf

ROOT = Path(__file__).parent.parent
FUNCTIONS = {name: getattr(rf, name) for name in rf.__all__ if inspect.isroutine(getattr(rf, name))}
CLASSES = {name: getattr(rf, name) for name in rf.__all__ if inspect.isclass(getattr(rf, name))}


def methods(cls):
    """Public methods, and properties by their getters, that the class defines in this package."""
    for name, _ in inspect.getmembers(cls):
        found = inspect.getattr_static(cls, name)
        found = getattr(found, "fget", None) or getattr(found, "func", None) or getattr(found, "__func__", found)
        public = name == "__init__" or not name.startswith("_")
        own = inspect.isfunction(found) and found.__module__.startswith("rlvr_fast")
        if public and own and found.__name__ != "<lambda>":  # what StepGuard hands on of the optimizer it wraps
            yield name, found


CALLABLES = {**FUNCTIONS, **{f"{name}.{own}": method for name, cls in CLASSES.items() for own, method in methods(cls)}}


# -- a type checker reads a user's file -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checked(tmp_path_factory):
    """(file, line) -> code of the error that mypy reports there, for the files of tests/typing."""
    if importlib.util.find_spec("mypy") is None:
        pytest.skip("mypy is not installed")
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "--no-error-summary", "--config-file=",
         f"--cache-dir={tmp_path_factory.mktemp('mypy')}", "usage.py", "misuse.py"],
        cwd=ROOT / "tests" / "typing", env={**os.environ, "MYPYPATH": str(ROOT)}, capture_output=True, text=True,
        timeout=600)
    assert done.returncode in (0, 1), done.stdout + done.stderr  # 2: mypy itself failed
    found = re.findall(r"^(\w+\.py):(\d+): error: .*\[([\w-]+)\]$", done.stdout, flags=re.M)
    return {(file, int(line)): code for file, line, code in found}


def test_a_file_that_uses_the_public_api_type_checks_with_the_types_it_states(checked):
    assert {place: code for place, code in checked.items() if place[0] == "usage.py"} == {}


def test_calls_that_cannot_work_are_refused_by_the_type_checker(checked):
    lines = (ROOT / "tests" / "typing" / "misuse.py").read_text().splitlines()
    expected = {("misuse.py", number): line.rpartition("  # ")[2] for number, line in enumerate(lines, 1)
                if "  # " in line}
    assert len(expected) > 15
    assert {place: code for place, code in checked.items() if place[0] == "misuse.py"} == expected


# -- annotations ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CALLABLES)
def test_every_parameter_and_result_is_annotated_with_a_type_that_exists(name):
    signature, hints = inspect.signature(CALLABLES[name]), typing.get_type_hints(CALLABLES[name])
    missing = [own for own in signature.parameters if own not in hints and own not in ("self", "cls")]
    assert not missing
    assert name.endswith(".__init__") or "return" in hints


@pytest.mark.parametrize("name", CLASSES)
def test_the_fields_of_every_class_have_types_that_exist(name):
    typing.get_type_hints(CLASSES[name])


@pytest.mark.parametrize("name", [name for name in CALLABLES if "Args:" in (CALLABLES[name].__doc__ or "")])
def test_docstring_and_signature_name_the_same_arguments(name):
    accepted = set(inspect.signature(CALLABLES[name]).parameters) - {"self", "cls"}
    compare_arguments(CALLABLES[name].__doc__, accepted)


@pytest.mark.parametrize("name", [name for name in CLASSES if "Args:" in (CLASSES[name].__doc__ or "")])
def test_class_docstring_and_constructor_name_the_same_arguments(name):
    compare_arguments(CLASSES[name].__doc__, set(inspect.signature(CLASSES[name]).parameters))


def compare_arguments(docstring, accepted):
    """What stands before a colon where an entry of "Args:" begins is a parameter, and every parameter stands there or,
    where entries share a line, before a colon further on."""
    text = re.search(r"Args:\n(.*?)(?:\n\n|\Z)", inspect.cleandoc(docstring), flags=re.S).group(1)
    indent = re.match(" *", text).group()
    names = r"\*{0,2}\w+(?:, \*{0,2}\w+)*"
    heads = re.findall(rf"^{indent}({names}):", text, flags=re.M)
    named = {name.strip("* ") for head in heads for name in head.split(",")}
    inline = {name.strip("* ") for head in re.findall(rf"({names}): ", text) for name in head.split(",")}
    assert named, "no entry"
    assert named <= accepted
    assert accepted <= named | inline


@pytest.mark.parametrize(("stub", "bindings"), [("_native.pyi", "csrc/cpu/bindings.cpp"),
                                                ("_cuda_rows.pyi", "csrc/cuda/bindings.cpp")])
def test_the_stubs_of_the_extensions_name_the_arguments_of_the_bindings(stub, bindings):
    source = (ROOT / bindings).read_text()
    bound = {}
    for definition in re.split(r"module\.def\(|py::class_<", source)[1:]:
        if definition[0] != '"':  # a class: its constructor is mypy's to check against the callers
            continue
        arguments = re.findall(r'py::arg\("(\w+)"\)( = )?', definition)
        bound[re.match(r'"(\w+)"', definition).group(1)] = (
            [name for name, _ in arguments], sum(bool(default) for _, default in arguments))
    typed = {node.name: ([argument.arg for argument in node.args.args], len(node.args.defaults))
             for node in ast.parse((ROOT / "rlvr_fast" / stub).read_text()).body if isinstance(node, ast.FunctionDef)}
    assert typed == bound


# -- imports ----------------------------------------------------------------------------------------------------------


def test_importing_the_package_imports_nothing_that_torch_does_not():
    script = ("import sys, torch; before = set(sys.modules); import rlvr_fast; "
              "print(*sorted({name.partition('.')[0] for name in set(sys.modules) - before}))")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300, check=True)
    beyond = set(done.stdout.split()) - sys.stdlib_module_names
    assert beyond <= {"rlvr_fast", "numpy"}  # no framework, no plots, no terminal, no triton before a kernel is wanted
