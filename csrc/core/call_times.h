// How long decode calls take, by their number of rows: measured, since no line fits it everywhere.
// It is the price of drafts. Where kernels take rows in groups and do the remainder one by one, 16
// rows can cost less than 15; then it also says whether a call had better get dummy rows. Whether
// these pay depends on the CPU or GPU, the types of the weights and how llama.cpp was built. So it
// is learnt: now and then a call gets dummy rows, and what was faster is kept.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

namespace batchcore {

class CallTimes {
 public:
  /// A decode call of `rows` rows, all of them with logits and none of a prompt, took `seconds`
  /// apart from attention.
  void observe(std::int32_t rows, double seconds);

  /// `rows`, or the next multiple of BackendInfo::row_group where calls of that size were faster.
  [[nodiscard]] std::int32_t preferred(std::int32_t rows, std::int32_t row_group) const;

  /// What a call of `rows` rows takes, where enough of them were seen.
  [[nodiscard]] std::optional<double> seconds(std::int32_t rows) const;
  /// Calls since the last of `rows` rows.
  [[nodiscard]] std::int64_t age(std::int32_t rows) const;
  /// The most rows whose time is known; 0 where none is.
  [[nodiscard]] std::int32_t largest() const;

 private:
  static constexpr std::size_t kSamples = 5;
  struct Times {
    std::array<double, kSamples> recent{};
    std::size_t count = 0;
    std::int64_t last = 0;  // number of the call that was the last of this size

    [[nodiscard]] bool is_known() const { return count >= kSamples; }
    [[nodiscard]] double median() const;
  };
  [[nodiscard]] const Times* find(std::int32_t rows) const;

  std::vector<Times> times_;  // by number of rows
  std::int64_t num_calls_ = 0;
};

}  // namespace batchcore
