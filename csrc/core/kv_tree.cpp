#include "core/kv_tree.h"

#include <algorithm>
#include <cassert>

namespace batchcore {

KvTree::KvTree(std::int32_t num_slots, bool shares_cells)
    : root_(std::make_unique<Node>()),
      slots_(static_cast<std::size_t>(num_slots)),
      shares_cells_(shares_cells) {
  for (Slot& slot : slots_) slot.leaf = root_.get();
}

KvTree::~KvTree() = default;

KvTree::Node* KvTree::add_child(Node* parent, std::span<const Token> tokens) {
  auto node = std::make_unique<Node>();
  node->parent = parent;
  node->tokens.assign(tokens.begin(), tokens.end());
  parent->children.push_back(std::move(node));
  return parent->children.back().get();
}

// The front part becomes a new node between `node` and its parent, so that slots which end at
// `node` still do.
KvTree::Node* KvTree::split(Node* node, std::int32_t at) {
  assert(at > 0 && at < node->size());
  Node* parent = node->parent;
  auto front = std::make_unique<Node>();
  front->parent = parent;
  front->tokens.assign(node->tokens.begin(), node->tokens.begin() + at);
  front->num_active = node->num_active;
  front->num_cached = node->num_cached;
  node->tokens.erase(node->tokens.begin(), node->tokens.begin() + at);
  auto own = std::find_if(parent->children.begin(), parent->children.end(),
                          [node](const auto& child) { return child.get() == node; });
  front->children.push_back(std::move(*own));
  node->parent = front.get();
  *own = std::move(front);
  return own->get();
}

// The node of `slot`'s path whose last token is the slot's token number `length`.
KvTree::Node* KvTree::node_ending_at(SeqId slot, std::int32_t length) {
  Node* node = slots_[index(slot)].leaf;
  std::int32_t end = slots_[index(slot)].length;
  while (node != root_.get() && end - node->size() >= length) {
    end -= node->size();
    node = node->parent;
  }
  return end == length ? node : split(node, length - (end - node->size()));
}

void KvTree::attach(SeqId slot, Node* leaf) {
  slots_[index(slot)].leaf = leaf;
  if (leaf != root_.get()) leaf->ends.push_back(slot);
}

void KvTree::detach(SeqId slot) {
  Node* leaf = slots_[index(slot)].leaf;
  std::erase(leaf->ends, slot);
  slots_[index(slot)].leaf = root_.get();
}

// One slot lets go of the runs from `node` up to, not including, `until`.
void KvTree::release_path(Node* node, const Node* until, bool active) {
  while (node != until) {
    Node* parent = node->parent;
    (active ? node->num_active : node->num_cached) -= 1;
    if (active && node->num_active == 0) num_active_cells_ -= node->size();
    if (node->refs() == 0) {
      assert(node->children.empty());
      num_cells_ -= node->size();
      std::erase_if(parent->children, [node](const auto& child) { return child.get() == node; });
    }
    node = parent;
  }
}

void KvTree::open(SeqId slot) {
  Slot& entry = slots_[index(slot)];
  assert(entry.state == SlotState::kFree);
  entry = Slot{SlotState::kActive, root_.get(), 0};
}

void KvTree::append(SeqId slot, std::span<const Token> tokens) {
  if (tokens.empty()) return;
  Slot& entry = slots_[index(slot)];
  assert(entry.state == SlotState::kActive);
  Node* leaf = entry.leaf;
  const auto count = static_cast<std::int32_t>(tokens.size());
  if (leaf != root_.get() && leaf->refs() == 1) {
    leaf->tokens.insert(leaf->tokens.end(), tokens.begin(), tokens.end());
  } else {
    detach(slot);
    Node* node = add_child(leaf, tokens);
    node->num_active = 1;
    attach(slot, node);
  }
  entry.length += count;
  num_cells_ += count;
  num_active_cells_ += count;
}

void KvTree::share(SeqId from, SeqId to, std::int32_t length) {
  Slot& target = slots_[index(to)];
  assert(target.state == SlotState::kActive && target.length == 0);
  assert(length <= slots_[index(from)].length);
  if (length == 0) return;
  if (!shares_cells_) {
    std::vector<Token> copy = tokens(from);
    copy.resize(static_cast<std::size_t>(length));
    append(to, copy);
    return;
  }
  Node* node = node_ending_at(from, length);
  for (Node* at = node; at != root_.get(); at = at->parent) {
    if (at->num_active == 0) num_active_cells_ += at->size();
    at->num_active += 1;
  }
  attach(to, node);
  target.length = length;
}

void KvTree::swap(SeqId a, SeqId b) {
  Node* const leaf_a = slots_[index(a)].leaf;
  Node* const leaf_b = slots_[index(b)].leaf;
  if (leaf_a != leaf_b) {  // else both are in its list, and stay
    std::replace(leaf_a->ends.begin(), leaf_a->ends.end(), a, b);
    std::replace(leaf_b->ends.begin(), leaf_b->ends.end(), b, a);
  }
  std::swap(slots_[index(a)], slots_[index(b)]);
}

void KvTree::truncate(SeqId slot, std::int32_t length) {
  Slot& entry = slots_[index(slot)];
  if (length >= entry.length) return;
  const bool active = entry.state == SlotState::kActive;
  Node* keep = length == 0 ? root_.get() : node_ending_at(slot, length);
  Node* leaf = entry.leaf;
  detach(slot);
  release_path(leaf, keep, active);
  attach(slot, keep);
  entry.length = length;
}

void KvTree::set_cached(SeqId slot) {
  Slot& entry = slots_[index(slot)];
  assert(entry.state == SlotState::kActive);
  entry.state = SlotState::kCached;
  for (Node* at = entry.leaf; at != root_.get(); at = at->parent) {
    at->num_active -= 1;
    at->num_cached += 1;
    if (at->num_active == 0) num_active_cells_ -= at->size();
  }
}

void KvTree::set_active(SeqId slot) {
  Slot& entry = slots_[index(slot)];
  assert(entry.state == SlotState::kCached);
  entry.state = SlotState::kActive;
  for (Node* at = entry.leaf; at != root_.get(); at = at->parent) {
    if (at->num_active == 0) num_active_cells_ += at->size();
    at->num_active += 1;
    at->num_cached -= 1;
  }
}

void KvTree::remove(SeqId slot) {
  truncate(slot, 0);
  slots_[index(slot)].state = SlotState::kFree;
}

SeqId KvTree::slot_below(const Node* node, bool cached) const {
  for (const SeqId slot : node->ends) {
    if ((state(slot) == SlotState::kCached) == cached) return slot;
  }
  for (const auto& child : node->children) {
    if ((cached ? child->num_cached : child->num_active) > 0) {
      return slot_below(child.get(), cached);
    }
  }
  return -1;
}

// Whether a match that begins with a run can be better than one of `length` tokens of `rest`: seen
// from one token, where all slots begin alike and every one of them would be compared in full.
bool KvTree::may_be_better(const Node& run, std::span<const Token> rest, std::int32_t length,
                           bool is_cached) {
  if (rest.empty() || run.tokens.front() != rest.front()) return false;
  const bool wins_ties = run.num_cached > 0 && !is_cached;
  const std::int32_t least = std::max(length + (wins_ties ? 0 : 1), 1);
  if (least > static_cast<std::int32_t>(rest.size())) return false;
  if (run.size() < least) return !run.children.empty();
  const auto last = static_cast<std::size_t>(least - 1);
  return run.tokens[last] == rest[last];
}

// Two slots that computed the same tokens on their own hold different cells, so several children
// may start with the same token: all of them are looked at.
void KvTree::match_below(const Node* node, std::span<const Token> rest, std::int32_t depth,
                         bool whole_slots_only, PrefixMatch& best) const {
  for (const auto& child : node->children) {
    if (!may_be_better(*child, rest, best.length - depth, best.is_cached)) continue;
    const auto [mine, theirs] =
        std::mismatch(child->tokens.begin(), child->tokens.end(), rest.begin(), rest.end());
    const auto common = static_cast<std::int32_t>(mine - child->tokens.begin());
    if (common == 0) continue;
    const bool whole_run = common == child->size();
    const std::int32_t length = depth + common;
    const bool has_cached = child->num_cached > 0;
    const bool better =
        length > best.length || (length == best.length && has_cached && !best.is_cached);
    if (whole_slots_only) {
      if (whole_run && better && !child->ends.empty()) {
        const bool end_cached =
            std::any_of(child->ends.begin(), child->ends.end(),
                        [this](SeqId slot) { return state(slot) == SlotState::kCached; });
        best = {child->ends.front(), length, end_cached};
        for (const SeqId slot : child->ends) {
          if ((state(slot) == SlotState::kCached) == end_cached) best.slot = slot;
        }
      }
    } else if (better) {
      best = {slot_below(child.get(), has_cached), length, has_cached};
    }
    if (whole_run) {
      match_below(child.get(), rest.subspan(static_cast<std::size_t>(common)), length,
                  whole_slots_only, best);
    }
  }
}

PrefixMatch KvTree::longest_match(std::span<const Token> tokens, bool whole_slots_only) const {
  PrefixMatch best;
  match_below(root_.get(), tokens, 0, whole_slots_only, best);
  return best;
}

std::int32_t KvTree::cells_freed_by(std::span<const SeqId> slots) const {
  std::int32_t freed = 0;
  for (const SeqId slot : slots) {
    for (const Node* at = slots_[index(slot)].leaf; at != root_.get(); at = at->parent) {
      at->num_removed += 1;
      if (at->num_removed == at->refs()) freed += at->size();
    }
  }
  for (const SeqId slot : slots) {
    for (const Node* at = slots_[index(slot)].leaf; at != root_.get(); at = at->parent) {
      at->num_removed = 0;
    }
  }
  return freed;
}

std::vector<Token> KvTree::tokens(SeqId slot) const {
  std::vector<const Node*> path;
  for (const Node* at = slots_[index(slot)].leaf; at != root_.get(); at = at->parent) {
    path.push_back(at);
  }
  std::vector<Token> all;
  all.reserve(static_cast<std::size_t>(length(slot)));
  for (auto node = path.rbegin(); node != path.rend(); ++node) {
    all.insert(all.end(), (*node)->tokens.begin(), (*node)->tokens.end());
  }
  return all;
}

std::optional<std::string> KvTree::check_node(const Node* node, std::int32_t& cells,
                                              std::int32_t& active_cells) const {
  std::int32_t active = 0;
  std::int32_t cached = 0;
  for (const SeqId slot : node->ends) {
    if (slots_[index(slot)].leaf != node) return "a slot ends at a run that is not its leaf";
    (state(slot) == SlotState::kActive ? active : cached) += 1;
  }
  for (const auto& child : node->children) {
    if (child->parent != node) return "a run has lost its parent";
    if (child->tokens.empty()) return "a run without tokens";
    if (auto problem = check_node(child.get(), cells, active_cells)) return problem;
    active += child->num_active;
    cached += child->num_cached;
    cells += child->size();
    active_cells += child->num_active > 0 ? child->size() : 0;
  }
  if (node == root_.get()) return std::nullopt;
  if (active != node->num_active || cached != node->num_cached) {
    return "a run's count of holders is off";
  }
  if (node->refs() == 0) return "a run that no slot holds";
  return std::nullopt;
}

std::optional<std::string> KvTree::check_integrity() const {
  std::int32_t cells = 0;
  std::int32_t active_cells = 0;
  if (auto problem = check_node(root_.get(), cells, active_cells)) return problem;
  if (cells != num_cells_) return "the count of cells is off";
  if (active_cells != num_active_cells_) return "the count of active cells is off";
  for (const Slot& slot : slots_) {
    std::int32_t length = 0;
    for (const Node* at = slot.leaf; at != root_.get(); at = at->parent) length += at->size();
    if (length != slot.length) return "a slot's length is off";
    if (slot.state == SlotState::kFree && length != 0) return "a free slot holds tokens";
  }
  return std::nullopt;
}

}  // namespace batchcore
