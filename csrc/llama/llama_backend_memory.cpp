// The part of LlamaBackend that forgets, copies, saves and restores sequences.
#include <llama.h>

#include <algorithm>
#include <exception>

#include "llama/llama_backend.h"
#include "llama/llama_log.h"

namespace batchcore {

// Whether a sequence that holds [held_from, end) can go on at `end`: with a sliding window, a token
// attends to the n_swa positions up to its own, and llama.cpp does not notice a hole.
bool LlamaBackend::window_allows(Position held_from, Position end) const {
  const std::int32_t window = context_->model().n_swa();
  return window <= 0 || held_from <= std::max(0, end - window + 1);
}

bool LlamaBackend::copy_pending(SeqId seq_id) const {
  return std::any_of(pending_copies_.begin(), pending_copies_.end(), [seq_id](const auto& pair) {
    return pair.first == seq_id || pair.second == seq_id;
  });
}

void LlamaBackend::forget(SeqId seq_id) { llama_memory_seq_rm(memory_, seq_id, -1, -1); }

bool LlamaBackend::remove(SeqId seq_id, Position begin, Position end) {
  if (!in_range(seq_id)) return false;
  const Position last = pos_max(seq_id);
  if (begin > last || (end >= 0 && end <= std::max(begin, 0))) return true;
  // A hole would break "next position = pos_max + 1", which both sides count on.
  if (end >= 0 && end <= last) return false;
  if (begin <= 0) {
    forget(seq_id);
    return true;
  }
  if (!window_allows(pos_min(seq_id), begin)) return false;
  return llama_memory_seq_rm(memory_, seq_id, begin, -1);
}

bool LlamaBackend::copy(SeqId from, SeqId to, Position end) {
  if (!in_range(from) || !in_range(to) || from == to) return false;
  forget(to);
  const Position first = pos_min(from);
  const Position length = pos_max(from) + 1;
  if (end < 0) end = length;
  if (end == 0) return true;
  if (end > length || !window_allows(first, end)) return false;
  const bool whole = end == length;
  const bool recurrent =
      info_.memory == MemoryKind::kRecurrent || info_.memory == MemoryKind::kHybrid;
  if (recurrent && !whole) return false;

  bool copied = false;
  if (info_.layout == KvLayout::kUnified || info_.memory == MemoryKind::kRecurrent) {
    llama_memory_seq_cp(memory_, from, to, 0, whole ? -1 : end);
    copied = true;
  } else if ((whole || info_.memory != MemoryKind::kSlidingWindow ||
              length <= context_->model().n_swa()) &&
             !copy_pending(from) && !copy_pending(to)) {
    copied = copy_state(from, to);
  } else {
    // A saved state has only the window before its own end; cells further back need the real copy.
    copied = copy_cells(from, to);
  }
  if (copied && !whole) copied = llama_memory_seq_rm(memory_, to, end, -1);
  if (copied && (pos_max(to) + 1 != end || !window_allows(pos_min(to), end))) copied = false;
  if (!copied) forget(to);
  return copied;
}

// Through host memory: only the cells in use, at once, and the compute graph stays. llama.cpp's own
// copy between streams moves the whole buffer at the next decode and then plans all graphs anew.
bool LlamaBackend::copy_state(SeqId from, SeqId to) {
  state_.resize(saved_size(from));
  const std::size_t size = save(from, state_);
  return size > 0 && restore(to, std::span<const std::uint8_t>(state_).first(size));
}

bool LlamaBackend::copy_cells(SeqId from, SeqId to) {
  llama_memory_seq_cp(memory_, from, to, -1, -1);  // part of a stream would be an assertion
  pending_copies_.emplace_back(from, to);
  return true;
}

std::size_t LlamaBackend::saved_size(SeqId seq_id) {
  if (!in_range(seq_id)) return 0;
  return llama_state_seq_get_size(context_->get(), seq_id);
}

std::size_t LlamaBackend::save(SeqId seq_id, std::span<std::uint8_t> into) {
  // The bytes of a pending copy are not there yet.
  if (!in_range(seq_id) || pos_max(seq_id) < 0 || copy_pending(seq_id)) return 0;
  // llama.cpp queues its reads before it notices that the buffer ends.
  if (into.size() < saved_size(seq_id)) return 0;
  try {
    return llama_state_seq_get_data(context_->get(), into.data(), into.size(), seq_id);
  } catch (const std::exception& error) {
    last_error_ = error.what();
    return 0;
  }
}

bool LlamaBackend::restore(SeqId seq_id, std::span<const std::uint8_t> from) {
  if (!in_range(seq_id)) return false;
  forget(seq_id);
  // A pending copy would overwrite what is restored, or copy it on.
  if (from.empty() || copy_pending(seq_id)) return false;
  const LogCapture capture;
  std::size_t size = 0;
  try {
    size = llama_state_seq_set_data(context_->get(), from.data(), from.size(), seq_id);
  } catch (const std::exception& error) {
    last_error_ = error.what();
  }
  if (size == from.size() && pos_max(seq_id) >= 0) return true;
  if (last_error_.empty()) last_error_ = capture.reason();
  forget(seq_id);
  return false;
}

}  // namespace batchcore
