// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "common/problem.h"

namespace sinkattn::cpu {

/// Merges the partial results of storage rows `rows` of one batch entry, all heads (docs/math.md,
/// "merging"). A partial with LSE -inf is skipped, whatever its out holds.
void merge_rows(const CombineProblem& problem, std::int64_t batch, const Range& rows);

}  // namespace sinkattn::cpu
