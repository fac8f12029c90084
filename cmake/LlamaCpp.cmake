# llama.cpp as static libraries that leave no trace outside the module: nothing installed, no symbol exported.

include(CheckCXXCompilerFlag)

# Both are environment variables too; those are read at every configure, so that a kept build folder follows them.
set(BATCHCORE_LLAMA_CPP_DIR "" CACHE PATH "A llama.cpp checkout to use instead of the pin")
set(BATCHCORE_LLAMA_CPP_SDIST "" CACHE FILEPATH "The pinned llama-cpp-python sdist, already downloaded")

# Sets BATCHCORE_LLAMA_CPP_TREE, and BATCHCORE_LLAMA_CPP_COMMIT and _VERSION for the build info.
function(batchcore_find_llama_cpp)
  set(vendor "${PROJECT_SOURCE_DIR}/vendor")
  set_property(DIRECTORY "${PROJECT_SOURCE_DIR}" APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS "${vendor}/llama.cpp.lock")
  set(arguments --target "${vendor}/llama.cpp" --fallback "${PROJECT_BINARY_DIR}/llama.cpp-source")
  foreach(name BATCHCORE_LLAMA_CPP_DIR BATCHCORE_LLAMA_CPP_SDIST)
    if(NOT ${name})
      set(${name} "$ENV{${name}}")
    endif()
  endforeach()
  if(BATCHCORE_LLAMA_CPP_DIR)
    list(APPEND arguments --dir "${BATCHCORE_LLAMA_CPP_DIR}")
  elseif(BATCHCORE_LLAMA_CPP_SDIST)
    list(APPEND arguments --sdist "${BATCHCORE_LLAMA_CPP_SDIST}")
  endif()
  if(BATCHCORE_BUILD_PEERS)
    list(APPEND arguments --programs)
  endif()
  message(STATUS "Looking for llama.cpp (the first build downloads 77 MB)")
  execute_process(
    COMMAND "${Python_EXECUTABLE}" "${vendor}/fetch.py" populate ${arguments}
    RESULT_VARIABLE failed OUTPUT_VARIABLE found ERROR_VARIABLE why OUTPUT_STRIP_TRAILING_WHITESPACE)
  if(failed)
    message(FATAL_ERROR "llama.cpp could not be provided.\n${why}See vendor/README.md.")
  endif()
  list(GET found 0 tree)
  list(GET found 1 commit)
  string(SUBSTRING "${commit}" 0 9 commit)
  file(STRINGS "${vendor}/llama.cpp.lock" version REGEX "^version = ")
  string(REPLACE "version = " "" version "${version}")
  message(STATUS "llama.cpp ${commit}: ${tree}")
  set(BATCHCORE_LLAMA_CPP_TREE "${tree}" PARENT_SCOPE)
  set(BATCHCORE_LLAMA_CPP_COMMIT "${commit}" PARENT_SCOPE)
  set(BATCHCORE_LLAMA_CPP_VERSION "${version}" PARENT_SCOPE)
endfunction()

