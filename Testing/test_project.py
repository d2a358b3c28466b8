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
MODULE = sorted((ROOT / "MedXAI").rglob("*.py"))

# slicer, qt, vtk and the rest of science are not among them: the library has to run anywhere.
THIRD_PARTY = set("PIL SimpleITK monai numpy psutil pydantic rich safetensors scipy sklearn torch typer".split())
# The extras `cases`, `cohort`, `dicom` and `pdf`, imported only where they are needed.
THIRD_PARTY |= {"lancedb", "pyarrow", "dask", "dask_jobqueue", "distributed", "highdicom", "pydicom", "reportlab"}

# What Slicer brings and loads fast; qt and ctk are there in the application only.
OF_SLICER = {"SimpleITK", "numpy", "slicer", "vtk"}
OF_THE_APPLICATION = {"ctk", "qt", "slicer.ScriptedLoadableModule", "slicer.i18n", "slicer.parameterNodeWrapper"}
# What of the library may be imported into Slicer's process: not what needs PyTorch.
WITHOUT_TORCH = {
    "MedXAILib",
    *(f"MedXAILib.{name}" for name in ("amount", "client", "errors", "hotspots", "protocol", "resources", "rule")),
    *(f"MedXAILib.report.{name}" for name in ("interval", "residuals")),
    *(f"MedXAILib.study.{name}" for name in ("design", "journal")),
    "MedXAILib.textual.intervention",
    "MedXAILib.trust.finding",
}

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


def imported(node: ast.AST, everywhere: bool = True) -> set[str]:
    """The modules that a piece of code imports; without what its functions do when they are called."""
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names}
    if isinstance(node, ast.ImportFrom):
        # `from slicer.i18n import tr`, and `from MedXAILib import client`.
        inner = {f"{node.module}.{alias.name}" for alias in node.names} if node.module == "MedXAILib" else set()
        return inner or {node.module or "."}
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) and not everywhere:
        return set()
    return set().union(*(imported(child, everywhere) for child in ast.iter_child_nodes(node)))


def code(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


named = pytest.mark.parametrize("path", MODULE, ids=lambda path: path.relative_to(ROOT).as_posix())


@named
def test_module_loads_with_what_slicer_brings(path):
    """What takes long or has to be installed is imported where it is needed."""
    loaded = imported(code(path), everywhere=False)
    roots = {name.split(".")[0] for name in loaded}
    assert roots <= {"MedXAISlicerLib", "ctk", "qt"} | OF_SLICER | set(sys.stdlib_module_names)
    if path.parent.name != "panels" and path.name not in ("MedXAI.py", "parameters.py"):
        assert not loaded & OF_THE_APPLICATION, "only panels need the application"


@named
def test_module_keeps_pytorch_out_of_slicers_process(path):
    if path.name == "mrml.py":
        pytest.skip("its explain() is for scripts, and takes networks that are in memory")
    # The self-test makes a network of its own.
    tree = [n for n in code(path).body if not (isinstance(n, ast.ClassDef) and n.name == "MedXAITest")]
    used = set().union(*map(imported, tree))
    assert not {name.split(".")[0] for name in used} & {"torch", "monai", "pydantic"}
    assert {name for name in used if name.split(".")[0] == "MedXAILib"} <= WITHOUT_TORCH


@named
def test_module_has_no_long_files(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400


# Where Slicer shows a text: properties of widgets, and functions with the positions of the texts among what they take.
SHOWN = {"text", "toolTip", "title", "windowTitle", "placeholderText", "statusTip", "whatsThis", "helpText"}
SHOWN_BY = {
    **dict.fromkeys(
        ("addItem", "addAction", "setToolTip", "setText", "setTitle", "setItemText", "showStatusMessage"), (0,)
    ),
    **dict.fromkeys(("QLabel", "QPushButton", "QCheckBox", "QGroupBox", "QAction", "QTableWidgetItem"), (0,)),
    **dict.fromkeys(("errorDisplay", "warningDisplay", "infoDisplay", "messageBox", "tryWithErrorDisplay"), (0, 1)),
    **dict.fromkeys(("confirmOkCancelDisplay", "confirmYesNoDisplay", "confirmRetryCloseDisplay"), (0, 1)),
    **dict.fromkeys(("getExistingDirectory", "getOpenFileName", "getSaveFileName", "addTab", "addRow"), (0, 1)),
    **dict.fromkeys(("setHorizontalHeaderLabels", "setVerticalHeaderLabels"), (0,)),
    "AddNewNodeByClass": (1,),
}


def untranslated(shown: ast.AST) -> list[str]:
    """The words in an expression that reach the screen as they stand here."""
    match shown:
        case ast.Constant(value=str(words)):
            # Neither markup nor the name of the product.
            words = re.sub(r"<[^>]*>|&\w+;|MedXAI", "", words)
            return [words] if re.search(r"[^\W\d_]{3}", words) else []
        case ast.IfExp(body=yes, orelse=no):
            parts = [yes, no]
        case ast.BinOp(left=left, right=right):
            parts = [left, right]
        case ast.JoinedStr(values=parts) | ast.BoolOp(values=parts) | ast.Dict(values=parts):
            pass
        case ast.List(elts=parts) | ast.Tuple(elts=parts):
            pass
        case (
            ast.GeneratorExp(elt=part)
            | ast.ListComp(elt=part)
            | ast.Call(func=ast.Attribute(value=part, attr="format"))
        ):
            parts = [part]
        case ast.Call(func=ast.Attribute(value=part, attr="join"), args=args):
            parts = [part, *args]
        case ast.Call(func=ast.Attribute(value=part, attr="get"), args=args):
            parts = [part, *args[1:]]
        case _:
            # Calls of `_` among them.
            return []
    return list(chain.from_iterable(map(untranslated, parts)))


@pytest.mark.parametrize(
    "path", [p for p in MODULE if p.name == "MedXAI.py" or p.parent.name == "panels"], ids=lambda path: path.name
)
def test_what_people_read_is_translated(path):
    found = []
    for node in ast.walk(code(path)):
        match node:
            case ast.Assign(targets=[*targets], value=value):
                if {getattr(t, "attr", getattr(t, "id", "")) for t in targets} & SHOWN:
                    found += untranslated(value)
            case ast.Call(func=ast.Attribute(attr=name) | ast.Name(id=name), args=args, keywords=keywords):
                for position, arg in enumerate(args):
                    if position in SHOWN_BY.get(name, ()):
                        found += untranslated(arg)
                for keyword in keywords:
                    if keyword.arg in SHOWN or (keyword.arg == "detailedText"):
                        found += untranslated(keyword.value)
    assert not found


def test_untranslated_words_are_found():
    for text in ('"Some words"', 'f"{n} voxels"', 'x or "None yet"', '"a" if b else "Cancel"', '"<b>Bold</b>"'):
        assert untranslated(ast.parse(text, mode="eval").body), text
    for text in ('_("Words")', "f\"{n} {_('voxels')}\"", '"<b>" + _("Bold") + "</b>"', 'name["words"]', '"MedXAI"'):
        assert not untranslated(ast.parse(text, mode="eval").body), text


@pytest.mark.parametrize("path", LIBRARY, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_library_imports_only_what_it_may(path):
    roots = {name.split(".")[0] for name in imported(code(path))}
    assert roots <= {"MedXAILib"} | THIRD_PARTY | set(sys.stdlib_module_names)


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
