#include "core/sim_backend.h"

#include <algorithm>
#include <cstring>

namespace batchcore {
namespace {

// The finaliser of SplitMix64 (Steele, Lea, Flood, OOPSLA'14): every input bit reaches every output
// bit.
std::uint64_t mix(std::uint64_t x) {
  x += 0x9E3779B97F4A7C15ULL;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ULL;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBULL;
  return x ^ (x >> 31);
}

}  // namespace

SimBackend::SimBackend(const BackendInfo& info, const SimCost& cost, std::int32_t num_logits)
    : info_(info),
      cost_(cost),
      num_logits_(static_cast<std::size_t>(num_logits > 0 ? num_logits : info.n_vocab)),
      sequences_(static_cast<std::size_t>(info.num_slots)),
      next_(static_cast<std::size_t>(info.num_slots)) {}

bool SimBackend::is_valid(const MicroBatch& batch) {
  if (batch.empty() || batch.size() > static_cast<std::size_t>(info_.n_ubatch)) return false;
  if (batch.num_outputs > info_.max_outputs) return false;
  for (const SeqId seq_id : batch.seq_ids) {
    if (seq_id < 0 || seq_id >= info_.num_slots) return false;
    next_[static_cast<std::size_t>(seq_id)] = pos_max(seq_id) + 1;
  }
  for (std::size_t i = 0; i < batch.size(); ++i) {
    if (batch.tokens[i] < 0 || batch.tokens[i] >= info_.n_vocab) return false;
    const Position expected = next_[static_cast<std::size_t>(batch.seq_ids[i])]++;
    if (batch.positions[i] != expected || expected >= info_.cells_per_slot) return false;
  }
  return true;
}

void SimBackend::push_cell(SeqId seq_id, std::uint64_t prefix) {
  if (free_cells_.empty()) {
    free_cells_.push_back(static_cast<std::uint32_t>(holders_.size()));
    holders_.push_back(0);
  }
  const std::uint32_t id = free_cells_.back();
  free_cells_.pop_back();
  holders_[id] = 1;
  cells(seq_id).push_back({prefix, id});
}

void SimBackend::release(const Cell& cell) {
  if (--holders_[cell.id] == 0) free_cells_.push_back(cell.id);
}

DecodeStatus SimBackend::decode(const MicroBatch& batch) {
  if (!is_valid(batch)) return DecodeStatus::kInvalidBatch;
  if (interrupted_.exchange(false)) return DecodeStatus::kInterrupted;
  if (!has_room_for(batch.size())) return DecodeStatus::kNoSlot;

  row_of_index_.assign(batch.size(), -1);
  logits_.resize(static_cast<std::size_t>(batch.num_outputs) * num_logits_);
  std::int32_t row = 0;
  const std::size_t num_loose = batch.size() % static_cast<std::size_t>(info_.row_group);
  double seconds = cost_.base_s + cost_.loose_row_s * static_cast<double>(num_loose);
  for (std::size_t i = 0; i < batch.size(); ++i) {
    const SeqId seq_id = batch.seq_ids[i];
    const std::vector<Cell>& held = cells(seq_id);
    const std::uint64_t before = held.empty() ? 0 : held.back().prefix;
    const std::uint64_t prefix = mix(before ^ static_cast<std::uint64_t>(batch.tokens[i] + 1));
    push_cell(seq_id, prefix);
    const bool alone = (i == 0 || batch.seq_ids[i - 1] != seq_id) &&
                       (i + 1 == batch.size() || batch.seq_ids[i + 1] != seq_id);
    seconds += (alone ? cost_.decode_row_s : cost_.prefill_token_s) +
               cost_.kv_token_s * static_cast<double>(held.size());
    if (batch.outputs[i] == 0) continue;
    row_of_index_[i] = row;
    float* out = logits_.data() + static_cast<std::size_t>(row) * num_logits_;
    for (std::size_t token = 0; token < num_logits_; ++token) {
      out[token] = static_cast<float>(mix(prefix + token) >> 40) * 0x1p-21F;
    }
    row += 1;
  }
  let_pass(seconds);
  return DecodeStatus::kOk;
}

const float* SimBackend::logits(std::int32_t index) {
  const auto i = static_cast<std::size_t>(index);
  if (index < 0 || i >= row_of_index_.size() || row_of_index_[i] < 0) return nullptr;
  return logits_.data() + static_cast<std::size_t>(row_of_index_[i]) * num_logits_;
}

// One layer, in blocks of 256 cells as llama.cpp has them.
AttentionShape SimBackend::attention_shape(const MicroBatch& batch) const {
  auto cells = static_cast<std::size_t>(num_cells_used());
  if (info_.layout == KvLayout::kStreams) {
    cells = 0;
    for (const SeqId seq_id : batch.seq_ids) {
      cells = std::max(cells, sequences_[static_cast<std::size_t>(seq_id)].size());
    }
  }
  constexpr std::size_t kBlock = 256;
  return {1, 0, 0, static_cast<std::int64_t>((cells + kBlock - 1) / kBlock * kBlock)};
}

bool SimBackend::remove(SeqId seq_id, Position begin, Position end) {
  std::vector<Cell>& held = cells(seq_id);
  const auto size = static_cast<Position>(held.size());
  const Position last = end < 0 ? size : std::min(end, size);
  if (begin >= last) return true;
  // What lies behind a hole would be unreachable; nothing here ever asks for one.
  if (last != size) return false;
  if (begin > 0 && is_whole_only()) return false;
  for (Position i = begin; i < last; ++i) release(held[static_cast<std::size_t>(i)]);
  held.resize(static_cast<std::size_t>(begin));
  return true;
}

bool SimBackend::copy(SeqId from, SeqId to, Position end) {
  const std::vector<Cell>& source = cells(from);
  const std::size_t count = end < 0 ? source.size() : static_cast<std::size_t>(end);
  if (!cells(to).empty() || count > source.size()) return false;
  if (is_whole_only() && count != source.size()) return false;
  for (std::size_t i = 0; i < count; ++i) {
    if (info_.layout == KvLayout::kUnified) {
      holders_[source[i].id] += 1;
      cells(to).push_back(source[i]);
    } else {
      push_cell(to, source[i].prefix);
    }
  }
  return true;
}

Position SimBackend::pos_min(SeqId seq_id) const {
  return sequences_[static_cast<std::size_t>(seq_id)].empty() ? -1 : 0;
}

Position SimBackend::pos_max(SeqId seq_id) const {
  return static_cast<Position>(sequences_[static_cast<std::size_t>(seq_id)].size()) - 1;
}

std::size_t SimBackend::saved_size(SeqId seq_id) {
  return cells(seq_id).size() * sizeof(std::uint64_t);
}

std::size_t SimBackend::save(SeqId seq_id, std::span<std::uint8_t> into) {
  const std::size_t bytes = saved_size(seq_id);
  if (into.size() < bytes) return 0;
  std::size_t at = 0;
  for (const Cell& cell : cells(seq_id)) {
    std::memcpy(into.data() + at, &cell.prefix, sizeof cell.prefix);
    at += sizeof cell.prefix;
  }
  let_pass(cost_.copied_token_s * static_cast<double>(cells(seq_id).size()));
  return bytes;
}

bool SimBackend::restore(SeqId seq_id, std::span<const std::uint8_t> from) {
  const std::size_t count = from.size() / sizeof(std::uint64_t);
  if (!cells(seq_id).empty() || !has_room_for(count)) return false;
  for (std::size_t i = 0; i < count; ++i) {
    std::uint64_t prefix = 0;
    std::memcpy(&prefix, from.data() + i * sizeof prefix, sizeof prefix);
    push_cell(seq_id, prefix);
  }
  let_pass(cost_.copied_token_s * static_cast<double>(count));
  return true;
}

}  // namespace batchcore
