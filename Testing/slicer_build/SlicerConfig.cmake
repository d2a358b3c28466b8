# Stands in for a build of 3D Slicer, so that the extension can be packaged without one (Testing/test_packaging.py).
#
# It offers the names that an extension's CMakeLists.txt uses. A scripted module is treated as Slicer treats it: missing
# files stop the configuration, listed files are copied into the folder of scripted modules when it is built, and
# whatever lies in that folder is packaged. Left out are byte-compilation, the launcher, the upload and the running of
# tests inside Slicer.

set(Slicer_DIR ${CMAKE_CURRENT_LIST_DIR})
set(Slicer_USE_FILE ${Slicer_DIR}/UseSlicer.cmake)
set(Slicer_EXTENSION_GENERATE_CONFIG ${Slicer_DIR}/ExtensionConfig.cmake)
set(Slicer_EXTENSION_CPACK ${Slicer_DIR}/ExtensionCPack.cmake)
set(Slicer_QTSCRIPTEDMODULES_LIB_DIR lib/Slicer-5.13/qt-scripted-modules)
