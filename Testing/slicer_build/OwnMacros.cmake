# Slicer's own macro for scripted modules, from checkouts of Slicer and CTK, to see that the stand-in packs the same.

set(CTK_CMAKE_DIR $ENV{MEDXAI_CTK_SOURCE}/CMake)
list(APPEND CMAKE_MODULE_PATH $ENV{MEDXAI_SLICER_SOURCE}/CMake ${CTK_CMAKE_DIR})
set(Slicer_USE_PYTHONQT ON)
set(Slicer_INSTALL_QTSCRIPTEDMODULES_LIB_DIR ${Slicer_QTSCRIPTEDMODULES_LIB_DIR})

# What compiles the scripts; that it is another Python than Slicer's makes no difference here.
set(PYTHONINTERP_FOUND TRUE)
set(PYTHONLIBS_FOUND TRUE)
set(PYTHON_LIBRARIES ${PYTHON_EXECUTABLE})

include(ctkFunctionExtractOptimizedLibrary)
include(ctkMacroCompilePythonScript)
include(SlicerMacroBuildScriptedModule)
