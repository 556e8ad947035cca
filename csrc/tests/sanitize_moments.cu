// The kernels of moments.cu on small odd shapes, without PyTorch: for compute-sanitizer.
//     nvcc -std=c++17 -O3 -lineinfo -arch=sm_90 -Icsrc csrc/tests/sanitize_moments.cu csrc/moments.cu -o
//     build/sanitize_moments
//     for tool in memcheck racecheck synccheck; do compute-sanitizer --tool $tool --error-exitcode 1
//     build/sanitize_moments; done

#include "moments.h"
#include "sanitize.h"

namespace {

using halo_train::DType;
using halo_train::QType;

void run(DType dtype, int64_t size, int64_t batch, int64_t rows, int64_t cols) {
  const int64_t stride = cols + (cols % 8 == 0 ? 8 : 0), matrix = rows * stride;
  const int64_t elements = matrix * batch - (stride - cols);
  const Buffer x(size * elements), data(elements), scale(sizeof(float) * batch * rows),
      of_columns(sizeof(double) * batch * 2 * cols);
  const Buffer of_rows(sizeof(double) * batch * halo_train::kRoundingSums * rows),
      exponents(sizeof(int32_t) * batch * halo_train::kExponents, 0);
  const Buffer rounding_scratch(sizeof(double) * halo_train::rounding_moments_scratch(batch, rows, cols));
  halo_train::RoundingMomentsArgs r{};
  r.x = x.get();
  r.dtype = dtype;
  r.x_batch_stride = r.data_batch_stride = matrix;
  r.x_row_stride = r.data_row_stride = stride;
  r.data = data.get();
  r.scale = scale.as<float>();
  r.largest = 1.0f;
  r.counted = 3;
  r.batch = batch;
  r.rows = rows;
  r.cols = cols;
  r.of_rows = of_rows.as<double>();
  r.of_columns = of_columns.as<double>();
  r.exponents = exponents.as<int32_t>();
  r.scratch = rounding_scratch.as<double>();
  for (const QType qtype : {QType::kE4M3, QType::kE5M2, QType::kInt8}) {
    r.qtype = qtype;
    CHECK(halo_train::rounding_moments(r, nullptr));
  }
  const Buffer scratch(sizeof(double) * halo_train::moments_scratch(rows, cols, 0));
  halo_train::MomentsArgs m{};
  m.x = x.get();
  m.dtype = dtype;
  m.rows = rows;
  m.cols = cols;
  m.row_stride = stride;
  m.of_rows = of_rows.as<double>();
  m.of_columns = of_columns.as<double>();
  m.scratch = scratch.as<double>();
  CHECK(halo_train::moments(m, nullptr));
  CHECK(cudaDeviceSynchronize());
}

}  // namespace

int main() {
  const struct {
    DType dtype;
    int64_t size;
  } types[] = {{DType::kBFloat16, 2}, {DType::kFloat16, 2}, {DType::kFloat32, 4}};
  for (const auto& type : types) {
    for (const int64_t cols : {1, 7, 16, 264, 2048, 4099}) {
      for (const int64_t rows : {1, 5, 32, 70}) {
        run(type.dtype, type.size, 1, rows, cols);
        run(type.dtype, type.size, 3, rows, cols);
      }
    }
  }
  std::printf("done\n");
  return 0;
}
