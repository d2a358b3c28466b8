"""Getting packages into Slicer's Python: a real pip in a real environment, fed with wheels that are made here.

Only Slicer itself is played: its `slicer.packaging` and the PyTorch extension hand everything to pip, as the real ones
do. With MEDXAI_SLICER_SOURCE set to a checkout of Slicer, their signatures are compared with the real ones.
"""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import packaging
import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
REQUIREMENTS = ROOT / "MedXAI" / "Resources" / "MedXAI-requirements.txt"

# What Slicer brings itself, and what only the command line needs.
ELSEWHERE = {"numpy", "pillow", "scipy", "SimpleITK", "rich", "typer"}

PACKAGING = """
from slicer.util import run_pip
def pip_install(requirements, constraints=None, no_deps_requirements=None, skip_packages=None, blocking=True,
                show_progress=True, requester=None, logCallback=None, completedCallback=None):
    run_pip(["install", *requirements, "-c", str(constraints)])
"""
UTIL = """
import subprocess, sys
asked, reply = [], True
def run_pip(arguments):
    subprocess.run([sys.executable, "-m", "pip", *arguments], check=True, stdout=sys.stderr)
def confirmOkCancelDisplay(text, windowTitle=None, parent=None, **kwargs):
    asked.append(text)
    return reply
def pip_install(requirements):
    run_pip(["install", *requirements])
"""
PYTORCH = """
from slicer.util import run_pip
class PyTorchUtilsLogic:
    def installTorch(self, askConfirmation=False, forceComputationBackend=None, torchVersionRequirement=None):
        run_pip(["install", "torch" + torchVersionRequirement])
"""
PROGRAM = """
import json, slicer, slicer.util
from importlib.metadata import distributions
from MedXAISlicerLib import install, settings
{before}
try:
    said = install.ensure(also={also})
except Exception as error:
    said = f"{{type(error).__name__}}: {{error}}"
there = {{d.name: d.version for d in distributions() if d.name not in ("pip", "setuptools")}}
print(json.dumps([said, there, slicer.util.asked, install.describe(install.status())]))
"""

ALL = {
    "monai": "1.5.1",
    "nibabel": "5.3.0",
    "psutil": "7.0.0",
    "pydantic": "2.9.0",
    "safetensors": "0.5.0",
    "scikit-learn": "1.6.0",
    "torch": "2.9.0+cpu",
}

EVERYTHING = "MONAI, nibabel, psutil, pydantic, safetensors, scikit-learn and PyTorch"


def wheel(folder: Path, name: str, version: str, *requires: str) -> Path:
    """A wheel with one empty module."""
    file = name.replace("-", "_")
    info = f"{file}-{version}.dist-info"
    metadata = "".join(f"{line}\n" for line in ("Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"))
    contents = {
        f"{file}.py": "",
        f"{info}/METADATA": metadata + "".join(f"Requires-Dist: {line}\n" for line in requires),
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    contents[f"{info}/RECORD"] = "".join(f"{path},,\n" for path in [*contents, f"{info}/RECORD"])
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{file}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for inside, text in contents.items():
            archive.writestr(inside, text)
    return path


class Python:
    """A Python of its own, as Slicer's is."""

    def __init__(self, folder: Path, wheels: Path) -> None:
        self.folder, self.wheels = folder, wheels
        self.executable = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
        self.slicer = folder / "slicer stand-in"
        (self.slicer / "slicer").mkdir(parents=True)
        for name, text in {
            "slicer/__init__.py": "",
            "slicer/util.py": UTIL,
            "slicer/packaging.py": PACKAGING,
            "PyTorchUtils.py": PYTORCH,
        }.items():
            (self.slicer / name).write_text(text, encoding="utf-8")
        # Slicer brings it.
        shutil.copytree(Path(packaging.__file__).parent, self.slicer / "packaging")

    def has(self, name: str, version: str, *requires: str) -> None:
        """Something is installed before."""
        with zipfile.ZipFile(wheel(self.folder / "before", name, version, *requires)) as archive:
            archive.extractall(next(self.folder.glob("[Ll]ib/**/site-packages")))

    def ensure(self, before: str = "", network: bool = True, also: tuple[str, ...] = ()):
        """What `install.ensure()` returned or raised, all packages then, the questions asked, and the description."""
        temporary = self.folder / "a folder with spaces"
        temporary.mkdir(exist_ok=True)
        done = subprocess.run(
            [self.executable, "-c", PROGRAM.format(before=before, also=also)],
            env={
                **{name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "PYTHON"))},
                "PYTHONPATH": os.pathsep.join(map(str, (self.slicer, ROOT / "MedXAI", ROOT))),
                "PYTHONDONTWRITEBYTECODE": "1",
                "PIP_CONFIG_FILE": os.devnull,
                "PIP_DISABLE_PIP_VERSION_CHECK": "1",
                "PIP_NO_INDEX": "1",
                # The wheels stand for what can be downloaded.
                **({"PIP_FIND_LINKS": self.wheels.as_uri()} if network else {}),
                **dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(temporary)),
            },
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        assert not list(temporary.iterdir())
        return json.loads(done.stdout)


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    folder = tmp_path_factory.mktemp("python") / "bare"
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    return folder


