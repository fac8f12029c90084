// batchcore's kernels inside ggml: which operations they compute, and on which tensors. The only
// header of this folder that others need, but for the block size in attention_task.h; ggml_seam.cpp
// behind it is the only file that knows ggml's internals.
//
// ggml's CPU backend asks each registered buffer type for every operation before it runs its own
// code. So weights that lie in our buffers are multiplied by our kernels, and attention over a
// registered KV cache is computed by them; everything else stays ggml's.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

namespace batchcore::kernels {

/// Registers with ggml. Before the first model is loaded, any thread; later calls do nothing.
void install();

/// Whether this CPU has kernels of ours.
[[nodiscard]] bool is_available();

/// Name of the instruction set that the kernels use, "ggml" where this CPU has none of ours.
[[nodiscard]] const char* active_name();

/// While one exists, models that its thread loads keep their weights in our layout.
class LoadScope {
 public:
  /// `num_threads` repack the weights. A buffer of more than `available_bytes` is not asked for;
  /// 0 = any may be. With `lock_memory`, repacked weights are kept from being swapped out; if the
  /// system refuses, the log says so.
  LoadScope(bool enabled, int num_threads, std::uint64_t available_bytes, bool lock_memory = false);
  ~LoadScope();
  LoadScope(const LoadScope&) = delete;
  LoadScope& operator=(const LoadScope&) = delete;

  /// Whether a buffer for repacked weights could not be had.
  [[nodiscard]] bool ran_out_of_memory() const;
};

/// Says where the cells of a KV cache are in their sequences.
class CellPositions {
 public:
  virtual ~CellPositions() = default;
  /// Fills [num_streams][num_cells] for the streams from `first_stream` on; −1 = empty. Called by
  /// the thread that decodes.
  virtual void read(std::int32_t first_stream, std::int32_t num_streams, std::int32_t num_cells,
                    std::span<std::int32_t> positions) = 0;
};

/// The attention of one KV cache: computed by our kernels while this lives. The context that uses
/// the cache must not decode while it is made or destroyed.
class CacheScope {
 public:
  /// `layers` are the K tensors (ggml_tensor) of the cache, in the order in which a graph uses
  /// them.
  CacheScope(std::vector<const void*> layers, std::unique_ptr<CellPositions> positions);
  ~CacheScope();
  CacheScope(const CacheScope&) = delete;
  CacheScope& operator=(const CacheScope&) = delete;

  struct Cache;

 private:
  const std::unique_ptr<Cache> cache_;
};

/// What can make the results of a row depend on the other rows of a call, as bits of a mask.
enum VariantOperation : std::uint32_t {
  kGgmlKernels = 1U << 0,      ///< the model runs on ggml's kernels, or on another device
  kMatrixProduct = 1U << 1,    ///< of a format or with a tensor that our kernels do not take
  kExpertProduct = 1U << 2,    ///< the same, in a mixture of experts
  kAttention = 1U << 3,        ///< without flash attention, or of a kind that is not ours
  kLinearAttention = 1U << 4,  ///< computes the tokens of a call in chunks
};
inline constexpr const char* kVariantOperationNames[] = {
    "ggml kernels", "matrix product", "expert product", "attention", "linear attention"};

/// While one exists, adds to a mask what the graphs that its thread computes contain.
class VariantWatch {
 public:
  explicit VariantWatch(std::uint32_t& operations);
  ~VariantWatch();
  VariantWatch(const VariantWatch&) = delete;
  VariantWatch& operator=(const VariantWatch&) = delete;
};

}  // namespace batchcore::kernels
