#include "llama/llama_tokenizer.h"

#include <llama.h>

#include <climits>
#include <cstdint>
#include <exception>
#include <iterator>

#include "core/errors.h"

namespace batchcore {
namespace {

constexpr std::string_view kLowerBar = "\xE2\x96\x81";     // U+2581, SentencePiece's space
constexpr std::string_view kReplacement = "\xEF\xBF\xBD";  // U+FFFD

// Retokenising what is left is quadratic, so a hostile text ends up as plain byte tokens.
constexpr int kMaxRetries = 64;

bool is_continuation(char c) { return (static_cast<unsigned char>(c) & 0xC0U) == 0x80U; }

// Length of the UTF-8 character that `text` begins with, 0 where it is none. Stricter than
// llama.cpp's reader, so that nothing it would replace passes.
std::size_t utf8_length(std::string_view text) {
  const auto lead = static_cast<unsigned char>(text[0]);
  if (lead < 0x80) return 1;
  const std::size_t length = lead >= 0xF0 ? 4 : lead >= 0xE0 ? 3 : 2;
  if (lead < 0xC2 || lead > 0xF4 || text.size() < length) return 0;
  for (std::size_t i = 1; i < length; ++i) {
    if (!is_continuation(text[i])) return 0;
  }
  const auto second = static_cast<unsigned char>(text[1]);
  const bool overlong = (lead == 0xE0 && second < 0xA0) || (lead == 0xF0 && second < 0x90);
  const bool surrogate = lead == 0xED && second > 0x9F;
  const bool too_large = lead == 0xF4 && second > 0x8F;
  return overlong || surrogate || too_large ? 0 : length;
}

}  // namespace

LlamaTokenizer::LlamaTokenizer(const llama_vocab* vocab) : vocab_(vocab) {
  // Asking the tokenizer is surer than reading metadata whose defaults depend on its kind.
  const auto round_trip = [this](std::string_view text) {
    std::string result;
    for (const Token token : encode_raw(text, false, false)) result += piece(token, false);
    return result;
  };
  adds_space_ = round_trip("a").starts_with(' ');
  loses_lower_bar_ = round_trip(kLowerBar).find(kLowerBar) == std::string::npos;
  loses_invalid_ = round_trip("a\xFF").find('\xFF') == std::string::npos;
}

std::string LlamaTokenizer::piece(Token token, bool special) const {
  if (token < 0 || token >= llama_vocab_n_tokens(vocab_)) {
    throw InvalidRequestError("token " + std::to_string(token) + " is not in the vocabulary of " +
                              std::to_string(llama_vocab_n_tokens(vocab_)) + " tokens");
  }
  std::array<char, 64> small;
  std::int32_t size = llama_token_to_piece(vocab_, token, small.data(),
                                           static_cast<std::int32_t>(small.size()), 0, special);
  if (size >= 0) return {small.data(), static_cast<std::size_t>(size)};
  std::string bytes(static_cast<std::size_t>(-size), '\0');
  size = llama_token_to_piece(vocab_, token, bytes.data(), -size, 0, special);
  bytes.resize(static_cast<std::size_t>(size > 0 ? size : 0));
  return bytes;
}

std::string LlamaTokenizer::decode(std::span<const Token> tokens, bool skip_special) const {
  std::string text;
  bool at_start = adds_space_;
  for (const Token token : tokens) {
    const std::string bytes = piece(token, !skip_special);
    std::string_view rest = bytes;
    const bool is_special = (llama_vocab_get_attr(vocab_, token) &
                             (LLAMA_TOKEN_ATTR_CONTROL | LLAMA_TOKEN_ATTR_UNKNOWN)) != 0;
    if (at_start && !is_special && !rest.empty()) {
      if (rest.front() == ' ') rest.remove_prefix(1);
      at_start = false;
    }
    text += rest;
  }
  return text;
}

std::vector<Token> LlamaTokenizer::encode_raw(std::string_view text, bool add_special,
                                              bool parse_special) const {
  if (text.size() > INT_MAX / 2) {
    throw InvalidRequestError("a text of " + std::to_string(text.size()) +
                              " bytes is too long to tokenise");
  }
  std::vector<Token> tokens(text.size() + 8);  // at most one per byte, and a few around them
  const auto run = [&] {
    return llama_tokenize(vocab_, text.data(), static_cast<std::int32_t>(text.size()),
                          tokens.data(), static_cast<std::int32_t>(tokens.size()), add_special,
                          parse_special);
  };
  std::int32_t count = 0;
  try {
    count = run();
    if (count < 0 && count != INT_MIN) {
      tokens.resize(static_cast<std::size_t>(-count));
      count = run();
    }
  } catch (const std::exception& error) {
    throw InvalidRequestError(std::string("the text can't be tokenised: ") + error.what());
  }
  if (count < 0) throw InvalidRequestError("the text has too many tokens");
  tokens.resize(static_cast<std::size_t>(count));
  return tokens;
}

std::vector<Token> LlamaTokenizer::encode(std::string_view text, bool add_special,
                                          bool parse_special) const {
  // What add_special puts around is what it makes of an empty text: BOS in front, the rest behind.
  const std::vector<Token> around =
      add_special ? encode_raw({}, true, false) : std::vector<Token>();
  const std::ptrdiff_t front = !around.empty() && around.front() == llama_vocab_bos(vocab_) ? 1 : 0;
  const std::ptrdiff_t back = std::ssize(around) - front;

  if (parse_special || !is_lossy(text)) {
    std::vector<Token> tokens = encode_raw(with_valid_utf8(text), add_special, parse_special);
    if (parse_special) return tokens;  // control tokens swallow spaces on purpose
    std::vector<Token> body(tokens.begin() + front, tokens.end() - back);
    if (match(text, true, body) == text.size()) return tokens;
  }
  std::vector<Token> exact(around.begin(), around.begin() + front);
  if (!encode_exact(text, exact)) {
    return encode_raw(with_valid_utf8(text), add_special, parse_special);
  }
  exact.insert(exact.end(), around.begin() + front, around.end());
  return exact;
}

// Some of llama.cpp's tokenizers replace what is not UTF-8, some throw at a part of it.
std::string LlamaTokenizer::with_valid_utf8(std::string_view text) const {
  if (!loses_invalid_) return std::string(text);
  std::string result;
  result.reserve(text.size());
  for (std::size_t i = 0; i < text.size();) {
    const std::size_t length = utf8_length(text.substr(i));
    result += length == 0 ? kReplacement : text.substr(i, length);
    i += length == 0 ? 1 : length;
  }
  return result;
}

// Bytes of the unit at the start of `text` that encode_raw() would lose, 0 where it keeps it.
std::size_t LlamaTokenizer::lossy_unit(std::string_view text) const {
  if (loses_invalid_ && utf8_length(text) == 0) return 1;
  if (loses_lower_bar_ && text.starts_with(kLowerBar)) return kLowerBar.size();
  return 0;
}

bool LlamaTokenizer::is_lossy(std::string_view text) const {
  if (loses_lower_bar_ && text.find(kLowerBar) != std::string_view::npos) return true;
  if (!loses_invalid_) return false;
  for (std::size_t i = 0; i < text.size();) {
    const std::size_t length = utf8_length(text.substr(i));
    if (length == 0) return true;
    i += length;
  }
  return false;
}

// Appends tokens whose bytes are exactly `text`, or returns false. Units that llama.cpp would lose
// become byte tokens and cut the text into segments, which keeps this linear.
bool LlamaTokenizer::encode_exact(std::string_view text, std::vector<Token>& tokens) const {
  std::size_t begin = 0;
  for (std::size_t i = 0; i < text.size();) {
    const std::size_t unit = lossy_unit(text.substr(i));
    if (unit == 0) {
      const std::size_t length = utf8_length(text.substr(i));
      i += length == 0 ? 1 : length;
      continue;
    }
    if (!encode_segment(text.substr(begin, i - begin), begin == 0, tokens)) return false;
    if (!encode_bytes(text.substr(i, unit), tokens)) return false;
    i += unit;
    begin = i;
  }
  return encode_segment(text.substr(begin), begin == 0, tokens);
}

bool LlamaTokenizer::encode_segment(std::string_view text, bool first,
                                    std::vector<Token>& tokens) const {
  bool at_start = first;
  for (int retry = 0; !text.empty(); ++retry) {
    if (retry == kMaxRetries) return encode_bytes(text, tokens);
    std::vector<Token> next;
    if (at_start) {
      next = encode_raw(text, false, false);
    } else if (!encode_inside(text, next)) {
      return encode_bytes(text, tokens);
    }
    const std::size_t good = match(text, at_start, next);
    tokens.insert(tokens.end(), next.begin(), next.end());
    text.remove_prefix(good);
    if (good == 0 && !text.empty()) {
      const std::size_t length = utf8_length(text);
      const std::string_view unit = text.substr(0, length == 0 ? 1 : length);
      // decode() takes one space off the start, the one that encode_raw() would have added.
      if (at_start && adds_space_ && unit == " " && !encode_bytes(unit, tokens)) return false;
      if (!encode_bytes(unit, tokens)) return false;
      text.remove_prefix(unit.size());
    }
    at_start = false;
  }
  return true;
}

// Tokens of a text that continues another, so without the space that a vocabulary adds in front.
bool LlamaTokenizer::encode_inside(std::string_view text, std::vector<Token>& tokens) const {
  if (!adds_space_) {
    tokens = encode_raw(text, false, false);
    return true;
  }
  // A control character never merges with its neighbours: put one in front and cut it off again.
  constexpr std::string_view kGuard = "\x01";
  const std::vector<Token> guarded = encode_raw(std::string(kGuard).append(text), false, false);
  std::string seen;
  for (std::size_t i = 0; i < guarded.size() && seen.size() < 2; ++i) {
    seen += piece(guarded[i], false);
    if (seen == " \x01") {
      tokens.assign(guarded.begin() + static_cast<std::ptrdiff_t>(i) + 1, guarded.end());
      return true;
    }
  }
  return false;
}

bool LlamaTokenizer::encode_bytes(std::string_view text, std::vector<Token>& tokens) const {
  const ByteTokens& table = byte_tokens();
  for (const char c : text) {
    const Token token = table[static_cast<unsigned char>(c)];
    if (token < 0) return false;
    tokens.push_back(token);
  }
  return true;
}

// Cuts `tokens` back to those whose bytes agree with `text` from its start; returns how many bytes
// that is. `first` allows for the space that the vocabulary added.
std::size_t LlamaTokenizer::match(std::string_view text, bool first,
                                  std::vector<Token>& tokens) const {
  std::size_t offset = 0;
  bool at_start = first && adds_space_;
  for (std::size_t i = 0; i < tokens.size(); ++i) {
    const std::string bytes = piece(tokens[i], false);
    std::string_view rest = bytes;
    if (at_start && !rest.empty()) {
      if (rest.front() == ' ') rest.remove_prefix(1);
      at_start = false;
    }
    if (!text.substr(offset).starts_with(rest)) {
      tokens.resize(i);
      break;
    }
    offset += rest.size();
  }
  return offset;
}

const LlamaTokenizer::ByteTokens& LlamaTokenizer::byte_tokens() const {
  std::call_once(byte_tokens_once_, [this] {
    byte_tokens_.fill(-1);
    const std::int32_t n_vocab = llama_vocab_n_tokens(vocab_);
    for (Token token = 0; token < n_vocab; ++token) {
      const std::string bytes = piece(token, false);
      if (bytes.size() != 1) continue;
      Token& slot = byte_tokens_[static_cast<unsigned char>(bytes[0])];
      // Where a character has a token of its own, that is the one a model has seen most.
      const bool is_byte = (llama_vocab_get_attr(vocab_, token) & LLAMA_TOKEN_ATTR_BYTE) != 0;
      if (slot < 0 || !is_byte) slot = token;
    }
  });
  return byte_tokens_;
}

}  // namespace batchcore
