"""The packages that MedXAI needs: which are there, and getting the others without touching those that Slicer needs.

Nothing is imported to find out, PyTorch least of all, and nothing is installed before the person says so.
"""

import contextlib
import importlib.metadata
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import slicer

from MedXAISlicerLib import settings

REQUIREMENTS = Path(__file__).resolve().parents[1] / "Resources" / "MedXAI-requirements.txt"

# All that is needed here when another Python, or another machine, does the computing.
_CLIENT = {"psutil"}
_TITLES = {"lancedb": "LanceDB", "monai": "MONAI", "torch": "PyTorch"}


@dataclass(frozen=True)
class Package:
    """One package: what is required of it, such as "torch>=2.8", and the version that is there, or None."""

    requirement: str
    name: str
    installed: str | None
    ready: bool

    @property
    def title(self):
        return _TITLES.get(self.name, self.name)

    @property
    def kind(self):
        """What a PyTorch computes on: "CUDA 12.8", "CPU"; empty for other packages."""
        if self.name != "torch" or not self.installed:
            return ""
        suffix = self.installed.partition("+")[2]
        if suffix.startswith("cu"):
            return f"CUDA {suffix[2:-1]}.{suffix[-1]}"
        # On Linux the one without a suffix is for NVIDIA, elsewhere for the CPU.
        return "CUDA" if not suffix and sys.platform == "linux" else "CPU"


@dataclass(frozen=True)
class Status:
    """Everything that is needed in this Slicer's Python."""

    packages: tuple[Package, ...]

    @property
    def lacking(self):
        """What is missing or too old."""
        return [package for package in self.packages if not package.ready]

    @property
    def ready(self):
        return not self.lacking


def status(also=()):
    """What is needed, and what of it is there; `also` are requirements of what not everybody does."""
    from packaging.requirements import Requirement

    elsewhere = settings.get("workerCommand")
    packages = []
    for line in [*REQUIREMENTS.read_text(encoding="utf-8").splitlines(), *also]:
        if not line.strip() or line.startswith("#"):
            continue
        required = Requirement(line)
        if elsewhere and required.name not in _CLIENT:
            continue
        installed = _version(required.name)
        ready = installed is not None and required.specifier.contains(installed, prereleases=True)
        packages.append(Package(line.strip(), required.name, installed, ready))
    return Status(tuple(packages))


def describe(status):
    """A line for a badge, and all of it in full."""
    lines = [f"{p.title}: {_state(p)}" for p in status.packages]
    if command := settings.get("workerCommand"):
        lines.append(f"Explanations are computed by: {command}")
    return _badge(status), "\n".join(lines)


def ensure(parent=None, also=()):
    """Install what is missing or too old, if the person agrees; True when everything is there, with what is needed
    `also`.

    Call it where something is about to be computed, never when a module is loaded.

    Raises:
        MedXAIError: when the person declines, or when it cannot be installed.
    """
    from MedXAILib.errors import MedXAIError

    lacking = status(also).lacking
    if not lacking:
        return True
    names = _list(p.title for p in lacking)
    size = ", and PyTorch up to 6 GB" if any(p.name == "torch" for p in lacking) else ""
    app = getattr(slicer, "app", None)
    if app is not None and app.testingEnabled():
        # A test must not change the Slicer that it tests.
        raise MedXAIError(f"{names} cannot be installed in testing mode: install {REQUIREMENTS.name} before.")
    if not slicer.util.confirmOkCancelDisplay(
        f"MedXAI needs {names}. Installing may take some minutes{size}.\n\n"
        "This adds to Slicer's Python; the packages that Slicer itself uses stay as they are.",
        "MedXAI",
        parent=parent,
        detailedText="\n".join(p.requirement for p in lacking),
    ):
        raise MedXAIError(f"MedXAI cannot compute without {names}: press the button again to install them.")
    try:
        _install(lacking)
    # The PyTorch extension imports what it has installed, which fails in many ways.
    except (ImportError, OSError, RuntimeError, subprocess.CalledProcessError) as error:
        raise MedXAIError(f"Installing {names} failed ({_reason(error)}): {_remedy()}") from error
    if lacking := status(also).lacking:
        raise MedXAIError(f"{_list(p.title for p in lacking)} still cannot be used: restart Slicer and try again.")
    return True


