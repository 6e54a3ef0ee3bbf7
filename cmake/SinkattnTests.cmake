# SPDX-License-Identifier: Apache-2.0
# C++ tests (GoogleTest), examples and fuzz targets. Each is built only if its room has sources.
set(sinkattn_tests_dir "${PROJECT_BINARY_DIR}/tests")

if(SINKATTN_TESTS)
  # The hint is where tools/bootstrap.py unpacks the distribution's package.
  find_package(GTest CONFIG QUIET HINTS "${PROJECT_SOURCE_DIR}/.venv/googletest/usr")
  file(GLOB sinkattn_test_sources CONFIGURE_DEPENDS "${PROJECT_SOURCE_DIR}/tests/cpp/*.cpp")
  if(NOT GTest_FOUND)
    message(NOTICE "sinkattn: GoogleTest was not found, the C++ tests are NOT built")
  elseif(sinkattn_test_sources)
    add_executable(sinkattn_cpp_tests ${sinkattn_test_sources})
    target_link_libraries(sinkattn_cpp_tests PRIVATE sinkattn_core GTest::gtest GTest::gtest_main)
    target_include_directories(sinkattn_cpp_tests
      PRIVATE "${PROJECT_SOURCE_DIR}/src" "${PROJECT_SOURCE_DIR}/tests/cpp")
    set_target_properties(sinkattn_cpp_tests PROPERTIES
      LINKER_LANGUAGE CXX RUNTIME_OUTPUT_DIRECTORY "${sinkattn_tests_dir}")
    include(GoogleTest)
    gtest_discover_tests(sinkattn_cpp_tests DISCOVERY_MODE PRE_TEST PROPERTIES TIMEOUT 300)
  endif()

  # Kernels' own tests: compiled everywhere, run where a Hopper GPU is.
  file(GLOB sinkattn_gpu_test_sources CONFIGURE_DEPENDS
       "${PROJECT_SOURCE_DIR}/tests/gpu/*.cu" "${PROJECT_SOURCE_DIR}/tests/gpu/*.cpp")
  if(SINKATTN_WITH_CUDA AND GTest_FOUND AND sinkattn_gpu_test_sources)
    add_executable(sinkattn_gpu_tests ${sinkattn_gpu_test_sources})
    target_link_libraries(sinkattn_gpu_tests PRIVATE sinkattn_core GTest::gtest GTest::gtest_main)
    target_include_directories(sinkattn_gpu_tests PRIVATE "${PROJECT_SOURCE_DIR}/src")
    set_target_properties(sinkattn_gpu_tests PROPERTIES
      LINKER_LANGUAGE CXX RUNTIME_OUTPUT_DIRECTORY "${sinkattn_tests_dir}")
    add_test(NAME sinkattn_gpu_tests COMMAND sinkattn_gpu_tests)
    # The reasons of tests/gpu/gpu_test.h.
    set_tests_properties(sinkattn_gpu_tests PROPERTIES TIMEOUT 300 SKIP_REGULAR_EXPRESSION
      "no usable GPU: ;no GPU;needs compute capability 9.0")
  endif()

  # Benchmarks of the core alone: built with the tests, run by hand.
  file(GLOB sinkattn_core_benchmarks CONFIGURE_DEPENDS "${PROJECT_SOURCE_DIR}/bench/core/*.cpp")
  foreach(source IN LISTS sinkattn_core_benchmarks)
    cmake_path(GET source STEM name)
    add_executable(bench_${name} "${source}")
    target_link_libraries(bench_${name} PRIVATE sinkattn_core)
    target_include_directories(bench_${name} PRIVATE "${PROJECT_SOURCE_DIR}/src")
    set_target_properties(bench_${name} PROPERTIES
      LINKER_LANGUAGE CXX RUNTIME_OUTPUT_DIRECTORY "${PROJECT_BINARY_DIR}/bench")
  endforeach()

  file(GLOB sinkattn_examples CONFIGURE_DEPENDS "${PROJECT_SOURCE_DIR}/examples/*.cpp")
  foreach(source IN LISTS sinkattn_examples)
    cmake_path(GET source STEM name)
    add_executable(example_${name} "${source}")
    target_link_libraries(example_${name} PRIVATE sinkattn::sinkattn)
    set_target_properties(example_${name} PROPERTIES
      RUNTIME_OUTPUT_DIRECTORY "${PROJECT_BINARY_DIR}/examples")
    add_test(NAME example_${name} COMMAND example_${name})
    set_tests_properties(example_${name} PROPERTIES TIMEOUT 300)
  endforeach()
endif()

if(SINKATTN_TESTS AND SINKATTN_WITH_CUDA)
  # Benchmarks of the core without torch: programs against the public interface, not installed.
  file(GLOB sinkattn_benchmarks CONFIGURE_DEPENDS "${PROJECT_SOURCE_DIR}/bench/core/*.cu")
  foreach(source IN LISTS sinkattn_benchmarks)
    cmake_path(GET source STEM name)
    add_executable(bench_${name} "${source}")
    target_link_libraries(bench_${name} PRIVATE sinkattn::sinkattn CUDA::cudart_static)
    set_target_properties(bench_${name} PROPERTIES
      LINKER_LANGUAGE CXX RUNTIME_OUTPUT_DIRECTORY "${PROJECT_BINARY_DIR}/bench")
  endforeach()
endif()

if(SINKATTN_FUZZ)
  # With Clang these are libFuzzer programs. Other compilers link standalone.cpp, which feeds the
  # same entry point with seeded random inputs.
  file(GLOB sinkattn_fuzz_sources CONFIGURE_DEPENDS "${PROJECT_SOURCE_DIR}/tests/fuzz/fuzz_*.cpp")
  set(sinkattn_fuzz_driver "${PROJECT_SOURCE_DIR}/tests/fuzz/standalone.cpp")
  foreach(source IN LISTS sinkattn_fuzz_sources)
    cmake_path(GET source STEM name)
    add_executable(${name} "${source}")
    if(CMAKE_CXX_COMPILER_ID MATCHES "Clang")
      target_compile_options(${name} PRIVATE -fsanitize=fuzzer)
      target_link_options(${name} PRIVATE -fsanitize=fuzzer)
    else()
      target_sources(${name} PRIVATE "${sinkattn_fuzz_driver}")
    endif()
    target_link_libraries(${name} PRIVATE sinkattn_core)
    target_include_directories(${name} PRIVATE "${PROJECT_SOURCE_DIR}/src")
    set_target_properties(${name} PROPERTIES
      LINKER_LANGUAGE CXX RUNTIME_OUTPUT_DIRECTORY "${PROJECT_BINARY_DIR}/fuzz")
  endforeach()
endif()
