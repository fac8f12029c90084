#include "llama/llama_model.h"

#include <ggml-backend.h>
#include <llama.h>

#include <algorithm>
#include <array>
#include <climits>
#include <cstddef>
#include <exception>
#include <filesystem>
#include <fstream>
#include <string_view>
#include <system_error>

#include "core/errors.h"
#include "kernels/seam.h"
#include "llama/cpu_count.h"
#include "llama/llama_log.h"
#include "llama/llama_tokenizer.h"
#include "llama/memory_guard.h"

namespace batchcore {
namespace {

// Architectures that llama.cpp gives no memory (its create_memory() returns null for them) beside
// the diffusion ones, which it has a function for.
constexpr std::array<std::string_view, 12> kWithoutMemory = {
    "bert",      "modern-bert",      "nomic-bert",      "nomic-bert-moe",
    "neo-bert",  "jina-bert-v2",     "jina-bert-v3",    "eurobert",
    "t5encoder", "wavtokenizer-dec", "gemma-embedding", "clip"};

// Architectures with a learned table of positions: beyond it, a lookup aborts the process.
constexpr std::array<std::string_view, 4> kPositionTable = {"gpt2", "starcoder", "bert", "mpt"};

template <std::size_t N>
bool contains(const std::array<std::string_view, N>& names, std::string_view name) {
  return std::find(names.begin(), names.end(), name) != names.end();
}

// llama.cpp's words for these depend on the platform; ours say what to do.
void check_file(const std::string& path) {
  namespace fs = std::filesystem;
  std::error_code error;
  const fs::file_status status = fs::status(path, error);
  if (path.empty() || !fs::exists(status)) {
    throw ModelLoadError("no such model file: '" + path + "'");
  }
  if (fs::is_directory(status)) {
    throw ModelLoadError("'" + path + "' is a directory; give the path of a .gguf file in it");
  }
  std::ifstream file(path, std::ios::binary);
  std::array<char, 4> magic{};
  if (!file) throw ModelLoadError("'" + path + "' can't be opened for reading");
  if (!file.read(magic.data(), magic.size()) ||
      std::string_view(magic.data(), magic.size()) != "GGUF") {
    throw ModelLoadError("'" + path + "' is not a GGUF file (it does not begin with \"GGUF\")");
  }
}

llama_load_mode load_mode(const ModelParams& params) {
  // Repacked weights are a copy: pages of the file that stayed mapped would be memory twice.
  if (params.use_kernels) return params.use_mlock ? LLAMA_LOAD_MODE_MLOCK : LLAMA_LOAD_MODE_NONE;
  if (params.use_mlock) {
    return params.use_mmap ? LLAMA_LOAD_MODE_MMAP_MLOCK : LLAMA_LOAD_MODE_MLOCK;
  }
  return params.use_mmap ? LLAMA_LOAD_MODE_AUTO : LLAMA_LOAD_MODE_NONE;
}

llama_split_mode split_mode(SplitMode mode) {
  switch (mode) {
    case SplitMode::kNone:
      return LLAMA_SPLIT_MODE_NONE;
    case SplitMode::kLayer:
      return LLAMA_SPLIT_MODE_LAYER;
    case SplitMode::kRow:
      return LLAMA_SPLIT_MODE_ROW;
  }
  return LLAMA_SPLIT_MODE_LAYER;
}

// Null-terminated, as llama.cpp wants it. The CPU is always used besides, so naming it alone means
// no GPU.
std::vector<ggml_backend_dev_t> find_devices(const std::vector<std::string>& names) {
  std::vector<ggml_backend_dev_t> devices;
  for (const std::string& name : names) {
    ggml_backend_dev_t device = ggml_backend_dev_by_name(name.c_str());
    if (device == nullptr) {
      std::string known;
      for (std::size_t i = 0; i < ggml_backend_dev_count(); ++i) {
        known += (known.empty() ? "" : ", ") +
                 std::string(ggml_backend_dev_name(ggml_backend_dev_get(i)));
      }
      throw ConfigError("there is no device '" + name + "'; this build and machine have " + known);
    }
    const auto type = ggml_backend_dev_type(device);
    if (type == GGML_BACKEND_DEVICE_TYPE_CPU || type == GGML_BACKEND_DEVICE_TYPE_ACCEL) continue;
    devices.push_back(device);
  }
  devices.push_back(nullptr);
  return devices;
}

struct Progress {
  const std::function<bool(float)>* callback;
  bool cancelled = false;
};

bool on_progress(float fraction, void* user_data) {
  auto* progress = static_cast<Progress*>(user_data);
  if (*progress->callback && !(*progress->callback)(fraction)) progress->cancelled = true;
  return !progress->cancelled;
}

// Calls one of llama.cpp's "fill this buffer, return the length" functions.
template <typename Fill>
std::string fill_string(Fill fill) {
  std::string text(256, '\0');
  std::int32_t size = fill(text.data(), text.size());
  if (size >= static_cast<std::int32_t>(text.size())) {
    text.resize(static_cast<std::size_t>(size) + 1);
    size = fill(text.data(), text.size());
  }
  text.resize(static_cast<std::size_t>(std::max(size, 0)));
  return text;
}

}  // namespace

std::shared_ptr<LlamaModel> LlamaModel::load(ModelParams params) {
  init_llama();
  check_file(params.path);
  if (params.tensor_split.size() > llama_max_devices()) {
    throw ConfigError("tensor_split has more entries than llama.cpp supports devices (" +
                      std::to_string(llama_max_devices()) + ")");
  }
  if (!params.tensor_split.empty()) params.tensor_split.resize(llama_max_devices(), 0.0F);
  std::vector<ggml_backend_dev_t> devices = find_devices(params.devices);
  Progress progress{.callback = &params.progress};

  llama_model_params raw = llama_model_default_params();
  raw.devices = params.devices.empty() ? nullptr : devices.data();
  raw.n_gpu_layers = params.n_gpu_layers;
  raw.split_mode = split_mode(params.split_mode);
  raw.main_gpu = params.main_gpu;
  raw.tensor_split = params.tensor_split.empty() ? nullptr : params.tensor_split.data();
  raw.progress_callback = &on_progress;
  raw.progress_callback_user_data = &progress;
  raw.vocab_only = params.vocab_only;
  raw.check_tensors = params.check_tensors;

  params.use_kernels = params.use_kernels && !params.vocab_only && kernels::is_available();

  const LogCapture capture;
  llama_model* model = nullptr;
  std::string reason;
  const auto load_weights = [&](bool use_kernels) {
    const kernels::LoadScope scope(use_kernels, usable_cores(), available_host_bytes(),
                                   params.use_mlock);
    raw.load_mode = load_mode(params);
    reason.clear();
    try {
      model = llama_model_load_from_file(params.path.c_str(), raw);
    } catch (const std::exception& error) {
      reason = error.what();
    }
    const std::string why = reason.empty() ? capture.reason() : reason;
    return scope.ran_out_of_memory() || why.find("alloc") != std::string::npos;
  };
  const bool lacked_memory = load_weights(params.use_kernels);
  // Repacked weights need memory of their own; ggml's kernels can do with the mapped file.
  if (model == nullptr && lacked_memory && params.use_kernels && !progress.cancelled) {
    params.use_kernels = false;  // the log says why
    load_weights(false);
  }
  if (model == nullptr) {
    if (progress.cancelled) throw ModelLoadError("loading '" + params.path + "' was cancelled");
    if (reason.empty()) reason = capture.reason();
    if (reason.empty()) reason = "llama.cpp gave no reason";
    throw ModelLoadError("'" + params.path + "' can't be loaded: " + reason);
  }
  params.progress = nullptr;  // it may hold what the caller wants freed
  return std::shared_ptr<LlamaModel>(new LlamaModel(std::move(params), model));
}

LlamaModel::LlamaModel(ModelParams params, llama_model* model)
    : params_(std::move(params)), model_(model) {
  try {
    if (llama_vocab_type(vocab_handle()) != LLAMA_VOCAB_TYPE_NONE) {
      tokenizer_ = std::make_unique<LlamaTokenizer>(vocab_handle());
    }
  } catch (...) {
    llama_model_free(model_);
    throw;
  }
}

LlamaModel::~LlamaModel() { llama_model_free(model_); }

const llama_vocab* LlamaModel::vocab_handle() const { return llama_model_get_vocab(model_); }

const LlamaTokenizer& LlamaModel::tokenizer() const {
  if (tokenizer_ == nullptr) throw InvalidRequestError("this model has no vocabulary");
  return *tokenizer_;
}

std::string LlamaModel::description() const {
  return fill_string(
      [this](char* text, std::size_t size) { return llama_model_desc(model_, text, size); });
}

std::string LlamaModel::architecture() const {
  return fill_string([this](char* text, std::size_t size) {
    return llama_model_meta_val_str(model_, "general.architecture", text, size);
  });
}

std::map<std::string, std::string> LlamaModel::metadata() const {
  std::map<std::string, std::string> result;
  for (std::int32_t i = 0; i < llama_model_meta_count(model_); ++i) {
    std::string key = fill_string([this, i](char* text, std::size_t size) {
      return llama_model_meta_key_by_index(model_, i, text, size);
    });
    result[std::move(key)] = fill_string([this, i](char* text, std::size_t size) {
      return llama_model_meta_val_str_by_index(model_, i, text, size);
    });
  }
  return result;
}

std::uint64_t LlamaModel::n_params() const { return llama_model_n_params(model_); }
std::uint64_t LlamaModel::size_bytes() const { return llama_model_size(model_); }
std::int32_t LlamaModel::n_ctx_train() const { return llama_model_n_ctx_train(model_); }
std::int32_t LlamaModel::n_embd() const { return llama_model_n_embd(model_); }
std::int32_t LlamaModel::n_embd_out() const { return llama_model_n_embd_out(model_); }
std::int32_t LlamaModel::n_layer() const { return llama_model_n_layer(model_); }
std::int32_t LlamaModel::n_head() const { return llama_model_n_head(model_); }
std::int32_t LlamaModel::n_head_kv() const { return llama_model_n_head_kv(model_); }
std::int32_t LlamaModel::n_vocab() const { return llama_vocab_n_tokens(vocab_handle()); }
std::int32_t LlamaModel::n_swa() const { return llama_model_n_swa(model_); }
bool LlamaModel::has_encoder() const { return llama_model_has_encoder(model_); }
bool LlamaModel::has_decoder() const { return llama_model_has_decoder(model_); }
bool LlamaModel::is_recurrent() const { return llama_model_is_recurrent(model_); }
bool LlamaModel::is_hybrid() const { return llama_model_is_hybrid(model_); }
bool LlamaModel::is_diffusion() const { return llama_model_is_diffusion(model_); }

std::string LlamaModel::kernels() const {
  return uses_kernels() ? batchcore::kernels::active_name() : "ggml";
}

bool LlamaModel::uses_gpu() const {
  if (params_.n_gpu_layers == 0) return false;
  for (std::size_t i = 0; i < ggml_backend_dev_count(); ++i) {
    const auto type = ggml_backend_dev_type(ggml_backend_dev_get(i));
    if (type == GGML_BACKEND_DEVICE_TYPE_GPU || type == GGML_BACKEND_DEVICE_TYPE_IGPU) return true;
  }
  return false;
}

MemoryKind LlamaModel::memory_kind() const {
  if (is_diffusion() || contains(kWithoutMemory, architecture())) return MemoryKind::kNone;
  if (is_recurrent()) return MemoryKind::kRecurrent;
  if (is_hybrid()) return MemoryKind::kHybrid;
  return n_swa() > 0 ? MemoryKind::kSlidingWindow : MemoryKind::kAttention;
}

Position LlamaModel::position_limit() const {
  return contains(kPositionTable, architecture()) ? n_ctx_train() : INT32_MAX;
}

std::string LlamaModel::why_no_generation() const {
  const std::string kind = "a model of architecture '" + architecture() + "' ";
  if (params_.vocab_only) return "the model was loaded with vocab_only, without its weights";
  if (is_diffusion()) return kind + "makes text by diffusion, not token by token";
  if (!has_decoder()) return kind + "is an encoder: it makes embeddings, not text";
  if (has_encoder()) {
    return kind +
           "has an encoder and a decoder; llama.cpp keeps one encoder output per context, so its "
           "requests can't be batched";
  }
  if (memory_kind() == MemoryKind::kNone) return kind + "makes embeddings, not text";
  if (tokenizer_ == nullptr) return "the model has no vocabulary";
  return {};
}

SpecialTokens LlamaModel::special_tokens() const {
  const llama_vocab* vocab = vocab_handle();
  return {
      .bos = llama_vocab_bos(vocab),
      .eos = llama_vocab_eos(vocab),
      .eot = llama_vocab_eot(vocab),
      .sep = llama_vocab_sep(vocab),
      .nl = llama_vocab_nl(vocab),
      .pad = llama_vocab_pad(vocab),
      .mask = llama_vocab_mask(vocab),
      .add_bos = llama_vocab_get_add_bos(vocab),
      .add_eos = llama_vocab_get_add_eos(vocab),
  };
}

std::optional<std::string> LlamaModel::chat_template(const std::string& name) const {
  const char* text = llama_model_chat_template(model_, name.empty() ? nullptr : name.c_str());
  if (text == nullptr) return std::nullopt;
  return text;
}

std::shared_ptr<const Vocab> LlamaModel::vocab() const {
  std::call_once(vocab_once_, [this] {
    const LlamaTokenizer& pieces = tokenizer();
    auto vocab = std::make_shared<Vocab>();
    for (Token token = 0; token < n_vocab(); ++token) {
      vocab->add_piece(pieces.piece(token, false));
      if (llama_vocab_is_eog(vocab_handle(), token)) vocab->add_end_of_generation(token);
    }
    vocab_ = std::move(vocab);
  });
  return vocab_;
}

}  // namespace batchcore
