// An engine's counters as a dict; batchcore.EngineStats gives them names and meanings.
#pragma once

#include "bindings/bindings.h"
#include "engine/engine_stats.h"

namespace batchcore::python {

[[nodiscard]] py::dict to_dict(const EngineStats& stats);

/// Bounds of the buckets of every histogram, one more than there are buckets.
[[nodiscard]] py::tuple histogram_bounds();

}  // namespace batchcore::python
