# SPDX-License-Identifier: Apache-2.0
# The CUDA language for sm_90a. Result: SINKATTN_WITH_CUDA, SINKATTN_NO_CUDA_REASON.
set(SINKATTN_WITH_CUDA OFF)
set(SINKATTN_NO_CUDA_REASON "SINKATTN_CUDA=OFF.")

if(NOT SINKATTN_CUDA)
  return()
endif()

# 90a-real: machine code alone. sm_90a PTX runs on no later architecture, so it would be dead weight.
set(CMAKE_CUDA_ARCHITECTURES 90a-real)
set(CMAKE_CUDA_RUNTIME_LIBRARY Static)

include(CheckLanguage)
check_language(CUDA)
if(NOT CMAKE_CUDA_COMPILER)
  set(SINKATTN_NO_CUDA_REASON "No working nvcc was found.")
else()
  enable_language(CUDA)
  if(CMAKE_CUDA_COMPILER_VERSION VERSION_GREATER_EQUAL 13.0)
    find_package(CUDAToolkit REQUIRED)
    set(SINKATTN_WITH_CUDA ON)
  else()
    set(SINKATTN_NO_CUDA_REASON
        "nvcc ${CMAKE_CUDA_COMPILER_VERSION} is older than 13.0, the oldest that is tested.")
  endif()
endif()
if(NOT SINKATTN_WITH_CUDA)
  if(NOT SINKATTN_CUDA STREQUAL "AUTO")
    message(FATAL_ERROR "SINKATTN_CUDA=ON: ${SINKATTN_NO_CUDA_REASON}")
  endif()
  return()
endif()
set(SINKATTN_NO_CUDA_REASON)

set(CMAKE_CUDA_VISIBILITY_PRESET hidden)
set(CMAKE_CUDA_FLAGS_RELEASE "-O3 -DNDEBUG")

set(sinkattn_cuda_flags
    -Xcompiler=-Wall,-Wextra
    # The guard below reads the statistics that -v prints.
    -Xptxas=-v,-Werror,--warn-on-spills,--warn-on-local-memory-usage)
if(SINKATTN_LINEINFO)
  list(APPEND sinkattn_cuda_flags -lineinfo)
endif()
if(SINKATTN_WERROR)
  list(APPEND sinkattn_cuda_flags -Werror=all-warnings)
endif()
add_compile_options("$<$<COMPILE_LANGUAGE:CUDA>:${sinkattn_cuda_flags}>")

# ptxas reports a serialised wgmma as a remark that no flag turns into an error: read its output.
set(CMAKE_CUDA_COMPILER_LAUNCHER "${Python3_EXECUTABLE}" "${PROJECT_SOURCE_DIR}/tools/nvcc_guard.py")
