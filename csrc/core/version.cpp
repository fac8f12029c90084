#include "core/version.h"

namespace batchcore {

std::string_view version() noexcept { return BATCHCORE_VERSION; }

}  // namespace batchcore
