# SPDX-License-Identifier: Apache-2.0
# sinkattn_core: the static core both libraries are made of. sinkattn: what C++ programs link.
file(GLOB sinkattn_core_sources CONFIGURE_DEPENDS
     "${PROJECT_SOURCE_DIR}/src/common/*.cpp" "${PROJECT_SOURCE_DIR}/src/cpu/*.cpp")
if(SINKATTN_WITH_CUDA)
  file(GLOB_RECURSE sinkattn_hopper_sources CONFIGURE_DEPENDS
       "${PROJECT_SOURCE_DIR}/src/hopper/*.cpp" "${PROJECT_SOURCE_DIR}/src/hopper/*.cu")
  list(APPEND sinkattn_core_sources ${sinkattn_hopper_sources})
endif()
sinkattn_apply_isa(sinkattn_core_sources)

add_library(sinkattn_objects OBJECT ${sinkattn_core_sources})
target_include_directories(sinkattn_objects
  PRIVATE "${PROJECT_SOURCE_DIR}/include" "${PROJECT_SOURCE_DIR}/src")
target_compile_definitions(sinkattn_objects
  PRIVATE "SINKATTN_WITH_CUDA=$<BOOL:${SINKATTN_WITH_CUDA}>"
          "SINKATTN_VERSION=\"${PROJECT_VERSION}\""
          "$<$<BOOL:${SINKATTN_DEBUG_CHECKS}>:SINKATTN_DEBUG_CHECKS=1>")

find_package(Threads REQUIRED)
set(sinkattn_link_libraries Threads::Threads)
if(SINKATTN_WITH_CUDA)
  # The runtime is linked in; the driver is looked up through it. Nothing of CUDA is needed to load.
  list(APPEND sinkattn_link_libraries CUDA::cudart_static)
  target_include_directories(sinkattn_objects SYSTEM PRIVATE ${CUDAToolkit_INCLUDE_DIRS})
endif()

add_library(sinkattn_core STATIC $<TARGET_OBJECTS:sinkattn_objects>)
target_include_directories(sinkattn_core PUBLIC "${PROJECT_SOURCE_DIR}/include")
target_compile_definitions(sinkattn_core
  PUBLIC "SINKATTN_WITH_CUDA=$<BOOL:${SINKATTN_WITH_CUDA}>")
target_link_libraries(sinkattn_core PUBLIC ${sinkattn_link_libraries})

add_library(sinkattn SHARED $<TARGET_OBJECTS:sinkattn_objects>)
add_library(sinkattn::sinkattn ALIAS sinkattn)
target_link_libraries(sinkattn PRIVATE ${sinkattn_link_libraries})
target_include_directories(sinkattn
  PUBLIC "$<BUILD_INTERFACE:${PROJECT_SOURCE_DIR}/include>" "$<INSTALL_INTERFACE:include>")
target_compile_features(sinkattn PUBLIC cxx_std_20)
# No VERSION and SOVERSION: a wheel stores the links they create as two further copies.
set_target_properties(sinkattn PROPERTIES BUILD_WITH_INSTALL_RPATH ON)
target_link_options(sinkattn PRIVATE LINKER:--exclude-libs,ALL "$<$<CONFIG:Release>:-s>")
set_target_properties(sinkattn_core sinkattn PROPERTIES LINKER_LANGUAGE CXX)
