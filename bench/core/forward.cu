// SPDX-License-Identifier: Apache-2.0
// Speed of the forward without Python or torch, through the public interface.
//
//     bench_forward [--repeats N] [--fp16] [--no-sink] [SHAPE ...]
//
// SHAPE is BATCHxLENGTH:HEADS/KV_HEADS:DIM[/DIM_V]:MASK; MASK is causal, full, or wN for a causal
// window of N keys. "packed" in place of BATCHxLENGTH packs 32768 tokens of many lengths. Without
// shapes, a table of common ones is measured.
//
// Device time: CUDA events around one call, L2 flushed before it, median of the repeats. TFLOPS
// count the visible query-key pairs alone, 2 (d + dv) each. MHz is the clock of one multiprocessor
// right behind the timed calls: under load the power limit moves it. Host time: what plan_forward()
// and forward() cost the calling thread, beside the bare launch of an empty kernel.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>
#include <sinkattn/attention.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <numeric>
#include <string>
#include <vector>

namespace {

using namespace sinkattn;

void require(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(error));
  std::exit(2);
}

void require(const Status& status) {
  if (status.ok()) return;
  std::fprintf(stderr, "sinkattn: %s\n", status.message());
  std::exit(2);
}

/// Standard normal 16-bit values from a hash of the index.
__global__ void fill_normal(std::uint16_t* data, std::int64_t count, unsigned seed, bool half) {
  const std::int64_t step = std::int64_t{gridDim.x} * blockDim.x;
  for (std::int64_t i = std::int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < count; i += step) {
    std::uint64_t h = (static_cast<std::uint64_t>(i) + 1) * 0x9E3779B97F4A7C15ull + seed;
    h = (h ^ (h >> 30)) * 0xBF58476D1CE4E5B9ull;
    h = (h ^ (h >> 27)) * 0x94D049BB133111EBull;
    h ^= h >> 31;
    const float u = (static_cast<float>(h & 0xFFFFFF) + 1.0f) * 0x1p-24f;
    const float v = static_cast<float>(h >> 40) * 0x1p-24f;
    const float x = sqrtf(-2.0f * logf(u)) * cospif(2.0f * v);
    data[i] =
        half ? __half_as_ushort(__float2half_rn(x)) : __bfloat16_as_ushort(__float2bfloat16_rn(x));
  }
}

/// Clock of the multiprocessor it runs on, in MHz, over 50 us.
__global__ void measure_clock(float* megahertz) {
  const auto nanoseconds = [] {
    std::uint64_t t;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(t));
    return t;
  };
  const std::uint64_t begin = nanoseconds();
  const long long cycles = clock64();
  std::uint64_t now = begin;
  while (now - begin < 50000) now = nanoseconds();
  *megahertz = static_cast<float>(clock64() - cycles) * 1e3f / static_cast<float>(now - begin);
}

/// Parameters of about the size that the attention kernels have.
struct Baggage {
  char bytes[1024];
};
__global__ void empty_kernel(const __grid_constant__ Baggage) {}

class DeviceMemory {
 public:
  explicit DeviceMemory(std::size_t bytes) : bytes_(bytes) {
    require(cudaMalloc(&data_, std::max<std::size_t>(bytes, 256)), "cudaMalloc");
  }
  ~DeviceMemory() { cudaFree(data_); }
  DeviceMemory(const DeviceMemory&) = delete;
  DeviceMemory& operator=(const DeviceMemory&) = delete;

  void* data() const { return data_; }
  std::size_t bytes() const { return bytes_; }

 private:
  void* data_ = nullptr;
  std::size_t bytes_;
};

struct Shape {
  std::string text;
  std::int64_t batch = 0, length = 0;  ///< batch 0: packed
  std::int64_t heads = 0, kv_heads = 0, dim = 0, dim_v = 0;
  bool causal = true;
  std::int64_t window = 0;  ///< keys of a causal window; 0: none
};

struct Options {
  int repeats = 20;
  bool half = false, sink = true;
  std::vector<Shape> shapes;
};

