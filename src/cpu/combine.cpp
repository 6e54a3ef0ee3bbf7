// SPDX-License-Identifier: Apache-2.0
#include "cpu/combine.h"

#include <cmath>
#include <cstdio>
#include <limits>

#include "common/backend.h"
#include "cpu/element.h"
#include "cpu/parallel.h"

namespace sinkattn::cpu {
namespace {

constexpr double infinity = std::numeric_limits<double>::infinity();

/// One (batch, row, head): weights of the partials, then columns one by one in fp64.
void merge_one(const CombineProblem& p, std::int64_t batch, std::int64_t row, std::int64_t head) {
  const std::int64_t lse_base = p.lse_partial.offset(batch, head, row);
  const auto lse_of = [&](std::int64_t n) {
    return load_element(p.lse_partial.data, p.lse_partial.dtype,
                        lse_base + n * p.lse_partial_stride_split);
  };
  const double sink = p.sink.data == nullptr
                          ? -infinity
                          : load_element(p.sink.data, p.sink.dtype, head * p.sink.stride[0]);
  double top = sink;
  bool has_nan = std::isnan(sink);
  for (std::int64_t n = 0; n < p.splits; ++n) {
    const double lse = lse_of(n);
    has_nan |= std::isnan(lse);
    if (lse > top) top = lse;
  }
  const std::int64_t out_base = p.out.offset(batch, row, head);
  const auto finish = [&](double lse) {
    if (p.lse.data != nullptr) {
      store_element(p.lse.data, p.lse.dtype, p.lse.offset(batch, head, row), lse);
    }
  };
  double weights[256];  // check.cpp: at most 256 partials
  double total = 0.0;
  for (std::int64_t n = 0; n < p.splits && !has_nan; ++n) {
    const double lse = lse_of(n);
    // Equal to the top means weight 1, also where both are +inf.
    weights[n] = lse == -infinity ? 0.0 : (lse == top ? 1.0 : std::exp(lse - top));
    total += weights[n];
  }
  if (!has_nan && sink != -infinity) total += sink == top ? 1.0 : std::exp(sink - top);
  const std::int64_t partial_base = p.out_partial.offset(batch, row, head);
  for (std::int64_t c = 0; c < p.head_dim_v; ++c) {
    double sum = has_nan ? std::numeric_limits<double>::quiet_NaN() : 0.0;
    for (std::int64_t n = 0; n < p.splits && !has_nan; ++n) {
      if (weights[n] == 0.0) continue;
      sum += weights[n] * load_element(p.out_partial.data, p.out_partial.dtype,
                                       partial_base + n * p.out_partial_stride_split + c);
    }
    store_element(p.out.data, p.out.dtype, out_base + c,
                  total == 0.0 && !has_nan ? 0.0 : sum / (has_nan ? 1.0 : total));
  }
  if (has_nan) {
    finish(std::numeric_limits<double>::quiet_NaN());
  } else {
    finish(total == 0.0 ? -infinity : top + std::log(total));
  }
}

}  // namespace

void merge_rows(const CombineProblem& p, std::int64_t batch, const Range& rows) {
  for (std::int64_t row = rows.begin; row < rows.end; ++row) {
    for (std::int64_t head = 0; head < p.heads; ++head) merge_one(p, batch, row, head);
  }
}

Status plan_combine(const CombineProblem&, Plan* plan) {
  plan->backend = Backend::cpu;
  std::snprintf(plan->kernel, sizeof(plan->kernel), "cpu_combine");
  std::snprintf(plan->reason, sizeof(plan->reason), "row by row in float64");
  return {};
}

Status combine(const CombineProblem& p, const Plan&, const ExecutionContext& context) {
  const std::int64_t items = p.batch * p.rows;
  for_each_item(context, items, lanes_for(items), [&](int, std::int64_t item) {
    const std::int64_t row = item % p.rows;
    merge_rows(p, item / p.rows, {row, row + 1});
  });
  return {};
}

}  // namespace sinkattn::cpu
