// What benchmarks share: state that is costly to build.
#pragma once

#include <memory>
#include <optional>
#include <tuple>

namespace batchcore::bench {

/// A `Fixture` made from `args`, kept until others are asked for: google-benchmark calls a
/// benchmark several times for one measurement, and building a long queue would take longer than
/// all of them.
template <typename Fixture, typename... Args>
Fixture& fixture(Args... args) {
  static std::optional<std::tuple<Args...>> made_from;
  static std::unique_ptr<Fixture> made;
  const std::tuple<Args...> wanted(args...);
  if (made_from != wanted) {
    made.reset();  // two at once may not fit into memory
    made = std::make_unique<Fixture>(args...);
    made_from = wanted;
  }
  return *made;
}

}  // namespace batchcore::bench
