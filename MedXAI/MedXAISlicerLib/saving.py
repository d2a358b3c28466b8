"""Maps of the scene as folders on the disk, for the library and the command line."""

from __future__ import annotations

import json
import shutil

import slicer

from MedXAISlicerLib import geometry, results


def save(mapNode, folder):
    """Write a map to a new folder as `MedXAILib.load_explanation` reads it. Returns the folder.

    Raises:
        MedXAIError: when the folder is there already, or cannot be written; then nothing of it is left.
    """
    from MedXAILib.errors import MedXAIError

    channels, interval = results.part(mapNode, "Channels"), results.part(mapNode, "Interval")
    manifest = {
        "kind": results.kind(mapNode),
        "provenance": results.provenance(mapNode),
        "residual": results.residual(mapNode),
        "files": ["map.nrrd"],
        **({} if interval is None else {"intervals": ["interval.nrrd"]}),
        "affine": geometry.affine(mapNode).tolist(),
        "signed": results.isSigned(mapNode),
        "batched": False,
    }
    try:
        folder.mkdir()
    except OSError as error:
        raise MedXAIError(f"'{folder}' cannot be made ({error.strerror}): choose another folder.") from error
    files, card = {"explanation.json": manifest}, results.card(mapNode)
    if card is not None:
        files["trust.json"] = card
    images = {"map": mapNode if channels is None else channels, "interval": interval}
    try:
        for name, node in images.items():
            writer = slicer.vtkMRMLVolumeArchetypeStorageNode()
            writer.SetFileName(str(folder / f"{name}.nrrd"))
            if node is not None and not writer.WriteData(node):
                raise OSError(0, f"the {name} could not be written")
        for name, data in files.items():
            (folder / name).write_text(json.dumps(data, indent=2, ensure_ascii=False), encoding="utf-8")
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise MedXAIError(f"'{folder}' cannot be written ({error.strerror}): make room, or choose another.") from error
    return folder
