"""The views of a layout, drawn off the screen by Slicer's own displayable managers."""

import numpy as np
import slicer
import slicer_scene


class _Drawn:
    """A picture of one view node."""

    def draw(self, width, height):
        self.window.SetSize(width, height)
        return self.picture()

    def close(self):
        self.group.SetMRMLDisplayableNode(None)
        self.window.Finalize()


class SliceDrawing(_Drawn, slicer_scene.SliceWindow):
    """What the slice widget shows."""

    def __init__(self, app_logic, logic):
        super().__init__(app_logic, logic, (400, 300))

    def draw(self, width, height):
        self.logic.ResizeSliceNode(width, height)
        return super().draw(width, height)


class SpaceDrawing(_Drawn, slicer_scene._View):
    """What the 3-D widget shows."""

    def __init__(self, app_logic, node):
        managers = slicer_scene._IN_SPACE
        super().__init__(slicer.vtkMRMLThreeDViewDisplayableManagerFactory, managers, app_logic, (400, 300))
        self.renderer.SetUseDepthPeeling(True)
        self.group.SetMRMLDisplayableNode(node)

    def draw(self, width, height):
        self.window.SetSize(width, height)
        self.window.Render()
        self.renderer.ResetCamera()
        return super().draw(width, height)


class SliceWidget:
    """A slice view: its logic at once, its drawing when somebody looks."""

    def __init__(self, app_logic, node):
        self._app_logic, self._node, self._drawing = app_logic, node, None
        self._logic = slicer.vtkMRMLSliceLogic()
        self._logic.SetMRMLApplicationLogic(app_logic)
        self._logic.SetMRMLScene(slicer.mrmlScene)
        self._logic.SetSliceNode(node)
        app_logic.GetSliceLogics().AddItem(self._logic)

    def sliceLogic(self):
        return self._logic

    def mrmlSliceNode(self):
        return self._node

    def mrmlSliceCompositeNode(self):
        return self._logic.GetSliceCompositeNode()

    def fitSliceToBackground(self):
        self._logic.FitSliceToBackground()

    def draw(self, width, height):
        self._drawing = self._drawing or SliceDrawing(self._app_logic, self._logic)
        return self._drawing.draw(width, height)

    def close(self):
        if self._drawing is not None:
            self._drawing.close()
        self._app_logic.GetSliceLogics().RemoveItem(self._logic)
        self._logic.SetMRMLScene(None)


class SpaceWidget:
    """A 3-D view."""

    def __init__(self, app_logic, node):
        self._app_logic, self._node, self._drawing = app_logic, node, None

    def mrmlViewNode(self):
        return self._node

    def draw(self, width, height):
        self._drawing = self._drawing or SpaceDrawing(self._app_logic, self._node)
        return self._drawing.draw(width, height)

    def close(self):
        if self._drawing is not None:
            self._drawing.close()


class OtherWidget:
    """A view that is not drawn."""

    def __init__(self, app_logic, node):
        self._node = node

    def draw(self, width, height):
        return np.full((height, width, 3), 96, np.uint8)

    def close(self):
        pass
