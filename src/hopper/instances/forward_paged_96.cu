// SPDX-License-Identifier: Apache-2.0
#include "hopper/instances/forward_instance.cuh"

namespace sinkattn::hopper {

ForwardInstance forward_paged_96_bf16() {
  return forward_instance<__nv_bfloat16, 96, 96, ForwardUse::general, true>(
      "forward_paged_96_bf16");
}

ForwardInstance forward_paged_96_fp16() {
  return forward_instance<__half, 96, 96, ForwardUse::general, true>("forward_paged_96_fp16");
}

}  // namespace sinkattn::hopper
