# llama.cpp as static libraries that leave no trace outside the module: nothing installed, no symbol exported.

set(BATCHCORE_LLAMA_CPP_SOURCE "${PROJECT_SOURCE_DIR}/vendor/llama.cpp")

file(STRINGS "${PROJECT_SOURCE_DIR}/vendor/llama.cpp.lock" lock_lines REGEX "^[a-z0-9]+ = ")
foreach(line IN LISTS lock_lines)
  if(line MATCHES "^([a-z0-9]+) = (.+)$")
    set(BATCHCORE_LLAMA_CPP_LOCK_${CMAKE_MATCH_1} "${CMAKE_MATCH_2}")
  endif()
endforeach()

function(batchcore_add_llama_cpp)
  set(BUILD_SHARED_LIBS OFF)
  set(CMAKE_POSITION_INDEPENDENT_CODE ON)
  set(CMAKE_C_VISIBILITY_PRESET hidden)
  set(CMAKE_CXX_VISIBILITY_PRESET hidden)
  set(CMAKE_VISIBILITY_INLINES_HIDDEN ON)
  # Upstream asks git for the commit, and inside this repository git would answer with ours.
  set(GIT_EXE "")
  set(LLAMA_BUILD_COMMIT "${BATCHCORE_LLAMA_CPP_LOCK_commit}")
  set(LLAMA_BUILD_NUMBER 0)
  foreach(part COMMON TESTS TOOLS EXAMPLES SERVER APP UI)
    set(LLAMA_BUILD_${part} OFF)
  endforeach()
  set(LLAMA_OPENSSL OFF)
  set(LLAMA_ALL_WARNINGS OFF)
  set(GGML_CCACHE OFF) # BATCHCORE_CCACHE covers every target
  # The engine attaches a ggml thread pool of its own, so OpenMP would only add a libgomp to ship.
  set(GGML_OPENMP OFF)
  add_subdirectory("${BATCHCORE_LLAMA_CPP_SOURCE}" "${PROJECT_BINARY_DIR}/llama.cpp" EXCLUDE_FROM_ALL)
  # Their headers are not ours to warn about (add_subdirectory(SYSTEM) would need CMake 3.25).
  foreach(target llama ggml ggml-base)
    get_target_property(dirs ${target} INTERFACE_INCLUDE_DIRECTORIES)
    set_target_properties(${target} PROPERTIES INTERFACE_SYSTEM_INCLUDE_DIRECTORIES "${dirs}")
  endforeach()
endfunction()
batchcore_add_llama_cpp()
