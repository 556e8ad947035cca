// Every quantising kernel on small odd shapes, without PyTorch: for compute-sanitizer, which would take
// minutes with it.
//     nvcc -std=c++17 -O3 -lineinfo -arch=sm_90 -Icsrc csrc/tests/sanitize_quantize.cu csrc/*quantize*.cu
//     csrc/gated_grad.cu csrc/*grad_blocks.cu csrc/producers.cu csrc/transpose.cu -o build/sanitize_quantize
//     for tool in memcheck synccheck; do compute-sanitizer --tool $tool --error-exitcode 1
//     build/sanitize_quantize; done
//     for part in 0 1 2 3 4 5 6 7; do compute-sanitizer --tool racecheck --error-exitcode 1
//     build/sanitize_quantize $part 8 & done

#include <algorithm>
#include <iterator>
#include <vector>

#include "quantize.h"
#include "sanitize.h"

namespace {

using halo_train::DType;
using halo_train::QType;

void run(DType dtype, size_t size, QType qtype, int64_t rows, int64_t cols, int block) {
  const int64_t gap = cols % 8 == 0 ? 8 : 0, stride = cols + gap;
  const Buffer x(size * ((rows - 1) * stride + cols)), col_scale(sizeof(float) * cols),
      row_scale(sizeof(float) * rows), q(rows * cols), scale(sizeof(float) * rows), amax(4, 0);
  halo_train::QuantizeRowsArgs args{};
  args.x = x.get();
  args.dtype = dtype;
  args.rows = rows;
  args.cols = cols;
  args.row_stride = stride;
  args.qtype = qtype;
  args.scale = scale.as<float>();
  const auto launch = [&] {
    if (block == 1) return CHECK(halo_train::quantize_rows(args, nullptr));
    const cudaError_t error = halo_train::rotate_quantize(args, block, nullptr);
    if (error != cudaErrorNotSupported) CHECK(error);
  };
  for (const bool scaled : {false, true}) {
    args.col_scale = scaled ? col_scale.as<float>() : nullptr;
    args.q = q.get();
    args.tensor_amax = nullptr;
    launch();
    args.tensor_amax = amax.as<uint32_t>();
    launch();
    args.q = nullptr;
    launch();
  }
  if (block > 1) return;

  const Buffer transposed(rows * cols), col_scales(sizeof(float) * cols), sums(sizeof(float) * cols),
      partial(sizeof(float) * halo_train::column_sums_scratch(rows, cols)), wide(sizeof(float) * rows * cols),
      both(sizeof(uint32_t) * (rows + cols));
  halo_train::QuantizeGradArgs g{};
  g.x = x.get();
  g.dtype = dtype;
  g.rows = rows;
  g.cols = cols;
  g.row_stride = stride;
  g.row_scale = row_scale.as<float>();
  g.qtype = qtype;
  g.forms = {nullptr, nullptr, transposed.as<uint8_t>(), col_scales.as<float>()};
  g.amax = both.as<uint32_t>();
  CHECK(halo_train::quantize_grad(g, nullptr));
  g.forms.rows = q.as<uint8_t>();
  g.forms.row_scales = scale.as<float>();
  g.col_scale = col_scale.as<float>();
  CHECK(halo_train::quantize_grad(g, nullptr));
  g.sums = sums.as<float>();
  g.partial_sums = partial.as<float>();
  CHECK(halo_train::quantize_grad(g, nullptr));
  if (qtype == QType::kE4M3) {
    const auto blocks = [](int64_t n) { return (n + halo_train::kScaleBlock - 1) / halo_train::kScaleBlock; };
    const Buffer row_blocks(sizeof(float) * blocks(cols) * rows),
        col_blocks(sizeof(float) * blocks(rows) * cols),
        block_sums(sizeof(float) * halo_train::block_sums_scratch(rows, cols));
    g.forms.row_scales = row_blocks.as<float>();
    g.forms.col_scales = col_blocks.as<float>();
    g.partial_sums = block_sums.as<float>();
    CHECK(halo_train::quantize_grad_blocks(g, nullptr));
    g.row_divisor = g.row_scale;
    CHECK(halo_train::quantize_tiles(g, nullptr));
    g.row_divisor = nullptr;
    g.sums = nullptr;
    g.col_scale = nullptr;
    CHECK(halo_train::quantize_grad_blocks(g, nullptr));
    CHECK(halo_train::quantize_tiles(g, nullptr));
    g.row_scale = nullptr;
    CHECK(halo_train::quantize_tiles(g, nullptr));
  }
  CHECK(halo_train::transpose_bytes(q.get(), transposed.get(), rows, cols, nullptr));
  CHECK(halo_train::widen(x.get(), dtype, rows, cols, stride, col_scale.as<float>(), wide.as<float>(), 0,
                          nullptr));
}

// Norms and gated activations; what the fused kernels do not take goes the other way.
void run_fused(DType dtype, size_t size, QType qtype, int64_t rows, int64_t cols, int block) {
  const int64_t stride = cols + (cols % 8 == 0 ? 8 : 0);
  const size_t elements = (rows - 1) * stride + cols;
  const Buffer x(size * elements), up(size * elements), vector(size * cols), d(sizeof(float) * cols),
      statistics(2 * sizeof(float) * rows), q(rows * cols), scale(sizeof(float) * rows),
      wide(sizeof(float) * rows * cols);
  const halo_train::RowsOutput out{rows, cols, qtype, q.get(), scale.as<float>(), 0};
  for (int kind = 0; kind < 3; ++kind) {  // RMSNorm with a weight of float32 and of the type of x, LayerNorm
    const bool center = kind == 2;
    halo_train::NormArgs norm{};
    norm.x = x.get();
    norm.dtype = dtype;
    norm.row_stride = stride;
    norm.weight =
        kind == 0 ? halo_train::Vector{d.get(), DType::kFloat32} : halo_train::Vector{vector.get(), dtype};
    if (center) norm.bias = norm.weight;
    norm.col_scale = d.as<float>();
    norm.eps = 1e-5f;
    norm.center = center;
    norm.mean = statistics.as<float>();
    norm.rstd = statistics.as<float>() + rows;
    const cudaError_t error = halo_train::norm_quantize(norm, out, block, nullptr);
    CHECK(error == cudaErrorNotSupported
              ? halo_train::norm_rows(norm, rows, cols, wide.as<float>(), 0, nullptr)
              : error);
  }
  for (const auto activation : {halo_train::Activation::kSilu, halo_train::Activation::kGelu}) {
    halo_train::GatedArgs gated{x.get(), up.get(), dtype, stride, stride, activation, d.as<float>()};
    const cudaError_t error = halo_train::gated_quantize(gated, out, block, nullptr);
    CHECK(error == cudaErrorNotSupported
              ? halo_train::gated_rows(gated, rows, cols, wide.as<float>(), 0, nullptr)
              : error);
    if (block > 1) continue;
    const Buffer bytes(4 * rows * cols), scales(2 * sizeof(float) * (rows + cols)),
        amax(2 * sizeof(uint32_t) * (rows + cols));
    halo_train::GatedGradArgs grad{};
    grad.dh = x.get();
    grad.gate = up.get();
    grad.up = x.get();
    grad.dtype = dtype;
    grad.rows = rows;
    grad.cols = cols;
    grad.dh_stride = grad.gate_stride = grad.up_stride = stride;
    grad.activation = activation;
    grad.col_scale[1] = d.as<float>();
    grad.qtype = qtype;
    for (int o = 0; o < 2; ++o) {
      uint8_t* const data = bytes.as<uint8_t>() + 2 * o * rows * cols;
      float* const floats = scales.as<float>() + o * (rows + cols);
      grad.forms[o] = {data, floats, data + rows * cols, floats + rows};
    }
    grad.amax = amax.as<uint32_t>();
    CHECK(halo_train::gated_grad_quantize(grad, nullptr));
    if (qtype != QType::kE4M3) continue;
    const int64_t blocks = (std::max(rows, cols) + halo_train::kScaleBlock - 1) / halo_train::kScaleBlock;
    const Buffer block_scales(2 * sizeof(float) * blocks * (rows + cols));
    for (int o = 0; o < 2; ++o) {
      float* const floats = block_scales.as<float>() + o * blocks * (rows + cols);
      grad.forms[o].row_scales = floats;
      grad.forms[o].col_scales = floats + blocks * rows;
    }
    CHECK(halo_train::gated_grad_blocks(grad, nullptr));
  }
}

}  // namespace

