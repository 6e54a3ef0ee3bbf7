// SPDX-License-Identifier: Apache-2.0
// Inference without Python: appends one token at a time to a KV cache and attends to it. Every step
// must give the same output as attention over the whole prefix at once.
#include <sinkattn/attention.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <initializer_list>
#include <random>
#include <vector>

namespace {

using namespace sinkattn;

constexpr std::int64_t capacity = 64, tokens = 40, heads = 8, kv_heads = 2, dim = 32;

TensorView view_of(std::vector<float>* data, std::initializer_list<std::int64_t> shape) {
  TensorView view;
  view.dtype = DType::float32;
  view.rank = static_cast<int>(shape.size());
  std::int64_t stride = 1;
  for (int i = view.rank - 1; i >= 0; --i) {
    view.shape[i] = shape.begin()[i];
    view.stride[i] = stride;
    stride *= view.shape[i];
  }
  if (data->empty()) data->resize(static_cast<std::size_t>(stride));
  view.data = data->data();
  return view;
}

TensorView length_view(std::int32_t* value) {
  TensorView view;
  view.dtype = DType::int32;
  view.rank = 1;
  view.shape[0] = view.stride[0] = 1;
  view.data = value;
  return view;
}

void require(const Status& status) {
  if (status.ok()) return;
  std::fprintf(stderr, "sinkattn: %s\n", status.message());
  std::exit(2);
}

ExecutionContext context_for(const Plan& plan, std::vector<char>* memory) {
  memory->resize(plan.workspace_bytes + 256);
  const auto address = reinterpret_cast<std::uintptr_t>(memory->data());
  ExecutionContext context;
  context.workspace = reinterpret_cast<void*>((address + 255) / 256 * 256);
  context.workspace_bytes = plan.workspace_bytes;
  return context;
}

void attend(const ForwardParams& params) {
  Plan plan;
  std::vector<char> memory;
  require(plan_forward(params, {}, &plan));
  require(forward(params, plan, context_for(plan, &memory)));
}

}  // namespace

int main() {
  std::mt19937 engine(7);
  std::normal_distribution<float> normal;
  const auto random = [&](std::int64_t n) {
    std::vector<float> values(static_cast<std::size_t>(n));
    for (float& x : values) x = normal(engine);
    return values;
  };
  std::vector<float> query = random(tokens * heads * dim), sink = random(heads);
  std::vector<float> key = random(tokens * kv_heads * dim), value = random(tokens * kv_heads * dim);

  // All tokens at once, causal.
  std::vector<float> expected;
  ForwardParams whole;
  whole.query = view_of(&query, {1, tokens, heads, dim});
  whole.key = view_of(&key, {1, tokens, kv_heads, dim});
  whole.value = view_of(&value, {1, tokens, kv_heads, dim});
  whole.out = view_of(&expected, {1, tokens, heads, dim});
  whole.learnable_sink = view_of(&sink, {heads});
  whole.mask.causal = true;
  attend(whole);

  // One token at a time against a cache.
  std::vector<float> key_cache, value_cache, out;
  std::int32_t used = 0, used_after = 0;
  float worst = 0.0f;
  for (std::int64_t t = 0; t < tokens; ++t) {
    AppendParams append;
    append.key_cache = view_of(&key_cache, {1, capacity, kv_heads, dim});
    append.value_cache = view_of(&value_cache, {1, capacity, kv_heads, dim});
    append.key_new = view_of(&key, {1, 1, kv_heads, dim});
    append.value_new = view_of(&value, {1, 1, kv_heads, dim});
    append.key_new.data = key.data() + t * kv_heads * dim;
    append.value_new.data = value.data() + t * kv_heads * dim;
    append.cache_seqlens = length_view(&used);
    append.seqused_k_after = length_view(&used_after);
    Plan plan;
    require(plan_append_kv(append, {}, &plan));
    require(append_kv(append, plan, {}));
    used = used_after;

    ForwardParams step;
    step.query = view_of(&query, {1, 1, heads, dim});
    step.query.data = query.data() + t * heads * dim;
    step.key = append.key_cache;
    step.value = append.value_cache;
    step.seqused_k = length_view(&used);
    step.out = view_of(&out, {1, 1, heads, dim});
    step.learnable_sink = whole.learnable_sink;
    step.mask.causal = true;
    attend(step);
    for (std::int64_t i = 0; i < heads * dim; ++i) {
      const auto at = static_cast<std::size_t>(i);
      const auto row = static_cast<std::size_t>(t * heads * dim + i);
      worst = std::fmax(worst, std::fabs(out[at] - expected[row]));
    }
  }
  std::printf("%d tokens decoded, largest difference to the whole sequence %.2e\n",
              static_cast<int>(tokens), static_cast<double>(worst));
  return worst < 1e-5f ? 0 : 1;
}
