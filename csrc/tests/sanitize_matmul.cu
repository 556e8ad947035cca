// The 8-bit products on small odd shapes, without PyTorch, for compute-sanitizer; every result is compared.
//
//   S="csrc/tests/sanitize_matmul.cu csrc/scaled_matmul.cu"
//
//   nvcc -std=c++17 -O3 -lineinfo -arch=sm_90a -Icsrc $S -o build/sanitize_matmul
//
//   compute-sanitizer --tool memcheck --error-exitcode 1 build/sanitize_matmul   # synccheck, racecheck

#include <cuda_bf16.h>

#include <vector>

#include "sanitize.h"
#include "scaled_matmul.h"

namespace {

using halo_train::QType;

float rounded(float x, float) { return x; }
float rounded(float x, __nv_bfloat16) { return __bfloat162float(__float2bfloat16(x)); }
float value(float x) { return x; }
float value(__nv_bfloat16 x) { return __bfloat162float(x); }

// Operands of one value each: in e4m3 1 and 2.
template <typename Out>
void run(QType type, int64_t m, int64_t n, int64_t k) {
  const bool int8 = type == QType::kInt8;
  const Buffer a(m * k, int8 ? 3 : 0x38), b(n * k, int8 ? 5 : 0x40);
  const Buffer c(sizeof(Out) * m * n), scales(sizeof(float) * (m + n));
  std::vector<float> by_row(m + n);
  for (int64_t i = 0; i < m + n; ++i) by_row[i] = 1.0f + 0.25f * static_cast<float>(i % 7);
  CHECK(cudaMemcpy(scales.get(), by_row.data(), sizeof(float) * (m + n), cudaMemcpyHostToDevice));
  halo_train::ScaledProduct product{};
  product.type = type;
  product.a = a.get();
  product.b = b.get();
  product.c = c.get();
  product.a_stride = k;
  product.b_stride = k;
  product.m = m;
  product.n = n;
  product.k = k;
  product.scale_a = scales.as<float>();
  product.scale_b = scales.as<float>() + m;
  product.rows_a = true;
  product.rows_b = true;
  product.dtype = sizeof(Out) == 4 ? halo_train::DType::kFloat32 : halo_train::DType::kBFloat16;
  CHECK(halo_train::scaled_matmul(product, nullptr));
  std::vector<Out> found(m * n);
  CHECK(cudaMemcpy(found.data(), c.get(), sizeof(Out) * m * n, cudaMemcpyDeviceToHost));
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      const float exact = static_cast<float>((int8 ? 15 : 2) * k) * by_row[i] * by_row[m + j];
      const float expected = rounded(exact, Out{});
      if (value(found[i * n + j]) != expected) {
        std::printf("%s %lld x %lld x %lld: [%lld, %lld] is %f, not %f\n", int8 ? "int8" : "e4m3",
                    static_cast<long long>(m), static_cast<long long>(n), static_cast<long long>(k),
                    static_cast<long long>(i), static_cast<long long>(j), value(found[i * n + j]), expected);
        std::exit(1);
      }
    }
  }
}

}  // namespace

int main() {
  constexpr int64_t shapes[][3] = {
      {1, 16, 16},        {129, 272, 144},
      {300, 48, 1040},    {2500, 2064, 528},  // more tiles than clusters, the wide ones
      {2500, 2064, 1040},                     // and more stages than the ring has
  };
  for (const QType type : {QType::kInt8, QType::kE4M3}) {
    for (const auto& [m, n, k] : shapes) {
      run<float>(type, m, n, k);
      run<__nv_bfloat16>(type, m, n, k);
    }
  }
  std::printf("done\n");
}
