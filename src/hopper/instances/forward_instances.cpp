// SPDX-License-Identifier: Apache-2.0
// The list of compiled forward kernels, smaller head dims first, the
// general kernel of a pair before those for special uses.
#include "hopper/kernels/forward.h"

namespace sinkattn::hopper {

ForwardInstance forward_64_bf16();
ForwardInstance forward_64_fp16();
ForwardInstance forward_64_window_bf16();
ForwardInstance forward_64_window_fp16();
ForwardInstance forward_96_bf16();
ForwardInstance forward_96_fp16();
ForwardInstance forward_128_bf16();
ForwardInstance forward_128_fp16();
ForwardInstance forward_128_short_bf16();
ForwardInstance forward_128_short_fp16();
ForwardInstance forward_192_128_bf16();
ForwardInstance forward_192_128_fp16();
ForwardInstance forward_192_bf16();
ForwardInstance forward_192_fp16();
ForwardInstance forward_256_bf16();
ForwardInstance forward_256_fp16();
ForwardInstance forward_paged_64_bf16();
ForwardInstance forward_paged_64_fp16();
ForwardInstance forward_paged_64_window_bf16();
ForwardInstance forward_paged_64_window_fp16();
ForwardInstance forward_paged_96_bf16();
ForwardInstance forward_paged_96_fp16();
ForwardInstance forward_paged_128_bf16();
ForwardInstance forward_paged_128_fp16();
ForwardInstance forward_paged_192_128_bf16();
ForwardInstance forward_paged_192_128_fp16();
ForwardInstance forward_paged_192_bf16();
ForwardInstance forward_paged_192_fp16();
ForwardInstance forward_paged_256_bf16();
ForwardInstance forward_paged_256_fp16();

const ForwardInstance* find_forward(DType dtype, std::int64_t head_dim, std::int64_t head_dim_v,
                                    ForwardUse use, bool paged) {
  static const ForwardInstance all[] = {
      forward_64_bf16(),
      forward_64_fp16(),
      forward_64_window_bf16(),
      forward_64_window_fp16(),
      forward_96_bf16(),
      forward_96_fp16(),
      forward_128_bf16(),
      forward_128_fp16(),
      forward_128_short_bf16(),
      forward_128_short_fp16(),
      forward_192_128_bf16(),
      forward_192_128_fp16(),
      forward_192_bf16(),
      forward_192_fp16(),
      forward_256_bf16(),
      forward_256_fp16(),
      forward_paged_64_bf16(),
      forward_paged_64_fp16(),
      forward_paged_64_window_bf16(),
      forward_paged_64_window_fp16(),
      forward_paged_96_bf16(),
      forward_paged_96_fp16(),
      forward_paged_128_bf16(),
      forward_paged_128_fp16(),
      forward_paged_192_128_bf16(),
      forward_paged_192_128_fp16(),
      forward_paged_192_bf16(),
      forward_paged_192_fp16(),
      forward_paged_256_bf16(),
      forward_paged_256_fp16(),
  };
  const ForwardInstance* found = nullptr;
  for (const ForwardInstance& instance : all) {
    const bool fits = instance.dtype == dtype && instance.paged == paged &&
                      head_dim <= instance.head_dim && head_dim_v <= instance.head_dim_v;
    if (!fits) continue;
    const bool other_pair = found != nullptr && (instance.head_dim != found->head_dim ||
                                                 instance.head_dim_v != found->head_dim_v);
    if (other_pair) break;
    if (instance.use == use) return &instance;
    if (instance.use == ForwardUse::general) found = &instance;
  }
  return found;
}

}  // namespace sinkattn::hopper
