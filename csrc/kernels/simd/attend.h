// Attention of a few query vectors over blocks of 32 keys: scores, softmax as it goes, weighted
// values (online softmax: Milakov and Gimelshein, arXiv 1805.02867; spans joined as in
// Flash-Decoding). Scores are sums over 16 lanes; values are added key by key.
#pragma once

#include <cstring>

#include "kernels/attention_task.h"
#include "kernels/simd/wide.h"

namespace batchcore::kernels {
namespace {

constexpr float kMinusInfinity = -__builtin_inff();

#if defined(__AVX512F__)
constexpr int kTileQueries = 4;
constexpr int kTileKeys = 4;
#else  // with 16 registers
constexpr int kTileQueries = 2;
constexpr int kTileKeys = 2;
#endif

inline std::int32_t padded(std::int32_t n) { return (n + 15) / 16 * 16; }

template <CacheType kType>
inline Wide load_elements(const std::uint8_t* row, std::int32_t i) {
  if constexpr (kType == CacheType::kF16) return Wide::load_f16(row + 2 * i);
  if constexpr (kType == CacheType::kBF16) return Wide::load_bf16(row + 2 * i);
  return Wide::load(reinterpret_cast<const float*>(row) + i);
}

#if defined(__AVX512F__)
// Sums across the lanes of 16 vectors at once, each in the order of Wide::sum(): of those of query
// q and key k, lane 4q + k of the result.
inline __m512 sum_each(const Wide (&s)[4][4]) {
  __m512 half[4][2];  // of key k: queries 0 and 1, 2 and 3
  for (int k = 0; k < 4; ++k) {
    for (int pair = 0; pair < 2; ++pair) {
      const __m512 a = s[2 * pair][k].x;
      const __m512 b = s[2 * pair + 1][k].x;
      half[k][pair] =
          _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
    }
  }
  __m512 quarter[4];
  for (int k = 0; k < 4; ++k) {
    quarter[k] = _mm512_add_ps(_mm512_shuffle_f32x4(half[k][0], half[k][1], 0x88),
                               _mm512_shuffle_f32x4(half[k][0], half[k][1], 0xdd));
  }
  __m512 eighth[2];
  for (int pair = 0; pair < 2; ++pair) {
    const __m512 a = quarter[2 * pair];
    const __m512 b = quarter[2 * pair + 1];
    eighth[pair] = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  }
  const __m512d a = _mm512_castps_pd(eighth[0]);
  const __m512d b = _mm512_castps_pd(eighth[1]);
  return _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)),
                       _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
}
#endif

// scores[q][k] for a tile of queries (rows of q, padded) and keys.
template <CacheType kType, int kQueries>
inline void score_tile(const float* const (&queries)[kQueries],
                       const std::uint8_t* const (&keys)[kTileKeys], std::int32_t size,
                       float* scores) {
  Wide s[kTileQueries][kTileKeys];
  for (int q = 0; q < kTileQueries; ++q) {
    for (int k = 0; k < kTileKeys; ++k) s[q][k] = Wide::zero();
  }
  for (std::int32_t i = 0; i < size; i += 16) {
    Wide key[kTileKeys];
    for (int k = 0; k < kTileKeys; ++k) key[k] = load_elements<kType>(keys[k], i);
    for (int q = 0; q < kQueries; ++q) {
      const Wide query = Wide::load(queries[q] + i);
      for (int k = 0; k < kTileKeys; ++k) s[q][k] = Wide::fma(query, key[k], s[q][k]);
    }
  }
#if defined(__AVX512F__)
  float sums[16];
  _mm512_storeu_ps(sums, sum_each(s));
  for (int q = 0; q < kQueries; ++q) std::memcpy(scores + q * kKeyBlock, sums + 4 * q, 16);
#else
  for (int q = 0; q < kQueries; ++q) {
    for (int k = 0; k < kTileKeys; ++k) scores[q * kKeyBlock + k] = s[q][k].sum();
  }
#endif
}

template <CacheType kType, int kQueries>
void score_block(const float* queries, const std::uint8_t* const* keys, std::int32_t size,
                 float* scores) {
  const float* q[kQueries];
  for (int i = 0; i < kQueries; ++i) q[i] = queries + i * padded(size);
  for (int k = 0; k < kKeyBlock; k += kTileKeys) {
    const std::uint8_t* tile[kTileKeys];
    for (int i = 0; i < kTileKeys; ++i) tile[i] = keys[k + i];
    score_tile<kType, kQueries>(q, tile, padded(size), scores + k);
  }
}

