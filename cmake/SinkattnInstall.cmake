# SPDX-License-Identifier: Apache-2.0
# Component sinkattn: library, headers and CMake package for C++ programs.
# Component sinkattn_torch: the operator library, beside the Python files of the wheel.
include(CMakePackageConfigHelpers)
if(SKBUILD)
  # Inside the wheel everything lies in one folder per kind under the Python package.
  set(CMAKE_INSTALL_LIBDIR lib)
  set(CMAKE_INSTALL_INCLUDEDIR include)
else()
  include(GNUInstallDirs)
endif()
set(sinkattn_package_dir "${CMAKE_INSTALL_LIBDIR}/cmake/sinkattn")

install(TARGETS sinkattn EXPORT sinkattn
        LIBRARY DESTINATION "${CMAKE_INSTALL_LIBDIR}" COMPONENT sinkattn)
install(DIRECTORY "${PROJECT_SOURCE_DIR}/include/sinkattn"
        DESTINATION "${CMAKE_INSTALL_INCLUDEDIR}" COMPONENT sinkattn FILES_MATCHING PATTERN "*.h")
install(EXPORT sinkattn NAMESPACE sinkattn:: FILE sinkattnTargets.cmake
        DESTINATION "${sinkattn_package_dir}" COMPONENT sinkattn)
configure_package_config_file(
  "${PROJECT_SOURCE_DIR}/cmake/sinkattnConfig.cmake.in"
  "${PROJECT_BINARY_DIR}/sinkattnConfig.cmake"
  INSTALL_DESTINATION "${sinkattn_package_dir}")
write_basic_package_version_file(
  "${PROJECT_BINARY_DIR}/sinkattnConfigVersion.cmake" COMPATIBILITY SameMinorVersion)
install(FILES "${PROJECT_BINARY_DIR}/sinkattnConfig.cmake"
              "${PROJECT_BINARY_DIR}/sinkattnConfigVersion.cmake"
        DESTINATION "${sinkattn_package_dir}" COMPONENT sinkattn)

if(SINKATTN_WITH_TORCH)
  install(TARGETS sinkattn_torch
          LIBRARY DESTINATION "${CMAKE_INSTALL_LIBDIR}" COMPONENT sinkattn_torch)
  if(SINKATTN_WITH_DIRECT)
    install(TARGETS sinkattn_direct
            LIBRARY DESTINATION "${CMAKE_INSTALL_LIBDIR}" COMPONENT sinkattn_torch)
  endif()
endif()

# What is linked into the wheel's libraries, for whoever scans it (PEP 770).
if(SKBUILD_METADATA_DIR)
  if(SINKATTN_WITH_CUDA)
    set(SINKATTN_SBOM_CUDART "{
    \"type\": \"library\",
    \"name\": \"cudart_static\",
    \"version\": \"${CUDAToolkit_VERSION}\",
    \"supplier\": {\"name\": \"NVIDIA Corporation\"},
    \"licenses\": [{\"license\": {\"name\": \"CUDA Toolkit EULA, Attachment A (redistributable)\"}}]
  }")
  endif()
  configure_file("${PROJECT_SOURCE_DIR}/cmake/sbom.cdx.json.in"
                 "${PROJECT_BINARY_DIR}/sinkattn.cdx.json" @ONLY)
  install(FILES "${PROJECT_BINARY_DIR}/sinkattn.cdx.json"
          DESTINATION "${SKBUILD_METADATA_DIR}/sboms" COMPONENT sinkattn_torch)
endif()
