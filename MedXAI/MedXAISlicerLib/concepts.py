"""Concept scores in the scene: a table of concepts, of which each may have a map."""

from __future__ import annotations

import json

from MedXAISlicerLib import captions, display, results


def addConcepts(volumeNode, answer):
    """Add what concepts are to a network, asked about a volume, to the scene: a table of them, their maps, and a
    summary. Returns the table node."""
    *_, tableNode = addingConcepts(volumeNode, answer)
    return tableNode


def addingConcepts(volumeNode, answer):
    """The same in steps: a generator of the table node."""
    said = answer.manifest
    columns = {"Concept": lambda concept: concept["name"], "Layer": lambda concept: concept["layer"]}
    columns |= {"In this scan": amount, said["scored"]: score}
    tableNode = results.addTable(
        results.safeName(f"{volumeNode.GetName()} concepts"),
        {title: [*map(cell, said["concepts"])] for title, cell in columns.items()},
    )
    results.describe(tableNode, answer)
    results.setPart(tableNode, "Source", volumeNode)
    # The concept that matters most has the first map, which is shown first.
    ranked = sorted(said["concepts"], key=lambda concept: -abs(concept["score"] or 0))
    used = [*dict.fromkeys(concept["map"] for concept in ranked if concept["map"] is not None)]
    kept = [{**c, "map": None if c["map"] is None else used.index(c["map"])} for c in said["concepts"]]
    known = {name: said[name] for name in ("scored", "text", "alike")}
    tableNode.SetAttribute("MedXAI.Concepts", json.dumps({**known, "concepts": kept}))
    yield tableNode
    for index in used:
        names = " ".join(concept["name"] for concept in said["concepts"] if concept["map"] == index)
        array, _ = answer.images[said["files"][index]]
        captions.addMap(tableNode, "Map", volumeNode, array, f"{tableNode.GetName()} {names}")
        yield tableNode
    results.addSummary(tableNode, about(tableNode))
    results.fileBesideSource(tableNode)
    yield tableNode


def read(node):
    """What is known, as in the attribute MedXAI.Concepts: `text`, what is `scored`, the cosines between concepts that
    are `alike`, and the `concepts`, each with the node of its map (None without one)."""
    said, maps = json.loads(node.GetAttribute("MedXAI.Concepts")), results.parts(node, "Map")
    return {**said, "concepts": [{**concept, "map": maps.get(concept["map"])} for concept in said["concepts"]]}


def showConcept(node, index):
    """Lay the map of a concept over the scan, and move all slices to its peak; without a map the scan is shown
    alone."""
    display.showOneOf(node, read(node)["concepts"][index]["map"])


def amount(concept):
    """How much of a concept is in the scan, in words; empty when nobody knows."""
    if concept["value"] is None:
        return ""
    return f"{concept['value']:.3g} {concept['unit']}" if concept["unit"] else f"{concept['value']:.2f}"


def score(concept):
    """The score of a concept in words, or why there is none."""
    if concept["score"] is None:
        return concept["refused"]
    # Zero has no side.
    return f"{round(concept['score'], 2) + 0.0:+.2f}" + (
        "" if concept["interval"] is None else f" ± {concept['interval']:.2f}"
    )


def about(node):
    """What the concepts say, and each of them, in lines."""
    said = read(node)
    lines = [*filter(None, [said["text"]]), f"Concepts, with their {said['scored']}"]
    for concept in said["concepts"]:
        layer = f" at {concept['layer']}" if concept["layer"] else ""
        there = f", {amount(concept)} in this scan" if amount(concept) else ""
        lines.append(f"'{concept['name']}'{layer}{there}: {score(concept)}")
    return lines
