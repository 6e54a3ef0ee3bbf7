// SPDX-License-Identifier: Apache-2.0
#include "hopper/kernels/decode.cuh"

namespace sinkattn::hopper {
template Status launch_decode_instance<128, 128, 1, false>(const DecodeParams&, int, cudaStream_t);
template Status launch_decode_instance<128, 128, 2, false>(const DecodeParams&, int, cudaStream_t);
}  // namespace sinkattn::hopper
