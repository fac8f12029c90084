// Greedy generation straight through llama.h, one JSON object per prompt on stdout: the reference
// that batchcore's own output is compared with. It decodes as llama-completion does (the prompt in
// one batch, then one token at a time, flash attention auto, f16 cache) but prints token ids and
// margins, which none of llama.cpp's tools does for tokens that end in the middle of a character.
//
// usage: reference_tokens MODEL N_PREDICT PROMPT_FILE...
//
// With llama.cpp built in $B (static libraries) from source $L:
//   g++ -O2 -std=c++17 -I$L/include -I$L/ggml/include tests/tools/reference_tokens.cpp -o
//   reference_tokens
//       $B/src/libllama.a $B/ggml/src/libggml.a $B/ggml/src/libggml-cpu.a
//       $B/ggml/src/libggml-base.a -fopenmp -lpthread -ldl
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <string>
#include <utility>
#include <vector>

#include "llama.h"

namespace {

struct Step {
  llama_token token = 0;
  llama_token runner_up = 0;
  double logprob = 0;
  double margin = 0;
};

Step Greedy(const float* logits, int n_vocab) {
  int best = 0;
  int second = 1;
  if (logits[second] > logits[best]) std::swap(best, second);
  for (int i = 2; i < n_vocab; ++i) {
    if (logits[i] > logits[best]) {
      second = best;
      best = i;
    } else if (logits[i] > logits[second]) {
      second = i;
    }
  }
  double sum = 0;
  for (int i = 0; i < n_vocab; ++i) sum += std::exp(double(logits[i]) - logits[best]);
  return {best, second, -std::log(sum), double(logits[best]) - logits[second]};
}

template <typename T, typename Get>
void PrintArray(const char* key, const std::vector<T>& items, const char* format, Get get) {
  std::printf("\"%s\": [", key);
  for (size_t i = 0; i < items.size(); ++i) {
    if (i != 0) std::printf(", ");
    std::printf(format, get(items[i]));
  }
  std::printf("]");
}

bool Generate(llama_context* ctx, const llama_vocab* vocab, const std::string& text,
              int n_predict) {
  std::vector<llama_token> prompt(text.size() + 8);
  const int n =
      llama_tokenize(vocab, text.data(), int(text.size()), prompt.data(), int(prompt.size()),
                     /*add_special=*/true, /*parse_special=*/false);
  if (n <= 0) return false;
  prompt.resize(n);
  llama_memory_clear(llama_get_memory(ctx), true);

  std::vector<Step> steps;
  bool end_of_generation = false;
  std::vector<llama_token> input = prompt;
  while (int(steps.size()) < n_predict && !end_of_generation) {
    if (llama_decode(ctx, llama_batch_get_one(input.data(), int(input.size()))) != 0) return false;
    steps.push_back(Greedy(llama_get_logits_ith(ctx, -1), llama_vocab_n_tokens(vocab)));
    end_of_generation = llama_vocab_is_eog(vocab, steps.back().token);
    input = {steps.back().token};
  }

  std::printf("{");
  PrintArray("prompt_token_ids", prompt, "%d", [](llama_token t) { return t; });
  std::printf(", ");
  PrintArray("token_ids", steps, "%d", [](const Step& s) { return s.token; });
  std::printf(", ");
  PrintArray("runner_up_ids", steps, "%d", [](const Step& s) { return s.runner_up; });
  std::printf(", ");
  PrintArray("logprobs", steps, "%.5f", [](const Step& s) { return s.logprob; });
  std::printf(", ");
  PrintArray("margins", steps, "%.5f", [](const Step& s) { return s.margin; });
  std::printf(", \"finish_reason\": \"%s\", \"text_hex\": \"",
              end_of_generation ? "stop" : "length");
  for (size_t i = 0; i + (end_of_generation ? 1 : 0) < steps.size(); ++i) {
    char piece[256];
    const int size = llama_token_to_piece(vocab, steps[i].token, piece, sizeof(piece), 0, false);
    for (int j = 0; j < size; ++j) std::printf("%02x", static_cast<unsigned char>(piece[j]));
  }
  std::printf("\"}\n");
  return true;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 4) {
    std::fprintf(stderr, "usage: %s MODEL N_PREDICT PROMPT_FILE...\n", argv[0]);
    return 2;
  }
  llama_log_set([](ggml_log_level, const char*, void*) {}, nullptr);
  llama_backend_init();
  llama_model* model = llama_model_load_from_file(argv[1], llama_model_default_params());
  if (model == nullptr) return 1;
  llama_context_params params = llama_context_default_params();
  params.n_ctx = 2048;
  params.n_batch = 2048;
  params.n_ubatch = 512;
  params.n_threads = 2;
  params.n_threads_batch = 2;
  params.swa_full = false;
  llama_context* ctx = llama_init_from_model(model, params);
  if (ctx == nullptr) return 1;
  for (int i = 3; i < argc; ++i) {
    std::ifstream file(argv[i], std::ios::binary);
    const std::string text((std::istreambuf_iterator<char>(file)),
                           std::istreambuf_iterator<char>());
    if (!Generate(ctx, llama_model_get_vocab(model), text, std::atoi(argv[2]))) return 1;
  }
  llama_free(ctx);
  llama_model_free(model);
  return 0;
}
