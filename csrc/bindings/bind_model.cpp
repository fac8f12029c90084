#include <pybind11/functional.h>
#include <pybind11/stl.h>

#include <chrono>
#include <exception>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "bindings/bindings.h"
#include "core/errors.h"
#include "llama/llama_model.h"
#include "llama/llama_tokenizer.h"

namespace batchcore::python {
namespace {

SplitMode split_mode(const std::string& name) {
  static const std::map<std::string, SplitMode> modes = {
      {"none", SplitMode::kNone}, {"layer", SplitMode::kLayer}, {"row", SplitMode::kRow}};
  if (const auto found = modes.find(name); found != modes.end()) return found->second;
  throw ConfigError("split_mode must be none, layer or row, not '" + name + "'");
}

bool uses_kernels(const std::string& name) {
  if (name == "auto" || name == "ggml") return name == "auto";
  throw ConfigError("kernels must be auto or ggml, not '" + name + "'");
}

const char* memory_kind_name(MemoryKind kind) {
  switch (kind) {
    case MemoryKind::kNone:
      return "none";
    case MemoryKind::kAttention:
      return "attention";
    case MemoryKind::kSlidingWindow:
      return "sliding_window";
    case MemoryKind::kRecurrent:
      return "recurrent";
    case MemoryKind::kHybrid:
      return "hybrid";
  }
  return "none";
}

// llama.cpp reports once per tensor; taking the GIL each time would slow the load of small ones.
class ProgressReporter {
 public:
  explicit ProgressReporter(py::object callback) : callback_(std::move(callback)) {}

  bool operator()(float fraction) {
    using std::chrono::steady_clock;
    const auto now = steady_clock::now();
    const bool first_or_last = fraction <= 0.0F || fraction >= 1.0F;
    if (!first_or_last && now - last_ < std::chrono::milliseconds(20)) return true;
    last_ = now;
    const py::gil_scoped_acquire acquire;
    try {
      if (PyErr_CheckSignals() != 0) throw py::error_already_set();
      return callback_.is_none() || !callback_(fraction).equal(py::bool_(false));
    } catch (...) {
      error_ = std::current_exception();  // llama.cpp must be left by its own way out
      return false;
    }
  }

  void rethrow() const {
    if (error_) std::rethrow_exception(error_);
  }

