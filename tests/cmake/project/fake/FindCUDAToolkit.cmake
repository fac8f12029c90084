# A toolkit without cuBLAS (TEST_CUDA=nvcc) or with it (TEST_CUDA=complete).
set(CUDAToolkit_FOUND ON)
set(CUDAToolkit_VERSION 13.0)
set(CUDAToolkit_NVCC_EXECUTABLE /fake/nvcc)
if(TEST_CUDA STREQUAL "complete" AND NOT TARGET CUDA::cublas)
  add_library(CUDA::cublas INTERFACE IMPORTED)
endif()
