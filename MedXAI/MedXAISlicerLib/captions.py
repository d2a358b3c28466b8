"""Captions in the scene: a text node whose words know their map and their place in the scan."""

from __future__ import annotations

import json

import slicer

from MedXAISlicerLib import display, geometry, results


def addCaption(volumeNode, answer):
    """Add a caption of a volume to the scene: its text, the maps of its words, and a summary. Returns the text node."""
    said = answer.manifest
    textNode = slicer.mrmlScene.AddNewNodeByClass(
        "vtkMRMLTextNode", results.safeName(f"{volumeNode.GetName()} caption")
    )
    textNode.SetText(results.safeText(said["text"]))
    results.describe(textNode, answer)
    results.setPart(textNode, "Source", volumeNode)
    # In the order of the words, so that the first map is that of the first word that has one.
    used = [*dict.fromkeys(word["map"] for word in said["words"] if word["map"] is not None)]
    words = [{**word, "map": None if word["map"] is None else used.index(word["map"])} for word in said["words"]]
    textNode.SetAttribute("MedXAI.Words", json.dumps(words))
    for index in used:
        shown = [word["text"] for word in said["words"] if word["map"] == index]
        array, _ = answer.images[said["files"][index]]
        addMap(textNode, "Map", volumeNode, array, f"{textNode.GetName()} {' '.join(shown)}")
    results.addSummary(textNode, about(textNode))
    results.fileBesideSource(textNode)
    return textNode


def addMap(node, name, volumeNode, array, title, limit=None):
    """Add an array (D, H, W) as one of the maps of an explanation, in the place of a volume and in the map colours,
    which end at `limit` where it is given.

    Returns its index among those under this name.
    """
    mapNode = results.addMapNode(volumeNode, array, title)
    mapNode.SetAttribute("MedXAI.Signed", str(int(array.min() < 0)))
    display.colour(mapNode, limit)
    return results.addPart(node, name, mapNode)


def words(node):
    """The words that a caption knows more about, as in its attribute MedXAI.Words, but with the node of their map (None
    without one) and the place in RAS mm of the scene."""
    maps = results.parts(node, "Map")
    # The maps lie where the scan does, and may outlive it.
    anchor = next(filter(None, [results.part(node, "Source"), *maps.values()]), None)
    return [
        {**word, "map": maps.get(word["map"]), "place": inScene(word["place"], anchor)}
        for word in json.loads(node.GetAttribute("MedXAI.Words"))
    ]


def showWord(node, index):
    """Lay the map of a word over the scan, and move all slices to its place; without a map the scan is shown alone."""
    word = words(node)[index]
    display.showOneOf(node, word["map"], word["place"])


def about(node):
    """What a caption says, and where its words are seen, in lines."""
    lines = [f"The network says: {node.GetText()}"]
    for word in words(node):
        sure = "" if word["confidence"] is None else f", confidence {word['confidence']:.0%}"
        where = "" if word["place"] is None else f", seen at {results.inWords(word['place'])}"
        lines.append(f"'{word['text']}'{sure}{where}")
    return lines


def inScene(place, volumeNode):
    """A point below the transform of a volume, in RAS mm of the scene; None stays None."""
    if place is None or volumeNode is None:
        return place
    return list(geometry.transformBetween(volumeNode.GetParentTransformNode(), None).TransformPoint(place))