// accumulators[q] = accumulators[q] · factors[q] + Σ over keys of weights[q][key] · values[key].
template <CacheType kType, int kQueries, int kVectors>
inline void weigh_tile(float* accumulators, std::int32_t size, const float* factors,
                       const float* weights, const std::uint8_t* const* values, std::int32_t at) {
  Wide sum[kQueries][kVectors];
  for (int q = 0; q < kQueries; ++q) {
    for (int v = 0; v < kVectors; ++v) {
      sum[q][v] = Wide::load(accumulators + q * size + at + 16 * v) * Wide::broadcast(factors[q]);
    }
  }
  for (int key = 0; key < kKeyBlock; ++key) {
    Wide value[kVectors];
    for (int v = 0; v < kVectors; ++v) value[v] = load_elements<kType>(values[key], at + 16 * v);
    for (int q = 0; q < kQueries; ++q) {
      const Wide weight = Wide::broadcast(weights[q * kKeyBlock + key]);
      for (int v = 0; v < kVectors; ++v) sum[q][v] = Wide::fma(weight, value[v], sum[q][v]);
    }
  }
  for (int q = 0; q < kQueries; ++q) {
    for (int v = 0; v < kVectors; ++v) sum[q][v].store(accumulators + q * size + at + 16 * v);
  }
}

template <CacheType kType, int kQueries>
void weigh_block(float* accumulators, std::int32_t size, const float* factors, const float* weights,
                 const std::uint8_t* const* values) {
  std::int32_t at = 0;
  for (; at + 16 * kTileKeys <= size; at += 16 * kTileKeys) {
    weigh_tile<kType, kQueries, kTileKeys>(accumulators, size, factors, weights, values, at);
  }
  for (; at < size; at += 16) {
    weigh_tile<kType, kQueries, 1>(accumulators, size, factors, weights, values, at);
  }
}

// A value that a generic lambda can use as a template argument.
template <auto kConstant>
struct Constant {
  static constexpr auto kValue = kConstant;
};

// Calls f with the number of queries of a tile.
template <typename F>
inline void with_queries(int count, const F& f) {
  switch (count) {
    case 1:
      f(Constant<1>{});
      break;
    case 2:
      f(Constant<2>{});
      break;
    case 3:
      f(Constant<(kTileQueries < 3 ? kTileQueries : 3)>{});
      break;
    default:
      f(Constant<kTileQueries>{});
      break;
  }
}

template <typename F>
inline void with_type(CacheType type, const F& f) {
  switch (type) {
    case CacheType::kF16:
      f(Constant<CacheType::kF16>{});
      break;
    case CacheType::kBF16:
      f(Constant<CacheType::kBF16>{});
      break;
    default:
      f(Constant<CacheType::kF32>{});
      break;
  }
}

// The rows of a block's cells, as they are or in single precision.
class BlockRows {
 public:
  BlockRows(const CacheRows& cache, std::int32_t size, float* copies, float* zeros, bool is_reused)
      : cache_(cache), size_(size), copies_(copies), zeros_(zeros) {
    std::memset(zeros_, 0, sizeof(float) * static_cast<std::size_t>(padded(size)));
    // Decoded once where several tiles of queries use it. Odd sizes are padded by the copy.
    is_copied_ = cache.type == CacheType::kOther || is_reused || size % 16 != 0;
  }

  [[nodiscard]] CacheType type() const { return is_copied_ ? CacheType::kF32 : cache_.type; }

  void fetch(const std::int32_t* cells, const std::uint8_t* (&rows)[kKeyBlock]) {
    for (int key = 0; key < kKeyBlock; ++key) {
      if (cells[key] < 0) {
        rows[key] = reinterpret_cast<const std::uint8_t*>(zeros_);
        continue;
      }
      const std::uint8_t* row = cache_.base + static_cast<std::size_t>(cells[key]) * cache_.stride;
      rows[key] = is_copied_ ? copy(key, row) : row;
    }
  }

