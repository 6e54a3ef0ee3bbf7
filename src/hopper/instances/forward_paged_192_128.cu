// SPDX-License-Identifier: Apache-2.0
#include "hopper/instances/forward_instance.cuh"

namespace sinkattn::hopper {

ForwardInstance forward_paged_192_128_bf16() {
  return forward_instance<__nv_bfloat16, 192, 128, ForwardUse::general, true>(
      "forward_paged_192_128_bf16");
}

ForwardInstance forward_paged_192_128_fp16() {
  return forward_instance<__half, 192, 128, ForwardUse::general, true>(
      "forward_paged_192_128_fp16");
}

}  // namespace sinkattn::hopper
