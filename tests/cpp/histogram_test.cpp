#include "core/histogram.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <vector>

namespace batchcore {
namespace {

TEST_CASE("buckets have no gaps, and a value is in the bucket that says so") {
  for (std::size_t b = 0; b + 1 < LogHistogram::kNumBuckets; ++b) {
    const double low = LogHistogram::lower_bound(b);
    const double high = LogHistogram::lower_bound(b + 1);
    REQUIRE(low < high);
    REQUIRE(high / low <= 1.125);
    LogHistogram histogram;
    histogram.record(low);
    histogram.record(std::nextafter(high, 0.0));
    REQUIRE(histogram.count_in(b) == 2);
  }
  CHECK(LogHistogram::lower_bound(0) == std::ldexp(1.0, -16));
  CHECK(LogHistogram::lower_bound(16 * 8) == 1.0);
  CHECK(LogHistogram::lower_bound(16 * 8 + 1) == 1.125);
}

TEST_CASE("quantiles are within a sixteenth of the exact ones") {
  std::mt19937 random(2);
  std::lognormal_distribution<double> duration(-3.0, 2.0);
  LogHistogram histogram;
  std::vector<double> values;
  double sum = 0.0;
  for (int i = 0; i < 20'000; ++i) {
    values.push_back(duration(random));
    histogram.record(values.back());
    sum += values.back();
  }
  std::sort(values.begin(), values.end());
  for (const double share : {0.01, 0.5, 0.9, 0.95, 0.99, 0.999}) {
    const double exact =
        values[static_cast<std::size_t>(std::ceil(share * static_cast<double>(values.size()))) - 1];
    CHECK(std::abs(histogram.quantile(share) - exact) <= exact / 16);
  }
  CHECK(histogram.count() == 20'000);
  CHECK(histogram.sum() == doctest::Approx(sum));
}

TEST_CASE("what lies outside is counted at the ends") {
  LogHistogram histogram;
  CHECK(histogram.quantile(0.5) == 0.0);
  for (const double value : {0.0, -1.0, 1e-9, std::nan("")}) histogram.record(value);
  CHECK(histogram.count_in(0) == 4);
  histogram.record(1e9);
  histogram.record(std::numeric_limits<double>::infinity());
  CHECK(histogram.count_in(LogHistogram::kNumBuckets - 1) == 2);
  CHECK(sizeof(LogHistogram) < 2048);
}

}  // namespace
}  // namespace batchcore
