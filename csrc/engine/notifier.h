// Wakes an event loop through a file descriptor: once per decode call however many requests have
// news, and not again until the loop has taken them.
#pragma once

#include <mutex>
#include <vector>

#include "core/types.h"

namespace batchcore {

class Notifier {
 public:
  /// Throws EngineError where the system gives no descriptor.
  Notifier();
  ~Notifier();
  Notifier(const Notifier&) = delete;
  Notifier& operator=(const Notifier&) = delete;

  /// Readable while there is something to take.
  [[nodiscard]] int fd() const { return read_fd_; }

  /// Engine thread: `id` has news. The loop is woken by the next wake().
  void mark(RequestId id);
  /// Engine thread, when all with news are marked.
  void wake();
  /// The requests with news since the last call; makes fd() unreadable. The loop's thread.
  [[nodiscard]] std::vector<RequestId> take();

 private:
  std::mutex mutex_;
  std::vector<RequestId> marked_;
  bool is_signalled_ = false;
  int read_fd_ = -1;
  int write_fd_ = -1;  // the same as read_fd_ where it is an eventfd
};

}  // namespace batchcore
