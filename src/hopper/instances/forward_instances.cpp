// SPDX-License-Identifier: Apache-2.0
// The list of compiled forward kernels, smaller head dims first.
#include "hopper/kernels/forward.h"

namespace sinkattn::hopper {

ForwardInstance forward_64_bf16();
ForwardInstance forward_64_fp16();
ForwardInstance forward_96_bf16();
ForwardInstance forward_96_fp16();
ForwardInstance forward_128_bf16();
ForwardInstance forward_128_fp16();
ForwardInstance forward_192_128_bf16();
ForwardInstance forward_192_128_fp16();
ForwardInstance forward_192_bf16();
ForwardInstance forward_192_fp16();
ForwardInstance forward_256_bf16();
ForwardInstance forward_256_fp16();

const ForwardInstance* find_forward(DType dtype, std::int64_t head_dim, std::int64_t head_dim_v) {
  static const ForwardInstance all[] = {
      forward_64_bf16(),  forward_64_fp16(),  forward_96_bf16(),      forward_96_fp16(),
      forward_128_bf16(), forward_128_fp16(), forward_192_128_bf16(), forward_192_128_fp16(),
      forward_192_bf16(), forward_192_fp16(), forward_256_bf16(),     forward_256_fp16(),
  };
  for (const ForwardInstance& instance : all) {
    if (instance.dtype == dtype && head_dim <= instance.head_dim &&
        head_dim_v <= instance.head_dim_v) {
      return &instance;
    }
  }
  return nullptr;
}

}  // namespace sinkattn::hopper
