// The frame of all matrix products: tiles of weight vectors × activation rows.
//
// Equal bits: sums over a block are integers, hence exact. Each output has one float accumulator,
// to which blocks are added in the order of columns. So neither the size of a tile nor where the
// accumulator waits between two pieces of columns (registers or the output itself) changes a bit.
#pragma once

#include "kernels/kernel_set.h"
#include "kernels/simd/formats.h"

// Not inlined in builds with sanitizers: their checks would make one huge function of each tile.
#if defined(BATCHCORE_KERNELS_OUTLINED)
#define BATCHCORE_ALWAYS_INLINE
#else
#define BATCHCORE_ALWAYS_INLINE __attribute__((always_inline))
#endif
#define BATCHCORE_INLINE inline BATCHCORE_ALWAYS_INLINE

namespace batchcore::kernels {
namespace {

constexpr int kVectorsPerGroup = kGroupRows / Simd::kLanes;
constexpr int kGroupsPerTile = Simd::kTileVectors / kVectorsPerGroup;
// Weights of a tile that stay in the first-level cache while activation rows pass by.
constexpr std::int64_t kTileBytes = 24 * 1024;
// With fewer rows the weights pass by once: nothing is gained by keeping them.
constexpr std::int64_t kRowsWorthPieces = 8;
// Activations that stay in the second-level cache while the weights of a task pass by.
constexpr std::int64_t kActivationBytes = 320 * 1024;

// What tiles fetch into the cache for the next groups: each of the tiles that share the weights
// takes its part of the lines.
struct Ahead {
  std::int64_t bytes;  // from the weights in work to those to fetch
  std::int64_t part;
  std::int64_t parts;  // 0 = fetch nothing
};

BATCHCORE_INLINE void fetch_ahead(const std::uint8_t* from, std::int64_t count,
                                  const Ahead& ahead) {
  if (ahead.parts == 0) return;
  for (std::int64_t at = 64 * ahead.part; at < count; at += 64 * ahead.parts) {
    _mm_prefetch(reinterpret_cast<const char*>(from + ahead.bytes + at), _MM_HINT_T1);
  }
}

BATCHCORE_INLINE const ActivationBlock* blocks_of(const void* row, std::int64_t first_column) {
  return static_cast<const ActivationBlock*>(row) + first_column / kBlockColumns;
}

template <WeightFormat kFormat, int kVectors, int kRows>
struct Tile {
  using Q = Quants<kFormat>;
  using S = Scales<kFormat>;
  static constexpr PackedLayout kLayout = layout_of(kFormat);
  static constexpr int kBlocks = kLayout.columns_per_unit() / kBlockColumns;
  static constexpr int kStepsPerPart = 8 / S::kParts;

  Simd::Float sums[kVectors][kRows];
  S scales[kVectors];

  static BATCHCORE_INLINE int lane(int vector) {
    return kVectorsPerGroup == 1 ? 0 : vector % kVectorsPerGroup * Simd::kLanes;
  }

  template <int kStep, int kLast, typename Dots>
  BATCHCORE_INLINE void steps(Dots& dots, const std::uint8_t* const (&block)[kVectors],
                              const ActivationBlock* const (&rows)[kRows], std::int64_t at) {
    Simd::Int weights[kVectors];
    for (int v = 0; v < kVectors; ++v) weights[v] = Q::template step<kStep>(block[v], lane(v));
    for (int r = 0; r < kRows; ++r) {
      const Simd::Int activations = Simd::broadcast_activations(rows[r][at].q + 4 * kStep);
      for (int v = 0; v < kVectors; ++v) {
        dots[v][r].template add<kStep % kStepsPerPart, kStepsPerPart - 1>(weights[v], activations);
      }
    }
    if constexpr (kStep < kLast) steps<kStep + 1, kLast>(dots, block, rows, at);
  }

