"""Traversals in the scene: a table of the steps, and the variants of the scan as a series that Slicer can play."""

from __future__ import annotations

import json

import slicer

from MedXAISlicerLib import deleting, display, results, windows

_KNOWN = ("steps", "along", "text", "flipped", "cohort", "path")


def addingTraversal(volumeNode, answer):
    """Add variants of a volume to the scene, in steps: a table of what is said of them, a series of them, another of
    what is changed in them, and a summary. A generator of the table node."""
    said = answer.manifest
    name = volumeNode.GetName()
    steps = said["steps"]
    tableNode = results.addTable(results.safeName(f"{name} variants"), columns(said))
    results.describe(tableNode, answer)
    results.setPart(tableNode, "Source", volumeNode)
    tableNode.SetAttribute("MedXAI.Traversal", json.dumps({known: said[known] for known in _KNOWN}))
    yield tableNode
    arrays, affine = [answer.images[file][0] for file in said["files"]], answer.images[said["files"][0]][1]
    titles = [f"{number}: {step['position']:+.3g}" for number, step in enumerate(steps, 1)]
    variants = [_addVolume(volumeNode, array, affine) for array in arrays]
    browserNode, variantNode = _play(tableNode, volumeNode, variants, titles, "variant")
    results.setPart(tableNode, "Variant", variantNode)
    results.setPart(tableNode, "Browser", browserNode)
    yield tableNode
    scan = _nearest(steps)
    here = arrays[scan]
    changes = [_addVolume(volumeNode, array - here, affine) for array in arrays]
    # One window for all of them: what is changed more looks so.
    limits = [display.windowLimit(array - here) for array in arrays if (array != here).any()]
    for node in changes:
        # What the series does not know of a volume is lost when it is played.
        for attribute, value in {"Signed": "1", "Index": "0", "Meaning": "Added / taken away"}.items():
            node.SetAttribute(f"MedXAI.{attribute}", value)
        display.colour(node, max(limits, default=1.0))
    _, changeNode = _play(tableNode, volumeNode, changes, titles, "change", browserNode)
    results.addPart(tableNode, "Map", changeNode)
    setStep(tableNode, scan if said["flipped"] is None else said["flipped"])
    results.addSummary(tableNode, about(tableNode))
    results.fileBesideSource(tableNode)
    yield tableNode


def read(node):
    """What is known, as in the attribute MedXAI.Traversal: the `steps`, `along` what, `text`, the step at which the
    decision has `flipped` (or None), the `cohort` with the `path` of the steps in it, and `here`, the step that is the
    scan itself or nearest to it."""
    said = json.loads(node.GetAttribute("MedXAI.Traversal"))
    return {**said, "here": _nearest(said["steps"])}


def columns(said):
    """What is said of the steps, as columns of texts by their titles."""
    steps = said["steps"]
    scores, numbers = (
        list(dict.fromkeys(name for step in steps for name in step[kind])) for kind in ("scores", "numbers")
    )
    found = {"Step": [f"{step['position']:+.3g}" for step in steps]}
    found["Remark"] = [remark(said, index) for index in range(len(steps))]
    found |= {name: [_text(step["scores"].get(name), ".0%") for step in steps] for name in scores}
    return found | {
        name.replace("_", " "): [_text(step["numbers"].get(name), ".3g") for step in steps] for name in numbers
    }


def remark(said, index):
    """What is special about a step, in words; empty where nothing is."""
    remarks = {
        "this scan": index == _nearest(said["steps"]),
        "the answer flips": index == said["flipped"],
        "strange": said["steps"][index]["strange"],
    }
    return ", ".join(words for words, holds in remarks.items() if holds)


def step(node):
    """Which step is shown."""
    browserNode = results.part(node, "Browser")
    return 0 if browserNode is None else browserNode.GetSelectedItemNumber()


def setStep(node, index):
    """Show a step, in all views and in Slicer's own browser of series."""
    results.part(node, "Browser").SetSelectedItemNumber(index)


def about(node):
    """What the variants say, and each of them, in lines."""
    said = read(node)
    rows = columns(said)
    lines = [*filter(None, [said["text"]]), f"Variants of the scan along: {said['along']}"]
    for index in range(len(said["steps"])):
        known = {title: values[index] for title, values in rows.items() if values[index]}
        lines.append(", ".join(value if title == "Remark" else f"{title} {value}" for title, value in known.items()))
    return lines


def _nearest(steps):
    return min(range(len(steps)), key=lambda index: abs(steps[index]["position"]))


def _text(value, form):
    return "" if value is None else format(value, form)


def _addVolume(volumeNode, array, affine):
    """A variant in its own place, below the transform of the scan."""
    node = slicer.util.addVolumeFromArray(array, affine[:, [2, 1, 0, 3]], nodeClassName="vtkMRMLScalarVolumeNode")
    node.SetAndObserveTransformNodeID(volumeNode.GetTransformNodeID())
    node.CreateDefaultDisplayNodes()
    windows.copyWindow(node.GetDisplayNode(), volumeNode.GetDisplayNode())
    return node


def _play(tableNode, volumeNode, nodes, titles, what, browserNode=None):
    """Make volumes a series of the traversal, and remove them. Returns its browser and the volume that is played."""
    title = results.safeName(f"{volumeNode.GetName()} {what}")
    browserNode, playedNode = display.sequence(nodes, titles, title, browserNode)
    results.addPart(tableNode, "Sequence", browserNode.GetSequenceNode(playedNode))
    results.setPart(playedNode, "Source", volumeNode)
    for node in nodes:
        deleting.remove(node)
    return browserNode, playedNode
