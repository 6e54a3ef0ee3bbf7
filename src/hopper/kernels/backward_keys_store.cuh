// SPDX-License-Identifier: Apache-2.0
// The end of the key pass: dK and dV from registers to their rows, or to partial sums where the
// query heads of a group are split among blocks.
#pragma once

#include "hopper/kernels/backward_keys.cuh"

namespace sinkattn::hopper {

/// Index of a key row's partial gradients, in rows.
__device__ inline std::int64_t partial_row(const BackwardArguments& p, const KeyPassPlace& at,
                                           std::int64_t row) {
  const std::int64_t batch = p.packed_k ? 0 : at.b;
  return (batch * p.rows_k + row) * p.heads_kv + at.kv_head + at.split * p.partial_stride;
}

/// Stores fragments of 64 keys that start at key `first` of the block's tile.
template <class C>
struct KeyGradientStore {
  using T = typename C::T;
  const BackwardArguments& p;
  KeyPassPlace at;
  SequenceInfo keys;
  int key, column;  ///< this thread's first key in the sequence, and first column of 8

  __device__ __forceinline__ KeyGradientStore(const BackwardArguments& p_, const KeyPassPlace& at_,
                                              int first, unsigned thread)
      : p(p_), at(at_), keys(resolve_sequence(p_.side_k, at_.b)) {
    key = at.first_key + first + static_cast<int>(thread / 32 * 16 + thread % 32 / 4);
    column = 2 * static_cast<int>(thread % 4);
  }

  /// Columns [start, start + 2 Registers) of dK; the scale of the scores is applied here.
  template <int Registers>
  __device__ __forceinline__ void key_columns(const float (&x)[Registers], int start) const {
    store(x, start, p.softmax_scale, p.dk, p.head_dim, p.dk_partial, C::d);
  }

  /// The same of dV.
  template <int Registers>
  __device__ __forceinline__ void value_columns(const float (&x)[Registers], int start) const {
    store(x, start, 1.0f, p.dv, p.head_dim_v, p.dv_partial, C::dv);
  }

 private:
  template <int Registers>
  __device__ __forceinline__ void store(const float (&x)[Registers], int start, float scale,
                                        const HeadsTensor& tensor, int columns, float* partial,
                                        int padded) const {
    if (tensor.data == nullptr) return;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (key + 8 * half >= keys.length) continue;
      const std::int64_t row = keys.first_row + key + 8 * half;
      if (partial != nullptr) {
        float* to = partial + partial_row(p, at, row) * padded + start + column;
#pragma unroll
        for (int j = 0; j < Registers / 4; ++j) {
          *reinterpret_cast<float2*>(to + 8 * j) =
              make_float2(x[4 * j + 2 * half], x[4 * j + 2 * half + 1]);
        }
        continue;
      }
      T* to = static_cast<T*>(tensor.data) + tensor.offset(p.packed_k ? 0 : at.b, row, at.kv_head) +
              start + column;
#pragma unroll
      for (int j = 0; j < Registers / 4; ++j) {
        if (start + 8 * j >= columns) break;
        *reinterpret_cast<std::uint32_t*>(to + 8 * j) =
            ptx::pack<T>(x[4 * j + 2 * half] * scale, x[4 * j + 2 * half + 1] * scale);
      }
    }
  }
};

template <class T>
__device__ inline void store_zero_row(const BackwardArguments& p, const KeyPassPlace& at,
                                      std::int64_t row, const HeadsTensor& tensor, int columns,
                                      float* partial, int padded) {
  if (tensor.data == nullptr) return;
  T* to = static_cast<T*>(tensor.data) + tensor.offset(p.packed_k ? 0 : at.b, row, at.kv_head);
  for (int column = 0; column < columns; column += 4) {
    if (partial != nullptr) {
      *reinterpret_cast<float4*>(partial + partial_row(p, at, row) * padded + column) =
          make_float4(0, 0, 0, 0);
    } else {
      *reinterpret_cast<uint2*>(to + column) = make_uint2(0, 0);
    }
  }
}

/// Zeros for keys that no query sees; one key per thread of the main warpgroups.
template <class C>
__device__ __forceinline__ void store_zero_gradients(const BackwardArguments& p) {
  const KeyPassPlace at(p, blockIdx.x, C::keys);
  const SequenceInfo keys = resolve_sequence(p.side_k, at.b);
  const int key = static_cast<int>(threadIdx.x) - C::first_main_group * 128;
  if (key >= C::keys || at.first_key + key >= keys.length) return;
  const std::int64_t row = keys.first_row + at.first_key + key;
  store_zero_row<typename C::T>(p, at, row, p.dv, p.head_dim_v, p.dv_partial, C::dv);
  store_zero_row<typename C::T>(p, at, row, p.dk, p.head_dim, p.dk_partial, C::d);
}

}  // namespace sinkattn::hopper
