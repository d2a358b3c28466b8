# What `include(${Slicer_USE_FILE})` gives to an extension: testing, and the macros for scripted modules.

include(CTest)

if(OWN_MACROS)
  include(${Slicer_DIR}/OwnMacros.cmake)
  return()
endif()

macro(slicerMacroBuildScriptedModule)
  cmake_parse_arguments(MODULE "WITH_GENERIC_TESTS;WITH_SUBDIR" "NAME" "SCRIPTS;RESOURCES" ${ARGN})
  if(MODULE_UNPARSED_ARGUMENTS OR NOT MODULE_NAME OR NOT MODULE_SCRIPTS)
    message(FATAL_ERROR "slicerMacroBuildScriptedModule: NAME and SCRIPTS, and nothing like ${MODULE_UNPARSED_ARGUMENTS}")
  endif()
  set(modules ${CMAKE_BINARY_DIR}/${Slicer_QTSCRIPTEDMODULES_LIB_DIR})
  set(folder ${modules})
  if(MODULE_WITH_SUBDIR)
    get_filename_component(subdir ${CMAKE_CURRENT_SOURCE_DIR} NAME)
    set(folder ${modules}/${subdir})
  endif()
  set(copies)
  foreach(file ${MODULE_SCRIPTS} ${MODULE_RESOURCES})
    if(NOT EXISTS ${CMAKE_CURRENT_SOURCE_DIR}/${file})
      message(FATAL_ERROR "slicerMacroBuildScriptedModule: there is no ${file}")
    endif()
    add_custom_command(
      OUTPUT ${folder}/${file}
      DEPENDS ${CMAKE_CURRENT_SOURCE_DIR}/${file}
      COMMAND ${CMAKE_COMMAND} -E copy ${CMAKE_CURRENT_SOURCE_DIR}/${file} ${folder}/${file}
      )
    list(APPEND copies ${folder}/${file})
  endforeach()
  add_custom_target(Copy${MODULE_NAME} ALL DEPENDS ${copies})
  install(DIRECTORY ${folder}/ DESTINATION ${Slicer_QTSCRIPTEDMODULES_LIB_DIR}/${subdir})
  unset(subdir)
endmacro()

macro(slicer_add_python_unittest)
  cmake_parse_arguments(UNITTEST "" "SCRIPT" "SLICER_ARGS" ${ARGN})
  if(NOT EXISTS ${UNITTEST_SCRIPT})
    message(FATAL_ERROR "slicer_add_python_unittest: there is no ${UNITTEST_SCRIPT}")
  endif()
  get_filename_component(name ${UNITTEST_SCRIPT} NAME_WE)
  add_test(NAME py_${name} COMMAND Slicer --testing)
endmacro()
