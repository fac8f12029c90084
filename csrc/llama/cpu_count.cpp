#include "llama/cpu_count.h"

#include <algorithm>
#include <cmath>
#include <fstream>
#include <set>
#include <string>
#include <thread>

#ifdef __linux__
#include <sched.h>
#endif

namespace batchcore {
namespace {

#ifdef __linux__
// 0 where the kernel does not tell.
std::int32_t cores_in_affinity_mask() {
  cpu_set_t mask;
  if (sched_getaffinity(0, sizeof(mask), &mask) != 0) return 0;
  std::set<std::string> cores;
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
    if (!CPU_ISSET(cpu, &mask)) continue;
    std::ifstream file("/sys/devices/system/cpu/cpu" + std::to_string(cpu) +
                       "/topology/thread_siblings");
    std::string siblings;
    cores.insert(std::getline(file, siblings) ? siblings : "cpu" + std::to_string(cpu));
  }
  return static_cast<std::int32_t>(cores.size());
}

// 0 where there is no limit. Only cgroup version 2; a wrong guess costs speed, nothing else.
std::int32_t cores_in_quota() {
  std::ifstream file("/sys/fs/cgroup/cpu.max");
  double quota = 0;
  double period = 0;
  if (!(file >> quota >> period) || quota <= 0 || period <= 0) return 0;
  return std::max(1, static_cast<std::int32_t>(std::floor(quota / period)));
}
#endif

}  // namespace

std::int32_t usable_cores() {
  std::int32_t cores = 0;
#ifdef __linux__
  cores = cores_in_affinity_mask();
  if (const std::int32_t quota = cores_in_quota(); quota > 0) {
    cores = cores > 0 ? std::min(cores, quota) : quota;
  }
#endif
  if (cores == 0) cores = static_cast<std::int32_t>(std::thread::hardware_concurrency());
  return std::max(cores, 1);
}

}  // namespace batchcore