/// BATCHxLENGTH:HEADS/KV_HEADS:DIM[/DIM_V]:MASK
bool parse_shape(const char* text, Shape* shape) {
  shape->text = text;
  const std::size_t colon = std::string(text).find(':');
  if (colon == std::string::npos) return false;
  long long a = 0, b = 0, c = 0, d = 0;
  if (std::strncmp(text, "packed:", 7) != 0) {
    if (std::sscanf(text, "%lldx%lld:", &a, &b) != 2 || a < 1 || b < 1) return false;
    shape->batch = a;
    shape->length = b;
  }
  char mask[16] = {};
  const char* rest = text + colon + 1;
  if (std::sscanf(rest, "%lld/%lld:%lld/%lld:%15s", &a, &b, &c, &d, mask) != 5) {
    if (std::sscanf(rest, "%lld/%lld:%lld:%15s", &a, &b, &c, mask) != 4) return false;
    d = c;
  }
  shape->heads = a;
  shape->kv_heads = b;
  shape->dim = c;
  shape->dim_v = d;
  shape->causal = std::strcmp(mask, "full") != 0;
  if (mask[0] == 'w') shape->window = std::atoll(mask + 1);
  return std::strcmp(mask, "causal") == 0 || !shape->causal || shape->window > 0;
}

constexpr const char* usual_shapes[] = {
    "2x8192:64/8:64:causal",  "1x32768:64/8:64:causal",     "2x8192:64/8:64:full",
    "2x8192:64/8:128:causal", "2x8192:64/8:128:full",       "2x8192:16/16:128:causal",
    "2x8192:16/16:128:full",  "2x8192:64/4:192/128:causal", "2x8192:32/8:256:causal",
    "2x8192:32/8:256:full",   "4x2048:32/8:128:causal",     "2x8192:64/8:64:w1024",
    "packed:64/8:64:causal",
};

/// Lengths of the packed batch: 128 to 8192, long ones among short ones, 32768 together.
std::vector<std::int32_t> packed_lengths() {
  return {8192, 128, 1024, 4096, 512, 256, 6144, 2048, 384, 3072, 1536, 896, 2560, 640, 768, 512};
}

TensorView tensor(const DeviceMemory& memory, DType dtype,
                  std::initializer_list<std::int64_t> shape) {
  TensorView view;
  view.data = memory.data();
  view.dtype = dtype;
  view.device = {DeviceType::cuda, 0};
  view.rank = static_cast<int>(shape.size());
  std::int64_t stride = 1;
  for (int i = view.rank - 1; i >= 0; --i) {
    view.shape[i] = shape.begin()[i];
    view.stride[i] = stride;
    stride *= view.shape[i];
  }
  return view;
}

/// One problem with its memory, ready to run.
class Case {
 public:
  Case(const Shape& shape, const Options& options)
      : shape_(shape),
        lengths_(shape.batch > 0 ? std::vector<std::int32_t>(shape.batch, shape.length)
                                 : packed_lengths()),
        rows_(std::accumulate(lengths_.begin(), lengths_.end(), std::int64_t{0})),
        query_(2 * rows_ * shape.heads * shape.dim),
        key_(2 * rows_ * shape.kv_heads * shape.dim),
        value_(2 * rows_ * shape.kv_heads * shape.dim_v),
        out_(2 * rows_ * shape.heads * shape.dim_v),
        lse_(4 * rows_ * shape.heads),
        sink_(4 * shape.heads),
        offsets_(4 * (lengths_.size() + 1)) {
    fill(query_, 1, options.half);
    fill(key_, 2, options.half);
    fill(value_, 3, options.half);
    const DType dtype = options.half ? DType::float16 : DType::bfloat16;
    if (shape.batch > 0) {
      const std::int64_t b = shape.batch, s = shape.length;
      params_.query = tensor(query_, dtype, {b, s, shape.heads, shape.dim});
      params_.key = tensor(key_, dtype, {b, s, shape.kv_heads, shape.dim});
      params_.value = tensor(value_, dtype, {b, s, shape.kv_heads, shape.dim_v});
      params_.out = tensor(out_, dtype, {b, s, shape.heads, shape.dim_v});
      params_.softmax_lse = tensor(lse_, DType::float32, {b, shape.heads, s});
    } else {
      params_.query = tensor(query_, dtype, {rows_, shape.heads, shape.dim});
      params_.key = tensor(key_, dtype, {rows_, shape.kv_heads, shape.dim});
      params_.value = tensor(value_, dtype, {rows_, shape.kv_heads, shape.dim_v});
      params_.out = tensor(out_, dtype, {rows_, shape.heads, shape.dim_v});
      params_.softmax_lse = tensor(lse_, DType::float32, {shape.heads, rows_});
      set_offsets();
    }
    if (options.sink) set_sink();
    params_.mask.causal = shape.causal;
    if (shape.window > 0) params_.mask.window_left = shape.window - 1;
    require(query_device({DeviceType::cuda, 0}, &device_));
    require(plan_forward(params_, device_, &plan_));
    workspace_ = std::make_unique<DeviceMemory>(plan_.workspace_bytes);
    context_.workspace = workspace_->data();
    context_.workspace_bytes = plan_.workspace_bytes;
  }

