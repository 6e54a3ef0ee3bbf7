// SPDX-License-Identifier: Apache-2.0
// What the core costs the host: checks, plan, and on a Hopper GPU everything up to the launch.
// No torch. Medians of 1,000 calls in microseconds, on stdout.
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <initializer_list>
#include <vector>

#include "common/prepared.h"
#include "sinkattn/attention.h"

#if SINKATTN_WITH_CUDA
#include <cuda_runtime_api.h>
#endif

namespace {

using namespace sinkattn;

void require(const Status& status) {
  if (status.ok()) return;
  std::fprintf(stderr, "host_path: %s\n", status.message());
  std::exit(1);
}

/// Median of 1,000 single calls. `drain` runs outside the timed part every 64 calls, so that the
/// queue of the GPU never fills and makes the host wait.
template <class Call, class Drain>
double median_us(Call&& call, Drain&& drain) {
  using Clock = std::chrono::steady_clock;
  constexpr int calls = 1000;
  std::vector<double> samples;
  for (int i = -100; i < calls; ++i) {
    if (i % 64 == 0) drain();
    const auto start = Clock::now();
    call();
    const std::chrono::duration<double, std::micro> took = Clock::now() - start;
    if (i >= 0) samples.push_back(took.count());
  }
  std::nth_element(samples.begin(), samples.begin() + calls / 2, samples.end());
  return samples[calls / 2];
}

void report(const char* what, double us) {
  std::printf("%-44s%8.3f us\n", what, us);
  std::fflush(stdout);
}

TensorView tensor(Device device, DType type, void* data,
                  std::initializer_list<std::int64_t> shape) {
  TensorView view;
  view.device = device;
  view.dtype = type;
  view.data = data;
  view.rank = static_cast<int>(shape.size());
  std::int64_t stride = 1;
  for (int i = view.rank; i-- > 0;) {
    view.shape[i] = shape.begin()[i];
    view.stride[i] = stride;
    stride *= view.shape[i];
  }
  return view;
}

struct Shape {
  std::int64_t batch, length, heads_q, heads_kv, dim;
};

/// A causal bf16 problem with a sink, all tensors at `data`: plans read none.
ForwardParams problem(Device device, const Shape& s, char* data) {
  constexpr std::int64_t gap = std::int64_t{1} << 20;  // between tensors that are really there
  ForwardParams p;
  p.query = tensor(device, DType::bfloat16, data, {s.batch, s.length, s.heads_q, s.dim});
  p.key = tensor(device, DType::bfloat16, data + gap, {s.batch, s.length, s.heads_kv, s.dim});
  p.value = tensor(device, DType::bfloat16, data + 2 * gap, {s.batch, s.length, s.heads_kv, s.dim});
  p.out = tensor(device, DType::bfloat16, data + 3 * gap, {s.batch, s.length, s.heads_q, s.dim});
  p.softmax_lse = tensor(device, DType::float32, data + 4 * gap, {s.batch, s.heads_q, s.length});
  p.learnable_sink = tensor(device, DType::float32, data + 5 * gap, {s.heads_q});
  p.mask.causal = true;
  return p;
}

void time_plans(const char* name, const ForwardParams& params, const DeviceProperties& device) {
  char what[96];
  const auto nothing = [] {};
  Plan plan;
  std::snprintf(what, sizeof(what), "%s: plan_forward, with its text", name);
  report(what, median_us([&] { require(plan_forward(params, device, &plan)); }, nothing));
  std::snprintf(what, sizeof(what), "%s: checks and plan, no text", name);
  report(what, median_us(
                   [&] {
                     Prepared<ForwardProblem> prepared;
                     require(prepare_forward(params, device, &prepared));
                   },
                   nothing));
}

#if SINKATTN_WITH_CUDA
/// Everything a call does on the host, launch included.
void time_launches() {
  DeviceProperties device;
  const Status found = query_device({DeviceType::cuda, 0}, &device);
  if (!found.ok() || device.compute_capability != 90) {
    std::printf("no Hopper GPU: nothing was launched\n");
    return;
  }
  char* data = nullptr;
  if (cudaMalloc(reinterpret_cast<void**>(&data), 7 << 20) != cudaSuccess ||
      cudaMemset(data, 0, 7 << 20) != cudaSuccess) {
    std::fprintf(stderr, "host_path: no memory on the GPU\n");
    std::exit(1);
  }
  const Shape small{1, 256, 4, 2, 128};
  const ForwardParams params = problem({DeviceType::cuda, 0}, small, data);
  ExecutionContext context;
  context.workspace = data + (6 << 20);
  context.workspace_bytes = 1 << 20;
  const auto drain = [] { cudaDeviceSynchronize(); };
  report("cuda: query_device",
         median_us([&] { require(query_device({DeviceType::cuda, 0}, &device)); }, drain));
  report("cuda: plan_forward and forward", median_us(
                                               [&] {
                                                 Plan plan;
                                                 require(plan_forward(params, device, &plan));
                                                 require(forward(params, plan, context));
                                               },
                                               drain));
  report("cuda: the same with one check, no text",
         median_us(
             [&] {
               Prepared<ForwardProblem> prepared;
               require(prepare_forward(params, device, &prepared));
               require(run_prepared(prepared, context));
             },
             drain));
  cudaFree(data);
}
#endif

}  // namespace

int main() {
  // Addresses for the tensors; nothing is read there.
  std::vector<char> memory((7 << 20) + 256);
  char* place = memory.data() + 256 - reinterpret_cast<std::uintptr_t>(memory.data()) % 256;
  const Shape training{2, 8192, 64, 8, 128};
  time_plans("cpu", problem({}, training, place), {});
#if SINKATTN_WITH_CUDA
  DeviceProperties h100;
  h100.device = {DeviceType::cuda, 0};
  h100.sm_count = 132;
  h100.compute_capability = 90;
  h100.l2_bytes = 50 << 20;
  time_plans("hopper", problem(h100.device, training, place), h100);
  time_launches();
#endif
  return 0;
}
