"""What a person has chosen in the panels: kept in the scene, and saved with it."""

from typing import Annotated, Union

from slicer import (
    vtkMRMLMarkupsFiducialNode,
    vtkMRMLMarkupsROINode,
    vtkMRMLScalarVolumeNode,
    vtkMRMLSegmentationNode,
    vtkMRMLTableNode,
    vtkMRMLTextNode,
)
from slicer.parameterNodeWrapper import WithinRange, parameterNodeWrapper


@parameterNodeWrapper
class MedXAIParameterNode:
    """The choices of one scene. Empty text stands for: nothing chosen yet, or as the network likes it."""

    model: str
    """Path of the bundle."""
    inputVolume: vtkMRMLScalarVolumeNode
    moreChannels: list[vtkMRMLScalarVolumeNode]
    regionKind: str = "whole"
    """One of whole, point, roi, segment."""
    point: vtkMRMLMarkupsFiducialNode
    roi: vtkMRMLMarkupsROINode
    segmentation: vtkMRMLSegmentationNode
    segment: str
    """ID of the segment."""
    target: str
    """Name of a class; empty for what the network predicts."""
    labelWithin: str = "predicted"
    """Of a segmentation network, where its label is explained: predicted, everywhere or segment."""
    withinSegmentation: vtkMRMLSegmentationNode
    withinSegment: str
    """ID of the segment."""
    labelMeasure: str = "logit"
    """What of the label is explained: logit, volume or dice."""
    method: str = "gradcam"
    methodParameters: str = "{}"
    """JSON: what was changed from its default, by method and name."""
    explanation: Union[vtkMRMLScalarVolumeNode, vtkMRMLTextNode, vtkMRMLTableNode, None]  # noqa: UP007 (older Slicers know no |)
    """The one that is shown."""
    compared: vtkMRMLScalarVolumeNode
    """The map beside it."""
    opacity: Annotated[float, WithinRange(0, 1)] = 0.6
    threshold: Annotated[float, WithinRange(0, 1)] = 0.2
