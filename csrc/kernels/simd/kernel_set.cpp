// The kernels of one instruction set: compiled once for each, with its flags and its name as
// BATCHCORE_KERNELS. Everything it includes has internal linkage, and no template of the standard
// library is instantiated here: the linker would keep one copy of those for all CPUs.

#include "kernels/kernel_set.h"

#if defined(__AVX512F__)
#include "kernels/simd/avx512.h"
#else
#include "kernels/simd/avx2.h"
#endif
#include "kernels/simd/attend.h"
#include "kernels/simd/formats.h"
#include "kernels/simd/gate.h"
#include "kernels/simd/product.h"
#include "kernels/simd/quantize.h"

namespace batchcore::kernels {

extern const KernelSet BATCHCORE_KERNELS;

#define BATCHCORE_QUANTIZED(format) \
  {&multiply<WeightFormat::format>, &quantize<WeightFormat::format>}
#define BATCHCORE_FLOAT(format) {&multiply<WeightFormat::format>, nullptr}

// In the order of WeightFormat.
const KernelSet BATCHCORE_KERNELS = {
    BATCHCORE_KERNELS_NAME,
    {
        BATCHCORE_QUANTIZED(kQ4_0),
        BATCHCORE_QUANTIZED(kQ4_1),
        BATCHCORE_QUANTIZED(kQ5_0),
        BATCHCORE_QUANTIZED(kQ5_1),
        BATCHCORE_QUANTIZED(kQ8_0),
        BATCHCORE_QUANTIZED(kQ2_K),
        BATCHCORE_QUANTIZED(kQ3_K),
        BATCHCORE_QUANTIZED(kQ4_K),
        BATCHCORE_QUANTIZED(kQ5_K),
        BATCHCORE_QUANTIZED(kQ6_K),
        BATCHCORE_QUANTIZED(kIQ4_NL),
        BATCHCORE_QUANTIZED(kIQ4_XS),
        BATCHCORE_FLOAT(kF16),
        BATCHCORE_FLOAT(kBF16),
        BATCHCORE_FLOAT(kF32),
    },
    &scan_mask,
    &attend,
    &merge,
    &gate,
};

}  // namespace batchcore::kernels
