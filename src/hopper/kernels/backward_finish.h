// SPDX-License-Identifier: Apache-2.0
// After the main passes: accumulators and partial sums to gradients, zeros where nothing was used.
#pragma once

#include "hopper/kernels/backward.h"

namespace sinkattn::hopper {

/// dQ accumulator (`columns` wide) -> dq.
Status launch_finish_queries(const BackwardArguments& arguments, DType dtype, int columns,
                             std::int64_t tiles, cudaStream_t stream);

/// Partial dK and dV of split groups, summed in order -> dk, dv.
Status launch_finish_keys(const BackwardArguments& arguments, DType dtype, CompiledDims dims,
                          std::int64_t longest_k, cudaStream_t stream);

/// Zeros the rows of a gradient that no sequence uses, or all of its rows.
Status launch_zero_unused(const HeadsTensor& gradient, const SequenceSide& side, bool packed,
                          int batch, int heads, int head_dim, bool all, cudaStream_t stream);

}  // namespace sinkattn::hopper