  const Plan& plan() const { return plan_; }

  void run() const { require(forward(params_, plan_, context_)); }

  void plan_only() const {
    Plan plan;
    require(plan_forward(params_, device_, &plan));
  }

  /// Checks, decides and launches, as a caller without a cached plan does.
  void plan_and_run() const {
    Plan plan;
    require(plan_forward(params_, device_, &plan));
    require(forward(params_, plan, context_));
  }

  double flops() const {
    double pairs = 0;
    for (const std::int32_t length : lengths_) {
      for (std::int64_t i = 0; i < length; ++i) {
        const std::int64_t seen = shape_.causal ? i + 1 : length;
        pairs += static_cast<double>(shape_.window > 0 ? std::min(seen, shape_.window) : seen);
      }
    }
    return 2.0 * pairs * static_cast<double>(shape_.heads * (shape_.dim + shape_.dim_v));
  }

 private:
  static void fill(const DeviceMemory& memory, unsigned seed, bool half) {
    fill_normal<<<1024, 256>>>(static_cast<std::uint16_t*>(memory.data()),
                               static_cast<std::int64_t>(memory.bytes() / 2), seed, half);
    require(cudaGetLastError(), "fill_normal");
  }

  void set_offsets() {
    std::vector<std::int32_t> offsets{0};
    for (const std::int32_t length : lengths_) offsets.push_back(offsets.back() + length);
    require(cudaMemcpy(offsets_.data(), offsets.data(), offsets_.bytes(), cudaMemcpyHostToDevice),
            "cu_seqlens");
    params_.cu_seqlens_q = params_.cu_seqlens_k =
        tensor(offsets_, DType::int32, {static_cast<std::int64_t>(offsets.size())});
    params_.max_seqlen_q = params_.max_seqlen_k =
        *std::max_element(lengths_.begin(), lengths_.end());
  }

  void set_sink() {
    std::vector<float> sink(shape_.heads);
    for (std::size_t i = 0; i < sink.size(); ++i) sink[i] = static_cast<float>(i % 5) - 2.0f;
    require(cudaMemcpy(sink_.data(), sink.data(), sink_.bytes(), cudaMemcpyHostToDevice), "sink");
    params_.learnable_sink = tensor(sink_, DType::float32, {shape_.heads});
  }

  Shape shape_;
  std::vector<std::int32_t> lengths_;
  std::int64_t rows_;
  DeviceMemory query_, key_, value_, out_, lse_, sink_, offsets_;
  std::unique_ptr<DeviceMemory> workspace_;
  ForwardParams params_;
  DeviceProperties device_;
  Plan plan_;
  ExecutionContext context_;
};

template <class T>
T median(std::vector<T> values) {
  std::nth_element(values.begin(), values.begin() + values.size() / 2, values.end());
  return values[values.size() / 2];
}

struct Timing {
  std::vector<float> milliseconds, megahertz;
};

/// Each call by itself, L2 flushed before it.
Timing device_times(const Case& work, int repeats, const DeviceMemory& flush) {
  cudaEvent_t begin, end;
  require(cudaEventCreate(&begin), "cudaEventCreate");
  require(cudaEventCreate(&end), "cudaEventCreate");
  const DeviceMemory clock(sizeof(float));
  constexpr int warm_up = 3;
  Timing times;
  for (int i = 0; i < warm_up + repeats; ++i) {
    require(cudaMemsetAsync(flush.data(), i, flush.bytes()), "flush");
    require(cudaEventRecord(begin), "cudaEventRecord");
    work.run();
    require(cudaEventRecord(end), "cudaEventRecord");
    measure_clock<<<1, 1>>>(static_cast<float*>(clock.data()));
    float ms = 0, mhz = 0;
    require(cudaMemcpy(&mhz, clock.data(), sizeof(mhz), cudaMemcpyDeviceToHost), "forward");
    require(cudaEventElapsedTime(&ms, begin, end), "cudaEventElapsedTime");
    if (i < warm_up) continue;
    times.milliseconds.push_back(ms);
    times.megahertz.push_back(mhz);
  }
  cudaEventDestroy(begin);
  cudaEventDestroy(end);
  return times;
}

