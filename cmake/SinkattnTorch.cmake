# SPDX-License-Identifier: Apache-2.0
# The torch operators on the stable ABI, one library for CPU and CUDA builds of torch >= 2.10.
# find_package(Torch) is avoided: it brings CUDA detection and compile flags of its own. Only the
# headers and the empty libtorch.so are used, and torch is not imported to find them.
set(SINKATTN_WITH_TORCH OFF)
file(GLOB sinkattn_torch_sources CONFIGURE_DEPENDS "${PROJECT_SOURCE_DIR}/bindings/torch/*.cpp")
if(NOT SINKATTN_TORCH OR NOT sinkattn_torch_sources)
  return()
endif()

execute_process(
  COMMAND "${Python3_EXECUTABLE}" -c
    "import importlib.util as u; s = u.find_spec('torch'); print(s.submodule_search_locations[0] if s else '')"
  OUTPUT_VARIABLE SINKATTN_TORCH_DIR OUTPUT_STRIP_TRAILING_WHITESPACE
  RESULT_VARIABLE sinkattn_torch_result)
set(sinkattn_torch_shim "${SINKATTN_TORCH_DIR}/include/torch/csrc/stable/library.h")
if(NOT sinkattn_torch_result EQUAL 0 OR NOT EXISTS "${sinkattn_torch_shim}")
  if(NOT SINKATTN_TORCH STREQUAL "AUTO")
    message(FATAL_ERROR "SINKATTN_TORCH=ON: ${Python3_EXECUTABLE} finds no torch >= 2.10 (headers). "
                        "Install torch, and build with --no-build-isolation.")
  endif()
  message(STATUS "sinkattn: no torch >= 2.10 for ${Python3_EXECUTABLE}, torch operators are left out")
  return()
endif()
set(SINKATTN_WITH_TORCH ON)

# libtorch.so is an empty shell that a linker drops as unneeded. It must stay in DT_NEEDED: the weak
# stream symbol of a CUDA torch resolves through it and stays null under a CPU torch.
set(CMAKE_CXX_LINK_LIBRARY_USING_keep_needed
    "LINKER:--push-state,--no-as-needed" "<LINK_ITEM>" "LINKER:--pop-state")
set(CMAKE_CXX_LINK_LIBRARY_USING_keep_needed_SUPPORTED TRUE)

add_library(sinkattn_torch MODULE ${sinkattn_torch_sources})
target_include_directories(sinkattn_torch PRIVATE "${PROJECT_SOURCE_DIR}/src")
target_include_directories(sinkattn_torch SYSTEM PRIVATE "${SINKATTN_TORCH_DIR}/include")
# 2.10, the oldest torch the library loads on. The macro also bars every unstable torch header.
target_compile_definitions(sinkattn_torch PRIVATE TORCH_TARGET_VERSION=0x020a000000000000)
target_link_libraries(sinkattn_torch PRIVATE
  sinkattn_core "$<LINK_LIBRARY:keep_needed,${SINKATTN_TORCH_DIR}/lib/libtorch.so>")
target_link_options(sinkattn_torch PRIVATE LINKER:--exclude-libs,ALL "$<$<CONFIG:Release>:-s>")
set_target_properties(sinkattn_torch PROPERTIES
  OUTPUT_NAME sinkattn_torch
  PREFIX lib
  LINKER_LANGUAGE CXX
  SKIP_BUILD_RPATH ON
  LIBRARY_OUTPUT_DIRECTORY "${SINKATTN_TORCH_OUTPUT_DIR}")

# The Python module of plain calls, for the stable ABI: it needs Python's header and no library.
# Without the header the package works through the operators alone.
execute_process(
  COMMAND "${Python3_EXECUTABLE}" -c "import sysconfig; print(sysconfig.get_path('include'))"
  OUTPUT_VARIABLE sinkattn_python_include OUTPUT_STRIP_TRAILING_WHITESPACE)
set(SINKATTN_WITH_DIRECT OFF)
if(NOT EXISTS "${sinkattn_python_include}/Python.h")
  message(STATUS "sinkattn: no Python.h for ${Python3_EXECUTABLE}, the direct entry is left out")
elseif(NOT EXISTS "${SINKATTN_TORCH_DIR}/include/ATen/dlpack.h")
  message(STATUS "sinkattn: this torch has no ATen/dlpack.h, the direct entry is left out")
else()
  set(SINKATTN_WITH_DIRECT ON)
  add_library(sinkattn_direct MODULE "${PROJECT_SOURCE_DIR}/bindings/python/direct.cpp")
  target_include_directories(sinkattn_direct PRIVATE "${PROJECT_SOURCE_DIR}/include")
  target_include_directories(sinkattn_direct SYSTEM PRIVATE
    "${sinkattn_python_include}" "${SINKATTN_TORCH_DIR}/include")
  target_link_options(sinkattn_direct PRIVATE "$<$<CONFIG:Release>:-s>")
  set_target_properties(sinkattn_direct PROPERTIES
    OUTPUT_NAME _direct
    PREFIX ""
    SUFFIX .abi3.so
    SKIP_BUILD_RPATH ON
    LIBRARY_OUTPUT_DIRECTORY "${SINKATTN_TORCH_OUTPUT_DIR}")
  add_dependencies(sinkattn_torch sinkattn_direct)  # whoever asks for one gets both
endif()
