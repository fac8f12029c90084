# Chooses the instruction sets that ggml's CPU kernels are compiled for, so that no build can meet an illegal instruction.
#
# ggml's own GGML_NATIVE believes what CPUID reports. On virtual machines that report AMX and fault on the first tile
# instruction, that kills the process at the first matrix product. So on x86-64 each feature is executed once at
# configure time, and only what worked is turned on. Sets BATCHCORE_CPU_FEATURES (names as in csrc/cpu/cpu_features.h),
# BATCHCORE_GGML_OPTIONS (NAME=ON|OFF for ggml), and the import check compares the names with the running CPU.
#
# Elsewhere GGML_NATIVE stays ggml's: on Arm it executes what it turns on beyond what the compiler knows of the CPU.

option(BATCHCORE_PORTABLE "Build for any x86-64 CPU with SSE4.2 (x86-64-v2), or Arm's baseline, not for this machine" OFF)
set(BATCHCORE_TEST_FAULTING_FEATURE "" CACHE INTERNAL "Tests only: a feature whose probe faults")

# Lowest first. A feature is only used if what it builds on is: compilers turn that on with it.
set(batchcore_x86_features
  "sse4.2      | GGML_SSE42       |             | -msse4.2"
  "bmi2        | GGML_BMI2        |             | -mbmi2"
  "avx         | GGML_AVX         | sse4.2      | -mavx"
  "f16c        | GGML_F16C        | avx         | -mf16c"
  "fma         | GGML_FMA         | avx         | -mfma"
  "avx2        | GGML_AVX2        | avx         | -mavx2"
  "avx_vnni    | GGML_AVX_VNNI    | avx2        | -mavxvnni"
  "avx512      | GGML_AVX512      | avx2 fma f16c | -mavx512f -mavx512cd -mavx512vl -mavx512dq -mavx512bw"
  "avx512_vbmi | GGML_AVX512_VBMI | avx512      | -mavx512f -mavx512vbmi"
  "avx512_vnni | GGML_AVX512_VNNI | avx512      | -mavx512f -mavx512vnni"
  "avx512_bf16 | GGML_AVX512_BF16 | avx512      | -mavx512f -mavx512bf16"
  "amx_tile    | GGML_AMX_TILE    | avx512_vnni | -mamx-tile"
  "amx_int8    | GGML_AMX_INT8    | amx_tile    | -mamx-tile -mamx-int8"
  "amx_bf16    | GGML_AMX_BF16    | amx_tile    | -mamx-tile -mamx-bf16")

# A kept build folder may meet another CPU (shared home, image moved): what was probed there says nothing here.
function(batchcore_forget_other_cpu)
  cmake_host_system_information(RESULT cpu QUERY PROCESSOR_DESCRIPTION)
  if(EXISTS /proc/cpuinfo)
    file(STRINGS /proc/cpuinfo flags REGEX "^flags" LIMIT_COUNT 1)
    string(SHA256 flags "${flags}")
    string(APPEND cpu " ${flags}")
  endif()
  if(NOT cpu STREQUAL BATCHCORE_PROBED_CPU)
    get_cmake_property(names CACHE_VARIABLES)
    list(FILTER names INCLUDE REGEX "^BATCHCORE_CPU_HAS_")
    foreach(name IN LISTS names)
      unset(${name} CACHE)
    endforeach()
    set(BATCHCORE_PROBED_CPU "${cpu}" CACHE INTERNAL "The CPU that BATCHCORE_CPU_HAS_* speak of")
  endif()
endfunction()

# Runs the probe of one feature once per build folder; the result is cached.
function(batchcore_probe_cpu_feature name flags)
  string(MAKE_C_IDENTIFIER "${name}" id)
  if(DEFINED BATCHCORE_CPU_HAS_${id})
    return()
  endif()
  if(name STREQUAL BATCHCORE_TEST_FAULTING_FEATURE)
    list(APPEND flags -DPROBE_FAULT)
  endif()
  try_run(status compiled "${CMAKE_CURRENT_BINARY_DIR}/cpu_probe" "${CMAKE_CURRENT_FUNCTION_LIST_DIR}/cpu_probe.cpp"
    CMAKE_FLAGS "-DINCLUDE_DIRECTORIES=${CMAKE_CURRENT_FUNCTION_LIST_DIR}/../csrc"
    COMPILE_DEFINITIONS ${flags} "-DPROBE_NAME=\"${name}\"" "-DPROBE_${id}"
    CXX_STANDARD 17)
  set(works OFF)
  if(NOT compiled)
    set(why "the compiler does not know it")
  elseif(status EQUAL 0)
    set(works ON)
  elseif(status EQUAL 1)
    set(why "this CPU does not have it")
  else()
    message(STATUS "CPU feature ${name}: reported by this CPU, but fails when executed: left out")
  endif()
  set(BATCHCORE_CPU_HAS_${id} ${works} CACHE BOOL "CPU feature ${name} was executed and works")
  mark_as_advanced(BATCHCORE_CPU_HAS_${id})
  unset(status CACHE)
  unset(compiled CACHE)
endfunction()

function(batchcore_choose_x86_features)
  batchcore_forget_other_cpu()
  set(features "")
  set(options GGML_NATIVE=OFF)
  foreach(row IN LISTS batchcore_x86_features)
    string(REGEX REPLACE " *\\| *" "|" row "${row}")
    string(REPLACE "|" ";" row "${row}")
    list(GET row 0 name)
    list(GET row 1 option)
    list(GET row 2 needs)
    list(GET row 3 flags)
    separate_arguments(needs)
    separate_arguments(flags)
    set(use ON) # a variable called "on" would always be true
    if(DEFINED CACHE{${option}}) # asked for by hand: the import check still guards it
      set(use "$CACHE{${option}}")
    elseif(BATCHCORE_PORTABLE)
      if(NOT name STREQUAL "sse4.2")
        set(use OFF)
      endif()
    else()
      foreach(need IN LISTS needs)
        if(NOT need IN_LIST features)
          set(use OFF)
        endif()
      endforeach()
      if(use)
        batchcore_probe_cpu_feature("${name}" "${flags}")
        string(MAKE_C_IDENTIFIER "${name}" id)
        set(use "${BATCHCORE_CPU_HAS_${id}}")
      endif()
    endif()
    if(use)
      list(APPEND features "${name}")
      list(APPEND options "${option}=ON")
    else()
      list(APPEND options "${option}=OFF")
    endif()
  endforeach()
  set(BATCHCORE_CPU_FEATURES "${features}" PARENT_SCOPE)
  set(BATCHCORE_GGML_OPTIONS "${options}" PARENT_SCOPE)
endfunction()

if(CMAKE_CROSSCOMPILING OR CMAKE_OSX_ARCHITECTURES MATCHES ";")
  set(BATCHCORE_PORTABLE ON) # nothing can be executed, or not for every slice
endif()
if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$" AND NOT CMAKE_OSX_ARCHITECTURES MATCHES "arm64")
  batchcore_choose_x86_features()
  list(JOIN BATCHCORE_CPU_FEATURES " " features)
  message(STATUS "CPU features: ${features}")
else()
  set(BATCHCORE_CPU_FEATURES "")
  if(BATCHCORE_PORTABLE)
    set(BATCHCORE_GGML_OPTIONS GGML_NATIVE=OFF)
  else()
    set(BATCHCORE_GGML_OPTIONS GGML_NATIVE=ON)
  endif()
endif()
