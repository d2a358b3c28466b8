"""The extension's package: built with CMake against a stand-in for Slicer's build tree, unpacked and imported.

With MEDXAI_SLICER_SOURCE and MEDXAI_CTK_SOURCE set to checkouts, Slicer's own macros pack it, too.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MODULES = Path("lib/Slicer-5.13/qt-scripted-modules")

# Only inside the application.
OF_THE_APPLICATION = {"qt", "ctk", "slicer.i18n", "slicer.parameterNodeWrapper", "slicer.ScriptedLoadableModule"}

IMPORTS = """
import importlib, pathlib, sys
package = pathlib.Path(sys.argv[1])
absent = set()
for path in sorted(package.rglob("*.py")):
    if "Resources" in path.parts:
        continue
    name = ".".join(path.relative_to(package).with_suffix("").parts).removesuffix(".__init__")
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        absent.add(error.name)
    else:
        assert pathlib.Path(module.__file__).is_relative_to(package), module
from MedXAILib.resources import path
assert path("Models/lung_nodule").is_relative_to(package)
assert path("SampleData/chest_ct_nodule.nrrd").is_relative_to(package)
from MedXAISlicerLib import install
assert install.status().packages
print(*absent)
"""


def run(*command: object) -> str:
    done = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        # What CMake itself lacks on this machine is not our defect.
        for tool in ("CMAKE_CXX_COMPILER", "CMAKE_MAKE_PROGRAM"):
            if f"{tool} not set" in done.stdout or f"No {tool}" in done.stdout:
                pytest.skip(f"CMake finds no {tool}")
        pytest.fail(done.stdout)
    return done.stdout


def files(folder: Path) -> set[str]:
    """All but what a desktop hides there."""
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file() and not p.name.startswith(".")}


PACKAGES = {
    "with tests": ["-DBUILD_TESTING=ON"],
    "without tests": ["-DBUILD_TESTING=OFF"],
    "by Slicer's own macros": ["-DBUILD_TESTING=OFF", "-DOWN_MACROS=ON", f"-DPYTHON_EXECUTABLE={sys.executable}"],
}


@pytest.fixture(scope="module", params=PACKAGES)
def package(request, tmp_path_factory):
    """The folder that Slicer would unpack."""
    if "own" in request.param and not {"MEDXAI_SLICER_SOURCE", "MEDXAI_CTK_SOURCE"} <= os.environ.keys():
        pytest.skip("MEDXAI_SLICER_SOURCE and MEDXAI_CTK_SOURCE are not set to checkouts of Slicer and CTK")
    if not (cmake := shutil.which("cmake", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")):
        pytest.skip("there is no CMake")
    folder = tmp_path_factory.mktemp("packaging")
    build = folder / "build"
    run(cmake, "-S", ROOT, "-B", build, f"-DSlicer_DIR={ROOT / 'Testing/slicer_build'}", *PACKAGES[request.param])
    run(cmake, "--build", build, "--config", "Release")
    run(cmake, "--build", build, "--config", "Release", "--target", "package")
    assert (build / "Testing/CTestTestfile.cmake").exists() is (request.param == "with tests")
    with tarfile.open(build / "MedXAI.tar.gz") as archive:
        archive.extractall(folder / "unpacked", **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    return folder / "unpacked" / "MedXAI"


def test_package_has_every_file_and_nothing_else(package):
    expected = set()
    for source, inside in (("MedXAI", ""), ("MedXAILib", "MedXAILib/")):
        expected |= {inside + name for name in files(ROOT / source) if "__pycache__" not in name}
    for name in ("Fonts", "Models", "SampleData"):
        expected |= {f"MedXAILib/Resources/{name}/{inside}" for inside in files(ROOT / "Resources" / name)}
    expected = {name for name in expected if not name.endswith("CMakeLists.txt")}
    assert {"MedXAI.py", "MedXAISlicerLib/panels/__init__.py", "Resources/MedXAI-requirements.txt"} <= expected
    # Slicer puts its compiled twin beside each script.
    packaged = {name for name in files(package) if not name.endswith(".pyc") or "__pycache__" in name}
    assert packaged == {(MODULES / name).as_posix() for name in expected}


def test_package_works_on_its_own(package, tmp_path):
    pytest.importorskip("slicer")
    done = subprocess.run(
        [sys.executable, "-c", IMPORTS, str((package / MODULES).resolve())],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(package / MODULES), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) <= OF_THE_APPLICATION
