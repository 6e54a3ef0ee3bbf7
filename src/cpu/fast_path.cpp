// SPDX-License-Identifier: Apache-2.0
#include "cpu/fast.h"

namespace sinkattn::cpu {

const FastPath& fast_path() {
#if defined(__x86_64__)
  static const FastPath& best = __builtin_cpu_supports("x86-64-v4")   ? fast_path_avx512()
                                : __builtin_cpu_supports("x86-64-v3") ? fast_path_avx2()
                                                                      : fast_path_portable();
  return best;
#else
  return fast_path_portable();
#endif
}

}  // namespace sinkattn::cpu
