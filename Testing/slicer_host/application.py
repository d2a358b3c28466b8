"""Stand-in for `slicer.app` and the main window."""

from types import SimpleNamespace

import slicer

from .layouts import LayoutManager
from .pythonqt import QtWidgets, qt


def qapplication():
    """Qt's own application, of which a process can have only one."""
    return QtWidgets.QApplication.instance() or QtWidgets.QApplication(["Slicer"])


class ModuleManager(qt.QObject):
    """Tells when modules go."""

    moduleAboutToBeUnloaded = qt.Signal(str)


class Application(qt.QObject):
    """What modules ask `slicer.app` for; all else is Qt's own application."""

    startupCompleted = qt.Signal()
    aboutToQuit = qt.Signal()
    applicationName = "Slicer"
    majorVersion, minorVersion, applicationVersion = 5, 13, "5.13.0"
    temporaryPath = slicerHome = ""

    def __init__(self, logic, folder):
        super().__init__()
        self._logic = logic
        self.temporaryPath = self.slicerHome = str(folder)
        self._modules = ModuleManager()
        self._layouts = LayoutManager(logic)

    def __getattr__(self, name):
        return getattr(QtWidgets.QApplication.instance(), name)

    def applicationLogic(self):
        return self._logic

    mrmlApplicationLogic = applicationLogic

    def mrmlScene(self):
        return slicer.mrmlScene

    def layoutManager(self):
        return self._layouts

    def moduleManager(self):
        return self._modules

    def userSettings(self):
        return qt.QSettings()

    settings = userSettings

    def testingEnabled(self):
        return False

    def commandOptions(self):
        return SimpleNamespace(testingEnabled=False, noMainWindow=False, pythonScript="")

    def translate(self, context, text):
        return text

    def setRenderPaused(self, paused):
        pass

    def pauseRender(self):
        pass

    resumeRender = pauseRender


class MainWindow(QtWidgets.QMainWindow):
    """Never on the screen, but there: dialogs ask whether there is one."""

    def __init__(self, select):
        super().__init__()
        self.name = "qSlicerMainWindow"
        self._selector = SimpleNamespace(selectModule=select, selectedModule="")

    def moduleSelector(self):
        return self._selector
