// The part of LowLevelContext that works on the memory of sequences.
#include <llama.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <exception>

#include "core/errors.h"
#include "llama/llama_log.h"
#include "llama/low_level.h"

namespace batchcore {
namespace {

// In front of what llama.cpp writes: it trusts a state's contents, so only whole states of an equal
// context may reach it.
struct StateHeader {
  std::array<char, 8> magic = {'b', 'c', 's', 't', 'a', 't', 'e', '1'};
  std::uint64_t fingerprint = 0;
  std::uint64_t size = 0;
  std::uint64_t checksum = 0;
};

std::uint64_t mix(std::uint64_t hash, std::uint64_t value) {
  hash = (hash ^ value) * 0x9E3779B97F4A7C15U;
  return hash ^ (hash >> 32U);
}

// Eight bytes at a time: states are large, and this guards against damage, not against malice.
std::uint64_t checksum(std::span<const std::uint8_t> bytes) {
  std::uint64_t hash = bytes.size();
  while (!bytes.empty()) {
    std::uint64_t word = 0;
    const std::size_t count = std::min(bytes.size(), sizeof(word));
    std::memcpy(&word, bytes.data(), count);
    hash = mix(hash, word);
    bytes = bytes.subspan(count);
  }
  return hash;
}

std::uint64_t checksum(const std::string& text) {
  return checksum({reinterpret_cast<const std::uint8_t*>(text.data()), text.size()});
}

}  // namespace

std::uint64_t LowLevelContext::fingerprint() const {
  const LlamaModel& model = context_.model();
  std::uint64_t hash = checksum(model.architecture());
  for (const std::uint64_t value :
       {model.n_params(), model.size_bytes(), checksum(params().type_k), checksum(params().type_v),
        static_cast<std::uint64_t>(params().layout == KvLayout::kStreams ? params().num_slots
                                                                         : 1)}) {
    hash = mix(hash, value);
  }
  return hash;
}

void LowLevelContext::check_sequence(SeqId seq_id) const {
  if (seq_id >= 0 && seq_id < params().num_slots) return;
  throw InvalidRequestError("there is no sequence " + std::to_string(seq_id) + ": n_seq_max is " +
                            std::to_string(params().num_slots));
}

bool LowLevelContext::seq_rm(SeqId seq_id, Position begin, Position end) {
  const Use use(*this);
  check_sequence(seq_id);
  return llama_memory_seq_rm(memory_, seq_id, begin, end);
}

void LowLevelContext::seq_cp(SeqId from, SeqId to, Position begin, Position end) {
  const Use use(*this);
  check_sequence(from);
  check_sequence(to);
  if (from == to || memory_ == nullptr) return;
  if (llama_memory_seq_pos_max(memory_, to) >= 0) {
    throw InvalidRequestError("sequence " + std::to_string(to) + " is not empty: seq_rm it first");
  }
  const bool whole = begin <= std::max(0, llama_memory_seq_pos_min(memory_, from)) &&
                     (end < 0 || end > llama_memory_seq_pos_max(memory_, from));
  const LlamaModel& model = context_.model();
  if (!whole && (model.is_recurrent() || model.is_hybrid())) {
    throw InvalidRequestError("a recurrent state can only be copied whole");
  }
  if (!whole && params().layout == KvLayout::kStreams) {
    throw InvalidRequestError(
        "between streams only whole sequences can be copied: copy it, then seq_rm its tail");
  }
  if (whole) {
    llama_memory_seq_cp(memory_, from, to, -1, -1);
  } else {
    llama_memory_seq_cp(memory_, from, to, begin, end);
  }
  if (params().layout == KvLayout::kStreams) pending_copies_.emplace_back(from, to);
}

void LowLevelContext::seq_keep(SeqId seq_id) {
  const Use use(*this);
  check_sequence(seq_id);
  // llama.cpp's own seq_keep() only sees the stream of the sequence.
  for (SeqId other = 0; other < params().num_slots; ++other) {
    if (other != seq_id) llama_memory_seq_rm(memory_, other, -1, -1);
  }
}

Position LowLevelContext::seq_pos_min(SeqId seq_id) {
  const Use use(*this);
  check_sequence(seq_id);
  return llama_memory_seq_pos_min(memory_, seq_id);
}

Position LowLevelContext::seq_pos_max(SeqId seq_id) {
  const Use use(*this);
  check_sequence(seq_id);
  return llama_memory_seq_pos_max(memory_, seq_id);
}

void LowLevelContext::clear() {
  const Use use(*this);
  if (memory_ != nullptr) llama_memory_clear(memory_, true);
  pending_copies_.clear();
  encoded_ = false;
}

std::string LowLevelContext::state_save(SeqId seq_id) {
  const Use use(*this);
  check_sequence(seq_id);
  if (llama_memory_seq_pos_max(memory_, seq_id) < 0) {
    throw InvalidRequestError("sequence " + std::to_string(seq_id) + " is empty");
  }
  for (const auto& [from, to] : pending_copies_) {
    if (to == seq_id) {
      throw InvalidRequestError("sequence " + std::to_string(seq_id) +
                                " is copied by the next decode: save it after that");
    }
  }
  const LogCapture capture;
  StateHeader header;
  std::string bytes(sizeof(header) + llama_state_seq_get_size(context_.get(), seq_id), '\0');
  auto* payload = reinterpret_cast<std::uint8_t*>(bytes.data()) + sizeof(header);
  header.fingerprint = fingerprint();
  header.size =
      llama_state_seq_get_data(context_.get(), payload, bytes.size() - sizeof(header), seq_id);
  if (header.size == 0) throw EngineError("the state can't be saved: " + capture.reason());
  bytes.resize(sizeof(header) + header.size);
  header.checksum = checksum({payload, header.size});
  std::memcpy(bytes.data(), &header, sizeof(header));
  return bytes;
}

void LowLevelContext::state_restore(SeqId seq_id, std::span<const std::uint8_t> bytes) {
  const Use use(*this);
  check_sequence(seq_id);
  StateHeader header;
  const auto magic = header.magic;
  if (bytes.size() < sizeof(header)) throw InvalidRequestError("these bytes are not a state");
  std::memcpy(&header, bytes.data(), sizeof(header));
  const std::span<const std::uint8_t> payload = bytes.subspan(sizeof(header));
  if (header.magic != magic) throw InvalidRequestError("these bytes are not a state");
  if (header.fingerprint != fingerprint()) {
    throw InvalidRequestError(
        "this state is of another model, another KV layout or other cache types");
  }
  if (header.size != payload.size() || header.checksum != checksum(payload)) {
    throw InvalidRequestError("this state is damaged");
  }
  for (const auto& [from, to] : pending_copies_) {
    if (from == seq_id || to == seq_id) {
      throw InvalidRequestError("sequence " + std::to_string(seq_id) +
                                " takes part in a copy by the next decode: restore it after that");
    }
  }
  llama_memory_seq_rm(memory_, seq_id, -1, -1);
  const LogCapture capture;
  std::size_t size = 0;
  std::string reason;
  try {
    size = llama_state_seq_set_data(context_.get(), payload.data(), payload.size(), seq_id);
  } catch (const std::exception& error) {
    reason = error.what();
  }
  if (size == payload.size()) return;
  llama_memory_seq_rm(memory_, seq_id, -1, -1);
  throw EngineError("the state can't be restored: " + (reason.empty() ? capture.reason() : reason));
}

}  // namespace batchcore
