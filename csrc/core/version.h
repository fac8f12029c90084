#pragma once

#include <string_view>

namespace batchcore {

/// The package version, e.g. "0.1.0", as pyproject.toml states it. Any thread.
std::string_view version() noexcept;

}  // namespace batchcore