// With `part` and `parts` that share of the shapes, bfloat16 to e4m3 alone, few rows before many: for
// racecheck, which is slow.
int main(int argc, char** argv) {
  const bool shared = argc == 3;
  const size_t part = shared ? std::strtoul(argv[1], nullptr, 10) : 0;
  const size_t parts = shared ? std::strtoul(argv[2], nullptr, 10) : 1;
  const struct {
    DType dtype;
    size_t size;
  } types[] = {{DType::kBFloat16, 2}, {DType::kFloat16, 2}, {DType::kFloat32, 4}};
  const struct {
    int64_t cols;
    int block;
  } shapes[] = {{1, 1},         {7, 1},        {16, 1},       {264, 1},      {4100, 1},      {4096, 1},
                {8192, 1},      {12288, 1},    {28672, 1},    {40000, 1},    {48, 16},       {416, 32},
                {1024, 1024},   {4128, 32},    {2304, 256},   {2560, 512},   {3072, 1024},   {6144, 2048},
                {4096, 4096},   {12288, 4096}, {8192, 8192},  {24576, 8192}, {16384, 16384}, {32768, 16384},
                {32768, 32768}, {8960, 256},   {18432, 2048}, {28672, 4096}, {16384, 4096}};
  for (const auto& type : types) {
    for (const QType qtype : {QType::kE4M3, QType::kInt8}) {
      if (shared && (type.dtype != DType::kBFloat16 || qtype != QType::kE4M3)) continue;
      for (const bool few : {true, false}) {
        for (size_t i = part; i < std::size(shapes); i += parts) {
          const auto& shape = shapes[i];
          // More rows than the thread blocks hold, so that some take a second one; of gradients, vectors down
          // the columns.
          const int64_t many = shape.cols >= 16384                     ? 664
                               : shape.cols >= 12288                   ? 272
                               : shape.block == 8192                   ? 544
                               : shape.block > 1 && shape.cols <= 2048 ? 2208
                                                                       : 1072;
          for (const int64_t rows : few ? std::vector<int64_t>{1, 37} : std::vector<int64_t>{many}) {
            run(type.dtype, type.size, qtype, rows, shape.cols, shape.block);
            run_fused(type.dtype, type.size, qtype, rows, shape.cols, shape.block);
          }
          if (!shared) continue;
          CHECK(cudaDeviceSynchronize());
          std::printf("%lld columns, block %d, %s rows\n", static_cast<long long>(shape.cols), shape.block,
                      few ? "few" : "many");
          std::fflush(stdout);
        }
      }
      CHECK(cudaDeviceSynchronize());
    }
  }
  std::printf("done\n");
  return 0;
}
