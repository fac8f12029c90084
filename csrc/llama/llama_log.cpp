#include "llama/llama_log.h"

#include <llama.h>

#include <atomic>
#include <cctype>
#include <cstddef>
#include <deque>
#include <mutex>
#include <string_view>
#include <utility>

#include "kernels/seam.h"

namespace batchcore {
namespace {

constexpr std::size_t kMaxLines = 4096;
constexpr std::size_t kMaxLineBytes = 4096;  // metadata prints whole chat templates

class LogBuffer {
 public:
  void push(LogLine line) {
    const std::lock_guard lock(mutex_);
    if (lines_.size() == kMaxLines) {
      lines_.pop_front();
      ++dropped_;
    }
    lines_.push_back(std::move(line));
  }

  DrainedLog drain() {
    DrainedLog result;
    const std::lock_guard lock(mutex_);
    result.lines.assign(std::make_move_iterator(lines_.begin()),
                        std::make_move_iterator(lines_.end()));
    lines_.clear();
    result.dropped = std::exchange(dropped_, 0);
    return result;
  }

 private:
  std::mutex mutex_;
  std::deque<LogLine> lines_;
  std::uint64_t dropped_ = 0;
};

// Never destroyed: ggml's threads may log while static objects are torn down.
LogBuffer& buffer() {
  static auto* instance = new LogBuffer;
  return *instance;
}

std::atomic<int> min_level{static_cast<int>(LogLevel::kInfo)};

// The line that a thread has begun: llama.cpp prints progress dots and tables in pieces.
struct PartialLine {
  LogLevel level = LogLevel::kInfo;
  std::string text;
};
thread_local PartialLine partial;
thread_local LogCapture* innermost_capture = nullptr;

}  // namespace

void capture_log_line(LogLevel level, const std::string& text) {
  if (innermost_capture != nullptr && level >= LogLevel::kWarn) {
    innermost_capture->lines_.push_back({level, text});
  }
}

namespace {

void finish_line() {
  if (partial.text.empty()) return;
  if (partial.text.size() > kMaxLineBytes) {
    partial.text.resize(kMaxLineBytes);
    partial.text += "...";
  }
  capture_log_line(partial.level, partial.text);
  if (static_cast<int>(partial.level) >= min_level.load(std::memory_order_relaxed)) {
    buffer().push({partial.level, partial.text});
  }
  partial.text.clear();
}

void on_log(ggml_log_level level, const char* text, void* /*user_data*/) noexcept try {
  if (level != GGML_LOG_LEVEL_CONT) {
    finish_line();
    partial.level = level == GGML_LOG_LEVEL_NONE ? LogLevel::kInfo : static_cast<LogLevel>(level);
  }
  for (std::string_view rest = text; !rest.empty();) {
    const std::size_t end = rest.find('\n');
    partial.text += rest.substr(0, end);
    if (end == std::string_view::npos) break;
    finish_line();
    rest.remove_prefix(end + 1);
  }
} catch (...) {
  // Out of memory for a log line: losing the line is all that may happen.
}

// "llama_model_load: error loading model: ..." -> "error loading model: ..."
std::string_view without_function_name(std::string_view line) {
  const std::size_t colon = line.find(": ");
  if (colon == std::string_view::npos || colon == 0) return line;
  for (const char c : line.substr(0, colon)) {
    if (std::isalnum(static_cast<unsigned char>(c)) == 0 && c != '_' && c != ':') return line;
  }
  return line.substr(colon + 2);
}

}  // namespace

void init_llama() {
  static std::once_flag once;
  std::call_once(once, [] {
    llama_log_set(&on_log, nullptr);
    kernels::install();  // before any model is loaded
    llama_backend_init();
  });
}

DrainedLog drain_llama_log() { return buffer().drain(); }

void set_llama_log_level(LogLevel level) {
  min_level.store(static_cast<int>(level), std::memory_order_relaxed);
}

LogCapture::LogCapture() : outer_(std::exchange(innermost_capture, this)) {
  init_llama();
  finish_line();  // what this thread had begun before is not ours
}

LogCapture::~LogCapture() {
  finish_line();
  innermost_capture = outer_;
}

std::string LogCapture::reason() const {
  std::string_view found;
  for (const LogLine& line : lines_) {
    if (line.level == LogLevel::kError) {
      found = line.text;
      break;
    }
    found = line.text;
  }
  found = without_function_name(found);
  constexpr std::string_view kPrefix = "error loading model: ";
  if (found.starts_with(kPrefix)) found.remove_prefix(kPrefix.size());
  return std::string(found);
}

}  // namespace batchcore
