#include "engine/stop_matcher.h"

#include <algorithm>
#include <array>

#include "engine/utf8.h"

namespace batchcore {

// Aho-Corasick over bytes. A state is the longest end of the text that begins some stop string.
class StopMatcher::Automaton {
 public:
  struct Node {
    std::int32_t depth = 0;         // length of that end
    std::int32_t fail = 0;          // the next shorter end that begins a stop string
    std::int32_t match = -1;        // index of the longest stop string that ends here, -1 for none
    std::int32_t first_child = -1;  // children are a list: most nodes have one
    std::int32_t next_sibling = -1;
    unsigned char byte = 0;
  };

  explicit Automaton(const std::vector<std::string>& stops) {
    nodes_.emplace_back();
    root_.fill(-1);
    for (std::size_t i = 0; i < stops.size(); ++i) {
      if (!stops[i].empty()) insert(stops[i], static_cast<std::int32_t>(i));
    }
    link();
  }

  [[nodiscard]] const Node& node(std::int32_t state) const {
    return nodes_[static_cast<std::size_t>(state)];
  }
  [[nodiscard]] std::size_t length_of_match(std::int32_t state) const {
    return lengths_[static_cast<std::size_t>(node(state).match)];
  }

  [[nodiscard]] std::int32_t next(std::int32_t state, unsigned char byte) const {
    for (; state != 0; state = node(state).fail) {
      const std::int32_t found = child(state, byte);
      if (found >= 0) return found;
    }
    return std::max(root_[byte], 0);
  }

 private:
  [[nodiscard]] std::int32_t child(std::int32_t state, unsigned char byte) const {
    if (state == 0) return root_[byte];
    std::int32_t at = node(state).first_child;
    while (at >= 0 && node(at).byte != byte) at = node(at).next_sibling;
    return at;
  }

  void insert(const std::string& stop, std::int32_t index) {
    std::int32_t state = 0;
    for (const char c : stop) {
      const auto byte = static_cast<unsigned char>(c);
      std::int32_t to = child(state, byte);
      if (to < 0) {
        to = static_cast<std::int32_t>(nodes_.size());
        Node& parent = nodes_[static_cast<std::size_t>(state)];
        const Node added{
            .depth = parent.depth + 1, .next_sibling = parent.first_child, .byte = byte};
        parent.first_child = to;
        if (state == 0) root_[byte] = to;
        nodes_.push_back(added);
      }
      state = to;
    }
    std::int32_t& match = nodes_[static_cast<std::size_t>(state)].match;
    if (match < 0) match = index;
    lengths_.resize(std::max(lengths_.size(), static_cast<std::size_t>(index) + 1));
    lengths_[static_cast<std::size_t>(index)] = stop.size();
  }

  // Breadth first, so that a node's shorter ends are linked before it.
  void link() {
    std::vector<std::int32_t> queue{0};
    for (std::size_t i = 0; i < queue.size(); ++i) {
      const std::int32_t parent = queue[i];
      for (std::int32_t at = node(parent).first_child; at >= 0; at = node(at).next_sibling) {
        Node& here = nodes_[static_cast<std::size_t>(at)];
        here.fail = parent == 0 ? 0 : next(node(parent).fail, here.byte);
        if (here.match < 0) here.match = node(here.fail).match;
        queue.push_back(at);
      }
    }
  }

  std::vector<Node> nodes_;
  std::vector<std::size_t> lengths_;  // by index of the stop string
  std::array<std::int32_t, 256> root_{};
};

StopMatcher::StopMatcher(const std::vector<std::string>& stops) {
  const bool any = std::any_of(stops.begin(), stops.end(),
                               [](const std::string& stop) { return !stop.empty(); });
  if (any) automaton_ = std::make_shared<const Automaton>(stops);
}

std::optional<std::size_t> StopMatcher::push(std::string_view text, std::string& safe) {
  if (matched_) return matched_;
  if (!automaton_) {
    safe.append(text);
    return std::nullopt;
  }
  for (std::size_t i = 0; i < text.size(); ++i) {
    state_ = automaton_->next(state_, static_cast<unsigned char>(text[i]));
    if (automaton_->node(state_).match < 0) continue;
    held_.append(text.substr(0, i + 1));
    release(held_.size() - held_begin_ - automaton_->length_of_match(state_), safe);
    matched_ = static_cast<std::size_t>(automaton_->node(state_).match);
    held_.clear();
    held_begin_ = 0;
    return matched_;
  }
  held_.append(text);
  const auto kept = static_cast<std::size_t>(automaton_->node(state_).depth);
  release(held_.size() - held_begin_ - kept, safe);
  return std::nullopt;
}

void StopMatcher::finish(std::string& safe) {
  safe.append(held_, held_begin_);
  held_.clear();
  held_begin_ = 0;
  state_ = 0;
}

// Appends the first `count` held bytes, fewer where that would split a character: a stop string
// that is no valid UTF-8 may begin inside one.
void StopMatcher::release(std::size_t count, std::string& safe) {
  const std::size_t held = held_.size() - held_begin_;
  while (count > 0 && count < held && is_utf8_continuation(held_[held_begin_ + count])) --count;
  safe.append(held_, held_begin_, count);
  held_begin_ += count;
  // Moving the rest to the front pays once it is the smaller part: linear overall.
  if (held_begin_ * 2 >= held_.size()) {
    held_.erase(0, held_begin_);
    held_begin_ = 0;
  }
}

}  // namespace batchcore
