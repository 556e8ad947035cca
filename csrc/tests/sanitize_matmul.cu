// The int8 product on small odd shapes, without PyTorch, for compute-sanitizer; every result is compared.
//     nvcc -std=c++17 -O3 -lineinfo -arch=sm_90a -Icsrc csrc/tests/sanitize_matmul.cu csrc/int8_matmul.cu
//     -o build/sanitize_matmul
//     for tool in memcheck synccheck racecheck; do compute-sanitizer --tool $tool --error-exitcode 1
//     build/sanitize_matmul; done

#include <cmath>
#include <vector>

#include "int8_matmul.h"
#include "sanitize.h"

namespace {

void run(int64_t m, int64_t n, int64_t k) {
  const Buffer a(m * k, 3), b(n * k, 5), c(sizeof(float) * m * n), scales(sizeof(float) * (m + n));
  std::vector<float> by_row(m + n);
  for (int64_t i = 0; i < m + n; ++i) by_row[i] = 1.0f + 0.25f * static_cast<float>(i % 7);
  CHECK(cudaMemcpy(scales.get(), by_row.data(), sizeof(float) * (m + n), cudaMemcpyHostToDevice));
  halo_train::Int8Product product{};
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
  product.dtype = halo_train::DType::kFloat32;
  CHECK(halo_train::int8_matmul(product, nullptr));
  std::vector<float> found(m * n);
  CHECK(cudaMemcpy(found.data(), c.get(), sizeof(float) * m * n, cudaMemcpyDeviceToHost));
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      const float expected = static_cast<float>(15 * k) * by_row[i] * by_row[m + j];
      if (found[i * n + j] != expected) {
        std::printf("%lld x %lld x %lld: [%lld, %lld] is %f, not %f\n", static_cast<long long>(m),
                    static_cast<long long>(n), static_cast<long long>(k), static_cast<long long>(i),
                    static_cast<long long>(j), found[i * n + j], expected);
        std::exit(1);
      }
    }
  }
  product.dtype = halo_train::DType::kBFloat16;
  CHECK(halo_train::int8_matmul(product, nullptr));
  CHECK(cudaDeviceSynchronize());
}

}  // namespace

int main() {
  run(1, 16, 16);
  run(129, 272, 144);
  run(300, 48, 1040);
  run(2500, 2064, 528);  // more tiles than clusters, the wide ones
  std::printf("done\n");
}