 private:
  const std::uint8_t* copy(int key, const std::uint8_t* row) {
    float* copy = copies_ + key * padded(size_);
    const std::int32_t whole = size_ / 16 * 16;
    if (cache_.type == CacheType::kOther) {
      cache_.to_float(row, copy, size_);
    } else {
      with_type(cache_.type, [&](auto type) {
        for (std::int32_t i = 0; i < whole; i += 16) {
          load_elements<decltype(type)::kValue>(row, i).store(copy + i);
        }
      });
      if (whole < size_) copy_rest(row, copy, whole);
    }
    for (std::int32_t i = size_; i < padded(size_); ++i) copy[i] = 0.0F;
    return reinterpret_cast<const std::uint8_t*>(copy);
  }

  void copy_rest(const std::uint8_t* row, float* copy, std::int32_t from) const {
    alignas(64) std::uint8_t bytes[64] = {};
    const std::size_t element = cache_.type == CacheType::kF32 ? 4 : 2;
    std::memcpy(bytes, row + element * static_cast<std::size_t>(from),
                element * static_cast<std::size_t>(size_ - from));
    float rest[16];
    with_type(cache_.type,
              [&](auto type) { load_elements<decltype(type)::kValue>(bytes, 0).store(rest); });
    std::memcpy(copy + from, rest, sizeof(float) * static_cast<std::size_t>(size_ - from));
  }

  const CacheRows& cache_;
  std::int32_t size_;
  float* copies_;
  float* zeros_;
  bool is_copied_;
};

// Adds a sum over other keys, with its own maximum, to what a query has. Nothing stays as it is.
inline void join(float& max, float& sum, float* values, float other_max, float other_sum,
                 const float* other, std::int32_t size) {
  if (other_max == kMinusInfinity) return;
  if (max == kMinusInfinity) {
    max = other_max;
    sum = other_sum;
    std::memcpy(values, other, sizeof(float) * static_cast<std::size_t>(size));
    return;
  }
  const float both = max < other_max ? other_max : max;
  const float mine = exp_of_negative(max - both);
  const float theirs = exp_of_negative(other_max - both);
  max = both;
  sum = __builtin_fmaf(other_sum, theirs, sum * mine);
  for (std::int32_t i = 0; i < size; ++i)
    values[i] = __builtin_fmaf(other[i], theirs, values[i] * mine);
}

inline void finish(float max, float sum, const float* values, const float* sink, std::int32_t size,
                   float* output) {
  if (max == kMinusInfinity) {  // no key is seen: `values` was never written
    std::memset(output, 0, sizeof(float) * static_cast<std::size_t>(size));
    return;
  }
  float factor = 1.0F;
  if (sink != nullptr) {
    const float both = max < *sink ? *sink : max;
    factor = exp_of_negative(max - both);
    sum = sum * factor + exp_of_negative(*sink - both);
  }
  const float inverse = sum == 0.0F ? 0.0F : factor / sum;
  for (std::int32_t i = 0; i < size; ++i) output[i] = values[i] * inverse;
}

class Attention {
 public:
  Attention(const AttentionTask& task, float* scratch)
      : task_(task), keys_(padded(task.key_size)), values_(padded(task.value_size)) {
    const auto take = [&scratch](std::size_t count) {
      float* at = scratch;
      scratch += count;
      return at;
    };
    num_queries_ = task.num_rows * task.num_heads;
    queries_ = take(static_cast<std::size_t>(kMaxQueries * keys_));
    span_ = take(static_cast<std::size_t>(kMaxQueries * values_));
    total_ = take(static_cast<std::size_t>(kMaxQueries * values_));
    scores_ = take(kMaxQueries * kKeyBlock);
    factors_ = take(kMaxQueries);
    for (PartialHeader*& header : headers_) {
      header = reinterpret_cast<PartialHeader*>(take(2 * kMaxQueries));
    }
    key_copies_ = take(static_cast<std::size_t>(kKeyBlock * keys_));
    value_copies_ = take(static_cast<std::size_t>(kKeyBlock * values_));
    zeros_ = take(static_cast<std::size_t>(keys_ < values_ ? values_ : keys_));
  }

  void run() {
    load_queries();
    const bool is_reused = num_queries_ > 2 * kTileQueries;
    BlockRows keys(task_.keys, task_.key_size, key_copies_, zeros_, is_reused);
    BlockRows values(task_.values, task_.value_size, value_copies_, zeros_, is_reused);
    for (std::int32_t q = 0; q < num_queries_; ++q) total(q) = {kMinusInfinity, 0.0F};
    begin_span();  // so that a partial result over no blocks says that no key is seen
    std::int32_t block = 0;
    while (block < task_.num_blocks) {
      const std::int32_t span = task_.block_ids[block] / kBlocksPerSpan;
      begin_span();
      for (; block < task_.num_blocks && task_.block_ids[block] / kBlocksPerSpan == span; ++block) {
        add_block(block, keys, values);
      }
      end_span();
    }
    write();
  }

