"""The colours of maps: two colour tables that live in the scene, are saved with it and used by every map.

They are those of the reports. Lightness rises with the absolute value, so that the order is seen without colour vision;
blue and orange are told apart by nearly everyone.
"""

from __future__ import annotations

import numpy as np
import slicer

# (value, red, green, blue); in between is interpolated.
UNSIGNED = ((0, 60, 10, 90), (0.25, 150, 20, 110), (0.5, 225, 60, 60), (0.75, 250, 145, 20), (1, 255, 240, 130))
SIGNED = ((-1, 170, 225, 255), (-0.5, 40, 130, 235), (0, 40, 40, 60), (0.5, 220, 85, 15), (1, 255, 210, 110))

FAINTEST = 0.2
"""What is less than this part of the window is transparent, so that the scan is seen."""

_KIND = "MedXAI.Colours"
_CATEGORY = "MedXAI"
_COUNT = 256


def colourNode(signed):
    """The colour table of signed or unsigned maps in this scene; made when it is not there yet."""
    kind = "signed" if signed else "unsigned"
    for node in slicer.util.getNodesByClass("vtkMRMLColorTableNode"):
        if node.GetAttribute(_KIND) == kind:
            return node
    node = addTable(f"MedXAI {kind}", signed)
    node.SetAttribute(_KIND, kind)
    return node


def addTable(name, signed):
    """Add a colour table to the scene."""
    node = slicer.vtkMRMLColorTableNode()
    node.SetTypeToUser()
    node.SetName(name)
    node.SetAttribute("Category", _CATEGORY)
    node.SetNumberOfColors(_COUNT)
    fill(node, signed, FAINTEST)
    # A hidden colour node is not saved with the scene.
    node.SetHideFromEditors(False)
    return slicer.mrmlScene.AddNode(node)


def isOurs(node):
    """Whether a colour node is one for maps."""
    return node is not None and node.GetAttribute("Category") == _CATEGORY


def fill(node, signed, faintest):
    """Set the colours of a table, with nothing where a value is less than `faintest` of the window.

    A display node has one threshold range only, which cannot hide what lies around zero of a signed map. The table can:
    slice views leave out colours whose opacity is zero.
    """
    positions = np.linspace(-1 if signed else 0, 1, _COUNT)
    colours = interpolated(positions, signed)
    modifying = node.StartModify()
    for i, (position, colour) in enumerate(zip(positions, colours, strict=True)):
        node.SetColor(i, f"{position:+.0%}" if signed else f"{position:.0%}", *colour, float(abs(position) >= faintest))
    node.EndModify(modifying)


def interpolated(positions, signed):
    """Colours (n, 3), 0 to 1, of positions between -1 or 0 and 1."""
    at, *channels = np.transpose(SIGNED if signed else UNSIGNED)
    return np.stack([np.interp(positions, at, channel) for channel in channels], axis=-1) / 255
