// Gated activation functions (GLU variants: Shazeer, arXiv 2002.05202).
#pragma once

#include <cstring>

#include "kernels/kernel_set.h"
#include "kernels/simd/wide.h"

namespace batchcore::kernels {
namespace {

template <Gate kGate>
inline Wide activate(Wide x) {
  const Wide one = Wide::broadcast(1.0F);
  if constexpr (kGate == Gate::kSilu) {
    // e^−|x| can't overflow: 1 / (1 + e) is the sigmoid of |x|, e / (1 + e) that of −|x|.
    const Wide zero = Wide::zero();
    const Wide e = exp_of_negative(zero - Wide::max(zero - x, x));
    const Wide above = one / (one + e);
    const Wide below = e * above;
    const Wide sigmoid =
        Wide::zero_below(above, x, 0.0F) + (below - Wide::zero_below(below, x, 0.0F));
    return Wide::zero_below(x * sigmoid, x, -87.0F);  // for −∞, too
  } else {
    const Wide cube = x * x * x;
    const Wide inner =
        Wide::broadcast(0.79788456F) * Wide::fma(Wide::broadcast(0.044715F), cube, x);
    // Below −10 the result is 0 in single precision.
    return Wide::zero_below(Wide::broadcast(0.5F) * x * (one + tanh_of(inner)), x, -10.0F);
  }
}

template <Gate kGate>
void gate_row(const float* x, const float* gates, std::int64_t count, float* outputs) {
  std::int64_t i = 0;
  for (; i + 16 <= count; i += 16) {
    (activate<kGate>(Wide::load(x + i)) * Wide::load(gates + i)).store(outputs + i);
  }
  if (i == count) return;
  float rest[2][16] = {};
  const std::size_t bytes = sizeof(float) * static_cast<std::size_t>(count - i);
  std::memcpy(rest[0], x + i, bytes);
  std::memcpy(rest[1], gates + i, bytes);
  (activate<kGate>(Wide::load(rest[0])) * Wide::load(rest[1])).store(rest[0]);
  std::memcpy(outputs + i, rest[0], bytes);
}

void gate(Gate function, const float* x, const float* gates, std::int64_t count, float* outputs) {
  if (function == Gate::kSilu) {
    gate_row<Gate::kSilu>(x, gates, count, outputs);
  } else {
    gate_row<Gate::kGelu>(x, gates, count, outputs);
  }
}

}  // namespace
}  // namespace batchcore::kernels