 private:
  PartialHeader& span(std::int32_t q) { return headers_[0][q]; }
  PartialHeader& total(std::int32_t q) { return headers_[1][q]; }

  void load_queries() {
    for (std::int32_t q = 0; q < num_queries_; ++q) {
      const auto* query = reinterpret_cast<const float*>(
          task_.queries + static_cast<std::size_t>(q / task_.num_heads) * task_.query_row_stride +
          static_cast<std::size_t>(q % task_.num_heads) * task_.query_head_stride);
      float* to = queries_ + q * keys_;
      for (std::int32_t i = 0; i < task_.key_size; ++i) to[i] = query[i] * task_.scale;
      for (std::int32_t i = task_.key_size; i < keys_; ++i) to[i] = 0.0F;
    }
  }

  void begin_span() {
    for (std::int32_t q = 0; q < num_queries_; ++q) span(q) = {kMinusInfinity, 0.0F};
    std::memset(span_, 0, sizeof(float) * static_cast<std::size_t>(num_queries_ * values_));
  }

  void end_span() {
    if (task_.partials != nullptr) return;
    for (std::int32_t q = 0; q < num_queries_; ++q) {
      join(total(q).max, total(q).sum, total_ + q * values_, span(q).max, span(q).sum,
           span_ + q * values_, task_.value_size);
    }
  }

  void add_block(std::int32_t block, BlockRows& keys, BlockRows& values) {
    const std::int32_t* cells = task_.cells + block * kKeyBlock;
    const std::uint8_t* rows[kKeyBlock];
    keys.fetch(cells, rows);
    with_type(keys.type(), [&](auto type) {
      for (std::int32_t q = 0; q < num_queries_; q += kTileQueries) {
        with_queries(num_queries_ - q, [&](auto count) {
          score_block<decltype(type)::kValue, decltype(count)::kValue>(
              queries_ + q * keys_, rows, task_.key_size, scores_ + q * kKeyBlock);
        });
      }
    });
    if (!weigh_scores(cells)) return;
    values.fetch(cells, rows);
    with_type(values.type(), [&](auto type) {
      for (std::int32_t q = 0; q < num_queries_; q += kTileQueries) {
        with_queries(num_queries_ - q, [&](auto count) {
          weigh_block<decltype(type)::kValue, decltype(count)::kValue>(
              span_ + q * values_, values_, factors_ + q, scores_ + q * kKeyBlock, rows);
        });
      }
    });
  }

  /// Turns scores into weights relative to the new maxima. False where no query sees a key.
  bool weigh_scores(const std::int32_t* cells) {
    bool any = false;
    for (std::int32_t row = 0; row < task_.num_rows; ++row) {
      alignas(64) float mask[kKeyBlock];
      read_mask(row, cells, mask);
      for (std::int32_t head = 0; head < task_.num_heads; ++head) {
        const std::int32_t q = row * task_.num_heads + head;
        any = weigh(q, mask, task_.slopes[head]) || any;
      }
    }
    return any;
  }

  void read_mask(std::int32_t row, const std::int32_t* cells, float* mask) const {
    const std::uint16_t* of_row = task_.masks == nullptr ? nullptr : task_.masks[row];
    std::uint16_t halves[kKeyBlock];
    constexpr std::uint16_t kHalfMinusInfinity = 0xfc00;
    for (int key = 0; key < kKeyBlock; ++key) {
      const std::uint16_t seen = of_row == nullptr ? std::uint16_t{0}
                                 : cells[key] < 0  ? kHalfMinusInfinity
                                                   : of_row[cells[key]];
      halves[key] = cells[key] < 0 ? kHalfMinusInfinity : seen;
    }
    Wide::load_f16(halves).store(mask);
    Wide::load_f16(halves + 16).store(mask + 16);
  }

