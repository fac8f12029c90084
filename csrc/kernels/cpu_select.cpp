#include "kernels/cpu_select.h"

#include <array>
#include <cstdlib>
#include <cstring>
#include <string_view>

#include "cpu/cpu_features.h"

#if defined(__linux__)
#include <signal.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>
#endif

namespace batchcore::kernels {

#if defined(BATCHCORE_X86_KERNELS)

extern const KernelSet kAvx512;
extern const KernelSet kAvxVnni;
extern const KernelSet kAvx2;

namespace {

struct Candidate {
  const KernelSet* set;
  std::array<const char*, 6> features;  // names of cpu_features.h
};

constexpr std::array<Candidate, 3> kCandidates = {{
    {&kAvx512, {"avx2", "fma", "f16c", "bmi2", "avx512", "avx512_vnni"}},
    {&kAvxVnni, {"avx2", "fma", "f16c", "bmi2", "avx_vnni", nullptr}},
    {&kAvx2, {"avx2", "fma", "f16c", "bmi2", nullptr, nullptr}},
}};

// A product of one group with a known result, without the heap: this runs in a forked child.
bool computes(const KernelSet& set) {
  static ActivationBlock blocks[1];
  static float row[kBlockColumns];
  static std::uint8_t weights[layout_of(WeightFormat::kQ8_0).unit_bytes()];
  static float output[kGroupRows];
  for (float& x : row) x = 1.0F;
  std::memset(weights, 0x80 + 2, sizeof weights);  // quants of 2 ...
  for (int i = 0; i < kGroupRows; ++i) {
    weights[kGroupRows * kBlockColumns + 2 * i] = 0x00;
    weights[kGroupRows * kBlockColumns + 2 * i + 1] = 0x3c;  // ... times 1.0 in half precision
  }
  const FormatKernels& kernels = set.formats[static_cast<int>(WeightFormat::kQ8_0)];
  kernels.quantize(row, kBlockColumns, blocks);
  const void* rows[] = {blocks};
  float* outputs[] = {output};
  const ProductTask task{.weights = weights,
                         .columns = kBlockColumns,
                         .num_outputs = kGroupRows,
                         .begin_group = 0,
                         .end_group = 1,
                         .activations = rows,
                         .outputs = outputs,
                         .num_rows = 1};
  kernels.multiply(task);
  for (const float x : output) {
    if (x < 63.9F || x > 64.1F) return false;
  }
  return true;
}

// CPUID alone is not believed: some virtual machines report instructions that fault. A fault in a
// child costs nothing but the child; about 1 ms.
bool executes(const KernelSet& set) {
#if defined(__linux__)
  const pid_t child = fork();
  if (child < 0) return true;  // cannot tell; CPUID has said yes
  if (child == 0) {
    signal(SIGILL, SIG_DFL);  // faulthandler would print a report of a crash that is expected
    const rlimit no_core = {0, 0};
    setrlimit(RLIMIT_CORE, &no_core);
    _exit(computes(set) ? 0 : 1);
  }
  int status = 0;
  if (waitpid(child, &status, 0) != child) return true;  // another thread reaps children here
  return WIFEXITED(status) && WEXITSTATUS(status) == 0;
#else
  return computes(set);
#endif
}

bool is_reported(const Candidate& candidate) {
  for (const char* feature : candidate.features) {
    if (feature != nullptr && !cpu_reports(feature)) return false;
  }
  return true;
}

}  // namespace

const KernelSet* const* usable_kernels() {
  static const auto sets = [] {
    std::array<const KernelSet*, kCandidates.size() + 1> found{};
    std::size_t count = 0;
    for (const Candidate& candidate : kCandidates) {
      if (is_reported(candidate) && executes(*candidate.set)) found[count++] = candidate.set;
    }
    return found;
  }();
  return sets.data();
}

#else

const KernelSet* const* usable_kernels() {
  static constexpr const KernelSet* kNone[] = {nullptr};
  return kNone;
}

#endif

const KernelSet* best_kernels() {
  static const KernelSet* const best = []() -> const KernelSet* {
    const KernelSet* const* sets = usable_kernels();
    const char* wanted = std::getenv("BATCHCORE_KERNELS");
    if (wanted == nullptr || *wanted == '\0' || std::string_view(wanted) == "auto") return *sets;
    for (; *sets != nullptr; ++sets) {
      if (std::string_view(wanted) == (*sets)->name) return *sets;
    }
    return nullptr;
  }();
  return best;
}

}  // namespace batchcore::kernels
