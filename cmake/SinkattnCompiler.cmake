# SPDX-License-Identifier: Apache-2.0
# Settings of the host compiler that every target shares.
# C++20 by flag, for both languages: CMAKE_CXX_STANDARD also asks for CUDA20, which CMake 3.25 does
# not know of nvcc 13, and CMAKE_CUDA_STANDARD 17 would put a second -std on nvcc's command line.
add_compile_options("$<$<COMPILE_LANGUAGE:CXX,CUDA>:-std=c++20>")
set(CMAKE_POSITION_INDEPENDENT_CODE ON)
set(CMAKE_CXX_VISIBILITY_PRESET hidden)
set(CMAKE_VISIBILITY_INLINES_HIDDEN ON)
set(CMAKE_EXPORT_COMPILE_COMMANDS ON)
set(CMAKE_CXX_FLAGS_RELEASE "-O3 -DNDEBUG")

# -ffp-contract=off: the reference gives the same bits on every machine. Files compiled for one
# instruction set (below) may contract: they are the fast path, compared within a tolerance.
set(sinkattn_cxx_flags -Wall -Wextra -Wshadow -Wnon-virtual-dtor -ffp-contract=off)
if(SINKATTN_WERROR)
  list(APPEND sinkattn_cxx_flags -Werror)
endif()
add_compile_options("$<$<COMPILE_LANGUAGE:CXX>:${sinkattn_cxx_flags}>")

if(SINKATTN_SANITIZE)
  set(sinkattn_sanitize_flags -fsanitize=address,undefined -fno-sanitize-recover=all
                              -fno-omit-frame-pointer -g)
  add_compile_options(${sinkattn_sanitize_flags})
  add_link_options(${sinkattn_sanitize_flags})
endif()

# No executable stack, no lazy binding; sections nobody refers to (most of cudart) are dropped.
add_link_options(LINKER:-z,noexecstack LINKER:-z,relro LINKER:-z,now LINKER:--gc-sections)
add_compile_options("$<$<COMPILE_LANGUAGE:CXX>:-ffunction-sections;-fdata-sections>")

# Instruction sets are chosen at run time: a source file named *_<isa>.cpp is compiled for that set
# and must be entered only after the CPU was asked for it. Nothing else may use more than baseline.
set(SINKATTN_ISA_avx2 -march=x86-64-v3 -ffp-contract=fast)
# GCC 12 takes the undefined vectors in its own AVX-512 headers for uninitialised variables.
set(sinkattn_avx512_flags -march=x86-64-v4 -ffp-contract=fast
                          -Wno-uninitialized -Wno-maybe-uninitialized)
set(SINKATTN_ISA_avx512 ${sinkattn_avx512_flags})
set(SINKATTN_ISA_avx512bf16 ${sinkattn_avx512_flags} -mavx512bf16)
set(SINKATTN_ISAS avx2 avx512 avx512bf16)

# sinkattn_apply_isa(<list variable of sources>): sets the flags by suffix; on processors other
# than x86-64 takes these files out of the list.
function(sinkattn_apply_isa sources_variable)
  set(kept)
  foreach(source IN LISTS ${sources_variable})
    set(is_isa_file OFF)
    foreach(isa IN LISTS SINKATTN_ISAS)
      if(source MATCHES "_${isa}\\.cpp$")
        set(is_isa_file ON)
        set_source_files_properties("${source}" PROPERTIES COMPILE_OPTIONS "${SINKATTN_ISA_${isa}}")
      endif()
    endforeach()
    if(NOT is_isa_file OR CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
      list(APPEND kept "${source}")
    endif()
  endforeach()
  set(${sources_variable} "${kept}" PARENT_SCOPE)
endfunction()
