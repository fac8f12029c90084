// Whether AMX tiles can be executed. CPUID alone is not believed: some virtual machines report AMX
// and fault on it.
#pragma once

#if defined(__linux__) && defined(__x86_64__)
#include <signal.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>
#endif

namespace batchcore {

#if defined(__linux__) && defined(__x86_64__)

/// Executes a few tile instructions in a child process, so that a fault costs nothing but the
/// child. About 1 ms.
static inline bool tiles_execute() noexcept {
  const pid_t child = fork();
  if (child < 0) return true;  // cannot tell; CPUID has said yes
  if (child == 0) {
    signal(SIGILL, SIG_DFL);  // faulthandler would print a report of a crash that is expected
    const rlimit no_core = {0, 0};
    setrlimit(RLIMIT_CORE, &no_core);
    constexpr long kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
    constexpr long kTileData = 18;
    if (syscall(SYS_arch_prctl, kRequestPermission, kTileData) != 0) _exit(1);
    alignas(64) unsigned char config[64] = {1};  // palette 1
    config[16] = 64;                             // tile 0: 64 bytes a row ...
    config[48] = 16;                             // ... 16 rows
    // As bytes, because this file is compiled for CPUs and by assemblers that do not know tiles.
    __asm__ volatile(
        ".byte 0xc4, 0xe2, 0x78, 0x49, 0x00\n\t"  // ldtilecfg (%rax)
        ".byte 0xc4, 0xe2, 0x7b, 0x49, 0xc0\n\t"  // tilezero %tmm0
        ".byte 0xc4, 0xe2, 0x78, 0x49, 0xc0"      // tilerelease
        :
        : "a"(config)
        : "memory");
    _exit(0);
  }
  int status = 0;
  if (waitpid(child, &status, 0) != child) return true;  // someone else reaps children here
  return WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

#else

static inline bool tiles_execute() noexcept { return true; }

#endif

}  // namespace batchcore