/// Median microseconds that one call costs this thread; the queue of launches never fills.
template <class Call>
double host_time(Call call) {
  using Clock = std::chrono::steady_clock;
  std::vector<double> times;
  for (int batch = 0; batch < 40; ++batch) {
    for (int i = 0; i < 50; ++i) {
      const Clock::time_point begin = Clock::now();
      call();
      times.push_back(std::chrono::duration<double, std::micro>(Clock::now() - begin).count());
    }
    require(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
  }
  return median(std::move(times));
}

Options parse(int count, char** arguments) {
  Options options;
  for (int i = 1; i < count; ++i) {
    const std::string argument = arguments[i];
    Shape shape;
    if (argument == "--repeats" && i + 1 < count) {
      options.repeats = std::max(1, std::atoi(arguments[++i]));
    } else if (argument == "--fp16") {
      options.half = true;
    } else if (argument == "--no-sink") {
      options.sink = false;
    } else if (parse_shape(arguments[i], &shape)) {
      options.shapes.push_back(shape);
    } else {
      std::fprintf(stderr,
                   "%s: expected --repeats N, --fp16, --no-sink or a shape like "
                   "2x8192:64/8:192/128:causal\n",
                   arguments[i]);
      std::exit(2);
    }
  }
  if (options.shapes.empty()) {
    for (const char* text : usual_shapes) {
      Shape shape;
      if (parse_shape(text, &shape)) options.shapes.push_back(shape);
    }
  }
  return options;
}

}  // namespace

int main(int argc, char** argv) {
  const Options options = parse(argc, argv);
  cudaDeviceProp properties;
  require(cudaGetDeviceProperties(&properties, 0), "cudaGetDeviceProperties");
  int driver = 0;
  require(cudaDriverGetVersion(&driver), "cudaDriverGetVersion");
  std::printf("%s, %d multiprocessors, CUDA %d.%d; sinkattn %s, %s, %s\n", properties.name,
              properties.multiProcessorCount, driver / 1000, driver % 1000 / 10, version(),
              options.half ? "fp16" : "bf16", options.sink ? "with sink" : "no sink");
  std::printf("%-30s %9s %9s %9s %8s %6s  %s\n", "shape", "ms", "min", "max", "TFLOPS", "MHz",
              "kernel");
  const DeviceMemory flush(std::size_t{256} << 20);
  for (const Shape& shape : options.shapes) {
    const Case work(shape, options);
    const Timing times = device_times(work, options.repeats, flush);
    const auto [fastest, slowest] =
        std::minmax_element(times.milliseconds.begin(), times.milliseconds.end());
    const float ms = median(times.milliseconds);
    std::printf("%-30s %9.3f %9.3f %9.3f %8.1f %6.0f  %s\n", shape.text.c_str(), ms, *fastest,
                *slowest, work.flops() / ms * 1e-9, median(times.megahertz), work.plan().kernel);
    std::fflush(stdout);
  }

  const double launch = host_time([] { empty_kernel<<<1, 32>>>(Baggage{}); });
  std::printf("\nhost time, us per call (launch of an empty kernel: %.2f)\n", launch);
  // One tile per block, and more tiles than blocks: then a counter is cleared before the launch.
  for (const char* text : {"1x128:8/8:64:causal", "1x512:64/8:64:causal"}) {
    Shape shape;
    parse_shape(text, &shape);
    const Case work(shape, options);
    const double plan = host_time([&] { work.plan_only(); });
    const double run = host_time([&] { work.run(); });
    const double both = host_time([&] { work.plan_and_run(); });
    std::printf("%-30s plan_forward %.2f, forward %.2f, both %.2f, both less the launch %.2f\n",
                text, plan, run, both, both - launch);
  }
  return 0;
}
