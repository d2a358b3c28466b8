"""The chest CTs that ship with MedXAI, in Slicer's Sample Data module: they load without a network connection."""

from pathlib import Path

CATEGORY = "MedXAI"
# Name, file, and its SHA-256.
SAMPLES = (
    ("Chest CT with nodule", "chest_ct_nodule", "43e2b62a9d61bb35ec4c5ae0091d4c09cbd8c582f20e48edcd39adda0a8b667e"),
    ("Chest CT with mass", "chest_ct_mass", "3c4cfe1fb89ab26b9b312b86e96875d1f9701dd8980515b77f51bc79efeb38ee"),
)

_ICONS = Path(__file__).resolve().parents[1] / "Resources" / "Icons"


def registerSampleData():
    """Add them to the Sample Data module; once Slicer has started, because that module may be loaded after this one."""
    from SampleData import SampleDataLogic

    from MedXAILib.resources import path

    # Slicer 5.10 shows the category's own name.
    if hasattr(SampleDataLogic, "registerCustomSampleDataCategory"):
        SampleDataLogic.registerCustomSampleDataCategory(category=CATEGORY, title="MedXAI")
    for name, file, sha256 in SAMPLES:
        SampleDataLogic.registerCustomSampleDataSource(
            category=CATEGORY,
            sampleName=name,
            thumbnailFileName=str(_ICONS / f"{file}.png"),
            uris=path(f"SampleData/{file}.nrrd").as_uri(),
            fileNames=f"MedXAI_{file}.nrrd",
            nodeNames=name,
            checksums=f"SHA256:{sha256}",
        )
