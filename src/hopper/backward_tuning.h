// SPDX-License-Identifier: Apache-2.0
// Tiles and register budgets of the backward, the only home of these numbers. docs/tuning-log.md
// has the measurements. Budgets: 384 threads share 504 registers (per thread of a warpgroup), 512
// threads share 512; values are multiples of 8 that compile without spills.
#pragma once

namespace sinkattn::hopper {

/// Rows of a query tile in every backward kernel; the accumulator of dQ is made of such tiles.
inline constexpr int backward_tile_queries = 64;

/// L2 that the accumulator, Q and dO of the heads in work may take: of the pairs of a section, each
/// counted with one head; and of the heads of a group that one block loops over.
inline constexpr long long l2_of_section = 24ll << 20;
inline constexpr long long l2_of_heads = 48ll << 20;

/// The key pass: 128 keys per block, 64 in each of two main warpgroups.
/// stages: query tiles (Q, dO and their statistics) in flight, and dS tiles between the main
/// warpgroups and the warpgroup of dQ.
/// producer_group: a warpgroup of its own for copies; otherwise a lane of the dQ warpgroup copies.
/// dq_columns: columns of dQ accumulated at a time.
/// statistics_window: pairs of LSE2 or D' (of 8 per thread and tile) held in registers.
template <int D, int DV>
struct KeyPassTuning;

template <>
struct KeyPassTuning<96, 96> {
  static constexpr int stages = 2, dq_columns = 32, statistics_window = 3;
  static constexpr bool producer_group = false;
  static constexpr int producer_registers = 0, dq_registers = 56, main_registers = 224;
};

template <>
struct KeyPassTuning<128, 128> {
  static constexpr int stages = 2, dq_columns = 32, statistics_window = 3;
  static constexpr bool producer_group = false;
  static constexpr int producer_registers = 0, dq_registers = 56, main_registers = 224;
};

/// The key pass at head dim 64. gradient_slots: tiles of dQ that wait for their turn, deterministic
/// mode. dq_registers: of the warpgroup of dQ and dK.
struct NarrowKeyPassTuning {
  static constexpr int stages = 4, gradient_slots = 3, statistics_window = 8;
  static constexpr int producer_registers = 32, dq_registers = 128, main_registers = 176;
};

/// The key pass for large head dims: 64 keys per block, shared by two main warpgroups.
template <int D, int DV>
struct WideKeyPassTuning;

template <>
struct WideKeyPassTuning<192, 128> {
  static constexpr int stages = 3, dq_columns = 64;
  static constexpr int producer_registers = 24, dq_registers = 88, main_registers = 200;
};

template <>
struct WideKeyPassTuning<256, 256> {
  static constexpr int stages = 2, dq_columns = 64;
  static constexpr int producer_registers = 24, dq_registers = 104, main_registers = 192;
};

/// The query pass: 128 query rows per block, 64 in each of two main warpgroups.
/// keys: rows of a key tile. stages: key tiles in flight. overlap: dQ of one tile runs behind S and
/// dP of the next.
template <int D, int DV>
struct QueryPassTuning;

template <>
struct QueryPassTuning<64, 64> {
  static constexpr int keys = 64, stages = 6;
  static constexpr bool overlap = true;
};

template <>
struct QueryPassTuning<96, 96> {
  static constexpr int keys = 64, stages = 4;
  static constexpr bool overlap = true;
};

template <>
struct QueryPassTuning<128, 128> {
  static constexpr int keys = 64, stages = 4;
  static constexpr bool overlap = true;
};

template <>
struct QueryPassTuning<192, 128> {
  static constexpr int keys = 64, stages = 3;
  static constexpr bool overlap = true;
};

template <>
struct QueryPassTuning<256, 256> {
  static constexpr int keys = 48, stages = 2;
  static constexpr bool overlap = false;
};

}  // namespace sinkattn::hopper
