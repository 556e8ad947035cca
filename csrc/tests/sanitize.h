// What the programs for compute-sanitizer share.

#pragma once

#include <cuda_runtime_api.h>

#include <cstdio>
#include <cstdlib>

inline void check(cudaError_t error, const char* call, const char* file, int line) {
  if (error == cudaSuccess) return;
  std::printf("%s:%d: %s: %s\n", file, line, call, cudaGetErrorString(error));
  std::exit(1);
}

#define CHECK(call) check((call), #call, __FILE__, __LINE__)

// Device memory of the exact size, so that one element too many is found.
class Buffer {
 public:
  explicit Buffer(size_t bytes, int fill = 0x3c) {
    if (bytes == 0) return;
    CHECK(cudaMalloc(&data_, bytes));
    CHECK(cudaMemset(data_, fill, bytes));
  }
  Buffer(const Buffer&) = delete;
  ~Buffer() { cudaFree(data_); }
  void* get() const { return data_; }
  template <typename T>
  T* as() const {
    return static_cast<T*>(data_);
  }

 private:
  void* data_ = nullptr;
};
