"""What was changed from the defaults of each method's parameters: kept in the scene, and saved with it.

The parameter node holds it as JSON. A region of the scene, an ROI node or a segment as (segmentation node, segment ID),
is a reference of the parameter node, which survives what a node's ID or name does not.
"""

from __future__ import annotations

import json


def read(parameterNode, method):
    """The changed parameters of a method, by name. A region whose node is gone is not there either."""
    kept = json.loads(parameterNode.methodParameters).get(method, {})
    values = {name: _region(parameterNode, method, name, value) for name, value in kept.items()}
    return {name: value for name, value in values.items() if value is not None}


def write(parameterNode, method, values):
    """Keep the changed parameters of a method."""
    kept = {}
    for name, value in values.items():
        node, segment = value if isinstance(value, tuple) else (value, "")
        if hasattr(node, "GetID"):
            parameterNode.parameterNode.SetNodeReferenceID(_role(method, name), node.GetID())
            kept[name] = {"segment": segment}
        else:
            kept[name] = value
    parameterNode.methodParameters = json.dumps({**json.loads(parameterNode.methodParameters), method: kept})


def _region(parameterNode, method, name, value):
    if not isinstance(value, dict):
        return value
    node = parameterNode.parameterNode.GetNodeReference(_role(method, name))
    return node if node is None or not value["segment"] else (node, value["segment"])


def _role(method, name):
    return f"MedXAI.Parameter.{method}.{name}"
