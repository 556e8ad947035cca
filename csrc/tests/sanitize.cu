// Every Hadamard kernel once, on small odd shapes, without PyTorch: for compute-sanitizer, which would take
// minutes with it. Arguments choose among rows, rounds, columns and matrix; none is all.
//     nvcc -std=c++17 -O3 -lineinfo -gencode=arch=compute_90a,code=sm_90a -Icsrc csrc/tests/sanitize.cu
//     csrc/hadamard*.cu -o build/sanitize
//     for tool in memcheck racecheck synccheck; do
//       compute-sanitizer --tool $tool --error-exitcode 1 build/sanitize
//     done

#include <cstring>

#include "hadamard.h"
#include "sanitize.h"

namespace {

using halo_train::DType;

struct Type {
  DType dtype;
  int bytes;
};

struct Form {
  int per_row = 1;  // blocks
  bool strided = false;
  bool columns = false;  // with signs and factors; of rounds, all three signs
  bool in_place = false;
};

void rows(const Type& type, int order, int block, int count, const Form& form) {
  const int vector = 16 / type.bytes;
  const int64_t axis = static_cast<int64_t>(form.per_row) * block;
  if ((form.strided || form.columns) && axis < vector) return;  // the operator copies or tiles these
  halo_train::HadamardArgs args{};
  args.dtype = type.dtype;
  args.axis = axis;
  args.row_stride = form.strided ? axis + vector : axis;
  args.total = count * axis;
  args.order = order;
  args.block = block;
  args.scale = 0.5;
  const Buffer x((static_cast<size_t>(count - 1) * args.row_stride + axis) * type.bytes);
  const Buffer y(form.in_place ? 0 : args.total * type.bytes);
  const Buffer signs(form.columns ? static_cast<size_t>(axis) * type.bytes : 0, 0xbc);
  const Buffer factors(form.columns ? static_cast<size_t>(axis) * (type.bytes == 8 ? 8 : 4) : 0);
  const Buffer matrix(order > 1 ? static_cast<size_t>(order) * order * type.bytes : 0);
  args.x = x.get();
  args.y = form.in_place ? x.get() : y.get();
  args.signs = signs.get();
  args.out_scale = factors.get();
  args.matrix = matrix.get();
  CHECK(halo_train::hadamard(args, nullptr));
  CHECK(cudaDeviceSynchronize());
}

void rounds(const Type& type, int block, int count, const Form& form) {
  const int vector = 16 / type.bytes;
  const int64_t axis = static_cast<int64_t>(form.per_row) * block;
  halo_train::HadamardRoundsArgs args{};
  args.dtype = type.dtype;
  args.axis = axis;
  args.row_stride = form.strided ? axis + vector : axis;
  args.total = count * axis;
  args.block = block;
  args.scale = 0.5;
  const Buffer x((static_cast<size_t>(count - 1) * args.row_stride + axis) * type.bytes);
  const Buffer y(form.in_place ? 0 : args.total * type.bytes);
  const size_t bits = static_cast<size_t>(axis) / 8;
  const Buffer first(form.columns ? bits : 0), middle(bits), last(form.columns ? bits : 0);
  args.x = x.get();
  args.y = form.in_place ? x.get() : y.get();
  args.first = first.as<const uint8_t>();
  args.middle = middle.as<const uint8_t>();
  args.last = last.as<const uint8_t>();
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

int main(int count, char** arguments) {
  const auto asked = [&](const char* part) {
    for (int i = 1; i < count; ++i) {
      if (std::strcmp(arguments[i], part) == 0) return true;
    }
    return count == 1;
  };
  const Type types[] = {
      {DType::kBFloat16, 2}, {DType::kFloat16, 2}, {DType::kFloat32, 4}, {DType::kFloat64, 8}};
  // Rows of 300 blocks of the largest kinds take turns on every multiprocessor.
  for (const bool given : {false, true}) {
    const Form dense{1, false, given, false}, gaps{1, true, given, false};
    const Form in_place{1, false, given, true}, two{2, true, given, false};
    for (const Type& type : types) {
      for (int block = 1; asked("rows") && block <= 32768; block *= 2) {
        rows(type, 1, block, 1, gaps);
        rows(type, 1, block, 3, two);
        rows(type, 1, block, 137, dense);
        rows(type, 1, block, type.bytes < 8 ? 300 : 3, in_place);
      }
      if (type.bytes > 4) continue;
      for (int block = 64; asked("rounds") && block <= 32768; block *= 2) {
        rounds(type, block, 1, gaps);
        rounds(type, block, 3, two);
        rounds(type, block, 137, dense);
        rounds(type, block, 300, in_place);
      }
      for (int block = 2; asked("columns") && block <= 32768; block *= 2) {
        for (const int inner : {2, 70}) columns(type, block, inner, given);
      }
      if (type.bytes > 2 || !asked("matrix")) continue;
      for (const int order : {12, 20, 28, 40, 56, 60}) {
        for (int power = 64; power <= (order > 16 && order <= 32 ? 1024 : 512); power *= 2) {
          rows(type, order, order * power, 1, gaps);
          rows(type, order, order * power, 3, two);
          rows(type, order, order * power, 301, dense);
        }
      }
    }
  }
  std::printf("done\n");
  return 0;
}