  template <int kPart>
  BATCHCORE_INLINE void part(const std::uint8_t* const (&block)[kVectors],
                             const ActivationBlock* const (&rows)[kRows], std::int64_t at) {
    typename Simd::template Dot<Q::kBits> dots[kVectors][kRows];
    for (int r = 0; r < kRows; ++r) {
      for (int v = 0; v < kVectors; ++v) dots[v][r].begin(rows[r][at].corrections[kPart]);
    }
    steps<kPart * kStepsPerPart, (kPart + 1) * kStepsPerPart - 1>(dots, block, rows, at);
    for (int v = 0; v < kVectors; ++v) {
      const Simd::Float scale = scales[v].scale(block[v], lane(v), kPart);
      for (int r = 0; r < kRows; ++r) {
        const Simd::Float both = Simd::mul(scale, Simd::broadcast(rows[r][at].d));
        sums[v][r] = Simd::fma(Simd::to_float(dots[v][r].total()), both, sums[v][r]);
      }
      if constexpr (S::kHasMin) {
        const Simd::Float min = scales[v].min(block[v], lane(v), kPart);
        for (int r = 0; r < kRows; ++r) {
          sums[v][r] = Simd::fma(min, Simd::broadcast(rows[r][at].scaled_sums[kPart]), sums[v][r]);
        }
      }
    }
  }

  /// Adds `num_units` units of columns to the sums.
  BATCHCORE_INLINE void add(const std::uint8_t* const (&weights)[kVectors],
                            const ActivationBlock* const (&rows)[kRows], std::int64_t num_units,
                            const Ahead& ahead) {
    const std::uint8_t* block[kVectors];
    for (int v = 0; v < kVectors; ++v) block[v] = weights[v];
    for (std::int64_t unit = 0; unit < num_units; ++unit) {
      for (int v = 0; v < kVectors; ++v) {
        scales[v].load_header(block[v], lane(v));
        block[v] += kLayout.header_bytes();
      }
      for (int b = 0; b < kBlocks; ++b) {
        const std::int64_t at = unit * kBlocks + b;
        for (int v = 0; v < kVectors; v += kVectorsPerGroup) {
          fetch_ahead(block[v], kLayout.block_bytes(), ahead);
        }
        part<0>(block, rows, at);
        if constexpr (S::kParts == 2) part<1>(block, rows, at);
        for (int v = 0; v < kVectors; ++v) block[v] += kLayout.block_bytes();
      }
    }
  }
};

// Floating-point weights: a multiply-add in single precision for each column. Sums of 16 columns
// are added to sums of 256, and those to the total, so that rounding errors stay as small as with a
// sum over many lanes.
constexpr std::int64_t kShortSum = 16;
constexpr std::int64_t kLongSum = 256;

template <WeightFormat kFormat, int kVectors, int kRows>
struct FloatTile {
  using Sums = Simd::Float[kVectors][kRows];
  static constexpr PackedLayout kLayout = layout_of(kFormat);
  Sums sums;

  static BATCHCORE_INLINE Simd::Float load(const std::uint8_t* column, int lane) {
    const std::uint8_t* at = column + lane * kLayout.low_bits / 8;
    if constexpr (kFormat == WeightFormat::kF16) return Simd::load_f16(at);
    if constexpr (kFormat == WeightFormat::kBF16) return Simd::load_bf16(at);
    return Simd::load(reinterpret_cast<const float*>(at));
  }

  static BATCHCORE_INLINE void clear(Sums& to) {
    for (int v = 0; v < kVectors; ++v) {
      for (int r = 0; r < kRows; ++r) to[v][r] = Simd::zero();
    }
  }

  static BATCHCORE_INLINE void add_sums(const Sums& from, Sums& to) {
    for (int v = 0; v < kVectors; ++v) {
      for (int r = 0; r < kRows; ++r) to[v][r] = Simd::add(to[v][r], from[v][r]);
    }
  }

  BATCHCORE_INLINE void add(const std::uint8_t* const (&weights)[kVectors],
                            const float* const (&rows)[kRows], std::int64_t num_columns,
                            const Ahead& /*ahead*/) {
    for (std::int64_t begin = 0; begin < num_columns; begin += kLongSum) {
      const std::int64_t end = num_columns < begin + kLongSum ? num_columns : begin + kLongSum;
      Sums long_sums;
      clear(long_sums);
      for (std::int64_t k = begin; k < end; k += kShortSum) {
        Sums short_sums;
        clear(short_sums);
        add_columns(weights, rows, k, end < k + kShortSum ? end : k + kShortSum, short_sums);
        add_sums(short_sums, long_sums);
      }
      add_sums(long_sums, sums);
    }
  }

