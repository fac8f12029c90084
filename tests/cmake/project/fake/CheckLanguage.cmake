# Stands in for CMake's own, which would look for a real nvcc.
macro(check_language language)
  set(CMAKE_${language}_COMPILER /fake/nvcc)
endmacro()
