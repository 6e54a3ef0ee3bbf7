// SPDX-License-Identifier: Apache-2.0
// wgmma through the descriptors of core/tile.cuh against a naive product: every generated N, both
// majors, A from shared memory and from registers, every number of slabs, every 8-row start.
//
// Operands are small integers, so the product is exact and compared for equality. Everything in
// shared memory that the product must not read is NaN.
#include <cstdint>
#include <vector>

#include "gpu_test.h"
#include "hopper/core/tile.cuh"
#include "hopper/ptx/math.cuh"
#include "hopper/ptx/mbarrier.cuh"
#include "hopper/ptx/sync.cuh"
#include "hopper/ptx/wgmma.cuh"

namespace sinkattn::hopper::testing {
namespace {

using ptx::Major;

constexpr int tile_m = 64;

/// A logical matrix, rows x depth (M or N, and K), row-major; its tile begins at tile row `start`,
/// a multiple of 8.
struct Operand {
  const Bits* data;
  int rows, depth, start;
};

/// Room for A (64 rows from any start up to 64, or depth 256 from there) and for B.
using TileA = Tile<128, 256>;
using TileAMn = Tile<320, 64>;
using TileB = Tile<320, 256>;
constexpr int shared_bytes = TileA::bytes + TileB::bytes;

/// The shared-memory image of the operand's tile, NaN around it.
template <class Tile, Major major>
__global__ void draw_tile(const Operand x, unsigned char* image) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i >= Tile::bytes / 2) return;
  const int row = i / (Tile::slabs * slab_columns), column = i % (Tile::slabs * slab_columns);
  const int outer = major == Major::k ? row - x.start : column;
  const int k = major == Major::k ? column : row - x.start;
  const bool inside = outer >= 0 && outer < x.rows && k >= 0 && k < x.depth;
  const std::uint32_t at = column / slab_columns * Tile::slab_bytes +
                           swizzled_offset(row, column % slab_columns / 8) + column % 8 * 2;
  *reinterpret_cast<Bits*>(image + at) = inside ? x.data[outer * x.depth + k] : nan_bits;
}

using DrawKernel = void (*)(Operand, unsigned char*);

/// Image -> shared memory, for wgmma to read.
__device__ void copy_image(unsigned char* tile, const unsigned char* image, int bytes) {
  for (int i = 16 * static_cast<int>(threadIdx.x); i < bytes; i += 16 * 128) {
    *reinterpret_cast<uint4*>(tile + i) = *reinterpret_cast<const uint4*>(image + i);
  }
  ptx::fence_proxy_async_shared();
}

/// Descriptor of an operand that begins at tile row `start`, and its k16 steps.
template <class Tile, Major major>
__device__ std::uint64_t describe(const unsigned char* tile, int start) {
  const std::uint32_t address = ptx::shared_address(tile) + start * slab_row_bytes;
  return major == Major::k ? descriptor::k_major(address)
                           : descriptor::mn_major(address, Tile::slab_bytes);
}

template <class Tile, Major major>
__device__ std::uint64_t step(int kk) {
  return major == Major::k ? descriptor::k_step<Tile::slab_bytes>(kk) : kk * descriptor::mn_step;
}

/// The fragment map of the accumulator (ptx/wgmma.cuh) -> row-major memory.
template <int N>
__device__ void write_accumulator(const float (&d)[N / 2], float* out) {
  const int row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4, column = 2 * (threadIdx.x % 4);
#pragma unroll
  for (int i = 0; i < N / 2; ++i) {
    out[(row + 8 * (i / 2 % 2)) * N + 8 * (i / 4) + column + i % 2] = d[i];
  }
}

/// What a product kernel reads: images of both tiles, or A itself for fragments.
struct ProductArguments {
  const unsigned char *image_a, *image_b;
  const Bits* a;
  int start_a, start_b, depth;
  float* out;
};

