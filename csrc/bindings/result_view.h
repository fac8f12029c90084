// A view into llama.cpp's output buffer that knows when it is stale, and the read-only NumPy arrays
// made from it. NumPy can't be told that memory has changed hands, so an array counts as borrowed
// while it lives, and the context refuses to compute meanwhile: bytearray's contract with
// memoryview.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "llama/low_level.h"

namespace batchcore::python {

namespace py = pybind11;

class ResultView {
 public:
  /// `flat`: one row, shown with one dimension.
  ResultView(std::shared_ptr<LowLevelContext> context, const ResultRows& rows, bool flat)
      : context_(std::move(context)), rows_(rows), flat_(flat) {}

  /// Without a copy, read-only.
  [[nodiscard]] py::array_t<float> array() const {
    auto loan = std::make_unique<Loan>(context_);
    check();
    const py::capsule owner(loan.get(), [](void* pointer) { delete static_cast<Loan*>(pointer); });
    loan.release();
    py::array_t<float> result(shape(), rows_.data, owner);
    result.attr("flags").attr("writeable") = false;
    return result;
  }

  [[nodiscard]] py::array_t<float> copy() const {
    const Loan loan(context_);
    check();
    return py::array_t<float>(shape(), rows_.data);
  }

  [[nodiscard]] std::vector<py::ssize_t> shape() const {
    if (flat_) return {rows_.num_columns};
    return {rows_.num_rows, rows_.num_columns};
  }

  void check() const { context_->check_readable(rows_.generation); }

 private:
  // Taken before check(): a decode on another thread first says that it uses the context and then
  // looks for loans, so one of the two always sees the other.
  struct Loan {
    explicit Loan(std::shared_ptr<LowLevelContext> lender) : context(std::move(lender)) {
      context->borrow();
    }
    ~Loan() { context->give_back(); }
    Loan(const Loan&) = delete;
    Loan& operator=(const Loan&) = delete;
    std::shared_ptr<LowLevelContext> context;
  };

  std::shared_ptr<LowLevelContext> context_;
  ResultRows rows_;
  bool flat_;
};

}  // namespace batchcore::python