@pytest.fixture
def wheels(tmp_path):
    folder = tmp_path / "wheels"
    for name, version in ALL.items():
        wheel(folder, name, version)
    return folder


@pytest.fixture
def python(bare, wheels, tmp_path):
    shutil.copytree(bare, tmp_path / "python", symlinks=True)
    return Python(tmp_path / "python", wheels)


def test_everything_is_installed_after_one_question(python):
    said, there, asked, (badge, text) = python.ensure()
    assert said is True
    assert there == ALL
    assert len(asked) == 1
    assert "PyTorch" in asked[0]
    assert badge == "Ready · PyTorch 2.9 (CPU)"
    assert "MONAI: 1.5.1" in text.splitlines()
    assert python.ensure("slicer.util.reply = False", network=False)[:3] == [True, ALL, []]


def test_what_one_method_needs_is_installed_when_it_is_asked(python):
    python.ensure()
    wheel(python.wheels, "lancedb", "0.40.0")
    wheel(python.wheels, "lancedb", "0.39.0")
    assert python.ensure()[:3] == [True, ALL, []]
    said, there, asked, (badge, _) = python.ensure(also=("lancedb>=0.40",))
    assert said is True and there == {**ALL, "lancedb": "0.40.0"}
    assert asked[0].startswith("MedXAI needs LanceDB. Installing may take some minutes.\n")
    assert badge == "Ready · PyTorch 2.9 (CPU)"
    assert python.ensure(also=("lancedb>=0.40",))[2] == []


def test_in_slicer_5_10(python):
    (python.slicer / "slicer" / "packaging.py").unlink()
    assert python.ensure()[:2] == [True, ALL]


def test_what_slicer_ships_stays_and_an_older_package_that_suits_it_is_taken(python):
    python.has("shipped", "1.0")
    wheel(python.wheels, "shipped", "2.0")
    wheel(python.wheels, "monai", "1.5.0", "shipped>=1")
    wheel(python.wheels, "monai", "1.5.1", "shipped>=2")
    # The PyTorch extension takes no constraints; they reach its pip all the same.
    wheel(python.wheels, "torch", "2.9.0+cpu", "shipped>=2")
    wheel(python.wheels, "torch", "2.8.0+cpu", "shipped>=1")
    said, there, *_ = python.ensure()
    assert said is True
    assert there == ALL | {"shipped": "1.0", "monai": "1.5.0", "torch": "2.8.0+cpu"}


def test_what_would_need_another_version_of_what_slicer_ships_is_refused(python):
    python.has("shipped", "1.0")
    wheel(python.wheels, "shipped", "2.0")
    wheel(python.wheels, "nibabel", "5.3.0", "shipped>=2")
    said, there, *_ = python.ensure()
    assert said.startswith(
        "MedXAIError: Installing MONAI, nibabel, psutil, pydantic, safetensors, scikit-learn and PyTorch failed (pip"
    )
    assert "Python console" in said
    assert there["shipped"] == "1.0"


def test_what_is_too_old_is_renewed_with_what_only_it_needs(python):
    for name, version in ALL.items():
        if name not in ("pydantic", "monai"):
            python.has(name, version)
    python.has("monai", "1.3.0")
    python.has("pydantic", "2.5.0", "pydantic-core==2.14", "shared")
    python.has("pydantic_core", "2.14")
    python.has("shared", "1.0")
    python.has("other", "1.0", "shared", 'pydantic>=2; extra == "more"')
    wheel(python.wheels, "pydantic", "2.9.0", "pydantic-core==2.23", "shared")
    wheel(python.wheels, "pydantic_core", "2.23")
    wheel(python.wheels, "shared", "2.0")
    assert python.ensure("slicer.util.reply = False")[3][0] == "MONAI and 1 more package are too old"
    said, there, *_ = python.ensure()
    assert said is True
    assert there == ALL | {"pydantic_core": "2.23", "shared": "1.0", "other": "1.0"}


