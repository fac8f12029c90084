// llama.cpp's log, process-wide: a bounded ring buffer that llama's callback fills and Python
// threads drain when they choose to. The callback runs on whatever thread logs (the engine thread
// too), so it takes one short mutex and never calls Python.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace batchcore {

/// Severity of a log line, in llama.cpp's order.
enum class LogLevel : std::uint8_t { kDebug = 1, kInfo = 2, kWarn = 3, kError = 4 };

/// One line without its newline; what llama.cpp printed in several pieces is joined.
struct LogLine {
  LogLevel level = LogLevel::kInfo;
  std::string text;
};

/// What drain_llama_log() took out.
struct DrainedLog {
  std::vector<LogLine> lines;  ///< oldest first
  std::uint64_t dropped = 0;   ///< lines lost since the last drain because nobody drained in time
};

/// Starts llama.cpp and ggml, with their log routed here. Once per process however often it is
/// called; any thread. Everything that touches llama.h calls it first.
void init_llama();

/// Takes all lines out of the buffer. Any thread.
[[nodiscard]] DrainedLog drain_llama_log();

/// Lines below `level` are not kept (default: kInfo). Any thread.
void set_llama_log_level(LogLevel level);

/// Collects warnings and errors that the current thread logs while it lives, so that a failed call
/// can say why. Captures nest; a line goes to the innermost. Must die on the thread that made it.
class LogCapture {
 public:
  LogCapture();
  ~LogCapture();
  LogCapture(const LogCapture&) = delete;
  LogCapture& operator=(const LogCapture&) = delete;

  /// The reason in llama.cpp's words: its first error line without the function names in front, or
  /// else its last warning; empty where it said nothing.
  [[nodiscard]] std::string reason() const;

  [[nodiscard]] const std::vector<LogLine>& lines() const { return lines_; }

 private:
  friend void capture_log_line(LogLevel level, const std::string& text);

  std::vector<LogLine> lines_;
  LogCapture* outer_;
};

}  // namespace batchcore