template <class T, int N, Major major_a, Major major_b>
__global__ void __launch_bounds__(128) product_ss(const ProductArguments x) {
  using ATile = std::conditional_t<major_a == Major::k, TileA, TileAMn>;
  extern __shared__ __align__(1024) unsigned char shared[];
  copy_image(shared, x.image_a, ATile::bytes);
  copy_image(shared + TileA::bytes, x.image_b, TileB::bytes);
  __syncthreads();
  const std::uint64_t a = describe<ATile, major_a>(shared, x.start_a);
  const std::uint64_t b = describe<TileB, major_b>(shared + TileA::bytes, x.start_b);
  float d[N / 2];
#pragma unroll
  for (int i = 0; i < N / 2; ++i) d[i] = NAN;  // the first step must not read it
#pragma unroll 1
  for (int kk = 0; kk < x.depth / 16; ++kk) {
    ptx::wgmma_fence();
    ptx::wgmma_ss<T, N, major_a, major_b>(d, a + step<ATile, major_a>(kk),
                                          b + step<TileB, major_b>(kk), kk > 0);
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();
  }
  write_accumulator<N>(d, x.out);
}

template <class T, int N, Major major_b>
__global__ void __launch_bounds__(128) product_rs(const ProductArguments x) {
  extern __shared__ __align__(1024) unsigned char shared[];
  copy_image(shared, x.image_b, TileB::bytes);
  __syncthreads();
  const std::uint64_t b = describe<TileB, major_b>(shared, x.start_b);
  // Registers of A: (row, k), (row + 8, k), (row, k + 8), (row + 8, k + 8).
  const int row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4;
  const Bits* a = x.a + row * x.depth + 2 * (threadIdx.x % 4);
  float d[N / 2];
#pragma unroll
  for (int i = 0; i < N / 2; ++i) d[i] = NAN;
#pragma unroll 1
  for (int kk = 0; kk < x.depth / 16; ++kk) {
    std::uint32_t fragment[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      fragment[i] = *reinterpret_cast<const std::uint32_t*>(a + 8 * (i % 2) * x.depth + 16 * kk +
                                                            8 * (i / 2));
    }
    ptx::wgmma_fence();
    ptx::wgmma_rs<T, N, major_b>(d, fragment, b + step<TileB, major_b>(kk), kk > 0);
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();
  }
  write_accumulator<N>(d, x.out);
}

using ProductKernel = void (*)(ProductArguments);

/// One instruction of the generated list.
struct Variant {
  int n;
  ProductKernel kernel;
};

template <int N>
concept Generated = requires { ptx::WgmmaShape<N>::registers; };

template <class T, Major major_a, Major major_b>
struct FromShared {
  static constexpr DrawKernel draw_a =
      &draw_tile<std::conditional_t<major_a == Major::k, TileA, TileAMn>, major_a>;
  static constexpr DrawKernel draw_b = &draw_tile<TileB, major_b>;

  template <int N>
  static ProductKernel kernel() {
    return &product_ss<T, N, major_a, major_b>;
  }
};

template <class T, Major major_b>
struct FromRegisters {
  static constexpr DrawKernel draw_a = &draw_tile<TileA, Major::k>;  // not read
  static constexpr DrawKernel draw_b = &draw_tile<TileB, major_b>;

  template <int N>
  static ProductKernel kernel() {
    return &product_rs<T, N, major_b>;
  }
};

/// Kernels of every N that wgmma_shapes.inl has.
template <class Kind, int N = 8>
void add_variants(std::vector<Variant>* list) {
  if constexpr (Generated<N>) list->push_back({N, Kind::template kernel<N>()});
  if constexpr (N < 256) add_variants<Kind, N + 8>(list);
}

template <class Kind>
std::vector<Variant> variants() {
  std::vector<Variant> list;
  add_variants<Kind>(&list);
  return list;
}

/// A (64 x depth) times B (n x depth), transposed.
std::vector<float> naive_product(const std::vector<int>& a, const std::vector<int>& b, int n,
                                 int depth) {
  std::vector<float> out(static_cast<std::size_t>(tile_m) * n);
  for (int i = 0; i < tile_m; ++i) {
    for (int j = 0; j < n; ++j) {
      int sum = 0;
      for (int k = 0; k < depth; ++k) sum += a[i * depth + k] * b[j * depth + k];
      out[static_cast<std::size_t>(i) * n + j] = static_cast<float>(sum);
    }
  }
  return out;
}

