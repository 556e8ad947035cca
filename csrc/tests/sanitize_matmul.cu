// The 8-bit products on small odd shapes, without PyTorch, for compute-sanitizer; every result is compared.
//
//   S="csrc/tests/sanitize_matmul.cu csrc/scaled_matmul.cu"
//
//   nvcc -std=c++17 -O3 -lineinfo -arch=sm_90a -Icsrc $S -o build/sanitize_matmul
//
//   compute-sanitizer --tool memcheck --error-exitcode 1 build/sanitize_matmul   # synccheck, racecheck

#include <cuda_bf16.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "sanitize.h"
#include "scaled_matmul.h"

namespace {

using halo_train::kScaleBlock;
using halo_train::QType;

float rounded(float x, float) { return x; }
float rounded(float x, __nv_bfloat16) { return __bfloat162float(__float2bfloat16(x)); }
float value(float x) { return x; }
float value(__nv_bfloat16 x) { return __bfloat162float(x); }

int64_t blocks_of(int64_t n) { return (n + kScaleBlock - 1) / kScaleBlock; }

// Operands of one value each: in e4m3 1 and 2. With `blocks` rows of a have a scale for each block, with
// `tiles` b has one for each tile of them.
template <typename Out>
void run(QType type, int64_t m, int64_t n, int64_t k, bool blocks, bool tiles) {
  const bool int8 = type == QType::kInt8;
  const Buffer a(m * k, int8 ? 3 : 0x38), b(n * k, int8 ? 5 : 0x40);
  const int64_t count = blocks ? blocks_of(k) : 1, across = blocks_of(n), of_b = tiles ? count * across : n;
  const Buffer c(sizeof(Out) * m * n), scales(sizeof(float) * (count * m + of_b));
  std::vector<float> factors(count * m + of_b);
  for (int64_t i = 0; i < count * m + of_b; ++i) {
    const bool power = tiles || (blocks && i < count * m);
    factors[i] = power ? std::exp2f(static_cast<float>(i % 5)) : 1.0f + 0.25f * (i % 7);
  }
  const float *const scale_a = factors.data(), *const scale_b = scale_a + count * m;
  std::vector<float> sums(m * across, 0.0f);
  for (int64_t block = 0; block < count; ++block) {
    const int64_t length = blocks ? std::min(kScaleBlock, k - block * kScaleBlock) : k;
    for (int64_t i = 0; i < m * across; ++i) {
      const float of_tile = tiles ? scale_b[block * across + i % across] : 1.0f;
      sums[i] += static_cast<float>((int8 ? 15 : 2) * length) * scale_a[block * m + i / across] * of_tile;
    }
  }
  CHECK(cudaMemcpy(scales.get(), factors.data(), sizeof(float) * factors.size(), cudaMemcpyHostToDevice));
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
  product.scale_b = scales.as<float>() + count * m;
  product.rows_a = true;
  product.blocks_a = blocks;
  product.rows_b = !tiles;
  product.tiles_b = tiles;
  product.dtype = sizeof(Out) == 4 ? halo_train::DType::kFloat32 : halo_train::DType::kBFloat16;
  CHECK(halo_train::scaled_matmul(product, nullptr));
  std::vector<Out> found(m * n);
  CHECK(cudaMemcpy(found.data(), c.get(), sizeof(Out) * m * n, cudaMemcpyDeviceToHost));
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      const float sum = sums[i * across + j / kScaleBlock];
      const float expected = rounded(tiles ? sum : sum * scale_b[j], Out{});
      if (value(found[i * n + j]) != expected) {
        std::printf("%s%s %lld x %lld x %lld: [%lld, %lld] is %f, not %f\n", int8 ? "int8" : "e4m3",
                    tiles    ? " in tiles"
                    : blocks ? " in blocks"
                             : "",
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
      {2500, 272, 2064},
  };
  for (const QType type : {QType::kInt8, QType::kE4M3}) {
    for (const auto& [m, n, k] : shapes) {
      for (const int form : {0, 1, 2}) {
        if (form > 0 && type == QType::kInt8) continue;
        run<float>(type, m, n, k, form > 0, form > 1);
        run<__nv_bfloat16>(type, m, n, k, form > 0, form > 1);
      }
    }
  }
  std::printf("done\n");
}
