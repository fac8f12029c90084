# How batchcore's own targets are compiled. llama.cpp's are left as upstream wants them.

find_package(Threads REQUIRED)

add_library(batchcore_options INTERFACE)
target_compile_features(batchcore_options INTERFACE cxx_std_20)
target_include_directories(batchcore_options INTERFACE "${PROJECT_SOURCE_DIR}/csrc")
target_link_libraries(batchcore_options INTERFACE Threads::Threads)
if(CMAKE_CXX_COMPILER_ID MATCHES "GNU|Clang")
  target_compile_options(batchcore_options INTERFACE
    -Wall -Wextra -Wpedantic -Wshadow -Wconversion -Wno-sign-conversion -Wnon-virtual-dtor
    -Woverloaded-virtual -Wcast-qual
    $<$<BOOL:${BATCHCORE_WERROR}>:-Werror>)
endif()
if(BATCHCORE_SANITIZE)
  target_compile_options(batchcore_options INTERFACE
    "-fsanitize=${BATCHCORE_SANITIZE}" -fno-sanitize-recover=all -fno-omit-frame-pointer)
  target_link_options(batchcore_options INTERFACE "-fsanitize=${BATCHCORE_SANITIZE}")
endif()

function(batchcore_target_defaults target)
  set_target_properties(${target} PROPERTIES
    CXX_EXTENSIONS OFF
    CXX_VISIBILITY_PRESET hidden
    VISIBILITY_INLINES_HIDDEN ON
    POSITION_INDEPENDENT_CODE ON)
endfunction()

# batchcore_library(core SOURCES a.cpp b.cpp LINK other_target): the static library of one csrc folder.
function(batchcore_library name)
  cmake_parse_arguments(PARSE_ARGV 1 arg "" "" "SOURCES;LINK")
  add_library(batchcore_${name} STATIC ${arg_SOURCES})
  target_link_libraries(batchcore_${name} PUBLIC batchcore_options ${arg_LINK})
  batchcore_target_defaults(batchcore_${name})
endfunction()