def test_without_a_network_from_a_folder_of_wheels(python):
    (python.slicer / "PyTorchUtils.py").unlink()
    choice = f"settings.set('wheelFolder', {str(python.wheels)!r})"
    assert python.ensure(choice, network=False)[:2] == [True, ALL]


def test_a_wheel_that_is_not_in_the_folder_is_told(python):
    next(python.wheels.glob("nibabel*")).unlink()
    said, there, *_ = python.ensure(f"settings.set('wheelFolder', {str(python.wheels)!r})", network=False)
    assert said.startswith("MedXAIError: Installing ")
    assert f"into '{python.wheels}'" in said
    assert there == {}
    said, *_ = python.ensure("settings.set('wheelFolder', '/nowhere')")
    assert "'/nowhere' is not there: choose" in said


def test_no_means_no(python):
    said, there, _, (badge, _) = python.ensure("slicer.util.reply = False")
    assert said.startswith(f"MedXAIError: MedXAI cannot compute without {EVERYTHING}: ")
    assert there == {}
    assert badge == "PyTorch and 6 more packages are missing"


def test_without_the_pytorch_extension_it_says_how_to_get_it(python):
    (python.slicer / "PyTorchUtils.py").unlink()
    said, there, *_ = python.ensure()
    assert "Extensions Manager" in said
    assert there == {}


def test_a_test_does_not_change_the_slicer_it_tests(python):
    before = "class app: testingEnabled = staticmethod(lambda: True)\nslicer.app = app"
    said, there, asked, _ = python.ensure(before)
    assert "testing mode" in said
    assert there == {}
    assert asked == []


def test_another_python_for_the_networks_leaves_little_to_install_here(python):
    said, there, _, (badge, text) = python.ensure("settings.set('workerCommand', 'ssh gpu')")
    assert said is True
    assert there == {"psutil": ALL["psutil"]}
    assert "another Python" in badge
    assert "ssh gpu" in text


@pytest.mark.parametrize(
    ("version", "platform", "kind"),
    [
        ("2.9.0+cu128", "win32", "CUDA 12.8"),
        ("2.9.0+cpu", "linux", "CPU"),
        ("2.9.0", "linux", "CUDA"),
        ("2.9.0", "darwin", "CPU"),
        ("2.9.0", "win32", "CPU"),
    ],
)
def test_kind_of_pytorch(monkeypatch, version, platform, kind):
    pytest.importorskip("slicer")
    from MedXAISlicerLib import install

    monkeypatch.setattr(sys, "platform", platform)
    assert install.Package("torch", "torch", version, True).kind == kind


def test_status_imports_none_of_it():
    pytest.importorskip("slicer")
    program = (
        "import sys; from MedXAISlicerLib import install; assert install.status().ready; "
        "assert not {'torch', 'monai', 'pydantic', 'psutil'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT / "MedXAI", check=True)


def test_requirements_are_those_of_the_project():
    project = pytest.importorskip("tomllib").loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [line for line in REQUIREMENTS.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    assert lines == sorted(lines, key=str.lower)
    assert not [line for line in lines if "==" in line or "<" in line]
    dependencies = {Requirement(line).name: line for line in project["dependencies"]}
    assert lines == [line for name, line in dependencies.items() if name not in ELSEWHERE]
    assert dependencies.keys() > ELSEWHERE


def test_the_stand_in_takes_what_slicer_takes():
    if "MEDXAI_SLICER_SOURCE" not in os.environ:
        pytest.skip("MEDXAI_SLICER_SOURCE is not set to a checkout of Slicer")
    source = Path(os.environ["MEDXAI_SLICER_SOURCE"]) / "Base" / "Python" / "slicer"

    def signature(text: str, name: str):
        function = next(
            node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef) and node.name == name
        )
        names = [a.arg for a in function.args.args], function.args.kwarg and function.args.kwarg.arg
        return names, [ast.unparse(default) for default in function.args.defaults]

    for file, text, name in (("packaging", PACKAGING, "pip_install"), ("util", UTIL, "confirmOkCancelDisplay")):
        assert signature(text, name) == signature((source / f"{file}.py").read_text(encoding="utf-8"), name)
