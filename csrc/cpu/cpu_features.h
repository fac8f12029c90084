// Which instruction sets the running CPU offers, by the names that the build uses for them.
//
// Used in two places: by the probes at configure time and by the check at import time, so both mean
// the same by a name. Plain functions without standard library templates: those may be emitted by a
// file compiled for a newer CPU.
#pragma once

#include <cstring>

#if defined(__x86_64__) || defined(_M_X64)
#define BATCHCORE_X86 1
#if defined(_MSC_VER)
#include <immintrin.h>
#include <intrin.h>
#else
#include <cpuid.h>
#endif
#endif

namespace batchcore {

#if defined(BATCHCORE_X86)

struct CpuidRegisters {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
};

static inline CpuidRegisters cpuid(unsigned leaf, unsigned subleaf) noexcept {
  CpuidRegisters r;
#if defined(_MSC_VER)
  int raw[4];
  __cpuid(raw, 0);
  if (static_cast<unsigned>(raw[0]) < leaf) return r;
  __cpuidex(raw, static_cast<int>(leaf), static_cast<int>(subleaf));
  r.eax = raw[0], r.ebx = raw[1], r.ecx = raw[2], r.edx = raw[3];
#else
  __get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx);
#endif
  return r;
}

/// State components that the operating system saves on a task switch (XCR0); registers it does not
/// save fault.
static inline unsigned long long saved_states() noexcept {
  if (!(cpuid(1, 0).ecx & (1U << 27))) return 0;  // no XGETBV
#if defined(_MSC_VER)
  return _xgetbv(0);
#else
  unsigned low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<unsigned long long>(high) << 32) | low;
#endif
}

/// Whether CPUID reports `name` and the operating system supports it. An unknown name is not
/// supported.
static inline bool cpu_reports(const char* name) noexcept {
  constexpr unsigned long long kAvxState = 0x6;
  constexpr unsigned long long kAvx512State = 0xe6;
  constexpr unsigned long long kTileState = 0x60000;
  const unsigned long long states = saved_states();
  const bool avx_state = (states & kAvxState) == kAvxState;
  const bool avx512_state = (states & kAvx512State) == kAvx512State;
  const bool tile_state = (states & kTileState) == kTileState;

  const CpuidRegisters leaf1 = cpuid(1, 0);
  const CpuidRegisters leaf7 = cpuid(7, 0);
  const CpuidRegisters leaf7_1 = leaf7.eax >= 1 ? cpuid(7, 1) : CpuidRegisters{};
  const auto all = [](unsigned reg, unsigned mask) { return (reg & mask) == mask; };
  const auto is = [name](const char* other) { return std::strcmp(name, other) == 0; };

  if (is("sse4.2")) return all(leaf1.ecx, 1U << 20 | 1U << 23);  // -msse4.2 implies popcnt
  if (is("avx")) return avx_state && all(leaf1.ecx, 1U << 28);
  if (is("f16c")) return avx_state && all(leaf1.ecx, 1U << 29);
  if (is("fma")) return avx_state && all(leaf1.ecx, 1U << 12);
  if (is("bmi2")) return all(leaf7.ebx, 1U << 8);
  if (is("avx2")) return avx_state && all(leaf7.ebx, 1U << 5);
  if (is("avx_vnni")) return avx_state && all(leaf7_1.eax, 1U << 4);
  // F, DQ, CD, BW, VL: ggml turns them on together
  if (is("avx512")) {
    return avx512_state && all(leaf7.ebx, 1U << 16 | 1U << 17 | 1U << 28 | 1U << 30 | 1U << 31);
  }
  if (is("avx512_vbmi")) return avx512_state && all(leaf7.ecx, 1U << 1);
  if (is("avx512_vnni")) return avx512_state && all(leaf7.ecx, 1U << 11);
  if (is("avx512_bf16")) return avx512_state && all(leaf7_1.eax, 1U << 5);
  if (is("amx_tile")) return tile_state && all(leaf7.edx, 1U << 24);
  if (is("amx_int8")) return tile_state && all(leaf7.edx, 1U << 25);
  if (is("amx_bf16")) return tile_state && all(leaf7.edx, 1U << 22);
  return false;
}

#else

static inline bool cpu_reports(const char*) noexcept { return false; }

#endif

}  // namespace batchcore