/// Runs one product and compares every element.
template <class T, class Kind>
void check_product(const Variant& variant, int depth, int start_a, int start_b) {
  Integers integers(static_cast<std::uint32_t>(variant.n * 1000 + depth + start_a + start_b));
  const std::vector<int> a = integers.many(static_cast<std::size_t>(tile_m) * depth, 8);
  const std::vector<int> b = integers.many(static_cast<std::size_t>(variant.n) * depth, 8);
  const DeviceArray<Bits> device_a(to_bits<T>(a)), device_b(to_bits<T>(b));
  const DeviceArray<unsigned char> image_a(TileA::bytes), image_b(TileB::bytes);
  DeviceArray<float> out(static_cast<std::size_t>(tile_m) * variant.n, -1.0f);
  Kind::draw_a<<<TileA::bytes / 256, 128>>>({device_a.device(), tile_m, depth, start_a},
                                            image_a.device());
  Kind::draw_b<<<TileB::bytes / 256, 128>>>({device_b.device(), variant.n, depth, start_b},
                                            image_b.device());
  ASSERT_CUDA(launch(variant.kernel, 1, 128, shared_bytes,
                     ProductArguments{image_a.device(), image_b.device(), device_a.device(),
                                      start_a, start_b, depth, out.device()}));
  ASSERT_CUDA(out.download());
  ASSERT_EQ(out.host, naive_product(a, b, variant.n, depth))
      << "n " << variant.n << ", depth " << depth << ", starts " << start_a << " and " << start_b;
}

/// Every N at every number of slabs along k (head dim 96 uses half of its second slab); then every
/// start at a multiple of 8 rows, of A and of B: K-major A has 64 rows to shift in, and where k
/// runs along the rows, depth 256 leaves 64.
template <class T, class Kind>
void check_products() {
  const std::vector<Variant> list = variants<Kind>();
  ASSERT_GE(list.size(), 20u);
  for (const Variant& variant : list) {
    for (const int depth : {16, 64, 96, 128, 192, 256}) {
      ASSERT_NO_FATAL_FAILURE((check_product<T, Kind>(variant, depth, 0, 0)));
    }
  }
  for (const Variant& variant : list) {
    if (variant.n != 64 && variant.n != 80 && variant.n != 128 && variant.n != 256) continue;
    for (int start = 8; start <= 64; start += 8) {
      ASSERT_NO_FATAL_FAILURE((check_product<T, Kind>(variant, 128, start, 0)));
      ASSERT_NO_FATAL_FAILURE((check_product<T, Kind>(variant, 128, 0, start)));
      ASSERT_NO_FATAL_FAILURE((check_product<T, Kind>(variant, 256, 64 - start, start)));
    }
  }
}

template <class T>
class Wgmma : public HopperTest {};

using Types = ::testing::Types<__nv_bfloat16, __half>;
TYPED_TEST_SUITE(Wgmma, Types);

TYPED_TEST(Wgmma, SharedTimesKMajor) {
  check_products<TypeParam, FromShared<TypeParam, Major::k, Major::k>>();
}

TYPED_TEST(Wgmma, SharedTimesMnMajor) {
  check_products<TypeParam, FromShared<TypeParam, Major::k, Major::mn>>();
}

TYPED_TEST(Wgmma, TransposedSharedTimesMnMajor) {
  check_products<TypeParam, FromShared<TypeParam, Major::mn, Major::mn>>();
}

TYPED_TEST(Wgmma, RegistersTimesKMajor) {
  check_products<TypeParam, FromRegisters<TypeParam, Major::k>>();
}

TYPED_TEST(Wgmma, RegistersTimesMnMajor) {
  check_products<TypeParam, FromRegisters<TypeParam, Major::mn>>();
}

