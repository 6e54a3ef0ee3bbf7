// SPDX-License-Identifier: Apache-2.0
// Any bit pattern in the parameter structs must give a Status: no crash, no hang, and no plan whose
// run would leave the memory it asked for. Small valid problems are also run, on exact allocations.
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "sinkattn/attention.h"

namespace {

using namespace sinkattn;

/// Reads values from the input; zeros once it is used up.
class Reader {
 public:
  Reader(const std::uint8_t* data, std::size_t size) : data_(data), left_(size) {}

  template <class T>
  T take() {
    T value{};
    const std::size_t n = left_ < sizeof(T) ? left_ : sizeof(T);
    std::memcpy(&value, data_, n);
    data_ += n;
    left_ -= n;
    return value;
  }

  bool chance(int of_256) { return take<std::uint8_t>() < of_256; }

 private:
  const std::uint8_t* data_;
  std::size_t left_;
};

void any_tensor(Reader& in, TensorView* tensor) {
  if (in.chance(90)) return;
  tensor->dtype = static_cast<DType>(in.take<std::uint8_t>() % 7);
  tensor->rank = in.take<std::uint8_t>() % (TensorView::max_rank + 1);
  tensor->device.type = static_cast<DeviceType>(in.chance(20) ? 1 : 0);
  for (int i = 0; i < TensorView::max_rank; ++i) {
    tensor->shape[i] = in.chance(200) ? in.take<std::int8_t>() : in.take<std::int64_t>();
    tensor->stride[i] = in.chance(200) ? in.take<std::int16_t>() : in.take<std::int64_t>();
  }
  tensor->data = reinterpret_cast<void*>(std::uintptr_t{16});  // never followed by plan_*
}

/// A dense tensor with its memory, or with some fields spoiled.
TensorView dense(Reader& in, std::vector<std::vector<char>>* memory,
                 std::initializer_list<std::int64_t> shape, DType dtype) {
  TensorView view;
  view.dtype = dtype;
  view.rank = static_cast<int>(shape.size());
  std::int64_t stride = 1;
  for (int i = view.rank - 1; i >= 0; --i) {
    view.shape[i] = shape.begin()[i];
    view.stride[i] = stride;
    stride *= view.shape[i];
  }
  memory->emplace_back(static_cast<std::size_t>(stride * dtype_size(dtype)));
  for (char& byte : memory->back()) byte = static_cast<char>(in.take<std::uint8_t>());
  view.data = memory->back().data();
  return view;
}

void fuzz_plans(Reader& in) {
  ForwardParams f;
  for (TensorView* t : {&f.query, &f.key, &f.value, &f.query_v, &f.out, &f.softmax_lse,
                        &f.cu_seqlens_q, &f.cu_seqlens_k, &f.seqused_q, &f.seqused_k, &f.page_table,
                        &f.cache_batch_idx, &f.cache_leftpad, &f.q_descale, &f.k_descale,
                        &f.v_descale, &f.learnable_sink, &f.scheduler_metadata}) {
    any_tensor(in, t);
  }
  f.max_seqlen_q = in.take<std::int64_t>();
  f.mask = {in.chance(128), in.take<std::int64_t>(), in.take<std::int64_t>(),
            in.take<std::int64_t>()};
  f.softcap = in.take<double>();
  if (in.chance(128)) f.softmax_scale = in.take<double>();
  f.num_splits = in.take<int>();
  f.sm_margin = in.take<int>();
  DeviceProperties device;
  device.device.type = in.chance(20) ? DeviceType::cuda : DeviceType::cpu;
  device.compute_capability = in.take<std::uint8_t>();
  Plan plan;
  (void)plan_forward(f, device, &plan);
  BackwardParams b;
  b.query = f.query, b.key = f.key, b.value = f.value, b.out = f.out;
  b.softmax_lse = f.softmax_lse, b.learnable_sink = f.learnable_sink;
  for (TensorView* t : {&b.dout, &b.dlse, &b.dq, &b.dk, &b.dv, &b.dsink, &b.softmax_d}) {
    any_tensor(in, t);
  }
  (void)plan_backward(b, device, &plan);
  CombineParams c;
  for (TensorView* t :
       {&c.out_partial, &c.lse_partial, &c.out, &c.softmax_lse, &c.learnable_sink}) {
    any_tensor(in, t);
  }
  (void)plan_combine(c, device, &plan);
  AppendParams a;
  for (TensorView* t : {&a.key_new, &a.value_new, &a.cu_seqlens_k_new, &a.key_cache, &a.value_cache,
                        &a.cache_seqlens, &a.cache_batch_idx, &a.cache_leftpad, &a.page_table,
                        &a.rotary_cos, &a.rotary_sin, &a.rotary_seqlens, &a.query, &a.query_rotated,
                        &a.cu_seqlens_q, &a.seqused_q, &a.seqused_k_after}) {
    any_tensor(in, t);
  }
  (void)plan_append_kv(a, device, &plan);
}

/// A valid packed problem with random bits in every tensor, index tensors included.
void fuzz_run(Reader& in) {
  std::vector<std::vector<char>> memory;
  memory.reserve(32);
  const std::int64_t batch = in.take<std::uint8_t>() % 4;
  const std::int64_t rows = in.take<std::uint8_t>() % 40;
  const std::int64_t keys = in.take<std::uint8_t>() % 40;
  const std::int64_t group = 1 + in.take<std::uint8_t>() % 3;
  const DType types[] = {DType::float32, DType::bfloat16, DType::float16, DType::float64};
  const DType type = types[in.take<std::uint8_t>() % 4];
  const DType statistics = type == DType::float64 ? DType::float64 : DType::float32;
  const std::int64_t h = 2 * group;
  BackwardParams b;
  ForwardParams f;
  f.query = dense(in, &memory, {rows, h, 8}, type);
  f.key = dense(in, &memory, {keys, 2, 8}, type);
  f.value = dense(in, &memory, {keys, 2, 16}, type);
  f.out = dense(in, &memory, {rows, h, 16}, type);
  f.softmax_lse = dense(in, &memory, {h, rows}, statistics);
  f.cu_seqlens_q = dense(in, &memory, {batch + 1}, DType::int32);
  f.cu_seqlens_k = dense(in, &memory, {batch + 1}, DType::int32);
  f.seqused_k = dense(in, &memory, {batch}, DType::int32);
  f.learnable_sink = dense(in, &memory, {h}, DType::float32);
  f.max_seqlen_q = in.take<std::uint8_t>();
  f.max_seqlen_k = in.take<std::uint8_t>();
  f.mask = {in.chance(128), in.take<std::int8_t>(), in.take<std::int8_t>(),
            in.take<std::int8_t>() & 15};
  f.num_splits = in.take<std::uint8_t>() % 5;
  Plan plan;
  const auto context_of = [&memory](const Plan& p) {
    ExecutionContext context;
    memory.emplace_back(p.workspace_bytes + 256);
    const auto address = reinterpret_cast<std::uintptr_t>(memory.back().data());
    // The end of the workspace is the end of its allocation, so that an overrun is seen.
    const std::uintptr_t start = (address + 255) / 256 * 256;
    context.workspace = reinterpret_cast<void*>(start);
    context.workspace_bytes = p.workspace_bytes;
    memory.back().resize(start - address + p.workspace_bytes);
    return context;
  };
  if (!plan_forward(f, {}, &plan).ok()) std::abort();  // everything above is valid
  if (!forward(f, plan, context_of(plan)).ok()) std::abort();
  b.query = f.query, b.key = f.key, b.value = f.value, b.out = f.out;
  b.softmax_lse = f.softmax_lse, b.learnable_sink = f.learnable_sink;
  b.cu_seqlens_q = f.cu_seqlens_q, b.cu_seqlens_k = f.cu_seqlens_k, b.seqused_k = f.seqused_k;
  b.max_seqlen_q = f.max_seqlen_q, b.max_seqlen_k = f.max_seqlen_k, b.mask = f.mask;
  b.dout = dense(in, &memory, {rows, h, 16}, type);
  b.dq = dense(in, &memory, {rows, h, 8}, type);
  b.dk = dense(in, &memory, {keys, 2, 8}, type);
  b.dv = dense(in, &memory, {keys, 2, 16}, type);
  b.dsink = dense(in, &memory, {h}, DType::float32);
  if (!plan_backward(b, {}, &plan).ok()) std::abort();
  if (!backward(b, plan, context_of(plan)).ok()) std::abort();
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  Reader in(data, size);
  if (in.chance(128)) {
    fuzz_plans(in);
  } else {
    fuzz_run(in);
  }
  return 0;
}