@contextlib.contextmanager
def constraints(upgraded):
    """The path of a constraints file that keeps pip from changing anything that is installed.

    Free are the packages named, and what nothing but those needs: a new PyTorch brings its own version of that along.
    """
    from packaging.version import InvalidVersion, Version

    found = {}
    for distribution in importlib.metadata.distributions():
        # The first of two with the same name is the one that Python imports.
        if name := distribution.metadata["Name"]:
            found.setdefault(_canonical(name), distribution)
    # Whoever installs packages may renew pip itself: nothing in Slicer imports it.
    free = {"pip", *map(_canonical, upgraded)}
    needed = _neededBy(found)
    while more := {name for name in found.keys() - free if needed.get(name) and needed[name] <= free}:
        free |= more
    lines = []
    for name in sorted(found.keys() - free):
        with contextlib.suppress(InvalidVersion):
            lines.append(f"{name}=={Version(found[name].version)}\n")
    with tempfile.TemporaryDirectory(prefix="MedXAI-") as folder:
        path = Path(folder) / "constraints.txt"
        path.write_text("".join(lines), encoding="utf-8")
        yield path


def _install(packages):
    from MedXAILib.errors import MedXAIError

    folder = settings.get("wheelFolder")
    if folder and not Path(folder).is_dir():
        raise MedXAIError(f"The folder with wheels '{folder}' is not there: choose another one in MedXAI's settings.")
    source = ["--no-index", "--find-links", folder] if folder else []
    if not folder and (torch := next((p for p in packages if p.name == "torch"), None)):
        _installTorch(torch)
        packages = [p for p in packages if p is not torch]
    if packages:
        with constraints(p.name for p in packages) as path:
            _pip(["--only-binary=:all:", *source, *(p.requirement for p in packages)], path)
    importlib.invalidate_caches()


def _pip(arguments, constraintsPath):
    try:
        from slicer.packaging import pip_install
    except ModuleNotFoundError:
        # Slicer 5.10
        slicer.util.pip_install([*arguments, "-c", str(constraintsPath)])
    else:
        pip_install(arguments, constraints=constraintsPath, requester="MedXAI")


def _installTorch(package):
    from MedXAILib.errors import MedXAIError

    try:
        import PyTorchUtils
    except ModuleNotFoundError:
        raise MedXAIError(
            "Slicer's extension 'PyTorch' is missing: install it in View > Extensions Manager, restart Slicer and try "
            "again."
        ) from None
    with constraints(["torch", "torchvision"]) as path:
        # It takes no constraints. As an address, because pip splits this variable at spaces.
        before = os.environ.get("PIP_CONSTRAINT")
        os.environ["PIP_CONSTRAINT"] = path.as_uri()
        try:
            PyTorchUtils.PyTorchUtilsLogic().installTorch(
                askConfirmation=False, torchVersionRequirement=package.requirement.removeprefix("torch")
            )
        finally:
            if before is None:
                del os.environ["PIP_CONSTRAINT"]
            else:
                os.environ["PIP_CONSTRAINT"] = before


def _reason(error):
    if isinstance(error, subprocess.CalledProcessError):
        return f"pip ended with code {error.returncode}"
    return next(iter(str(error).splitlines()), type(error).__name__)


def _remedy():
    log = "what pip says about it is in the Python console (View > Python Console). "
    if folder := settings.get("wheelFolder"):
        python = f"Python {sys.version_info.major}.{sys.version_info.minor}"
        return log + f"Put the wheels that it names, for {python} and this kind of computer, into '{folder}'."
    return log + "Check the network connection, or choose a folder with wheels in MedXAI's settings, and try again."


def _badge(status):
    lacking = sorted(status.lacking, key=lambda p: p.name != "torch")
    if not lacking:
        torch = next((p for p in status.packages if p.name == "torch"), None)
        if torch is None:
            return "Ready · another Python computes"
        return f"Ready · PyTorch {'.'.join(torch.installed.split('.')[:2])} ({torch.kind})"
    missing, old = (any(bool(p.installed) is there for p in lacking) for there in (False, True))
    what = " or ".join(word for word, there in (("missing", missing), ("too old", old)) if there)
    first, more = lacking[0].title, len(lacking) - 1
    if not more:
        return f"{first} is {what}"
    return f"{first} and {more} more package{'s' if more > 1 else ''} are {what}"


def _state(package):
    if not package.installed:
        return "missing"
    needed = "" if package.ready else f" is too old, {package.requirement.removeprefix(package.name)} is needed"
    return package.installed + (f" ({package.kind})" if package.kind else "") + needed


def _list(titles):
    *first, last = titles
    return f"{', '.join(first)} and {last}" if first else last


def _neededBy(found):
    """For each package the ones that need it here."""
    from packaging.requirements import InvalidRequirement, Requirement

    needed = {}
    for name, distribution in found.items():
        for line in distribution.requires or ():
            with contextlib.suppress(InvalidRequirement):
                required = Requirement(line)
                if required.marker is None or required.marker.evaluate({"extra": ""}):
                    needed.setdefault(_canonical(required.name), set()).add(name)
    return needed


def _canonical(name):
    from packaging.utils import canonicalize_name

    return canonicalize_name(name)


def _version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