function(batchcore_add_llama_cpp)
  set(BUILD_SHARED_LIBS OFF)
  set(CMAKE_POSITION_INDEPENDENT_CODE ON)
  if(NOT BATCHCORE_BUILD_PEERS) # whose shared library is nothing but llama.cpp's symbols
    set(CMAKE_C_VISIBILITY_PRESET hidden)
    set(CMAKE_CXX_VISIBILITY_PRESET hidden)
    set(CMAKE_VISIBILITY_INLINES_HIDDEN ON)
  endif()
  # Upstream asks git for the commit, and inside this repository git would answer with ours.
  set(GIT_EXE "")
  set(LLAMA_BUILD_COMMIT "${BATCHCORE_LLAMA_CPP_COMMIT}")
  set(LLAMA_BUILD_NUMBER 0)
  foreach(part TESTS APP UI)
    set(LLAMA_BUILD_${part} OFF)
  endforeach()
  foreach(part COMMON TOOLS EXAMPLES SERVER)
    set(LLAMA_BUILD_${part} ${BATCHCORE_BUILD_PEERS})
  endforeach()
  set(LLAMA_USE_PREBUILT_UI OFF)
  set(LLAMA_OPENSSL OFF)
  set(LLAMA_ALL_WARNINGS OFF)
  set(GGML_CCACHE OFF) # BATCHCORE_CCACHE covers every target
  # The engine attaches a ggml thread pool of its own, so OpenMP would only add a libgomp to ship.
  set(GGML_OPENMP OFF)
  foreach(setting IN LISTS BATCHCORE_GGML_OPTIONS)
    string(REGEX MATCH "^(.+)=(.+)$" setting "${setting}")
    set(${CMAKE_MATCH_1} ${CMAKE_MATCH_2})
  endforeach()
  if(BATCHCORE_CUDA_ENABLED)
    set(GGML_CUDA ON)
  endif()
  add_subdirectory("${BATCHCORE_LLAMA_CPP_TREE}" "${PROJECT_BINARY_DIR}/llama.cpp" EXCLUDE_FROM_ALL)
  # Their headers are not ours to warn about (add_subdirectory(SYSTEM) would need CMake 3.25).
  foreach(target llama ggml ggml-base)
    get_target_property(dirs ${target} INTERFACE_INCLUDE_DIRECTORIES)
    set_target_properties(${target} PROPERTIES INTERFACE_SYSTEM_INCLUDE_DIRECTORIES "${dirs}")
  endforeach()
  # Half of the build's time is spent on llama.cpp's own files, and almost none of a decode's: -O2 compiles them a
  # quarter faster. The kernels, which are in ggml, keep -O3.
  if(CMAKE_CXX_COMPILER_ID MATCHES "GNU|Clang")
    target_compile_options(llama PRIVATE "$<$<CONFIG:Release>:-O2>")
  endif()
  # Instruction order and vector width to this machine's liking; no instruction is added by it.
  if(NOT BATCHCORE_PORTABLE AND BATCHCORE_CPU_FEATURES)
    check_cxx_compiler_flag(-mtune=native BATCHCORE_HAS_MTUNE_NATIVE)
    if(BATCHCORE_HAS_MTUNE_NATIVE)
      target_compile_options(ggml-cpu PRIVATE "$<$<COMPILE_LANGUAGE:C,CXX>:-mtune=native>")
    endif()
  endif()
endfunction()

# Upstream's programs, linked with the very libraries that the module links: whatever differs is not the kernels.
function(batchcore_add_peers)
  set(programs llama-server llama-parallel llama-batched-bench llama-bench llama-completion)
  foreach(program IN LISTS programs)
    set_target_properties(${program} PROPERTIES RUNTIME_OUTPUT_DIRECTORY "${PROJECT_BINARY_DIR}/peers")
  endforeach()
  # For Python packages that load llama.cpp as a shared library (benchmarks say how).
  set(nothing "${PROJECT_BINARY_DIR}/peers/nothing.cpp")
  file(CONFIGURE OUTPUT "${nothing}" CONTENT "")
  add_library(batchcore_peers_llama SHARED "${nothing}")
  target_link_libraries(batchcore_peers_llama PRIVATE "$<LINK_LIBRARY:WHOLE_ARCHIVE,llama,ggml,ggml-cpu,ggml-base>")
  set_target_properties(batchcore_peers_llama PROPERTIES
    OUTPUT_NAME llama
    LIBRARY_OUTPUT_DIRECTORY "${PROJECT_BINARY_DIR}/peers/lib")
  add_custom_target(batchcore_peers ALL DEPENDS ${programs} batchcore_peers_llama)
endfunction()

batchcore_find_llama_cpp()
batchcore_add_llama_cpp()
if(BATCHCORE_BUILD_PEERS)
  batchcore_add_peers()
endif()
