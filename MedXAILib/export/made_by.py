"""What every DICOM object says of where it comes from, the same for all of one export."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any

from MedXAILib import __version__
from MedXAILib.explanation import Provenance

if TYPE_CHECKING:
    from highdicom import AlgorithmIdentificationSequence
    from highdicom.sr import CodedConcept

_SCHEME = "99MEDXAI"
_ROOT = r"(?:/|[A-Za-z]:[\\/]|\\\\)"
# An apostrophe in a name ("O'Brien") does not end what is quoted.
_PATH = re.compile(rf"(?<='){_ROOT}(?:[^']|'(?=\w))*(?=')|(?<![\w.:/\\]){_ROOT}[^\s'\"]*[\\/][^\s'\"]*")


def equipment(made: Provenance) -> dict[str, Any]:
    """Manufacturer, model and version; software has no serial number, and the fingerprint of the network tells it from
    others."""
    return {
        "manufacturer": "MedXAI",
        "manufacturer_model_name": "MedXAILib",
        "software_versions": __version__,
        "device_serial_number": str(made.model.get("fingerprint", ""))[:64] or "unknown",
    }


def instance(series_number: int, instance_number: int = 1) -> dict[str, Any]:
    """A series and an instance of its own, in UTF-8 whatever the source is in: what it says is in any language."""
    from highdicom import UID

    return {
        "series_instance_uid": UID(),
        "series_number": series_number,
        "sop_instance_uid": UID(),
        "instance_number": instance_number,
        "specific_character_set": "ISO_IR 192",
    }


def algorithm(made: Provenance) -> AlgorithmIdentificationSequence:
    """The method with its parameters, and the network that it was asked of."""
    from highdicom import AlgorithmIdentificationSequence
    from pydicom.sr.codedict import codes

    asked = {"network": made.model.get("name"), "fingerprint": made.model.get("fingerprint"), "seed": made.seed}
    parameters = {name: json.dumps(placeless(value)) for name, value in {**made.parameters, **asked}.items()}
    return AlgorithmIdentificationSequence(
        name=long_string(made.title or made.method),
        family=codes.DCM.ArtificialIntelligence,
        version=__version__,
        source="MedXAI",
        parameters=parameters,
    )


def without_folders(text: str) -> str:
    """`text` with the absolute paths in it, quoted or free of spaces, by their last name alone."""
    return _PATH.sub(lambda found: PureWindowsPath(found[0]).name or found[0], text)


def placeless(value: Any) -> Any:
    """Paths without their folders, in lists and mappings, too: they name people and machines, and objects are sent
    around."""
    if isinstance(value, Mapping):
        return {name: placeless(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [placeless(one) for one in value]
    kinds = (PurePosixPath, PureWindowsPath)
    return next((kind(value).name for kind in kinds if isinstance(value, str) and kind(value).is_absolute()), value)


def coded(meaning: str) -> CodedConcept:
    """`meaning` in MedXAI's own coding scheme, for which no standard has a code."""
    from highdicom.sr import CodedConcept

    short = re.sub(r"[^A-Za-z0-9]+", "_", meaning).strip("_")
    if short.replace("_", " ") != meaning or len(short) > 16:
        # Two meanings never have one code.
        short = f"{short[:9]}_{hashlib.sha256(meaning.encode()).hexdigest()[:6]}"
    return CodedConcept(value=short, scheme_designator=_SCHEME, meaning=long_string(meaning))


def long_string(text: str) -> str:
    """`text` as DICOM's LO takes it: 64 characters, no backslash, no control characters."""
    plain = "".join(c if c.isprintable() and c != "\\" else " " for c in text).strip()
    return plain if len(plain) <= 64 else plain[:63] + "…"
