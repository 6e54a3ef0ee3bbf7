// SPDX-License-Identifier: Apache-2.0
#include "hopper/instances/forward_instance.cuh"

namespace sinkattn::hopper {

ForwardInstance forward_paged_64_bf16() {
  return forward_instance<__nv_bfloat16, 64, 64, ForwardUse::general, true>(
      "forward_paged_64_bf16");
}

ForwardInstance forward_paged_64_fp16() {
  return forward_instance<__half, 64, 64, ForwardUse::general, true>("forward_paged_64_fp16");
}

ForwardInstance forward_paged_64_window_bf16() {
  return forward_instance<__nv_bfloat16, 64, 64, ForwardUse::window, true>(
      "forward_paged_64_window_bf16");
}

ForwardInstance forward_paged_64_window_fp16() {
  return forward_instance<__half, 64, 64, ForwardUse::window, true>("forward_paged_64_window_fp16");
}

}  // namespace sinkattn::hopper