/// S = Q K^T, packed without a shuffle as A operand of O = S V: what attention does, less softmax.
/// `image` holds the tiles of Q, K and V one after the other.
template <class T, int Keys, int Columns>
struct TwoProducts {
  static constexpr int depth = 64;
  using Query = Tile<tile_m, depth>;
  using Key = Tile<Keys, depth>;
  using Value = Tile<Keys, Columns>;
  static constexpr int at_key = Query::bytes, at_value = at_key + Key::bytes;
  static constexpr int bytes = at_value + Value::bytes;
};

template <class T, int Keys, int Columns>
__global__ void __launch_bounds__(128) two_products(const unsigned char* image, float* out) {
  using Shape = TwoProducts<T, Keys, Columns>;
  extern __shared__ __align__(1024) unsigned char shared[];
  copy_image(shared, image, Shape::bytes);
  __syncthreads();
  const std::uint64_t q = describe<typename Shape::Query, Major::k>(shared, 0);
  const std::uint64_t k = describe<typename Shape::Key, Major::k>(shared + Shape::at_key, 0);
  const std::uint64_t v = describe<typename Shape::Value, Major::mn>(shared + Shape::at_value, 0);
  float s[Keys / 2], o[Columns / 2];
  std::uint32_t p[Keys / 16][4];
  ptx::wgmma_fence();
#pragma unroll
  for (int kk = 0; kk < Shape::depth / 16; ++kk) {
    ptx::wgmma_ss<T, Keys>(s, q + step<typename Shape::Query, Major::k>(kk),
                           k + step<typename Shape::Key, Major::k>(kk), kk > 0);
  }
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
#pragma unroll
  for (int i = 0; i < Keys / 2; i += 2) p[i / 8][i % 8 / 2] = ptx::pack<T>(s[i], s[i + 1]);
  ptx::wgmma_fence();
#pragma unroll
  for (int kk = 0; kk < Keys / 16; ++kk) {
    ptx::wgmma_rs<T, Columns, Major::mn>(o, p[kk], v + kk * descriptor::mn_step, kk > 0);
  }
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
  write_accumulator<Columns>(o, out);
}

template <class T, int Keys, int Columns>
void check_two_products() {
  using Shape = TwoProducts<T, Keys, Columns>;
  Integers integers(Keys + Columns);
  // |s| <= 64 is exact in 16 bits, |o| <= 64 * 4 * Keys in fp32.
  const std::vector<int> q = integers.many(tile_m * Shape::depth, 1);
  const std::vector<int> k = integers.many(Keys * Shape::depth, 1);
  const std::vector<int> v = integers.many(Columns * Keys, 4);
  const DeviceArray<Bits> dq(to_bits<T>(q)), dk(to_bits<T>(k)), dv(to_bits<T>(v));
  const DeviceArray<unsigned char> image(Shape::bytes);
  DeviceArray<float> out(tile_m * Columns, -1.0f);
  draw_tile<typename Shape::Query, Major::k>
      <<<Shape::Query::bytes / 256, 128>>>({dq.device(), tile_m, Shape::depth, 0}, image.device());
  draw_tile<typename Shape::Key, Major::k><<<Shape::Key::bytes / 256, 128>>>(
      {dk.device(), Keys, Shape::depth, 0}, image.device() + Shape::at_key);
  draw_tile<typename Shape::Value, Major::mn><<<Shape::Value::bytes / 256, 128>>>(
      {dv.device(), Columns, Keys, 0}, image.device() + Shape::at_value);
  ASSERT_CUDA(
      launch(&two_products<T, Keys, Columns>, 1, 128, Shape::bytes, image.device(), out.device()));
  ASSERT_CUDA(out.download());
  const std::vector<float> s = naive_product(q, k, Keys, Shape::depth);
  const std::vector<int> scores(s.begin(), s.end());
  EXPECT_EQ(out.host, naive_product(scores, v, Columns, Keys)) << Keys << " keys";
}

TYPED_TEST(Wgmma, AccumulatorIsTheNextAOperand) {
  check_two_products<TypeParam, 16, 64>();
  check_two_products<TypeParam, 80, 128>();
  check_two_products<TypeParam, 128, 96>();
}

}  // namespace
}  // namespace sinkattn::hopper::testing
