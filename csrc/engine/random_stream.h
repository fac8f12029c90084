// Random numbers without state: value n of stream (seed, index) is a hash of the three. Preempting
// and resuming a sequence, its neighbours in a batch and the number of threads can't change what it
// draws.
#pragma once

#include <cstdint>

namespace batchcore {

/// A bijection of 64-bit values whose output bits each depend on all input bits (SplitMix64's
/// mixer).
constexpr std::uint64_t mix64(std::uint64_t x) {
  x ^= x >> 30U;
  x *= 0xBF58476D1CE4E5B9U;
  x ^= x >> 27U;
  x *= 0x94D049BB133111EBU;
  x ^= x >> 31U;
  return x;
}

class RandomStream {
 public:
  /// `index` tells the completions of one request apart; each has a stream of its own.
  constexpr RandomStream(std::uint64_t seed, std::uint64_t index)
      : key_(mix64(mix64(seed + kStep) + kStep * (index + 1))) {}

  /// Value `n` of the stream, uniform in [0, 1) with 53 bits.
  [[nodiscard]] constexpr double uniform(std::uint64_t n) const {
    const std::uint64_t bits = mix64(key_ ^ mix64(kStep * (n + 1)));
    return static_cast<double>(bits >> 11U) * 0x1.0p-53;
  }

 private:
  static constexpr std::uint64_t kStep = 0x9E3779B97F4A7C15U;  // 2^64 / golden ratio

  std::uint64_t key_;
};

}  // namespace batchcore
