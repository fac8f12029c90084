#include "core/host_cache.h"

#include <algorithm>
#include <utility>

namespace batchcore {
namespace {

std::size_t common_prefix(std::span<const Token> a, std::span<const Token> b) {
  return static_cast<std::size_t>(std::mismatch(a.begin(), a.end(), b.begin(), b.end()).first -
                                  a.begin());
}

}  // namespace

void HostCache::erase(Entries::iterator entry) {
  num_bytes_ -= (*entry)->state.size();
  entries_.erase(entry);
}

void HostCache::put(Entry entry, bool whole_only) {
  if (entry.state.size() > max_bytes_) return;
  for (auto at = entries_.begin(); at != entries_.end();) {
    const auto old = at++;
    const std::size_t common = common_prefix((*old)->tokens, entry.tokens);
    const bool is_same = common == (*old)->tokens.size() && common == entry.tokens.size();
    if (is_same || (!whole_only && common == (*old)->tokens.size())) erase(old);
  }
  num_bytes_ += entry.state.size();
  entries_.push_front(std::make_shared<const Entry>(std::move(entry)));
  while (num_bytes_ > max_bytes_) erase(std::prev(entries_.end()));
}

HostCache::Match HostCache::longest_match(std::span<const Token> tokens, bool whole_only) const {
  Match best;
  for (const auto& entry : entries_) {
    const std::size_t common = common_prefix(entry->tokens, tokens);
    if (whole_only && common != entry->tokens.size()) continue;
    const auto length = static_cast<std::int32_t>(common);
    if (length > best.length ||
        (length > 0 && length == best.length && entry->tokens.size() < best.entry->tokens.size())) {
      best = {entry, length};
    }
  }
  return best;
}

void HostCache::touch(const std::shared_ptr<const Entry>& entry) {
  const auto found = std::find(entries_.begin(), entries_.end(), entry);
  if (found != entries_.end()) entries_.splice(entries_.begin(), entries_, found);
}

}  // namespace batchcore
