// Tokens into text, one at a time. One per sequence; one thread at a time.
#pragma once

#include <string>

#include "core/types.h"
#include "core/vocab.h"
#include "engine/utf8.h"

namespace batchcore {

/// The text is always whole UTF-8 characters, and a token costs the same however much came before.
class Detokenizer {
 public:
  /// `vocab` must outlive the detokenizer.
  explicit Detokenizer(const Vocab& vocab) : vocab_(&vocab) {}

  /// Appends the characters that `token` completes. A token outside the vocabulary has no text.
  void push(Token token, std::string& out) {
    if (token >= 0 && token < vocab_->size()) stream_.push(vocab_->piece(token), out);
  }

  /// No token follows: an unfinished character becomes U+FFFD.
  void finish(std::string& out) { stream_.finish(out); }

 private:
  const Vocab* vocab_;
  Utf8Stream stream_;
};

}  // namespace batchcore
