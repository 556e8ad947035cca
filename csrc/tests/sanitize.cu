// Every Hadamard kernel once, on small odd shapes, without PyTorch: for compute-sanitizer, which would take
// minutes with it.
//     nvcc -std=c++17 -O3 -lineinfo -arch=sm_90 -Icsrc csrc/tests/sanitize.cu csrc/hadamard*.cu -o
//     build/sanitize for tool in memcheck racecheck synccheck; do compute-sanitizer --tool $tool
//     --error-exitcode 1 build/sanitize; done

#include <cstdio>
#include <cstdlib>

#include "hadamard.h"

#define CHECK(call)                                                                         \
  do {                                                                                      \
    const cudaError_t error = (call);                                                       \
    if (error != cudaSuccess) {                                                             \
      std::printf("%s:%d: %s: %s\n", __FILE__, __LINE__, #call, cudaGetErrorString(error)); \
      std::exit(1);                                                                         \
    }                                                                                       \
  } while (0)

int main() {
  using halo_train::DType;
  const struct {
    DType dtype;
    int bytes;
  } types[] = {{DType::kBFloat16, 2}, {DType::kFloat16, 2}, {DType::kFloat32, 4}, {DType::kFloat64, 8}};
  for (const auto& type : types) {
    for (int block = 1; block <= 32768; block *= 2) {
      for (const int rows : {1, 3, 137}) {
        for (const bool strided : {false, true}) {
          for (const bool signs : {false, true}) {
            const int vector = 16 / type.bytes;
            if ((strided || signs) && block < vector) continue;  // the operator copies or tiles these
            halo_train::HadamardArgs args{};
            args.dtype = type.dtype;
            args.axis = block;
            args.row_stride = strided ? block + vector : block;
            args.total = static_cast<int64_t>(rows) * block;
            args.block = block;
            args.scale = 0.5;
            // Allocations of the exact size, so that one element too many is found.
            const size_t bytes = (static_cast<size_t>(rows - 1) * args.row_stride + block) * type.bytes;
            void *x, *y, *s = nullptr;
            CHECK(cudaMalloc(&x, bytes));
            CHECK(cudaMalloc(&y, args.total * type.bytes));
            CHECK(cudaMemset(x, 0x3c, bytes));
            if (signs) {
              CHECK(cudaMalloc(&s, static_cast<size_t>(block) * type.bytes));
              CHECK(cudaMemset(s, 0xbc, static_cast<size_t>(block) * type.bytes));
            }
            args.x = x;
            args.y = y;
            args.signs = s;
            CHECK(halo_train::hadamard(args, nullptr));
            CHECK(cudaDeviceSynchronize());
            CHECK(cudaFree(x));
            CHECK(cudaFree(y));
            CHECK(cudaFree(s));
          }
        }
      }
    }
  }
  std::printf("done\n");
  return 0;
}