 private:
  py::object callback_;
  std::chrono::steady_clock::time_point last_;
  std::exception_ptr error_;
};

std::shared_ptr<LlamaModel> load(const std::string& path, std::int32_t n_gpu_layers, bool use_mmap,
                                 bool use_mlock, std::vector<std::string> devices,
                                 const std::string& split, std::int32_t main_gpu,
                                 std::vector<float> tensor_split, bool vocab_only,
                                 bool check_tensors, const std::string& kernels,
                                 py::object progress) {
  ProgressReporter reporter(std::move(progress));
  ModelParams params{
      .path = path,
      .n_gpu_layers = n_gpu_layers,
      .use_mmap = use_mmap,
      .use_mlock = use_mlock,
      .devices = std::move(devices),
      .split_mode = split_mode(split),
      .main_gpu = main_gpu,
      .tensor_split = std::move(tensor_split),
      .vocab_only = vocab_only,
      .check_tensors = check_tensors,
      .use_kernels = uses_kernels(kernels),
      .progress = [&reporter](float fraction) { return reporter(fraction); },
  };
  try {
    const py::gil_scoped_release release;
    return LlamaModel::load(std::move(params));
  } catch (const ModelLoadError&) {
    reporter.rethrow();
    throw;
  }
}

py::object token_or_none(Token token) {
  if (token < 0) return py::none();
  return py::int_(token);
}

py::dict special_tokens(const LlamaModel& model) {
  using namespace py::literals;
  const SpecialTokens tokens = model.special_tokens();
  return py::dict("bos"_a = token_or_none(tokens.bos), "eos"_a = token_or_none(tokens.eos),
                  "eot"_a = token_or_none(tokens.eot), "sep"_a = token_or_none(tokens.sep),
                  "nl"_a = token_or_none(tokens.nl), "pad"_a = token_or_none(tokens.pad),
                  "mask"_a = token_or_none(tokens.mask), "add_bos"_a = tokens.add_bos,
                  "add_eos"_a = tokens.add_eos);
}

// Strings of a file need not be UTF-8.
py::str lenient_str(const std::string& text) {
  return py::reinterpret_steal<py::str>(
      PyUnicode_DecodeUTF8(text.data(), static_cast<py::ssize_t>(text.size()), "replace"));
}

py::dict metadata(const LlamaModel& model) {
  py::dict result;
  for (const auto& [key, value] : model.metadata()) result[lenient_str(key)] = lenient_str(value);
  return result;
}

std::vector<Token> tokenize(const LlamaModel& model, const py::bytes& text, bool add_special,
                            bool parse_special) {
  const std::string_view bytes = text;
  const py::gil_scoped_release release;
  return model.tokenizer().encode(bytes, add_special, parse_special);
}

py::bytes detokenize(const LlamaModel& model, const std::vector<Token>& tokens, bool skip_special) {
  std::string bytes;
  {
    const py::gil_scoped_release release;
    bytes = model.tokenizer().decode(tokens, skip_special);
  }
  return py::bytes(bytes);
}

}  // namespace

void bind_model(py::module_& m) {
  py::class_<LlamaModel, std::shared_ptr<LlamaModel>>(m, "Model",
                                                      "A loaded GGUF model; see batchcore.Model.")
      .def(py::init(&load), py::arg("path"), py::kw_only(), py::arg("n_gpu_layers") = -1,
           py::arg("use_mmap") = true, py::arg("use_mlock") = false,
           py::arg("devices") = std::vector<std::string>(), py::arg("split_mode") = "layer",
           py::arg("main_gpu") = 0, py::arg("tensor_split") = std::vector<float>(),
           py::arg("vocab_only") = false, py::arg("check_tensors") = false,
           py::arg("kernels") = "auto", py::arg("progress") = py::none())
      .def_property_readonly("path", [](const LlamaModel& model) { return model.params().path; })
      .def_property_readonly("kernels", &LlamaModel::kernels)
      .def_property_readonly("description", &LlamaModel::description)
      .def_property_readonly("architecture", &LlamaModel::architecture)
      .def_property_readonly("metadata", &metadata)
      .def_property_readonly("n_params", &LlamaModel::n_params)
      .def_property_readonly("size_bytes", &LlamaModel::size_bytes)
      .def_property_readonly("n_ctx_train", &LlamaModel::n_ctx_train)
      .def_property_readonly("uses_gpu", &LlamaModel::uses_gpu)
      .def_property_readonly("n_embd", &LlamaModel::n_embd)
      .def_property_readonly("n_embd_out", &LlamaModel::n_embd_out)
      .def_property_readonly("n_layer", &LlamaModel::n_layer)
      .def_property_readonly("n_head", &LlamaModel::n_head)
      .def_property_readonly("n_head_kv", &LlamaModel::n_head_kv)
      .def_property_readonly("n_vocab", &LlamaModel::n_vocab)
      .def_property_readonly("n_swa", &LlamaModel::n_swa)
      .def_property_readonly("has_encoder", &LlamaModel::has_encoder)
      .def_property_readonly("has_decoder", &LlamaModel::has_decoder)
      .def_property_readonly("is_recurrent", &LlamaModel::is_recurrent)
      .def_property_readonly("is_hybrid", &LlamaModel::is_hybrid)
      .def_property_readonly("is_diffusion", &LlamaModel::is_diffusion)
      .def_property_readonly(
          "memory_kind",
          [](const LlamaModel& model) { return memory_kind_name(model.memory_kind()); })
      .def_property_readonly("why_no_generation", &LlamaModel::why_no_generation)
      .def_property_readonly("special_tokens", &special_tokens)
      .def_property_readonly("end_of_generation",
                             [](const LlamaModel& model) {
                               const auto tokens = model.vocab()->end_of_generation();
                               return std::vector<Token>(tokens.begin(), tokens.end());
                             })
      .def(
          "chat_template",
          [](const LlamaModel& model, const std::string& name) -> py::object {
            const auto text = model.chat_template(name);
            if (!text) return py::none();
            return lenient_str(*text);
          },
          py::arg("name") = "")
      .def("tokenize", &tokenize, py::arg("text"), py::arg("add_special"), py::arg("parse_special"))
      .def("detokenize", &detokenize, py::arg("tokens"), py::arg("skip_special"))
      .def(
          "token_piece",
          [](const LlamaModel& model, Token token, bool special) {
            return py::bytes(model.tokenizer().piece(token, special));
          },
          py::arg("token"), py::arg("special"));
}

}  // namespace batchcore::python
