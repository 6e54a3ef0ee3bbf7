// SPDX-License-Identifier: Apache-2.0
// Rows that belong to no sequence: every output row is written, used or not.
#pragma once

#include <cstdint>

#include "common/problem.h"

namespace sinkattn::cpu {

/// Sets all rows of a (batch, row, head, dim) tensor to zero.
void zero_rows(const HeadsTensor& tensor, std::int64_t batch, std::int64_t rows, std::int64_t heads,
               std::int64_t dim);

/// Sets all entries of a (batch, head, row) tensor to `value`.
void fill_statistics(const RowsTensor& tensor, std::int64_t batch, std::int64_t heads,
                     std::int64_t rows, double value);

/// Number of batch entries to walk in storage: packed tensors have one.
inline std::int64_t storage_batch(bool packed, std::int64_t batch) { return packed ? 1 : batch; }

}  // namespace sinkattn::cpu
