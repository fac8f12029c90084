// Carries the output of one request from the engine thread to its consumer. What the consumer has
// not taken yet is merged, so a slow one costs no more memory than the output itself and never
// holds up the engine.
#pragma once

#include <unistd.h>

#include <condition_variable>
#include <memory>
#include <mutex>
#include <optional>

#include "engine/request.h"

namespace batchcore {

class RequestChannel {
 public:
  RequestChannel(RequestId id, std::shared_ptr<Notifier> notifier)
      : id_(id), process_(getpid()), notifier_(std::move(notifier)) {}

  [[nodiscard]] RequestId id() const { return id_; }

  /// Engine thread. Merges `update` into what waits to be taken and wakes the consumer.
  void publish(RequestUpdate update);

  /// What came since the last call, nothing where there is none. Any thread.
  [[nodiscard]] std::optional<RequestUpdate> take();

  /// True once there is something to take, false after `timeout_s` seconds without. Any thread.
  [[nodiscard]] bool wait(double timeout_s);

  /// True once the last update was published. Any thread.
  [[nodiscard]] bool is_finished() const;

 private:
  void check_process() const;

  const RequestId id_;
  const int process_;
  const std::shared_ptr<Notifier> notifier_;
  mutable std::mutex mutex_;
  std::condition_variable ready_;
  std::optional<RequestUpdate> pending_;
  bool finished_ = false;
};

}  // namespace batchcore
