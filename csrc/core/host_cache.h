// Prefixes that had to leave the KV memory, kept in host memory: the second tier of the prefix
// cache. Holds opaque states (Backend::save) of bounded total size, least recently used out first.
#pragma once

#include <cstddef>
#include <cstdint>
#include <list>
#include <memory>
#include <span>
#include <vector>

#include "core/types.h"

namespace batchcore {

class HostCache {
 public:
  struct Entry {
    std::vector<Token> tokens;
    std::vector<std::uint8_t> state;
  };
  /// `length` leading tokens are those asked for; the state holds all of the entry's.
  struct Match {
    std::shared_ptr<const Entry> entry;
    std::int32_t length = 0;
  };

  /// 0 switches it off.
  void set_max_bytes(std::size_t bytes) { max_bytes_ = bytes; }
  [[nodiscard]] std::size_t max_bytes() const { return max_bytes_; }
  [[nodiscard]] std::size_t num_bytes() const { return num_bytes_; }
  [[nodiscard]] std::size_t size() const { return entries_.size(); }

  /// Takes a state in, unless it is too large. Entries that it makes superfluous (all of their
  /// tokens lead it) go, and so do the oldest that no longer fit.
  void put(Entry entry, bool whole_only);

  /// The longest match; an entry that goes further than `tokens` serves only where its state can be
  /// cut back (not `whole_only`). Equal lengths: the shorter state, which is copied sooner.
  [[nodiscard]] Match longest_match(std::span<const Token> tokens, bool whole_only) const;

  /// It has served: now the youngest.
  void touch(const std::shared_ptr<const Entry>& entry);

 private:
  using Entries = std::list<std::shared_ptr<const Entry>>;
  void erase(Entries::iterator entry);

  Entries entries_;  // youngest first
  std::size_t max_bytes_ = 0;
  std::size_t num_bytes_ = 0;
};

}  // namespace batchcore
