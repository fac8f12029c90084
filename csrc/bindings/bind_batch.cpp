#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "bindings/bindings.h"
#include "core/errors.h"
#include "llama/token_batch.h"

namespace batchcore::python {
namespace {

using Flags = py::array_t<bool, py::array::c_style | py::array::forcecast>;

// Anything that NumPy takes for a one-dimensional array of integers. NumPy's own narrowing would
// wrap large values into valid ones.
std::vector<std::int32_t> integers(const char* name, const py::object& values) {
  const auto array = py::array::ensure(values);
  if (!array) throw py::error_already_set();
  const char kind = array.dtype().kind();
  if (array.ndim() != 1 || (array.size() > 0 && kind != 'i' && kind != 'u')) {
    throw InvalidRequestError(std::string(name) + " must be one-dimensional and of integers");
  }
  const auto wide = array.cast<py::array_t<std::int64_t, py::array::forcecast>>();
  std::vector<std::int32_t> result;
  result.reserve(static_cast<std::size_t>(wide.size()));
  for (py::ssize_t i = 0; i < wide.size(); ++i) {
    const std::int64_t value = wide.at(i);
    if (value < INT32_MIN || value > INT32_MAX) {
      throw InvalidRequestError(std::string(name) +
                                " has a value that is out of range: " + std::to_string(value));
    }
    result.push_back(static_cast<std::int32_t>(value));
  }
  return result;
}

// One sequence per token, or a list of lists.
std::vector<std::vector<SeqId>> sequence_lists(const py::object& seq_ids) {
  std::vector<std::vector<SeqId>> result;
  const bool nested = !py::isinstance<py::array>(seq_ids) && py::len(seq_ids) > 0 &&
                      py::isinstance<py::sequence>(seq_ids[py::int_(0)]);
  if (nested) {
    for (const py::handle item : seq_ids) {
      result.push_back(integers("seq_ids", py::reinterpret_borrow<py::object>(item)));
    }
  } else {
    for (const SeqId seq_id : integers("seq_ids", seq_ids)) result.push_back({seq_id});
  }
  return result;
}

void append(TokenBatch& batch, const py::object& token_values, const py::object& pos_values,
            const py::object& seq_ids, const std::optional<Flags>& logits) {
  const std::vector<Token> tokens = integers("tokens", token_values);
  const std::vector<Position> positions = integers("pos", pos_values);
  const std::vector<std::vector<SeqId>> sequences = sequence_lists(seq_ids);
  const std::size_t size = tokens.size();
  if (positions.size() != size || sequences.size() != size ||
      (logits && (logits->ndim() != 1 || static_cast<std::size_t>(logits->size()) != size))) {
    throw InvalidRequestError("tokens, pos, seq_ids and logits must be equally long");
  }
  for (const std::vector<SeqId>& one : sequences) {
    if (one.empty()) throw InvalidRequestError("a token must belong to a sequence");
  }
  for (std::size_t i = 0; i < size; ++i) {
    const bool output = logits ? logits->at(static_cast<py::ssize_t>(i)) : i + 1 == size;
    batch.add(tokens[i], positions[i], sequences[i], output);
  }
}

std::vector<std::vector<SeqId>> sequences_of(const TokenBatch& batch) {
  std::vector<std::vector<SeqId>> result;
  for (std::size_t i = 0; i < batch.size(); ++i) {
    const auto sequences = batch.sequences(i);
    result.emplace_back(sequences.begin(), sequences.end());
  }
  return result;
}

}  // namespace

void bind_batch(py::module_& m) {
  py::class_<TokenBatch>(m, "Batch", "Tokens for one decode or encode call.")
      .def(py::init<>())
      .def_static(
          "from_arrays",
          [](const py::object& tokens, const py::object& positions, const py::object& seq_ids,
             const std::optional<Flags>& logits) {
            TokenBatch batch;
            append(batch, tokens, positions, seq_ids, logits);
            return batch;
          },
          py::arg("tokens"), py::arg("pos"), py::arg("seq_ids"), py::arg("logits") = py::none(),
          "A batch of equally long arrays. seq_ids: one per token, or lists of several (unified "
          "only); logits: which tokens ask for an output, None = the last.")
      .def(
          "add",
          [](TokenBatch& batch, Token token, Position position, const std::vector<SeqId>& seq_ids,
             bool logits) {
            if (seq_ids.empty()) throw InvalidRequestError("a token must belong to a sequence");
            batch.add(token, position, seq_ids, logits);
          },
          py::arg("token"), py::arg("pos"), py::arg("seq_ids"), py::arg("logits") = false,
          "Appends one token.")
      .def("extend", &append, py::arg("tokens"), py::arg("pos"), py::arg("seq_ids"),
           py::arg("logits") = py::none(), "Appends arrays as from_arrays() takes them.")
      .def("clear", &TokenBatch::clear)
      .def("__len__", &TokenBatch::size)
      .def_property_readonly("tokens", [](const TokenBatch& batch) { return batch.tokens; })
      .def_property_readonly("pos", [](const TokenBatch& batch) { return batch.positions; })
      .def_property_readonly("seq_ids", &sequences_of)
      .def_property_readonly("logits", [](const TokenBatch& batch) {
        return std::vector<bool>(batch.outputs.begin(), batch.outputs.end());
      });
}

}  // namespace batchcore::python
