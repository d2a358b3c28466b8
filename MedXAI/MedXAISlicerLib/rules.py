"""Rules in the scene: a table of them."""

from __future__ import annotations

import json

from MedXAISlicerLib import results


def addRules(volumeNode, answer):
    """Add the rules by which a network says what to the scene: a table of them, and a summary. Returns the table
    node."""
    said = answer.manifest
    known = {name: said[name] for name in ("rules", "text", "values")}
    found = _read(said["rules"])
    columns = {
        "Rule": [rule.sentence for rule in found],
        "Completeness": [float(rule.completeness) for rule in found],
        "Correctness": [float(rule.correctness) for rule in found],
        "Cases": [float(rule.cases) for rule in found],
        "This scan": ["applies" if rule.applies else "" for rule in found],
    }
    tableNode = results.addTable(results.safeName(f"{volumeNode.GetName()} rules"), columns)
    results.describe(tableNode, answer)
    results.setPart(tableNode, "Source", volumeNode)
    tableNode.SetAttribute("MedXAI.Rules", json.dumps(known))
    results.addSummary(tableNode, about(tableNode))
    results.fileBesideSource(tableNode)
    return tableNode


def read(node):
    """What is known, as in the attribute MedXAI.Rules: `text`, the `values` of the scan, and the `rules`, as
    `MedXAILib.rule.Rule`."""
    said = json.loads(node.GetAttribute("MedXAI.Rules"))
    return {**said, "rules": _read(said["rules"])}


def about(node):
    """What the rules say, in lines."""
    said = read(node)
    lines = [*filter(None, [said["text"]]), "Rules by which the network says what"]
    return [*lines, *(rule.sentence + (" (this scan)" if rule.applies else "") for rule in said["rules"])]


def _read(known):
    from MedXAILib.rule import Rule

    return [Rule.read(one) for one in known]
