"""What the project promises about itself: packaging, metadata for 3D Slicer, imports, names, sizes."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from itertools import chain
from pathlib import Path

import jsonschema
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import MedXAILib

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = sorted((ROOT / "MedXAILib").rglob("*.py"))

# slicer, qt, vtk and the rest of science are not among them: the library has to run anywhere.
THIRD_PARTY = {"PIL", "SimpleITK", "monai", "numpy", "psutil", "pydantic", "rich", "safetensors", "torch", "typer"}

# What the Extensions Index asks of an entry (version 1.0.1 of its schema), without the texts.
ENTRY = {
    "type": "object",
    "required": ["$schema", "category", "scm_url"],
    "additionalProperties": False,
    "properties": {
        "$schema": {"pattern": r"^https://.*/slicer-extension-catalog-entry-schema-v1\.0\.1\.json#$"},
        "category": {"const": "Analysis"},
        "scm_url": {"pattern": r"^https://.*/Slicer[^/]+\.git$"},
        "scm_revision": {"type": "string"},
        "scm_type": {"enum": ["git", "local"]},
        "build_dependencies": {"type": "array", "items": {"type": "string"}},
        "build_subdirectory": {"type": "string"},
        "enabled": {"type": "boolean"},
        "tier": {"enum": [1, 3, 5]},
    },
}


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def files() -> list[Path]:
    """The files that a clone has."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    return [path for name in listed.decode().split("\0") if name and (path := ROOT / name).exists()]


@pytest.fixture(scope="module")
def cmake() -> dict[str, str]:
    """EXTENSION_... of the root CMakeLists.txt, read as the Extensions Index reads it: as text, one line each."""
    return dict(re.findall(r'^set\(EXTENSION_([A-Z]+) "([^"\n]+)"\)$', text("CMakeLists.txt"), re.MULTILINE))


def test_cmake_has_what_the_index_reads(cmake):
    assert re.findall(r"^project\(([^\s)]+)", text("CMakeLists.txt"), re.MULTILINE) == ["MedXAI"]
    assert " ".join(cmake) == "HOMEPAGE CATEGORY CONTRIBUTORS DESCRIPTION ICONURL SCREENSHOTURLS DEPENDS"


@pytest.mark.parametrize("field", ["ICONURL", "SCREENSHOTURLS"])
def test_pictures_of_the_extension_exist(cmake, field):
    for url in cmake[field].split():
        assert re.match(r"https://.+\.(png|jpg|gif)$", url)
        assert (ROOT / url.split("/main/")[1]).is_file()


def test_s4ext_equals_cmake(cmake):
    lines = [line for line in text("MedXAI.s4ext").splitlines() if line and not line.startswith("#")]
    described = {name: value for name, _, value in (line.partition(" ") for line in lines)}
    assert {name: described[name.lower()] for name in cmake} == cmake
    assert described["scmurl"] == json.loads(text("MedXAI.json"))["scm_url"]


def test_index_entry(cmake):
    entry = json.loads(text("MedXAI.json"))
    jsonschema.validate(entry, ENTRY)
    assert entry["category"] == cmake["CATEGORY"]
    assert entry["build_dependencies"] == cmake["DEPENDS"].split()


def test_slicer_module_lists_every_file():
    module = ROOT / "MedXAI"
    listed = set(re.findall(r"\S+\.(?:py|png|ui|svg|json)\b", text("MedXAI/CMakeLists.txt")))
    there = {p.relative_to(module).as_posix() for p in module.rglob("*.*") if p.name != "CMakeLists.txt"}
    assert listed == {name for name in there if "__pycache__" not in name}


@pytest.mark.parametrize("path", LIBRARY, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_library_imports_only_what_it_may(path):
    imported = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            imported.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            imported.add(node.module.split(".")[0])
    assert imported <= {"MedXAILib"} | THIRD_PARTY | set(sys.stdlib_module_names)


def test_repository_is_small(files):
    assert sum(path.stat().st_size for path in files) <= 60e6


def test_files_are_named_for_what_they_hold(files):
    assert not [path for path in files if path.stem.strip("_") in {"util", "utils", "helper", "helpers", "misc"}]


def test_readme_has_the_commands():
    for command in ("make demo", "make test", ".venv\\Scripts\\medxai demo", ".venv\\Scripts\\python -m pytest"):
        assert command in text("README.md")


def test_constraints_pin_the_dependencies():
    project = pytest.importorskip("tomllib").loads(text("pyproject.toml"))["project"]
    pinned = {}
    for line in filter(None, (line.split("#")[0].strip() for line in text("constraints.txt").splitlines())):
        pin = Requirement(line)
        assert [s.operator for s in pin.specifier] == ["=="], line
        if pin.marker is None or pin.marker.evaluate():
            pinned[canonicalize_name(pin.name)] = next(iter(pin.specifier)).version
    for wanted in map(Requirement, [*project["dependencies"], *chain(*project["optional-dependencies"].values())]):
        assert pinned[canonicalize_name(wanted.name)] in wanted.specifier, wanted


def test_public_names_come_when_they_are_used() -> None:
    """`medxai --help` and the panels of Slicer do not wait for PyTorch, and no module hides a public name."""
    program = (
        "import sys, MedXAILib, MedXAILib.cli; assert 'torch' not in sys.modules; "
        "import MedXAILib.request; from MedXAILib import *; assert callable(MedXAILib.explain) and callable(explain)"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)
    assert not {p.stem for p in (ROOT / "MedXAILib").iterdir()} & set(MedXAILib.__all__)
