// Which slot holds which tokens, and which slots share the same cells: a radix tree over token ids
// whose nodes are runs of KV cells. It is the exact account of the KV memory and the index of the
// prefix cache in one. Knows nothing of llama.cpp; the engine mirrors every change in the backend.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "core/types.h"

namespace batchcore {

/// The longest prefix that some slot holds.
struct PrefixMatch {
  SeqId slot = -1;
  std::int32_t length = 0;
  bool is_cached = false;  ///< the slot is idle: it may be taken over instead of copied
};

class KvTree {
 public:
  enum class SlotState { kFree, kActive, kCached };

  /// `shares_cells`: a copied prefix costs no cells (unified layout).
  KvTree(std::int32_t num_slots, bool shares_cells);
  ~KvTree();
  KvTree(const KvTree&) = delete;
  KvTree& operator=(const KvTree&) = delete;

  /// kFree → kActive, empty.
  void open(SeqId slot);
  /// `tokens` were computed behind the last token of an active slot.
  void append(SeqId slot, std::span<const Token> tokens);
  /// Makes the active, empty slot `to` hold the first `length` tokens of `from`.
  void share(SeqId from, SeqId to, std::int32_t length);
  /// Forgets what lies behind the first `length` tokens.
  void truncate(SeqId slot, std::int32_t length);
  /// Active ↔ cached: a cached slot serves prefixes until its cells or its id are needed.
  void set_cached(SeqId slot);
  void set_active(SeqId slot);
  /// → kFree.
  void remove(SeqId slot);
  /// What one of them holds and is, the other does from now on.
  void swap(SeqId a, SeqId b);

  [[nodiscard]] SlotState state(SeqId slot) const { return slots_[index(slot)].state; }
  [[nodiscard]] std::int32_t length(SeqId slot) const { return slots_[index(slot)].length; }
  /// Distinct cells in use, by any slot and by active ones.
  [[nodiscard]] std::int32_t num_cells() const { return num_cells_; }
  [[nodiscard]] std::int32_t num_active_cells() const { return num_active_cells_; }

  /// Longest prefix of `tokens` that a slot holds; cached slots win over active ones at equal
  /// length. `whole_slots_only`: a recurrent state serves only the exact position that it stands
  /// at.
  [[nodiscard]] PrefixMatch longest_match(std::span<const Token> tokens,
                                          bool whole_slots_only) const;

  /// Cells that removing all of `slots` together would free.
  [[nodiscard]] std::int32_t cells_freed_by(std::span<const SeqId> slots) const;

  /// The tokens that a slot holds (for tests and integrity checks).
  [[nodiscard]] std::vector<Token> tokens(SeqId slot) const;

  /// Recounts everything; a sentence that says what is wrong, or nothing.
  [[nodiscard]] std::optional<std::string> check_integrity() const;

 private:
  struct Node {
    Node* parent = nullptr;
    std::vector<Token> tokens;
    std::vector<std::unique_ptr<Node>> children;
    std::vector<SeqId> ends;               // slots whose last token is the last of this run
    std::int32_t num_active = 0;           // active slots that hold this run
    std::int32_t num_cached = 0;           // cached ones
    mutable std::int32_t num_removed = 0;  // scratch of cells_freed_by(), else 0

    [[nodiscard]] std::int32_t size() const { return static_cast<std::int32_t>(tokens.size()); }
    [[nodiscard]] std::int32_t refs() const { return num_active + num_cached; }
  };
  struct Slot {
    SlotState state = SlotState::kFree;
    Node* leaf = nullptr;  // root where the slot is empty
    std::int32_t length = 0;
  };

  static std::size_t index(SeqId slot) { return static_cast<std::size_t>(slot); }
  Node* add_child(Node* parent, std::span<const Token> tokens);
  Node* split(Node* node, std::int32_t at);
  Node* node_ending_at(SeqId slot, std::int32_t length);
  void attach(SeqId slot, Node* leaf);
  void detach(SeqId slot);
  void release_path(Node* from, const Node* until, bool active);
  [[nodiscard]] static bool may_be_better(const Node& run, std::span<const Token> rest,
                                          std::int32_t length, bool is_cached);
  void match_below(const Node* node, std::span<const Token> rest, std::int32_t depth,
                   bool whole_slots_only, PrefixMatch& best) const;
  [[nodiscard]] SeqId slot_below(const Node* node, bool cached) const;
  std::optional<std::string> check_node(const Node* node, std::int32_t& cells,
                                        std::int32_t& active_cells) const;

  std::unique_ptr<Node> root_;
  std::vector<Slot> slots_;
  bool shares_cells_;
  std::int32_t num_cells_ = 0;
  std::int32_t num_active_cells_ = 0;
};

}  // namespace batchcore
