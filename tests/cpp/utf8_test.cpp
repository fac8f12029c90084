#include "engine/utf8.h"

#include <doctest/doctest.h>

#include <cstdint>
#include <map>
#include <random>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "core/vocab.h"
#include "engine/detokenizer.h"

namespace batchcore {
namespace {

using std::string_view_literals::operator""sv;

std::string decode(const std::vector<std::string_view>& pieces) {
  Utf8Stream stream;
  std::string out;
  for (const std::string_view piece : pieces) stream.push(piece, out);
  stream.finish(out);
  return out;
}

std::string encode(std::uint32_t code) {
  const auto byte = [](std::uint32_t value) { return static_cast<char>(value); };
  const auto tail = [&](int shift) { return byte(0x80 | (code >> shift & 0x3F)); };
  if (code < 0x80) return {byte(code)};
  if (code < 0x800) return {byte(0xC0 | code >> 6), tail(0)};
  if (code < 0x10000) return {byte(0xE0 | code >> 12), tail(6), tail(0)};
  return {byte(0xF0 | code >> 18), tail(12), tail(6), tail(0)};
}

// Every proper beginning of every character, with that character's length: made by encoding them
// all (the last byte doesn't matter), where the decoder goes by ranges of bytes.
const std::map<std::string, std::size_t>& beginnings() {
  static const auto map = [] {
    std::map<std::string, std::size_t> result;
    for (std::uint32_t code = 0x80; code < 0x110000; code += 0x40) {
      if (code >= 0xD800 && code < 0xE000) continue;
      const std::string whole = encode(code);
      for (std::size_t n = 1; n < whole.size(); ++n) result[whole.substr(0, n)] = whole.size();
    }
    return result;
  }();
  return map;
}

std::string reference(const std::string& bytes) {
  std::string out;
  for (std::size_t at = 0; at < bytes.size();) {
    if (static_cast<unsigned char>(bytes[at]) < 0x80) {
      out += bytes[at++];
      continue;
    }
    std::size_t length = 0;
    while (at + length < bytes.size() && beginnings().contains(bytes.substr(at, length + 1))) {
      ++length;
    }
    const std::size_t next = at + length;
    if (length > 0 && beginnings().at(bytes.substr(at, length)) == length + 1 &&
        next < bytes.size() && is_utf8_continuation(bytes[next])) {
      out += bytes.substr(at, length + 1);
      at = next + 1;
    } else {
      out += kReplacementCharacter;
      at += length > 0 ? length : 1;
    }
  }
  return out;
}

// What bytes.decode(errors="replace") of Python 3 makes of each.
const std::vector<std::pair<std::string_view, std::string_view>> kVectors = {
    {"\x70\x6C\x61\x69\x6E"sv, "\x70\x6C\x61\x69\x6E"sv},
    {"\x68\xC3\xA9\x6C\x6C\x6F\x20\xE2\x82\xAC\x75\x72\x6F\x20\xF0\x9F\x8E\x88"sv,
     "\x68\xC3\xA9\x6C\x6C\x6F\x20\xE2\x82\xAC\x75\x72\x6F\x20\xF0\x9F\x8E\x88"sv},
    {"\xFF"sv, "\xEF\xBF\xBD"sv},
    {"\xC0\x80"sv, "\xEF\xBF\xBD\xEF\xBF\xBD"sv},
    {"\xC1\xBF"sv, "\xEF\xBF\xBD\xEF\xBF\xBD"sv},
    {"\xE0\x80\x80"sv, "\xEF\xBF\xBD\xEF\xBF\xBD\xEF\xBF\xBD"sv},
    {"\xE0\x9F\xBF"sv, "\xEF\xBF\xBD\xEF\xBF\xBD\xEF\xBF\xBD"sv},
    {"\xE0\xA0\x80"sv, "\xE0\xA0\x80"sv},
    {"\xED\x9F\xBF"sv, "\xED\x9F\xBF"sv},
    {"\xED\xA0\x80"sv, "\xEF\xBF\xBD\xEF\xBF\xBD\xEF\xBF\xBD"sv},
    {"\xED\xBF\xBF"sv, "\xEF\xBF\xBD\xEF\xBF\xBD\xEF\xBF\xBD"sv},
    {"\xEE\x80\x80"sv, "\xEE\x80\x80"sv},
    {"\xF0\x80\x80\x80"sv, "\xEF\xBF\xBD\xEF\xBF\xBD\xEF\xBF\xBD\xEF\xBF\xBD"sv},
    {"\xF0\x8F\xBF\xBF"sv, "\xEF\xBF\xBD\xEF\xBF\xBD\xEF\xBF\xBD\xEF\xBF\xBD"sv},
    {"\xF0\x90\x80\x80"sv, "\xF0\x90\x80\x80"sv},
    {"\xF4\x8F\xBF\xBF"sv, "\xF4\x8F\xBF\xBF"sv},
    {"\xF4\x90\x80\x80"sv, "\xEF\xBF\xBD\xEF\xBF\xBD\xEF\xBF\xBD\xEF\xBF\xBD"sv},
    {"\xF5\x80\x80\x80"sv, "\xEF\xBF\xBD\xEF\xBF\xBD\xEF\xBF\xBD\xEF\xBF\xBD"sv},
    {"\xF0\x90\x41"sv, "\xEF\xBF\xBD\x41"sv},
    {"\xF0\x90\x80\x41"sv, "\xEF\xBF\xBD\x41"sv},
    {"\xE2\x82\x41"sv, "\xEF\xBF\xBD\x41"sv},
    {"\xE2\x82"sv, "\xEF\xBF\xBD"sv},
    {"\xF0\x9F\x8E"sv, "\xEF\xBF\xBD"sv},
    {"\xF0\x9F"sv, "\xEF\xBF\xBD"sv},
    {"\xF0"sv, "\xEF\xBF\xBD"sv},
    {"\xE2\xE2\x82\xAC"sv, "\xEF\xBF\xBD\xE2\x82\xAC"sv},
    {"\xF0\x9F\x8E\xF0\x9F\x8E\x88"sv, "\xEF\xBF\xBD\xF0\x9F\x8E\x88"sv},
    {"\x80\xBF\x41\xC3"sv, "\xEF\xBF\xBD\xEF\xBF\xBD\x41\xEF\xBF\xBD"sv},
    {"\xC3\xC3\xA9"sv, "\xEF\xBF\xBD\xC3\xA9"sv},
    {"\xF8\x88\x80\x80\x80"sv, "\xEF\xBF\xBD\xEF\xBF\xBD\xEF\xBF\xBD\xEF\xBF\xBD\xEF\xBF\xBD"sv},
    {"\xFE\xFF"sv, "\xEF\xBF\xBD\xEF\xBF\xBD"sv},
    {"\x41\xC3\x28\x42"sv, "\x41\xEF\xBF\xBD\x28\x42"sv},
    {"\x61\xF1\x80\x80\xE1\x80\xC2\x62\x80\x63\x80\xBF\x64"sv,
     "\x61\xEF\xBF\xBD\xEF\xBF\xBD\xEF\xBF\xBD\x62\xEF\xBF\xBD\x63\xEF\xBF\xBD\xEF\xBF\xBD\x64"sv},
    {"\x61\x00\x62"sv, "\x61\x00\x62"sv},
};

TEST_CASE("utf8: bytes become what Python's errors=replace makes of them") {
  for (const auto& [bytes, text] : kVectors) {
    CHECK(decode({bytes}) == text);
    CHECK(reference(std::string(bytes)) == text);
  }
}

TEST_CASE("utf8: the result doesn't depend on where the bytes are split") {
  for (const auto& [bytes, text] : kVectors) {
    for (std::size_t i = 0; i <= bytes.size(); ++i) {
      for (std::size_t j = i; j <= bytes.size(); ++j) {
        CHECK(decode({bytes.substr(0, i), bytes.substr(i, j - i), bytes.substr(j)}) == text);
      }
    }
    std::vector<std::string_view> single;
    for (std::size_t i = 0; i < bytes.size(); ++i) single.push_back(bytes.substr(i, 1));
    CHECK(decode(single) == text);
  }
}

TEST_CASE("utf8: every character passes unchanged, byte by byte") {
  std::string all;
  for (std::uint32_t code = 0; code < 0x110000; code += code < 0x3000 ? 1 : 37) {
    if (code < 0xD800 || code >= 0xE000) all += encode(code);
  }
  Utf8Stream stream;
  std::string out;
  for (const char byte : all) stream.push({&byte, 1}, out);
  CHECK(out == all);
  CHECK(decode({all}) == all);
}

TEST_CASE(
    "utf8: random bytes in random pieces match the reference, and never is half a character out") {
  std::mt19937 random(7);
  const std::string_view likely =
      "\xE2\x82\xAC\xF0\x9F\x8E\x88\xED\xA0\x80\xF4\x8F\x90\xC3\xA9\xE0 a"sv;
  for (int round = 0; round < 20000; ++round) {
    std::string bytes;
    for (std::size_t n = random() % 12; n > 0; --n) {
      bytes +=
          random() % 4 == 0 ? static_cast<char>(random() & 0xFF) : likely[random() % likely.size()];
    }
    const std::string expected = reference(bytes);
    Utf8Stream stream;
    std::string out;
    for (std::size_t at = 0; at < bytes.size();) {
      const std::size_t count = 1 + random() % 5;
      stream.push(std::string_view(bytes).substr(at, count), out);
      at += count;
      REQUIRE(reference(out) == out);
      REQUIRE(expected.starts_with(out));
    }
    stream.finish(out);
    REQUIRE(out == expected);
  }
}

TEST_CASE("utf8: at most three bytes are held back") {
  Utf8Stream stream;
  std::string out;
  stream.push("\xF0\x9F\x8E", out);
  CHECK(out.empty());
  stream.push("x", out);
  CHECK(out == "\xEF\xBF\xBDx");
  out.clear();
  stream.push("\xC3", out);
  stream.finish(out);
  stream.finish(out);
  CHECK(out == kReplacementCharacter);
  stream.push("\xA9", out);  // a finished stream remembers nothing
  CHECK(out == "\xEF\xBF\xBD\xEF\xBF\xBD");
}

TEST_CASE("detokenizer: byte-level pieces join to characters") {
  Vocab vocab;
  for (const auto piece : {"a"sv, "\xF0\x9F"sv, "\x8E"sv, "\x88 "sv, ""sv, "\xE2\x82"sv}) {
    vocab.add_piece(piece);
  }
  Detokenizer detokenizer(vocab);
  const auto text_of = [&](Token token) {
    std::string out;
    detokenizer.push(token, out);
    return out;
  };
  CHECK(text_of(0) == "a");
  CHECK(text_of(1).empty());
  CHECK(text_of(4).empty());
  CHECK(text_of(2).empty());
  CHECK(text_of(3) == "\xF0\x9F\x8E\x88 ");
  CHECK(text_of(-1).empty());
  CHECK(text_of(6).empty());
  CHECK(text_of(5).empty());
  CHECK(text_of(0) ==
        "\xEF\xBF\xBD"
        "a");
  CHECK(text_of(1).empty());
  std::string tail;
  detokenizer.finish(tail);
  CHECK(tail == kReplacementCharacter);
}

}  // namespace
}  // namespace batchcore
