// Operators that others are composed of: those of product_bindings.cpp.

#pragma once

#include <optional>
#include <tuple>

#include "binding_helpers.h"

namespace halo_train::operators {

std::tuple<Tensor, Tensor> quantize_rows(const Tensor& x, ScalarType dtype, int64_t block,
                                         const std::optional<Tensor>& col_scale);
std::tuple<Tensor, Tensor> quantize_rows_transposed(const Tensor& x, ScalarType dtype,
                                                    const std::optional<Tensor>& row_scale);
std::tuple<Tensor, Tensor> quantize_tiles(const Tensor& x, ScalarType dtype,
                                          const std::optional<Tensor>& divisor,
                                          const std::optional<Tensor>& row_scale,
                                          const std::optional<Tensor>& col_scale);
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> quantize_grad(const Tensor& e, ScalarType dtype,
                                                                 const std::optional<Tensor>& col_scale,
                                                                 const Tensor& row_scale, bool column_sums);
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> quantize_grad_blocks(
    const Tensor& e, ScalarType dtype, const std::optional<Tensor>& col_scale, const Tensor& row_scale,
    bool column_sums);
Tensor transpose_bytes(const Tensor& x);
void hadamard_(Tensor x, int64_t block, double scale, const std::optional<Tensor>& signs,
               const std::optional<Tensor>& out_scale, const std::optional<Tensor>& matrix);

}  // namespace halo_train::operators
