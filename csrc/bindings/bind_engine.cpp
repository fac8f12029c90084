#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <unistd.h>

#include <map>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "bindings/bind_errors.h"
#include "bindings/bindings.h"
#include "bindings/engine_options.h"
#include "bindings/engine_stats_dict.h"
#include "core/errors.h"
#include "engine/engine.h"
#include "engine/notifier.h"
#include "llama/llama_backend.h"
#include "llama/llama_model.h"

namespace batchcore::python {
namespace {

ContextParams context_params(const py::dict& options) {
  const auto get = [&options](const char* key) { return options[key]; };
  ContextParams params;
  params.n_ctx = get("n_ctx").cast<std::int32_t>();
  params.num_slots = get("num_slots").cast<std::int32_t>();
  params.n_ubatch = get("n_ubatch").cast<std::int32_t>();
  params.max_outputs = get("max_outputs").cast<std::int32_t>();
  params.n_threads = get("n_threads").cast<std::int32_t>();
  params.n_threads_batch = get("n_threads_batch").cast<std::int32_t>();
  params.layout =
      by_name<KvLayout>("kv_layout", get("kv_layout").cast<std::string>(),
                        {{"unified", KvLayout::kUnified}, {"streams", KvLayout::kStreams}});
  params.type_k = get("type_k").cast<std::string>();
  params.type_v = get("type_v").cast<std::string>();
  params.flash_attn = by_name<FlashAttention>("flash_attn", get("flash_attn").cast<std::string>(),
                                              {{"auto", FlashAttention::kAuto},
                                               {"off", FlashAttention::kOff},
                                               {"on", FlashAttention::kOn}});
  params.swa_full = get("swa_full").cast<bool>();
  params.offload_kqv = get("offload_kqv").cast<bool>();
  return params;
}

// A forked child has copies of the engine's locks and threads' stacks, but not its threads: there,
// destroying it would wait for them forever, so its copy is left alone.
void destroy_in_own_process(Engine* engine) {
  if (engine->process() != getpid()) return;
  const py::gil_scoped_release release;
  delete engine;
}

std::shared_ptr<Engine> make_engine(const std::shared_ptr<LlamaModel>& model,
                                    const py::dict& context, const py::dict& engine) {
  const ContextParams params = context_params(context);
  const EngineConfig config = engine_config(engine);
  const py::gil_scoped_release release;
  auto backend = std::make_unique<LlamaBackend>(model, params);
  auto built = std::make_unique<Engine>(std::move(backend), model->vocab(), config);
  return {built.release(), &destroy_in_own_process};
}

SamplingParams sampling_params(const py::dict& values) {
  const auto get = [&values](const char* key) { return values[key]; };
  SamplingParams params;
  params.max_tokens = get("max_tokens").cast<std::int32_t>();
  params.min_tokens = get("min_tokens").cast<std::int32_t>();
  params.temperature = get("temperature").cast<float>();
  params.top_k = get("top_k").cast<std::int32_t>();
  params.top_p = get("top_p").cast<float>();
  params.min_p = get("min_p").cast<float>();
  params.repetition_penalty = get("repetition_penalty").cast<float>();
  params.presence_penalty = get("presence_penalty").cast<float>();
  params.frequency_penalty = get("frequency_penalty").cast<float>();
  params.seed = get("seed").cast<std::uint64_t>();
  params.logprobs = get("logprobs").cast<std::int32_t>();
  params.n = get("n").cast<std::int32_t>();
  params.ignore_eos = get("ignore_eos").cast<bool>();
  params.stop_token_ids = get("stop_token_ids").cast<std::vector<Token>>();
  params.stop = get("stop").cast<std::vector<std::string>>();
  params.logit_bias = get("logit_bias").cast<std::vector<std::pair<Token, float>>>();
  return params;
}

// Prompt, parameters, priority, user, timeout and queue timeout.
using Submission = std::tuple<std::vector<Token>, SamplingParams, std::int32_t, std::string,
                              std::optional<double>, std::optional<double>>;

std::vector<std::shared_ptr<RequestChannel>> submit(Engine& engine,
                                                    std::vector<Submission> submissions,
                                                    bool streams, bool pins, bool in_lock_step,
                                                    const std::shared_ptr<Notifier>& notifier) {
  std::vector<RequestSpec> specs(submissions.size());
  for (std::size_t i = 0; i < specs.size(); ++i) {
    RequestSpec& spec = specs[i];
    std::tie(spec.prompt, spec.sampling, spec.priority, spec.user, spec.timeout_s,
             spec.queue_timeout_s) = std::move(submissions[i]);
    spec.streams = streams;
    spec.pins = pins;
    spec.notifier = notifier;
  }
  const py::gil_scoped_release release;
  return engine.submit_all(std::move(specs), in_lock_step);
}

py::tuple to_tuple(const TokenLogprob& value) { return py::make_tuple(value.token, value.logprob); }

py::list to_list(const std::vector<PositionLogprobs>& positions) {
  py::list list(positions.size());
  for (std::size_t i = 0; i < positions.size(); ++i) {
    py::list top(positions[i].top.size());
    for (std::size_t k = 0; k < positions[i].top.size(); ++k)
      top[k] = to_tuple(positions[i].top[k]);
    list[i] = py::make_tuple(to_tuple(positions[i].sampled), top);
  }
  return list;
}

py::tuple to_tuple(const CompletionDelta& delta) {
  py::object reason = py::none();
  if (delta.finish_reason) reason = py::str(std::string(to_string(*delta.finish_reason)));
  py::object stop = py::none();
  if (const auto* token = std::get_if<Token>(&delta.stop_reason)) stop = py::int_(*token);
  if (const auto* text = std::get_if<std::string>(&delta.stop_reason)) stop = py::str(*text);
  return py::make_tuple(delta.index, py::str(delta.text), py::cast(delta.token_ids),
                        to_list(delta.logprobs), reason, stop);
}

py::object take(RequestChannel& channel) {
  const std::optional<RequestUpdate> update = channel.take();
  if (!update) return py::none();
  py::list deltas(update->deltas.size());
  for (std::size_t i = 0; i < update->deltas.size(); ++i) deltas[i] = to_tuple(update->deltas[i]);
  const RequestMetrics& times = update->metrics;
  return py::make_tuple(
      deltas, update->finished, update->error ? to_python_error(update->error) : py::none(),
      py::make_tuple(times.arrival_s, times.admitted_s, times.first_token_s, times.finished_s,
                     times.num_cached_tokens, times.num_preemptions, times.attention_needed,
                     times.attention_computed));
}

using ReleaseGil = py::call_guard<py::gil_scoped_release>;

}  // namespace

void bind_engine(py::module_& m) {
  m.attr("histogram_bounds") = histogram_bounds();

  py::class_<SamplingParams>(m, "SamplingParams",
                             "Validated parameters; see batchcore.SamplingParams.")
      .def(py::init(&sampling_params), py::arg("values"));

  py::class_<Notifier, std::shared_ptr<Notifier>>(m, "Notifier",
                                                  "Wakes an event loop once per decode call.")
      .def(py::init<>())
      .def_property_readonly("fd", &Notifier::fd)
      .def("take", &Notifier::take, ReleaseGil());

  py::class_<RequestChannel, std::shared_ptr<RequestChannel>>(m, "RequestChannel",
                                                              "The output of one request.")
      .def_property_readonly("id", &RequestChannel::id)
      .def_property_readonly("is_finished", &RequestChannel::is_finished)
      .def("take", &take)
      .def("wait", &RequestChannel::wait, py::arg("timeout_s"), ReleaseGil());

  py::class_<Engine, std::shared_ptr<Engine>>(m, "Engine", "The loop; see batchcore.Engine.")
      .def(py::init(&make_engine), py::arg("model"), py::arg("context"), py::arg("engine"))
      .def("start", &Engine::start, ReleaseGil())
      .def("submit", &submit, py::arg("submissions"), py::arg("streams"), py::arg("pins"),
           py::arg("in_lock_step"), py::arg("notifier"))
      .def("abort", &Engine::abort, py::arg("request_id"), ReleaseGil())
      .def("unpin", &Engine::unpin, py::arg("request_id"), ReleaseGil())
      .def("pause", &Engine::pause, ReleaseGil())
      .def("resume", &Engine::resume, ReleaseGil())
      .def("drain", &Engine::drain, ReleaseGil())
      .def(
          "has_room",
          [](const Engine& engine, const std::string& user, std::int64_t num_requests,
             std::int64_t num_tokens) { return engine.has_room({user, num_requests, num_tokens}); },
          py::arg("user"), py::arg("num_requests"), py::arg("num_tokens"), ReleaseGil())
      .def(
          "wait_for_room",
          [](Engine& engine, const std::string& user, std::int64_t num_requests,
             std::int64_t num_tokens, double seconds) {
            return engine.wait_for_room({user, num_requests, num_tokens}, seconds);
          },
          py::arg("user"), py::arg("num_requests"), py::arg("num_tokens"), py::arg("seconds"),
          ReleaseGil())
      .def("wait_until_idle", &Engine::wait_until_idle, py::arg("seconds"), ReleaseGil())
      .def("watch_room", &Engine::watch_room, py::arg("notifier"), ReleaseGil())
      .def("step", &Engine::step, ReleaseGil())
      .def("close", &Engine::close, ReleaseGil())
      .def("stats", [](const Engine& engine) { return to_dict(engine.stats()); })
      .def_property_readonly("has_work", &Engine::has_work)
      .def_property_readonly("is_closed", &Engine::is_closed)
      .def_property_readonly("num_slots", [](const Engine& e) { return e.info().num_slots; })
      .def_property_readonly("num_cells", [](const Engine& e) { return e.info().num_cells; })
      .def_property_readonly("cells_per_slot",
                             [](const Engine& e) { return e.info().cells_per_slot; });
}

}  // namespace batchcore::python
