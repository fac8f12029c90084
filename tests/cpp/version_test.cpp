#include "core/version.h"

#include <doctest/doctest.h>

TEST_CASE("version has three parts") {
  int dots = 0;
  for (char c : batchcore::version()) {
    dots += c == '.' ? 1 : 0;
  }
  CHECK(dots == 2);
}
