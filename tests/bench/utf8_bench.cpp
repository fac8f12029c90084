// From token to text, per token: bytes into whole characters, and with the look-up of the piece and
// four stop strings, all that a token's text costs before it is published.
#include <benchmark/benchmark.h>

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "bench_text.h"
#include "core/vocab.h"
#include "engine/detokenizer.h"
#include "engine/stop_matcher.h"
#include "engine/utf8.h"

namespace {

using namespace batchcore;
using Strings = std::vector<std::string>;

Strings bytes_of(std::string_view text) {
  Strings bytes;
  for (const char byte : text) bytes.emplace_back(1, byte);
  return bytes;
}

void utf8_push(benchmark::State& state, const Strings& pieces) {
  Utf8Stream stream;
  std::string text;
  std::size_t next = 0;
  for (auto _ : state) {
    stream.push(pieces[next], text);
    benchmark::DoNotOptimize(text.data());
    text.clear();
    next = next + 1 == pieces.size() ? 0 : next + 1;
  }
  state.SetItemsProcessed(state.iterations());
  state.SetBytesProcessed(state.iterations() * bench::num_bytes(pieces) /
                          static_cast<std::int64_t>(pieces.size()));
}

BENCHMARK_CAPTURE(utf8_push, ascii, bench::pieces_of(bench::prose(false)));
BENCHMARK_CAPTURE(utf8_push, multibyte, bench::pieces_of(bench::prose(true)));
// A tokenizer that falls back to bytes gives characters in parts.
BENCHMARK_CAPTURE(utf8_push, split_characters, bytes_of(bench::prose(true)));
BENCHMARK_CAPTURE(utf8_push, invalid, Strings(32, "\xFF\xC3\xE2\x82"));
// One call for a long text, to see the decoder without the cost of a call.
BENCHMARK_CAPTURE(utf8_push, ascii_4_kib, {std::string(4096, 'a')});

void token_to_text(benchmark::State& state) {
  const Strings pieces = bench::pieces_of(bench::prose(true));
  Vocab vocab;
  for (const std::string& piece : pieces) vocab.add_piece(piece);
  Detokenizer detokenizer(vocab);
  StopMatcher matcher({"\nUser:", "###", "<|end|>", "STOP"});
  std::string safe;
  Token token = 0;
  for (auto _ : state) {
    std::string text;  // of its own for every token, as in the engine
    detokenizer.push(token, text);
    auto match = matcher.push(text, safe);
    benchmark::DoNotOptimize(match);
    benchmark::DoNotOptimize(safe.data());
    safe.clear();
    token = token + 1 == vocab.size() ? 0 : token + 1;
  }
  state.SetItemsProcessed(state.iterations());
}
BENCHMARK(token_to_text);

}  // namespace
