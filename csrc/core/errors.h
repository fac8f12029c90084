// Every error that can reach a caller. Each type has a twin of the same name in
// batchcore/errors.py; the bindings translate one into the other, attributes included.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace batchcore {

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

/// A parameter of an engine or model has a value that can't work.
struct ConfigError : Error {
  using Error::Error;
};

/// A model file is missing, damaged, or of a kind that can't be used.
struct ModelLoadError : Error {
  using Error::Error;
};

/// A request that can't be served as it is.
struct InvalidRequestError : Error {
  using Error::Error;
};

struct PromptTooLongError : InvalidRequestError {
  PromptTooLongError(const std::string& message, std::int64_t tokens, std::int64_t max)
      : InvalidRequestError(message), num_tokens(tokens), limit(max) {}
  std::int64_t num_tokens;
  std::int64_t limit;
};

/// A bound of the waiting queue is reached, or a request would wait longer than its timeout; try
/// again after `retry_after_s` seconds, an estimate (> 0, finite).
struct QueueFullError : Error {
  QueueFullError(const std::string& message, std::int64_t bound, double retry_after = 1.0)
      : Error(message), capacity(bound), retry_after_s(retry_after) {}
  std::int64_t capacity;
  double retry_after_s;
};

struct EngineError : Error {
  using Error::Error;
};

struct EngineClosedError : EngineError {
  using EngineError::EngineError;
};

/// llama.cpp could not compute; `status` is its return code.
struct DecodeError : EngineError {
  DecodeError(const std::string& message, int code) : EngineError(message), status(code) {}
  int status;
};

/// A view of logits or embeddings is read after the context has computed something else.
struct StaleViewError : Error {
  using Error::Error;
};

/// A context is to compute while an array over its last result is still alive.
struct ViewInUseError : Error {
  using Error::Error;
};

}  // namespace batchcore
