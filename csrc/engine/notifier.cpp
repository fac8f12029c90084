#include "engine/notifier.h"

#include <fcntl.h>
#include <unistd.h>

#include <array>
#include <cstdint>
#include <utility>

#if defined(__linux__)
#include <sys/eventfd.h>
#endif

#include "core/errors.h"

namespace batchcore {

Notifier::Notifier() {
#if defined(__linux__)
  read_fd_ = write_fd_ = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
#else
  std::array<int, 2> ends{-1, -1};
  if (pipe(ends.data()) == 0) {
    for (const int fd : ends) {
      fcntl(fd, F_SETFL, O_NONBLOCK);
      fcntl(fd, F_SETFD, FD_CLOEXEC);
    }
    read_fd_ = ends[0];
    write_fd_ = ends[1];
  }
#endif
  if (read_fd_ < 0) throw EngineError("no file descriptor left to wake an event loop with");
}

Notifier::~Notifier() {
  if (write_fd_ != read_fd_) close(write_fd_);
  close(read_fd_);
}

void Notifier::mark(RequestId id) {
  const std::lock_guard lock(mutex_);
  marked_.push_back(id);
}

void Notifier::wake() {
  const std::lock_guard lock(mutex_);
  if (marked_.empty() || is_signalled_) return;
  const std::uint64_t one = 1;
  // It can only fail for a full counter, and then the descriptor is readable anyway.
  is_signalled_ = write(write_fd_, &one, sizeof one) == sizeof one;
}

std::vector<RequestId> Notifier::take() {
  const std::lock_guard lock(mutex_);
  if (is_signalled_) {
    std::uint64_t ignored = 0;
    is_signalled_ = read(read_fd_, &ignored, sizeof ignored) < 0;
  }
  return std::exchange(marked_, {});
}

}  // namespace batchcore
