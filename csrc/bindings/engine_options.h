// Options of an engine from a dict, as batchcore.Engine and batchcore.simulation make it.
#pragma once

#include <map>
#include <string>

#include "bindings/bindings.h"
#include "core/errors.h"
#include "engine/engine.h"

namespace batchcore::python {

/// The value that an option's name stands for; throws ConfigError for another name.
template <typename T>
T by_name(const char* option, const std::string& name, const std::map<std::string, T>& values) {
  if (const auto found = values.find(name); found != values.end()) return found->second;
  std::string known;
  for (const auto& [key, value] : values) known += (known.empty() ? "" : ", ") + key;
  throw ConfigError(std::string(option) + " must be one of " + known + ", not '" + name + "'");
}

[[nodiscard]] EngineConfig engine_config(const py::dict& options);

}  // namespace batchcore::python
