# Slicer writes ${PROJECT_NAME}Config.cmake here, for extensions that build on this one. Nothing does.
