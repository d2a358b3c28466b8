"""Which part of the scan a parameter means: a region of interest, or a segment."""

import qt
import slicer
from slicer.i18n import tr as _

_KINDS = ["vtkMRMLMarkupsROINode", "vtkMRMLSegmentationNode"]


class RegionChooser:
    """A selector of nodes, and of a segment where that is a segmentation. `widget` is both, `value()` what is chosen:
    an ROI node, a segment as (segmentation node, segment ID), or None. `onChange()` follows every choice,
    `onAdded(node)` a new region of interest; masks can only be segments."""

    def __init__(self, value, onChange, onAdded, mask=False):
        self.widget = qt.QWidget()
        # Names of nodes may be long, and would make the whole panel as wide.
        self.widget.setSizePolicy(qt.QSizePolicy.Ignored, qt.QSizePolicy.Preferred)
        self.widget.minimumWidth = 100
        layout = qt.QVBoxLayout(self.widget)
        layout.setContentsMargins(0, 0, 0, 0)
        self._nodes, self._segments = slicer.qMRMLNodeComboBox(), slicer.qMRMLSegmentSelectorWidget()
        layout.addWidget(self._nodes)
        layout.addWidget(self._segments)
        self._nodes.nodeTypes = ["vtkMRMLSegmentationNode"] if mask else _KINDS
        self._nodes.noneEnabled = True
        self._nodes.noneDisplay = _("Choose a segment") if mask else _("Choose a region of interest or a segment")
        self._nodes.addEnabled, self._nodes.removeEnabled = not mask, False
        self._nodes.setMRMLScene(slicer.mrmlScene)
        self._segments.segmentationNodeSelectorVisible = False
        self._segments.setMRMLScene(slicer.mrmlScene)
        node, segment = value if isinstance(value, tuple) else (value, "")
        self._nodes.setCurrentNode(node)
        self._showSegments()
        if segment:
            self._segments.setCurrentSegmentID(segment)
        self._onChange = onChange
        self._nodes.connect("currentNodeChanged(vtkMRMLNode*)", self._nodeChosen)
        self._nodes.connect("nodeAddedByUser(vtkMRMLNode*)", onAdded)
        self._segments.connect("currentSegmentChanged(QString)", self._segmentChosen)

    def value(self):
        """What is chosen."""
        node = self._nodes.currentNode()
        if node is None or not node.IsA("vtkMRMLSegmentationNode"):
            return node
        segment = self._segments.currentSegmentID()
        return (node, segment) if segment else None

    def _showSegments(self):
        node = self._nodes.currentNode()
        isSegmentation = node is not None and node.IsA("vtkMRMLSegmentationNode")
        self._segments.visible = isSegmentation
        self._segments.setCurrentNode(node if isSegmentation else None)

    def _nodeChosen(self, _node):
        self._showSegments()
        self._onChange()

    def _segmentChosen(self, _segmentID):
        self._onChange()
