#include "core/kv_tree.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <map>
#include <random>
#include <set>
#include <vector>

namespace batchcore {
namespace {

using Tokens = std::vector<Token>;

TEST_CASE("a shared prefix costs its cells once") {
  KvTree tree(4, true);
  tree.open(0);
  tree.append(0, Tokens{1, 2, 3, 4});
  tree.open(1);
  tree.share(0, 1, 3);
  tree.append(1, Tokens{9});
  CHECK(tree.tokens(1) == Tokens{1, 2, 3, 9});
  CHECK(tree.num_cells() == 5);
  CHECK(tree.cells_freed_by(std::vector<SeqId>{0}) == 1);
  CHECK(tree.cells_freed_by(std::vector<SeqId>{0, 1}) == 5);
  tree.remove(0);
  CHECK(tree.num_cells() == 4);
  CHECK_FALSE(tree.check_integrity());
}

TEST_CASE("streams copy a prefix cell by cell") {
  KvTree tree(2, false);
  tree.open(0);
  tree.append(0, Tokens{1, 2, 3});
  tree.open(1);
  tree.share(0, 1, 3);
  CHECK(tree.num_cells() == 6);
  CHECK_FALSE(tree.check_integrity());
}

TEST_CASE("the longest match prefers a cached slot, and a deeper one to either") {
  KvTree tree(4, true);
  tree.open(0);
  tree.append(0, Tokens{1, 2, 3});
  tree.open(1);
  tree.append(1, Tokens{1, 2, 3, 4});
  tree.set_cached(1);
  CHECK(tree.longest_match(Tokens{1, 2, 7}, false).slot == 1);
  CHECK(tree.longest_match(Tokens{1, 2, 7}, false).length == 2);
  CHECK(tree.longest_match(Tokens{1, 2, 3, 4, 5}, false).length == 4);
  CHECK(tree.longest_match(Tokens{8}, false).slot == -1);
}

TEST_CASE("a recurrent state serves only the position it stands at") {
  KvTree tree(2, false);
  tree.open(0);
  tree.append(0, Tokens{1, 2, 3});
  CHECK(tree.longest_match(Tokens{1, 2, 3, 4}, true).length == 3);
  CHECK(tree.longest_match(Tokens{1, 2, 9}, true).length == 0);
  CHECK(tree.longest_match(Tokens{1, 2, 9}, false).length == 2);
}

TEST_CASE("only what active slots hold counts as active") {
  KvTree tree(3, true);
  tree.open(0);
  tree.append(0, Tokens{1, 2});
  tree.set_cached(0);
  CHECK(tree.num_active_cells() == 0);
  tree.open(1);
  tree.share(0, 1, 1);
  CHECK(tree.num_active_cells() == 1);
  tree.set_active(0);
  CHECK(tree.num_active_cells() == 2);
}

// A plain account of the same: each slot is a list of cells, a cell is a number and a token.
struct Model {
  struct Cell {
    int id;
    Token token;
  };
  std::map<SeqId, std::vector<Cell>> slots;
  int next = 0;

  void swap(SeqId a, SeqId b) {
    auto first = slots.extract(a);
    auto second = slots.extract(b);
    if (first) first.key() = b;
    if (second && a != b) second.key() = a;
    slots.insert(std::move(first));
    slots.insert(std::move(second));
  }
  [[nodiscard]] int num_cells() const {
    std::set<int> distinct;
    for (const auto& [slot, cells] : slots) {
      for (const Cell& cell : cells) distinct.insert(cell.id);
    }
    return static_cast<int>(distinct.size());
  }
  [[nodiscard]] Tokens tokens(SeqId slot) const {
    Tokens all;
    for (const Cell& cell : slots.at(slot)) all.push_back(cell.token);
    return all;
  }
};

TEST_CASE("any order of operations leaves the same account as a plain list of cells") {
  for (unsigned seed = 0; seed < 60; ++seed) {
    std::mt19937 random(seed);
    const auto below = [&](int n) { return static_cast<int>(random() % static_cast<unsigned>(n)); };
    const bool shares = seed % 2 == 0;
    constexpr int kSlots = 6;
    KvTree tree(kSlots, shares);
    Model model;
    for (int operation = 0; operation < 400; ++operation) {
      const SeqId slot = below(kSlots);
      if (below(8) == 0) {
        const SeqId other = below(kSlots);
        tree.swap(slot, other);
        model.swap(slot, other);
      } else if (tree.state(slot) == KvTree::SlotState::kFree) {
        tree.open(slot);
        model.slots[slot] = {};
        const SeqId from = below(kSlots);
        if (from != slot && model.slots.count(from) > 0 && below(2) == 0) {
          const int length = below(tree.length(from) + 1);
          tree.share(from, slot, length);
          for (int i = 0; i < length; ++i) {
            Model::Cell cell = model.slots[from][static_cast<std::size_t>(i)];
            if (!shares) cell.id = model.next++;
            model.slots[slot].push_back(cell);
          }
        }
      } else if (tree.state(slot) == KvTree::SlotState::kCached) {
        if (below(2) == 0) {
          tree.set_active(slot);
        } else {
          tree.remove(slot);
          model.slots.erase(slot);
        }
      } else {
        switch (below(5)) {
          case 0:
          case 1: {
            Tokens more;
            for (int i = below(4); i >= 0; --i) more.push_back(below(3));
            tree.append(slot, more);
            for (const Token token : more) model.slots[slot].push_back({model.next++, token});
            break;
          }
          case 2: {
            const int length = below(tree.length(slot) + 1);
            tree.truncate(slot, length);
            model.slots[slot].resize(static_cast<std::size_t>(length));
            break;
          }
          case 3:
            tree.set_cached(slot);
            break;
          default:
            tree.remove(slot);
            model.slots.erase(slot);
        }
      }
      const auto problem = tree.check_integrity();
      REQUIRE_MESSAGE(!problem, problem.value_or(""));
      REQUIRE(tree.num_cells() == model.num_cells());
      for (const auto& [held, cells] : model.slots)
        REQUIRE(tree.tokens(held) == model.tokens(held));

      Tokens probe;
      for (int i = below(8); i >= 0; --i) probe.push_back(below(3));
      int longest = 0;
      for (const auto& [held, cells] : model.slots) {
        const Tokens tokens = model.tokens(held);
        const auto end = std::mismatch(tokens.begin(), tokens.end(), probe.begin(), probe.end());
        longest = std::max(longest, static_cast<int>(end.first - tokens.begin()));
      }
      const PrefixMatch match = tree.longest_match(probe, false);
      REQUIRE(match.length == longest);
      if (longest > 0) {
        const Tokens tokens = tree.tokens(match.slot);
        REQUIRE(std::equal(probe.begin(), probe.begin() + longest, tokens.begin()));
      }
      std::vector<SeqId> victims;
      Model without = model;
      for (const auto& [held, cells] : model.slots) {
        if (below(2) == 0) continue;
        victims.push_back(held);
        without.slots.erase(held);
      }
      REQUIRE(tree.cells_freed_by(victims) == model.num_cells() - without.num_cells());
    }
  }
}

}  // namespace
}  // namespace batchcore
