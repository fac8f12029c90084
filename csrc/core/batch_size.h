// How many sequences to run at a time: no more than add to the throughput, and no more than the
// target inter-token latency allows. Pure: it is told what was observed. Engine thread only.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

namespace batchcore {

/// Smallest batch whose throughput n / t(n) reaches 95% of that of `max_num_seqs`, where a step
/// takes t(n) = a + (c + d * kv) * n; `cost` is StepCost::coefficients(), [a, b, c, d]. Without a
/// cost per call nothing can be said: max_num_seqs.
[[nodiscard]] std::int32_t throughput_knee(const std::array<double, 4>& cost, double kv_per_row,
                                           std::int32_t max_num_seqs);

/// Additive increase, multiplicative decrease, as TCP does it (after arXiv 2503.05248): while the
/// 95th percentile of a window of inter-token latencies lies below kGrowsBelow of the target the
/// limit grows by one, above the target it shrinks by a quarter, in between it stays. A window only
/// counts where the limit was in effect, and each is used once.
class BatchSizeController {
 public:
  static constexpr double kGrowsBelow = 0.85;
  static constexpr std::size_t kWindow = 128;  ///< tokens

  /// `target_itl_s` 0: only the knee bounds it.
  BatchSizeController(std::int32_t max_num_seqs, double target_itl_s)
      : max_num_seqs_(max_num_seqs),
        target_itl_s_(target_itl_s),
        latency_limit_(max_num_seqs),
        knee_(max_num_seqs) {}

  /// One token came `itl_s` after the one before it, with `num_running` sequences in the engine.
  void observe(double itl_s, std::int32_t num_running);
  void set_knee(std::int32_t knee) { knee_ = knee; }

  [[nodiscard]] std::int32_t limit() const {
    return latency_limit_ < knee_ ? latency_limit_ : knee_;
  }
  [[nodiscard]] std::int32_t knee() const { return knee_; }
  [[nodiscard]] std::int64_t num_increases() const { return num_increases_; }
  [[nodiscard]] std::int64_t num_decreases() const { return num_decreases_; }

 private:
  void decide();

  std::int32_t max_num_seqs_;
  double target_itl_s_;
  std::int32_t latency_limit_;
  std::int32_t knee_;
  std::array<double, kWindow> window_{};
  std::size_t size_ = 0;
  std::int32_t most_running_ = 0;  // in this window
  std::int64_t num_increases_ = 0;
  std::int64_t num_decreases_ = 0;
};

}  // namespace batchcore
