// Every quantising kernel on small odd shapes, without PyTorch: for compute-sanitizer, which would take
// minutes with it.
//     nvcc -std=c++17 -O3 -lineinfo -arch=sm_90 -Icsrc csrc/tests/sanitize_quantize.cu csrc/quantize.cu
//     csrc/rotate_quantize*.cu csrc/transpose.cu -o build/sanitize_quantize
//     for tool in memcheck racecheck synccheck; do compute-sanitizer --tool $tool --error-exitcode 1
//     build/sanitize_quantize; done

#include <cstdio>
#include <cstdlib>
#include <vector>

#include "quantize.h"

#define CHECK(call)                                                                         \
  do {                                                                                      \
    const cudaError_t error = (call);                                                       \
    if (error != cudaSuccess) {                                                             \
      std::printf("%s:%d: %s: %s\n", __FILE__, __LINE__, #call, cudaGetErrorString(error)); \
      std::exit(1);                                                                         \
    }                                                                                       \
  } while (0)

namespace {

using halo_train::DType;
using halo_train::QType;

// An allocation of the exact size, so that one element too many is found.
struct Buffer {
  explicit Buffer(size_t bytes, int fill = 0x3c) {
    CHECK(cudaMalloc(&data, bytes));
    CHECK(cudaMemset(data, fill, bytes));
  }
  ~Buffer() { cudaFree(data); }
  Buffer(const Buffer&) = delete;
  template <typename T>
  T* as() const {
    return static_cast<T*>(data);
  }
  void* data = nullptr;
};

void run(DType dtype, size_t size, QType qtype, int64_t rows, int64_t cols, int block) {
  const int64_t gap = cols % 8 == 0 ? 8 : 0, stride = cols + gap;
  const Buffer x(size * ((rows - 1) * stride + cols)), col_scale(sizeof(float) * cols),
      row_scale(sizeof(float) * rows), q(rows * cols), scale(sizeof(float) * rows), amax(4, 0);
  halo_train::QuantizeRowsArgs args{};
  args.x = x.data;
  args.dtype = dtype;
  args.rows = rows;
  args.cols = cols;
  args.row_stride = stride;
  args.qtype = qtype;
  args.scale = scale.as<float>();
  const auto launch = [&] {
    CHECK(block > 1 ? halo_train::rotate_quantize(args, block, nullptr)
                    : halo_train::quantize_rows(args, nullptr));
  };
  for (const bool scaled : {false, true}) {
    args.col_scale = scaled ? col_scale.as<float>() : nullptr;
    args.q = q.data;
    if (block > 1 && !halo_train::can_rotate_quantize(args, block)) continue;
    args.tensor_amax = nullptr;
    launch();
    args.tensor_amax = amax.as<uint32_t>();
    launch();
    args.q = nullptr;
    launch();
  }
  if (block > 1) return;

  const Buffer scratch(sizeof(uint32_t) * halo_train::quantize_rows_scratch(cols, 0)),
      col_amax(sizeof(uint32_t) * cols), transposed(rows * cols), col_scales(sizeof(float) * cols),
      sums(sizeof(float) * cols), partial(sizeof(float) * halo_train::column_sums_scratch(rows, cols)),
      wide(sizeof(float) * rows * cols);
  args.q = q.data;
  args.tensor_amax = nullptr;
  args.row_scale = row_scale.as<float>();
  args.col_amax = col_amax.as<uint32_t>();
  args.partial_amax = scratch.as<uint32_t>();
  launch();
  halo_train::QuantizeTransposedArgs t{};
  t.x = x.data;
  t.dtype = dtype;
  t.rows = rows;
  t.cols = cols;
  t.row_stride = stride;
  t.row_scale = row_scale.as<float>();
  t.col_amax = col_amax.as<uint32_t>();
  t.qtype = qtype;
  t.q = transposed.data;
  t.scale = col_scales.as<float>();
  CHECK(halo_train::quantize_rows_transposed(t, nullptr));
  t.gather_col_amax = true;
  t.sums = sums.as<float>();
  t.partial_sums = partial.as<float>();
  CHECK(halo_train::quantize_rows_transposed(t, nullptr));
  CHECK(halo_train::transpose_bytes(q.data, transposed.data, rows, cols, nullptr));
  CHECK(halo_train::widen(x.data, dtype, rows, cols, stride, col_scale.as<float>(), wide.as<float>(), 0,
                          nullptr));
}

}  // namespace

// With an argument bfloat16 to e4m3 alone, for racecheck, which is slow.
int main(int argc, char**) {
  const struct {
    DType dtype;
    size_t size;
  } types[] = {{DType::kBFloat16, 2}, {DType::kFloat16, 2}, {DType::kFloat32, 4}};
  const struct {
    int64_t cols;
    int block;
  } shapes[] = {{1, 1},       {7, 1},        {16, 1},        {264, 1},       {4100, 1},
                {4096, 1},    {8192, 1},     {12288, 1},     {28672, 1},     {40000, 1},
                {48, 16},     {416, 32},     {1024, 1024},   {4128, 32},     {2304, 256},
                {2560, 512},  {3072, 1024},  {6144, 2048},   {4096, 4096},   {12288, 4096},
                {8192, 8192}, {24576, 8192}, {16384, 16384}, {32768, 16384}, {32768, 32768}};
  for (const auto& type : types) {
    for (const QType qtype : {QType::kE4M3, QType::kInt8}) {
      if (argc > 1 && (type.dtype != DType::kBFloat16 || qtype != QType::kE4M3)) continue;
      for (const auto& shape : shapes) {
        // The last of these is more than the thread blocks that stay, so that some take a second row.
        const int64_t many = shape.cols >= 12288   ? 270
                             : shape.block == 8192 ? 534
                             : shape.block == 4096 ? 1060
                                                   : 100;
        for (const int64_t rows : {int64_t{1}, int64_t{37}, many}) {
          run(type.dtype, type.size, qtype, rows, shape.cols, shape.block);
        }
      }
      CHECK(cudaDeviceSynchronize());
    }
  }
  std::printf("done\n");
  return 0;
}
