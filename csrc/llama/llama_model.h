// A loaded GGUF model: weights, metadata, vocabulary. Immutable once loaded, so every method may be
// called from any thread; shared by the engines and contexts that run it.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "core/types.h"
#include "core/vocab.h"

struct llama_model;
struct llama_vocab;

namespace batchcore {

class LlamaTokenizer;

/// How a model's weights are spread over several GPUs.
enum class SplitMode {
  kNone,   ///< all on `main_gpu`
  kLayer,  ///< whole layers (and their KV) per GPU: the default, no traffic inside a layer
  kRow,    ///< rows of the matrices: less memory per GPU, traffic in every layer
};

/// How to load a model. Names are llama.cpp's where it has one.
struct ModelParams {
  std::string path;
  std::int32_t n_gpu_layers = -1;    ///< layers in GPU memory, negative = all
  bool use_mmap = true;              ///< map the file where that is of use; false reads it
  bool use_mlock = false;            ///< keep the weights from being swapped out
  std::vector<std::string> devices;  ///< ggml device names; empty = every GPU
  SplitMode split_mode = SplitMode::kLayer;
  std::int32_t main_gpu = 0;        ///< index into the devices, for kNone
  std::vector<float> tensor_split;  ///< share per device, empty = by free memory
  bool vocab_only = false;          ///< no weights: tokenising only
  bool check_tensors = false;       ///< look for NaNs and bad blocks while loading
  /// Keep the weights on the CPU in the layout of batchcore's kernels, where this CPU has them.
  bool use_kernels = true;
  /// Called on the loading thread with 0..1; false cancels the load. May be empty.
  std::function<bool(float)> progress;
};

/// Tokens with a meaning of their own; -1 where a vocabulary has none.
struct SpecialTokens {
  Token bos = -1;
  Token eos = -1;
  Token eot = -1;
  Token sep = -1;
  Token nl = -1;
  Token pad = -1;
  Token mask = -1;
  bool add_bos = false;  ///< tokenize(add_special) puts bos in front
  bool add_eos = false;  ///< tokenize(add_special) puts eos at the end
};

class LlamaModel {
 public:
  /// Reads the file. Throws ModelLoadError with llama.cpp's reason, ConfigError for parameters that
  /// can't work.
  static std::shared_ptr<LlamaModel> load(ModelParams params);

  ~LlamaModel();
  LlamaModel(const LlamaModel&) = delete;
  LlamaModel& operator=(const LlamaModel&) = delete;

  [[nodiscard]] const ModelParams& params() const { return params_; }

  [[nodiscard]] std::string description() const;   ///< e.g. "llama 135M Q4_1"
  [[nodiscard]] std::string architecture() const;  ///< GGUF's general.architecture
  [[nodiscard]] std::map<std::string, std::string> metadata() const;  ///< scalars as text
  [[nodiscard]] std::uint64_t n_params() const;
  [[nodiscard]] std::uint64_t size_bytes() const;  ///< of all tensors
  [[nodiscard]] std::int32_t n_ctx_train() const;
  [[nodiscard]] std::int32_t n_embd() const;
  [[nodiscard]] std::int32_t n_embd_out() const;  ///< width of an output embedding
  [[nodiscard]] std::int32_t n_layer() const;
  [[nodiscard]] std::int32_t n_head() const;
  [[nodiscard]] std::int32_t n_head_kv() const;
  [[nodiscard]] std::int32_t n_vocab() const;
  [[nodiscard]] std::int32_t n_swa() const;  ///< sliding window in tokens, 0 = none
  [[nodiscard]] bool has_encoder() const;
  [[nodiscard]] bool has_decoder() const;
  [[nodiscard]] bool is_recurrent() const;
  [[nodiscard]] bool is_hybrid() const;
  [[nodiscard]] bool is_diffusion() const;
  [[nodiscard]] MemoryKind memory_kind() const;

  /// Whether batchcore's kernels compute this model's products and attention on the CPU.
  [[nodiscard]] bool uses_kernels() const { return params_.use_kernels; }

  /// Instruction set of those kernels, "ggml" where they are not used.
  [[nodiscard]] std::string kernels() const;

  /// Whether layers are in GPU memory.
  [[nodiscard]] bool uses_gpu() const;

  /// First position that a learned position table has no entry for; INT32_MAX where there is none.
  [[nodiscard]] Position position_limit() const;

  /// Why this model can't generate text token by token; empty where it can.
  [[nodiscard]] std::string why_no_generation() const;

  [[nodiscard]] SpecialTokens special_tokens() const;

  /// The chat template in the file, or the named one of several.
  [[nodiscard]] std::optional<std::string> chat_template(const std::string& name = {}) const;

  /// Throws InvalidRequestError where the model has no vocabulary.
  [[nodiscard]] const LlamaTokenizer& tokenizer() const;

  /// All pieces at once, built at the first call (0.05 s for 262,144 tokens).
  [[nodiscard]] std::shared_ptr<const Vocab> vocab() const;

  /// llama.cpp's own objects, for the other files of this folder.
  [[nodiscard]] llama_model* handle() const { return model_; }
  [[nodiscard]] const llama_vocab* vocab_handle() const;

 private:
  LlamaModel(ModelParams params, llama_model* model);

  ModelParams params_;
  llama_model* model_;
  std::unique_ptr<const LlamaTokenizer> tokenizer_;

  mutable std::once_flag vocab_once_;
  mutable std::shared_ptr<const Vocab> vocab_;
};

}  // namespace batchcore
