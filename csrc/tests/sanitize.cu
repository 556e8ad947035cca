// Every Hadamard kernel once, on small odd shapes, without PyTorch: for compute-sanitizer, which would take
// minutes with it.
//     nvcc -std=c++17 -O3 -lineinfo -arch=sm_90 -Icsrc csrc/tests/sanitize.cu csrc/hadamard*.cu -o
//     build/sanitize for tool in memcheck racecheck synccheck; do compute-sanitizer --tool $tool
//     --error-exitcode 1 build/sanitize; done

#include "hadamard.h"
#include "sanitize.h"

namespace {

using halo_train::DType;

struct Type {
  DType dtype;
  int bytes;
};

void rows(const Type& type, int order, int block, int count, bool strided, bool columns) {
  const int vector = 16 / type.bytes;
  if ((strided || columns) && block < vector) return;  // the operator copies or tiles these
  halo_train::HadamardArgs args{};
  args.dtype = type.dtype;
  args.axis = block;
  args.row_stride = strided ? block + vector : block;
  args.total = static_cast<int64_t>(count) * block;
  args.order = order;
  args.block = block;
  args.scale = 0.5;
  const Buffer x((static_cast<size_t>(count - 1) * args.row_stride + block) * type.bytes);
  const Buffer y(args.total * type.bytes);
  const Buffer signs(columns ? static_cast<size_t>(block) * type.bytes : 0, 0xbc);
  const Buffer factors(columns ? static_cast<size_t>(block) * (type.bytes == 8 ? 8 : 4) : 0);
  const Buffer matrix(order > 1 ? static_cast<size_t>(order) * order * type.bytes : 0);
  args.x = x.get();
  args.y = y.get();
  args.signs = signs.get();
  args.out_scale = factors.get();
  args.matrix = matrix.get();
  CHECK(halo_train::hadamard(args, nullptr));
  CHECK(cudaDeviceSynchronize());
}

void rounds(const Type& type, int block, int count, bool strided, bool outer) {
  const int vector = 16 / type.bytes;
  halo_train::HadamardRoundsArgs args{};
  args.dtype = type.dtype;
  args.axis = block;
  args.row_stride = strided ? block + vector : block;
  args.total = static_cast<int64_t>(count) * block;
  args.block = block;
  args.scale = 0.5;
  const Buffer x((static_cast<size_t>(count - 1) * args.row_stride + block) * type.bytes);
  const Buffer y(args.total * type.bytes);
  const Buffer first(outer ? block / 8 : 0), middle(block / 8), last(outer ? block / 8 : 0);
  args.x = x.get();
  args.y = y.get();
  args.first = static_cast<const uint8_t*>(first.get());
  args.middle = static_cast<const uint8_t*>(middle.get());
  args.last = static_cast<const uint8_t*>(last.get());
  CHECK(halo_train::hadamard_rounds(args, nullptr));
  CHECK(cudaDeviceSynchronize());
}

void columns(const Type& type, int block, int inner, bool signs) {
  halo_train::HadamardColumnsArgs args{};
  args.dtype = type.dtype;
  args.outer = 2;
  args.axis = block;
  args.inner = inner;
  args.block = block;
  args.scale = 0.5;
  const size_t total = static_cast<size_t>(2) * block * inner;
  const Buffer x(total * type.bytes), y(total * type.bytes);
  const Buffer vector(signs ? block * sizeof(float) : 0);
  const Buffer middle(halo_train::hadamard_columns_needs_middle(block) ? total * sizeof(float) : 0);
  args.x = x.get();
  args.y = y.get();
  args.signs = static_cast<const float*>(vector.get());
  args.middle = middle.get();
  CHECK(halo_train::hadamard_columns(args, nullptr));
  CHECK(cudaDeviceSynchronize());
}

}  // namespace

int main() {
  const Type types[] = {
      {DType::kBFloat16, 2}, {DType::kFloat16, 2}, {DType::kFloat32, 4}, {DType::kFloat64, 8}};
  for (const Type& type : types) {
    for (const bool given : {false, true}) {
      for (int block = 1; block <= 32768; block *= 2) {
        for (const int count : {1, 3, 137}) {
          for (const bool strided : {false, true}) rows(type, 1, block, count, strided, given);
        }
        if (type.bytes < 8 && block >= 64) {
          for (const int count : {1, 3, 137}) rounds(type, block, count, count == 3, given);
        }
        if (type.bytes < 8 && block > 1) {
          for (const int inner : {2, 70}) columns(type, block, inner, given);
        }
      }
      if (type.bytes > 2) continue;
      for (const int order : {12, 20, 28, 40, 56, 60}) {
        for (int power = 64; power <= (order > 16 && order <= 32 ? 1024 : 512); power *= 2) {
          for (const int count : {1, 7, 301}) rows(type, order, order * power, count, count > 1, given);
        }
      }
    }
  }
  std::printf("done\n");
  return 0;
}
