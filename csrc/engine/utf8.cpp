#include "engine/utf8.h"

#include <algorithm>

namespace batchcore {
namespace {

struct Lead {
  std::size_t length = 0;           // bytes of the character, 0 where no character starts like this
  unsigned char second_min = 0x80;  // range of its second byte: no overlong forms, no surrogates,
  unsigned char second_max = 0xBF;  // nothing above U+10FFFF
};

Lead classify(unsigned char byte) {
  if (byte < 0x80) return {1};
  if (byte < 0xC2) return {};
  if (byte < 0xE0) return {2};
  if (byte == 0xE0) return {3, 0xA0, 0xBF};
  if (byte == 0xED) return {3, 0x80, 0x9F};
  if (byte < 0xF0) return {3};
  if (byte == 0xF0) return {4, 0x90, 0xBF};
  if (byte < 0xF4) return {4};
  if (byte == 0xF4) return {4, 0x80, 0x8F};
  return {};
}

enum class Outcome { kCharacter, kInvalid, kUnfinished };

struct Scan {
  Outcome outcome;
  std::size_t length;  // bytes of the character, or of the part that can't become one
};

Scan scan(std::string_view bytes) {
  const Lead lead = classify(static_cast<unsigned char>(bytes[0]));
  if (lead.length == 0) return {Outcome::kInvalid, 1};
  const std::size_t available = std::min(lead.length, bytes.size());
  for (std::size_t i = 1; i < available; ++i) {
    const auto byte = static_cast<unsigned char>(bytes[i]);
    const unsigned char min = i == 1 ? lead.second_min : 0x80;
    const unsigned char max = i == 1 ? lead.second_max : 0xBF;
    if (byte < min || byte > max) return {Outcome::kInvalid, i};
  }
  return {available == lead.length ? Outcome::kCharacter : Outcome::kUnfinished, available};
}

}  // namespace

void Utf8Stream::push(std::string_view bytes, std::string& out) {
  // A held part grows byte by byte until it is a character or can't become one. It is valid so far,
  // so a byte that breaks it starts anew and is looked at again.
  while (num_held_ > 0 && !bytes.empty()) {
    char joined[4];
    std::copy_n(held_, num_held_, joined);
    joined[num_held_] = bytes[0];
    const Scan result = scan({joined, num_held_ + 1});
    if (result.outcome == Outcome::kInvalid) {
      out += kReplacementCharacter;
      num_held_ = 0;
      break;
    }
    bytes.remove_prefix(1);
    if (result.outcome == Outcome::kCharacter) {
      out.append(joined, result.length);
      num_held_ = 0;
    } else {
      held_[num_held_] = joined[num_held_];
      ++num_held_;
    }
  }
  std::size_t copied = 0;
  std::size_t at = 0;
  while (at < bytes.size()) {
    const Scan result = scan(bytes.substr(at));
    if (result.outcome == Outcome::kCharacter) {
      at += result.length;
      continue;
    }
    out.append(bytes, copied, at - copied);
    if (result.outcome == Outcome::kUnfinished) {
      num_held_ = bytes.copy(held_, sizeof(held_), at);
      return;
    }
    out += kReplacementCharacter;
    at += result.length;
    copied = at;
  }
  out.append(bytes, copied);
}

void Utf8Stream::finish(std::string& out) {
  if (num_held_ > 0) out += kReplacementCharacter;
  num_held_ = 0;
}

}  // namespace batchcore
