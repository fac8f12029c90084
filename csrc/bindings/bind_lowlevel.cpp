// Context and ResultView of batchcore.lowlevel. The engine does not go through them.
#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "bindings/bindings.h"
#include "bindings/result_view.h"
#include "core/errors.h"
#include "llama/llama_model.h"
#include "llama/low_level.h"

namespace batchcore::python {
namespace {

using Context = LowLevelContext;
using ContextHandle = std::shared_ptr<LowLevelContext>;

template <typename T>
T by_name(const char* option, const std::string& name, const std::map<std::string, T>& values) {
  if (const auto found = values.find(name); found != values.end()) return found->second;
  std::string known;
  for (const auto& [key, value] : values) known += (known.empty() ? "" : ", ") + key;
  throw ConfigError(std::string(option) + " must be one of " + known + ", not '" + name + "'");
}

ContextHandle make_context(const std::shared_ptr<LlamaModel>& model, const py::dict& options) {
  const auto integer = [&](const char* key) { return options[key].cast<std::int32_t>(); };
  const auto text = [&](const char* key) { return options[key].cast<std::string>(); };
  const auto flag = [&](const char* key) { return options[key].cast<bool>(); };
  ContextParams params;
  params.n_ctx = integer("n_ctx");
  params.num_slots = integer("n_seq_max");
  params.n_ubatch = integer("n_ubatch");
  params.n_batch = integer("n_batch");
  params.max_outputs = integer("n_outputs_max");
  params.n_threads = integer("n_threads");
  params.n_threads_batch = integer("n_threads_batch");
  params.layout =
      by_name<KvLayout>("kv_layout", text("kv_layout"),
                        {{"unified", KvLayout::kUnified}, {"streams", KvLayout::kStreams}});
  params.type_k = text("type_k");
  params.type_v = text("type_v");
  params.flash_attn = by_name<FlashAttention>("flash_attn", text("flash_attn"),
                                              {{"auto", FlashAttention::kAuto},
                                               {"off", FlashAttention::kOff},
                                               {"on", FlashAttention::kOn}});
  params.swa_full = flag("swa_full");
  params.offload_kqv = flag("offload_kqv");
  params.op_offload = flag("op_offload");
  params.embeddings = flag("embeddings");
  params.pooling = by_name<Pooling>("pooling", text("pooling"),
                                    {{"model", Pooling::kModel},
                                     {"none", Pooling::kNone},
                                     {"mean", Pooling::kMean},
                                     {"cls", Pooling::kCls},
                                     {"last", Pooling::kLast},
                                     {"rank", Pooling::kRank}});
  params.poll = integer("poll");
  const py::gil_scoped_release release;
  return std::make_shared<LowLevelContext>(model, params);
}

py::object as_array(const ResultView& view, const py::object& dtype, const py::object& copy) {
  const bool must_copy = copy.is(py::bool_(true));
  const py::object array = must_copy ? py::object(view.copy()) : py::object(view.array());
  if (dtype.is_none() || py::dtype::from_args(dtype).equal(py::dtype::of<float>())) return array;
  if (copy.is(py::bool_(false))) {
    throw py::value_error("another dtype than float32 needs a copy");
  }
  return array.attr("astype")(dtype);
}

void bind_view(py::module_& m) {
  py::class_<ResultView>(m, "ResultView",
                         "Rows of llama.cpp's output buffer, readable until the context computes "
                         "again. numpy.asarray() gives a read-only array without a copy; while it "
                         "lives, the context refuses to decode.")
      .def("__array__", &as_array, py::arg("dtype") = py::none(), py::arg("copy") = py::none())
      .def(
          "__getitem__",
          [](const ResultView& view, const py::object& key) -> py::object {
            return view.array().attr("__getitem__")(key);
          },
          py::arg("key"))
      .def("__len__",
           [](const ResultView& view) {
             view.check();
             return view.shape().front();
           })
      .def_property_readonly("shape",
                             [](const ResultView& view) {
                               view.check();
                               return py::tuple(py::cast(view.shape()));
                             })
      .def(
          "argmax",
          [](const ResultView& view) -> py::object {
            const py::object result = view.array().attr("argmax")(py::arg("axis") = -1);
            if (view.shape().size() == 1) return py::int_(result);
            return result;
          },
          "Index of the largest value: an int of one row, an array of several.")
      .def("copy", &ResultView::copy, "An array of its own, to keep.");
}

using Release = py::call_guard<py::gil_scoped_release>;

py::bytes state_save(Context& context, SeqId seq_id) {
  std::string bytes;
  {
    const py::gil_scoped_release release;
    bytes = context.state_save(seq_id);
  }
  return py::bytes(bytes);
}

void state_restore(Context& context, SeqId seq_id, const py::bytes& state) {
  const std::string_view bytes = state;
  const py::gil_scoped_release release;
  context.state_restore(seq_id,
                        {reinterpret_cast<const std::uint8_t*>(bytes.data()), bytes.size()});
}

py::dict memory_usage(Context& context) {
  using namespace py::literals;
  const ContextMemory memory = context.memory_usage();
  return py::dict("model_bytes"_a = memory.model_bytes, "context_bytes"_a = memory.context_bytes,
                  "compute_bytes"_a = memory.compute_bytes);
}

void bind_context(py::module_& m) {
  py::class_<Context, ContextHandle>(m, "LowLevelContext", "See batchcore.lowlevel.Context.")
      .def(py::init(&make_context), py::arg("model"), py::arg("options"))
      .def("close", &Context::close,
           "Frees everything. Refused while arrays over the last result live.")
      .def_property_readonly("closed", &Context::is_closed)
      .def_property_readonly("n_ctx", [](const Context& c) { return c.params().n_ctx; })
      .def_property_readonly("n_ctx_seq", &Context::cells_per_sequence)
      .def_property_readonly("n_batch", [](const Context& c) { return c.params().n_batch; })
      .def_property_readonly("n_ubatch", [](const Context& c) { return c.params().n_ubatch; })
      .def_property_readonly("n_seq_max", [](const Context& c) { return c.params().num_slots; })
      .def_property_readonly("n_outputs_max",
                             [](const Context& c) { return c.params().max_outputs; })
      .def_property_readonly("n_threads", [](const Context& c) { return c.params().n_threads; })
      .def_property_readonly("n_threads_batch",
                             [](const Context& c) { return c.params().n_threads_batch; })
      .def_property_readonly("warnings", &Context::warnings)
      .def_property_readonly("num_graphs_reused", &Context::num_graphs_reused)
      .def("memory_usage", &memory_usage,
           "Bytes over all devices: model_bytes, context_bytes, compute_bytes.")
      .def("decode", &Context::decode, py::arg("batch"), Release(),
           "Computes a batch and keeps its tokens in memory.")
      .def("encode", &Context::encode, py::arg("batch"), Release(),
           "Computes a batch with an encoder.")
      .def("interrupt", &Context::interrupt,
           "Makes the running decode, or else the next one, fail with status 2. Any thread.")
      .def(
          "logits",
          [](const ContextHandle& context, std::int64_t index) {
            return ResultView(context, context->logits(index), true);
          },
          py::arg("index") = -1,
          "Logits of one token of the last batch; negative counts from its end.")
      .def(
          "logits_all",
          [](const ContextHandle& context) {
            return ResultView(context, context->all_logits(), false);
          },
          "Logits of all tokens that asked for them, in the order of the batch.")
      .def(
          "embeddings",
          [](const ContextHandle& context, std::int64_t index) {
            return ResultView(context, context->embeddings(index), true);
          },
          py::arg("index") = -1, "Embedding of one token, where nothing is pooled.")
      .def(
          "embeddings_all",
          [](const ContextHandle& context) {
            return ResultView(context, context->all_embeddings(), false);
          },
          "Embeddings of all tokens of the last batch, where nothing is pooled.")
      .def(
          "embeddings_seq",
          [](const ContextHandle& context, SeqId seq_id) {
            return ResultView(context, context->sequence_embedding(seq_id), true);
          },
          py::arg("seq_id"), "Pooled embedding of a sequence of the last batch.")
      .def("seq_rm", &Context::seq_rm, py::arg("seq_id"), py::arg("p0") = -1, py::arg("p1") = -1,
           "Forgets positions [p0, p1); negative = from the start, to the end. False where this "
           "memory can't forget a part (recurrent models).")
      .def("seq_cp", &Context::seq_cp, py::arg("src"), py::arg("dst"), py::arg("p0") = -1,
           py::arg("p1") = -1,
           "Makes the empty sequence dst hold positions [p0, p1) of src. Between streams: whole "
           "sequences only, at the next decode.")
      .def("seq_keep", &Context::seq_keep, py::arg("seq_id"), "Forgets all other sequences.")
      .def("seq_pos_min", &Context::seq_pos_min, py::arg("seq_id"),
           "First position that is held, -1 where there is none.")
      .def("seq_pos_max", &Context::seq_pos_max, py::arg("seq_id"),
           "Last position that is held, -1 where there is none.")
      .def("clear", &Context::clear, "Forgets everything.")
      .def("state_save", &state_save, py::arg("seq_id"),
           "The state of a sequence, for state_restore() into any sequence of an equal context.")
      .def("state_restore", &state_restore, py::arg("seq_id"), py::arg("state"),
           "Replaces a sequence by a saved one.");
}

}  // namespace

void bind_lowlevel(py::module_& m) {
  bind_view(m);
  bind_context(m);
}

}  // namespace batchcore::python
