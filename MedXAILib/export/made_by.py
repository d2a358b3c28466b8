"""What every DICOM object says of where it comes from, the same for all of one export."""

from __future__ import annotations

import hashlib
import json
import re
from typing import TYPE_CHECKING, Any

from MedXAILib import __version__
from MedXAILib.explanation import Provenance
from MedXAILib.placeless import placeless

if TYPE_CHECKING:
    from highdicom import AlgorithmIdentificationSequence
    from highdicom.sr import CodedConcept

_SCHEME = "99MEDXAI"


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