  bool weigh(std::int32_t q, const float* mask, float slope) {
    float* scores = scores_ + q * kKeyBlock;
    Wide s[2];
    for (int i = 0; i < 2; ++i) {
      s[i] = Wide::load(scores + 16 * i);
      if (task_.softcap != 0.0F) s[i] = Wide::broadcast(task_.softcap) * tanh_of(s[i]);
      s[i] = Wide::fma(Wide::load(mask + 16 * i), Wide::broadcast(slope), s[i]);
    }
    const float largest = Wide::max(s[0], s[1]).largest();
    factors_[q] = 1.0F;
    if (largest == kMinusInfinity) {
      Wide::zero().store(scores);
      Wide::zero().store(scores + 16);
      return false;
    }
    PartialHeader& header = span(q);
    if (header.max < largest) {
      factors_[q] = header.max == kMinusInfinity ? 0.0F : exp_of_negative(header.max - largest);
      header.max = largest;
    }
    const Wide max = Wide::broadcast(header.max);
    const Wide p0 = exp_of_negative(s[0] - max);
    const Wide p1 = exp_of_negative(s[1] - max);
    p0.store(scores);
    p1.store(scores + 16);
    header.sum = __builtin_fmaf(header.sum, factors_[q], (p0 + p1).sum());
    return true;
  }

  void write() {
    for (std::int32_t q = 0; q < num_queries_; ++q) {
      if (task_.partials != nullptr) {
        float* partial = task_.partials + static_cast<std::size_t>(q) * task_.partial_stride;
        std::memcpy(partial, &span(q), sizeof(PartialHeader));
        std::memcpy(partial + 2, span_ + q * values_,
                    sizeof(float) * static_cast<std::size_t>(task_.value_size));
        continue;
      }
      const std::int32_t head = q % task_.num_heads;
      finish(total(q).max, total(q).sum, total_ + q * values_,
             task_.sinks == nullptr ? nullptr : task_.sinks + head, task_.value_size,
             task_.outputs +
                 static_cast<std::size_t>(q / task_.num_heads) * task_.output_row_stride +
                 static_cast<std::size_t>(head) * task_.output_head_stride);
    }
  }

  const AttentionTask& task_;
  const std::int32_t keys_;    // floats of a key, padded
  const std::int32_t values_;  // and of a value
  std::int32_t num_queries_ = 0;
  float* queries_;
  float* span_;   // weighted values of the span
  float* total_;  // and of the spans before it
  float* scores_;
  float* factors_;
  PartialHeader* headers_[2];
  float* key_copies_;
  float* value_copies_;
  float* zeros_;
};

void attend(const AttentionTask& task, float* scratch) { Attention(task, scratch).run(); }

void merge(const MergeTask& task) {
  float* output = task.output;
  PartialHeader total{kMinusInfinity, 0.0F};
  std::memset(output, 0, sizeof(float) * static_cast<std::size_t>(task.value_size));
  for (std::int32_t span = 0; span < task.num_spans; ++span) {
    const float* partial = task.partials + static_cast<std::size_t>(span) * task.span_stride;
    PartialHeader header;
    std::memcpy(&header, partial, sizeof header);
    join(total.max, total.sum, output, header.max, header.sum, partial + 2, task.value_size);
  }
  finish(total.max, total.sum, output, task.sink, task.value_size, output);
}

void scan_mask(const MaskScan& scan) {
  const __m256i hidden = _mm256_set1_epi16(static_cast<short>(0xfc00));
  const std::int64_t whole = scan.num_cells / 64 * 64;
  std::int64_t word = 0;
  for (std::int64_t cell = 0; cell < whole; cell += 64, ++word) {
    std::uint64_t bits = 0;
    for (int half = 0; half < 2; ++half) {
      const auto* at = reinterpret_cast<const __m256i*>(scan.mask + cell + 32 * half);
      const __m256i a = _mm256_cmpeq_epi16(_mm256_loadu_si256(at), hidden);
      const __m256i b = _mm256_cmpeq_epi16(_mm256_loadu_si256(at + 1), hidden);
      const __m256i packed = _mm256_permute4x64_epi64(_mm256_packs_epi16(a, b), 0xd8);
      const auto is_hidden = static_cast<std::uint32_t>(_mm256_movemask_epi8(packed));
      bits |= static_cast<std::uint64_t>(~is_hidden) << (32 * half);
    }
    scan.bits[word] = bits;
  }
  if (whole == scan.num_cells) return;
  std::uint64_t bits = 0;
  for (std::int64_t cell = whole; cell < scan.num_cells; ++cell) {
    if (scan.mask[cell] != 0xfc00) bits |= std::uint64_t{1} << (cell - whole);
  }
  scan.bits[word] = bits;
}

}  // namespace
}  // namespace batchcore::kernels
