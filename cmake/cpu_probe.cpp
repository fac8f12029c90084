// Executes one instruction set and checks its answer: exit status 0 if it works, 1 if the CPU does
// not report it. Compiled once per feature, with that feature's flags and -DPROBE_<FEATURE>. CPUID
// alone is not believed: some virtual machines report AMX and then fault on the first tile
// instruction.

#include "cpu/cpu_features.h"

#include <immintrin.h>

#if defined(PROBE_amx_tile) || defined(PROBE_amx_int8) || defined(PROBE_amx_bf16)
#define PROBE_AMX 1
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

// Unknown to the optimiser, so that nothing is computed at compile time.
static volatile int two = 2;

#if defined(PROBE_AMX)

static bool allow_tiles() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
  constexpr long kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return true;
#endif
}

struct alignas(64) TileConfig {
  unsigned char palette = 1;
  unsigned char start_row = 0;
  unsigned char reserved[14] = {};
  unsigned short row_bytes[16] = {64, 64, 64};
  unsigned char rows[16] = {16, 16, 16};
};

static bool tiles_work() {
  if (!allow_tiles()) return false;
  TileConfig config;
  _tile_loadconfig(&config);
  alignas(64) int sums[16][16] = {};
  alignas(64) unsigned char a[16][64];
  alignas(64) unsigned char b[16][64];
  [[maybe_unused]] int expected = 0;
#if defined(PROBE_amx_bf16)
  for (int i = 0; i < 16; ++i) {
    for (int j = 0; j < 64; j += 2) {  // 2.0 as bfloat16 is 0x4000
      a[i][j] = b[i][j] = 0;
      a[i][j + 1] = b[i][j + 1] = static_cast<unsigned char>(two * 0x20);
    }
  }
  expected = 0x43000000;  // 32 products of 4.0: 128.0f
#else
  for (int i = 0; i < 16; ++i) {
    for (int j = 0; j < 64; ++j) a[i][j] = b[i][j] = static_cast<unsigned char>(two);
  }
  expected = 64 * 4;
#endif
  _tile_zero(0);
  _tile_loadd(1, a, 64);
  _tile_loadd(2, b, 64);
#if defined(PROBE_amx_int8)
  _tile_dpbssd(0, 1, 2);
  _tile_stored(0, sums, 64);
#elif defined(PROBE_amx_bf16)
  _tile_dpbf16ps(0, 1, 2);
  _tile_stored(0, sums, 64);
#else
  _tile_stored(1, sums, 64);
  expected = 0x02020202;
#endif
  _tile_release();
  for (auto& row : sums) {
    for (int sum : row) {
      if (sum != expected) return false;
    }
  }
  return true;
}

#endif

static bool works() {
#if defined(PROBE_FAULT)
  __builtin_trap();
#elif defined(PROBE_sse4_2)
  const __m128i equal = _mm_cmpgt_epi64(_mm_set1_epi64x(two), _mm_set1_epi64x(two - 1));
  return _mm_cvtsi128_si32(equal) == -1 && _mm_crc32_u8(0, static_cast<unsigned char>(two)) != 0 &&
         __builtin_popcount(static_cast<unsigned>(two)) == 1;
#elif defined(PROBE_avx)
  alignas(32) float out[8];
  _mm256_store_ps(out,
                  _mm256_mul_ps(_mm256_set1_ps(static_cast<float>(two)), _mm256_set1_ps(3.0F)));
  return out[0] == 6.0F && out[7] == 6.0F;
#elif defined(PROBE_f16c)
  alignas(32) float out[8];
  const __m128i half = _mm256_cvtps_ph(_mm256_set1_ps(static_cast<float>(two)), 0);
  _mm256_store_ps(out, _mm256_cvtph_ps(half));
  return out[0] == 2.0F && out[7] == 2.0F;
#elif defined(PROBE_fma)
  alignas(32) float out[8];
  const __m256 x = _mm256_set1_ps(static_cast<float>(two));
  _mm256_store_ps(out, _mm256_fmadd_ps(x, x, x));
  return out[0] == 6.0F && out[7] == 6.0F;
#elif defined(PROBE_bmi2)
  return _pext_u32(0xf0U, static_cast<unsigned>(two) << 4) == 1 &&
         _bzhi_u32(7U, static_cast<unsigned>(two)) == 3;
#elif defined(PROBE_avx2)
  alignas(32) int out[8];
  const __m256i x = _mm256_set1_epi16(static_cast<short>(two));
  const __m256i sums = _mm256_permutevar8x32_epi32(_mm256_madd_epi16(x, x), _mm256_set1_epi32(two));
  _mm256_store_si256(reinterpret_cast<__m256i*>(out), sums);
  return out[0] == 8 && out[7] == 8;
#elif defined(PROBE_avx_vnni)
  alignas(32) int out[8];
  const __m256i x = _mm256_set1_epi8(static_cast<char>(two));
  _mm256_store_si256(reinterpret_cast<__m256i*>(out),
                     _mm256_dpbusd_avx_epi32(_mm256_setzero_si256(), x, x));
  return out[0] == 16 && out[7] == 16;
#elif defined(PROBE_avx512)
  alignas(64) long long out[8];
  const __m512i x = _mm512_set1_epi64(two);
  __m512i y = _mm512_mullo_epi64(x, x);                              // DQ: 4
  y = _mm512_add_epi64(y, _mm512_lzcnt_epi64(x));                    // CD: 4 + 62
  y = _mm512_mask_add_epi8(y, static_cast<__mmask64>(~0ULL), y, x);  // BW: 68
  const __m256i half = _mm512_castsi512_si256(y);
  const __m256i low = _mm256_mask_add_epi64(half, 0xf, half, _mm256_set1_epi64x(two));  // VL: 70
  _mm512_store_si512(out, _mm512_inserti64x4(y, low, 0));
  return out[0] == 70 && out[7] == 68;
#elif defined(PROBE_avx512_vbmi)
  alignas(64) unsigned char out[64];
  const __m512i x = _mm512_set1_epi8(static_cast<char>(two));
  _mm512_store_si512(out, _mm512_permutexvar_epi8(x, x));
  return out[0] == 2 && out[63] == 2;
#elif defined(PROBE_avx512_vnni)
  alignas(64) int out[16];
  const __m512i x = _mm512_set1_epi8(static_cast<char>(two));
  _mm512_store_si512(out, _mm512_dpbusd_epi32(_mm512_setzero_si512(), x, x));
  return out[0] == 16 && out[15] == 16;
#elif defined(PROBE_avx512_bf16)
  alignas(64) float out[16];
  const __m512bh x =
      _mm512_cvtne2ps_pbh(_mm512_set1_ps(static_cast<float>(two)), _mm512_set1_ps(2.0F));
  _mm512_store_ps(out, _mm512_dpbf16_ps(_mm512_setzero_ps(), x, x));
  return out[0] == 8.0F && out[15] == 8.0F;
#elif defined(PROBE_AMX)
  return tiles_work();
#else
#error "no feature named"
#endif
}

int main() {
  if (!batchcore::cpu_reports(PROBE_NAME)) return 1;
  return works() ? 0 : 2;
}
