// Gated units of every instruction set that this CPU executes.
#include <doctest/doctest.h>

#include <cmath>
#include <limits>
#include <vector>

#include "kernel_data.h"

namespace batchcore::kernels {
namespace {

using testing::all_kernels;
using testing::bits_of;
using testing::name_of;
using testing::Row;

double expected(Gate function, double x) {
  if (function == Gate::kSilu) return x / (1 + std::exp(-x));
  return x / 2 *
         (1 + std::tanh(std::sqrt(2 / 3.14159265358979323846) * (x + 0.044715 * x * x * x)));
}

// Around zero, in the tails, and far away.
Row values_to_try() {
  Row values = {0.0F, -0.0F, 1e-30F, -1e-30F, 1e-42F, 1e4F, -1e4F, 1e10F, -1e10F, 87.5F, -87.5F};
  for (int i = -4000; i <= 4000; ++i) values.push_back(static_cast<float>(i) / 200.0F);
  return values;
}

TEST_CASE("activation functions are exact to single precision, the same on every set") {
  const Row x = values_to_try();
  std::mt19937 random(1);
  const Row gates = testing::gaussian_row(random, static_cast<std::int64_t>(x.size()));
  for (const Gate function : {Gate::kSilu, Gate::kGelu}) {
    CAPTURE(static_cast<int>(function));
    Row first;
    for (const KernelSet* set : all_kernels()) {
      CAPTURE(name_of(*set));
      Row outputs(x.size());
      set->gate(function, x.data(), gates.data(), static_cast<std::int64_t>(x.size()),
                outputs.data());
      for (std::size_t i = 0; i < x.size(); ++i) {
        CAPTURE(x[i]);
        const double error = std::fabs(outputs[i] - expected(function, x[i]) * gates[i]);
        const bool is_close = error <= 5e-7 * std::fabs(double{x[i]} * gates[i]) + 1e-37;
        REQUIRE(is_close);
      }
      if (first.empty()) first = outputs;
      CHECK(bits_of(outputs) == bits_of(first));
    }
  }
}

TEST_CASE("a value has the same bits in a row of any length, and nothing is written behind it") {
  std::mt19937 random(2);
  const Row x = testing::gaussian_row(random, 70);
  const Row gates = testing::gaussian_row(random, 70);
  for (const Gate function : {Gate::kSilu, Gate::kGelu}) {
    for (const KernelSet* set : all_kernels()) {
      CAPTURE(name_of(*set));
      Row all(70);
      set->gate(function, x.data(), gates.data(), 70, all.data());
      for (std::size_t first = 0; first < 3; ++first) {
        for (std::size_t count = 0; count <= 60; ++count) {
          // Exact copies, so that ASan sees a read too far.
          const auto begin = static_cast<std::ptrdiff_t>(first);
          const auto end = static_cast<std::ptrdiff_t>(first + count);
          const Row some(x.begin() + begin, x.begin() + end);
          const Row some_gates(gates.begin() + begin, gates.begin() + end);
          Row outputs(count + 32, -77.0F);
          set->gate(function, some.data(), some_gates.data(), static_cast<std::int64_t>(count),
                    outputs.data());
          Row expected_row(all.begin() + begin, all.begin() + end);
          expected_row.resize(count + 32, -77.0F);
          REQUIRE(bits_of(outputs) == bits_of(expected_row));
        }
      }
    }
  }
}

TEST_CASE("a NaN stays a NaN, and is no other value's business") {
  Row x(40, 1.0F);
  const Row gates(40, 2.0F);
  x[7] = x[39] = std::numeric_limits<float>::quiet_NaN();
  for (const Gate function : {Gate::kSilu, Gate::kGelu}) {
    for (const KernelSet* set : all_kernels()) {
      CAPTURE(name_of(*set));
      Row outputs(40);
      set->gate(function, x.data(), gates.data(), 40, outputs.data());
      for (std::size_t i = 0; i < 40; ++i) {
        const bool is_right = std::isnan(x[i]) ? std::isnan(outputs[i]) : outputs[i] == outputs[0];
        CHECK_MESSAGE(is_right, i);
      }
    }
  }
}

TEST_CASE("infinities give the limits, NaN stays NaN") {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  const Row x = {kInfinity, -kInfinity, 1e20F, -1e20F, std::nanf("")};
  const Row gates(x.size(), 1.0F);
  for (const Gate function : {Gate::kSilu, Gate::kGelu}) {
    for (const KernelSet* set : all_kernels()) {
      CAPTURE(name_of(*set));
      Row outputs(x.size());
      set->gate(function, x.data(), gates.data(), static_cast<std::int64_t>(x.size()),
                outputs.data());
      CHECK(outputs[0] == kInfinity);
      CHECK(outputs[1] == 0.0F);
      CHECK(outputs[2] == 1e20F);
      CHECK(outputs[3] == 0.0F);
      CHECK(std::isnan(outputs[4]));
    }
  }
}

}  // namespace
}  // namespace batchcore::kernels
