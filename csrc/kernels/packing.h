// Between rows of weights as a GGUF file has them and the layout of the kernels (packed_layout.h).
// Pure functions, any thread.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/packed_layout.h"

namespace batchcore::kernels {

/// Bytes of a row of `columns` weights in a GGUF file.
[[nodiscard]] std::size_t file_row_bytes(WeightFormat format, std::int64_t columns);

/// Packs up to 16 rows, file_row_bytes() apart, into one group. Rows that are missing become zeros.
void pack_group(WeightFormat format, const std::uint8_t* rows, std::int64_t num_rows,
                std::int64_t columns, std::uint8_t* group);

/// Decodes one row of a packed matrix.
void unpack_row(WeightFormat format, const std::uint8_t* matrix, std::int64_t row,
                std::int64_t columns, float* values);

}  // namespace batchcore::kernels