  static BATCHCORE_INLINE void add_columns(const std::uint8_t* const (&weights)[kVectors],
                                           const float* const (&rows)[kRows], std::int64_t begin,
                                           std::int64_t end, Sums& to) {
    for (std::int64_t k = begin; k < end; ++k) {
      Simd::Float w[kVectors];
      for (int v = 0; v < kVectors; ++v) {
        w[v] = load(weights[v] + k * kLayout.unit_bytes(),
                    kVectorsPerGroup == 1 ? 0 : v % kVectorsPerGroup * Simd::kLanes);
      }
      for (int r = 0; r < kRows; ++r) {
        const Simd::Float x = Simd::broadcast(rows[r][k]);
        for (int v = 0; v < kVectors; ++v) to[v][r] = Simd::fma(w[v], x, to[v][r]);
      }
    }
  }
};

BATCHCORE_INLINE void load_outputs(Simd::Float& sum, const float* output, std::int64_t count) {
  if (count >= Simd::kLanes) {
    sum = Simd::load(output);
    return;
  }
  float lanes[Simd::kLanes] = {};
  for (std::int64_t i = 0; i < count; ++i) lanes[i] = output[i];
  sum = Simd::load(lanes);
}

BATCHCORE_INLINE void store_outputs(Simd::Float sum, float* output, std::int64_t count) {
  if (count >= Simd::kLanes) {
    Simd::store(output, sum);
    return;
  }
  float lanes[Simd::kLanes];
  Simd::store(lanes, sum);
  for (std::int64_t i = 0; i < count; ++i) output[i] = lanes[i];
}

template <WeightFormat kFormat, int kVectors, int kRows>
__attribute__((noinline)) void run_tile(const ProductTask& task, std::int64_t group,
                                        std::int64_t first_row, std::int64_t first_unit,
                                        std::int64_t num_units, const Ahead& ahead) {
  constexpr PackedLayout kLayout = layout_of(kFormat);
  const std::size_t group_bytes = kLayout.group_bytes(task.columns);
  const std::uint8_t* weights[kVectors];
  std::int64_t output[kVectors];
  for (int v = 0; v < kVectors; ++v) {
    const std::int64_t of = group + v / kVectorsPerGroup;
    weights[v] = task.weights + static_cast<std::size_t>(of) * group_bytes +
                 static_cast<std::size_t>(first_unit) * kLayout.unit_bytes();
    output[v] = of * kGroupRows + v % kVectorsPerGroup * Simd::kLanes;
  }
  const std::int64_t first_column = first_unit * kLayout.columns_per_unit();

  const auto compute = [&](auto& tile, const auto& rows) BATCHCORE_ALWAYS_INLINE {
    for (int v = 0; v < kVectors; ++v) {
      for (int r = 0; r < kRows; ++r) {
        if (first_unit == 0) {
          tile.sums[v][r] = Simd::zero();
        } else {
          load_outputs(tile.sums[v][r], task.outputs[first_row + r] + output[v],
                       task.num_outputs - output[v]);
        }
      }
    }
    tile.add(weights, rows, num_units, ahead);
    for (int r = 0; r < kRows; ++r) {
      for (int v = 0; v < kVectors; ++v) {
        store_outputs(tile.sums[v][r], task.outputs[first_row + r] + output[v],
                      task.num_outputs - output[v]);
      }
    }
  };
  if constexpr (kLayout.is_float()) {
    const float* rows[kRows];
    for (int r = 0; r < kRows; ++r) {
      rows[r] = static_cast<const float*>(task.activations[first_row + r]) + first_column;
    }
    FloatTile<kFormat, kVectors, kRows> tile;
    compute(tile, rows);
  } else {
    const ActivationBlock* rows[kRows];
    for (int r = 0; r < kRows; ++r) {
      rows[r] = blocks_of(task.activations[first_row + r], first_column);
    }
    Tile<kFormat, kVectors, kRows> tile;
    compute(tile, rows);
  }
}

template <WeightFormat kFormat, int kVectors>
void run_rows(const ProductTask& task, std::int64_t group, std::int64_t first_row,
              std::int64_t end_row, std::int64_t first_unit, std::int64_t num_units,
              std::int64_t bytes_ahead) {
  // Tiles as equal as can be: five rows are 3 + 2 rather than 4 + 1.
  const std::int64_t num_rows = end_row - first_row;
  const std::int64_t num_tiles = (num_rows + Simd::kTileRows - 1) / Simd::kTileRows;
  std::int64_t row = first_row;
  for (std::int64_t tile = 0; tile < num_tiles; ++tile) {
    const std::int64_t end = first_row + num_rows * (tile + 1) / num_tiles;
    const Ahead ahead{bytes_ahead, tile, bytes_ahead > 0 ? num_tiles : 0};
    switch (end - row) {
      case 1:
        run_tile<kFormat, kVectors, 1>(task, group, row, first_unit, num_units, ahead);
        break;
      case 2:
        run_tile<kFormat, kVectors, 2>(task, group, row, first_unit, num_units, ahead);
        break;
      case 3:
        run_tile<kFormat, kVectors, 3>(task, group, row, first_unit, num_units, ahead);
        break;
      default:
        run_tile<kFormat, kVectors, 4>(task, group, row, first_unit, num_units, ahead);
        break;
    }
    row = end;
  }
}

template <WeightFormat kFormat>
void multiply_rows(const ProductTask& task, std::int64_t first_row, std::int64_t end_row) {
  constexpr PackedLayout kLayout = layout_of(kFormat);
  const std::int64_t num_units = task.columns / kLayout.columns_per_unit();
  std::int64_t per_piece = num_units;
  if (end_row - first_row > kRowsWorthPieces) {
    const std::int64_t fit = kTileBytes / (kGroupsPerTile * kLayout.unit_bytes());
    const std::int64_t num_pieces = fit > 0 ? (num_units + fit - 1) / fit : num_units;
    per_piece = (num_units + num_pieces - 1) / num_pieces;
    if (kLayout.is_float()) per_piece = (per_piece + kLongSum - 1) / kLongSum * kLongSum;
  }
  const std::int64_t unit_bytes = kLayout.unit_bytes();
  for (std::int64_t group = task.begin_group; group < task.end_group; group += kGroupsPerTile) {
    const bool is_whole = group + kGroupsPerTile <= task.end_group;
    const bool has_next = group + 2 * kGroupsPerTile <= task.end_group;
    for (std::int64_t unit = 0; unit < num_units; unit += per_piece) {
      const bool is_last = num_units - unit <= per_piece;
      const std::int64_t count = is_last ? num_units - unit : per_piece;
      // The next weights are further on in these groups, or at the beginning of the next ones.
      std::int64_t ahead = per_piece * unit_bytes;
      if (is_last) ahead = has_next ? (kGroupsPerTile * num_units - unit) * unit_bytes : 0;
      if (is_whole) {
        run_rows<kFormat, Simd::kTileVectors>(task, group, first_row, end_row, unit, count, ahead);
      } else {
        run_rows<kFormat, kVectorsPerGroup>(task, group, first_row, end_row, unit, count, ahead);
      }
    }
  }
}

template <WeightFormat kFormat>
void multiply(const ProductTask& task) {
  constexpr std::int64_t kBytesPerColumn =
      layout_of(kFormat).is_float() ? 4 : sizeof(ActivationBlock) / kBlockColumns;
  const std::int64_t fit = kActivationBytes / (kBytesPerColumn * task.columns);
  const std::int64_t per_part = fit > 4 * Simd::kTileRows ? fit : 4 * Simd::kTileRows;
  const std::int64_t num_parts = (task.num_rows + per_part - 1) / per_part;
  for (std::int64_t part = 0; part < num_parts; ++part) {
    multiply_rows<kFormat>(task, task.num_rows * part / num_parts,
                           task.num_rows * (part + 1) / num_parts);
  }
}

}  // namespace
}  // namespace batchcore::kernels
