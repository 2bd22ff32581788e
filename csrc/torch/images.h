// Images (N, C, *spatial) of one to three axes, as the operators of the conv family take them.
#pragma once

#include "cpu/conv.h"
#include "torch/common.h"

namespace fmk::ops {

using Ints = std::vector<int64_t>;

inline ScalarType accumulated_as(const Tensor& model) {
  return model.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Whether the elements lie in memory with the channels innermost or as contiguous, without gaps.
inline bool dense_in(const Tensor& tensor, bool channels_last) {
  if (tensor.numel() == 0) return true;
  int64_t step = 1;
  const auto follows = [&](int64_t dim) {
    const bool fits = tensor.size(dim) == 1 || tensor.stride(dim) == step;
    step *= tensor.size(dim);
    return fits;
  };
  if (channels_last && !follows(1)) return false;
  for (int64_t dim = tensor.dim() - 1; dim >= 0; --dim)
    if (!(channels_last && dim == 1) && !follows(dim)) return false;
  return true;
}

// True for channels last, false for contiguous (also if it is both), an error for anything else.
inline bool image_layout(const Tensor& image, const char* name) {
  check_cpu(image, name);
  FMK_CHECK(image.dim() >= 3 && image.dim() <= 5, name, ": expected three to five dimensions, got ",
            image.dim());
  if (image.is_contiguous()) return false;
  FMK_CHECK(dense_in(image, true), name, ": expected a contiguous or channels_last tensor");
  return true;
}

inline void check_image(const Tensor& image, const char* name, ScalarType dtype, const Ints& shape,
                        bool channels_last) {
  check_cpu(image, name);
  FMK_CHECK(image.scalar_type() == dtype, name, ": unexpected dtype");
  check_shape(image, name, shape);
  FMK_CHECK(dense_in(image, channels_last), name, ": expected the memory format of input");
}

inline Tensor allocate_image(const Tensor& like, const Ints& shape, bool channels_last,
                             std::optional<ScalarType> dtype = std::nullopt) {
  if (!channels_last) return allocate(like, shape, dtype);
  std::vector<size_t> order{0};
  for (size_t axis = 2; axis < shape.size(); ++axis) order.push_back(axis);
  order.push_back(1);
  return allocate_strided(like, shape, strides_of(shape, order), dtype);
}

inline void check_values(const Ints& values, const char* name, size_t count, int64_t lowest) {
  FMK_CHECK(values.size() == count, name, ": expected ", count, " values, got ", values.size());
  for (int64_t value : values)
    FMK_CHECK(value >= lowest && value <= INT32_MAX, name, ": expected values from ", lowest,
              " on, got ", value);
}

// A vector per channel in the type that `model` is accumulated in.
inline void check_vector(const OptionalTensor& vector, const char* name, const Tensor& model,
                         int64_t channels) {
  if (!vector) return;
  check_cpu(*vector, name);
  FMK_CHECK(vector->scalar_type() == accumulated_as(model), name,
            ": expected float32, or float64 for a float64 input");
  check_shape(*vector, name, {channels});
  check_contiguous(*vector, name);
}

// Number of places a dilated kernel fits in.
inline int64_t places(int64_t size, int64_t kernel, int64_t stride, int64_t before, int64_t after,
                      int64_t dilation) {
  const int64_t room = size + before + after - dilation * (kernel - 1) - 1;
  return room < 0 ? 0 : room / stride + 1;
}

// The pool of an epilogue over images of two axes; the shape after it in `output`.
inline PoolShape check_pool(const std::optional<std::string>& kind, const Ints& window,
                            const Ints& image, Ints* output) {
  *output = image;
  if (!kind) return {};
  FMK_CHECK(*kind == "max" || *kind == "avg", "pool: expected 'max' or 'avg'");
  FMK_CHECK(image.size() == 4, "pool: expected an image of two axes");
  check_values(window, "window", 6, 0);
  PoolShape q{};
  q.kind = *kind == "max" ? PoolKind::kMax : PoolKind::kAverage;
  q.kernel_h = window[0], q.kernel_w = window[1];
  q.stride_h = window[2], q.stride_w = window[3];
  q.padding_h = window[4], q.padding_w = window[5];
  q.dilation_h = q.dilation_w = 1;
  q.count_padding = true;
  FMK_CHECK(q.kernel_h >= 1 && q.kernel_w >= 1 && q.kernel_h <= 3 && q.kernel_w <= 3 &&
                q.stride_h >= 1 && q.stride_w >= 1 && 2 * q.padding_h <= q.kernel_h &&
                2 * q.padding_w <= q.kernel_w,
            "window: expected at most 3x3 and paddings of at most half of that");
  q.out_height = places(image[2], q.kernel_h, q.stride_h, q.padding_h, q.padding_h, 1);
  q.out_width = places(image[3], q.kernel_w, q.stride_w, q.padding_w, q.padding_w, 1);
  FMK_CHECK(q.out_height > 0 && q.out_width > 0, "window: larger than the image");
  *output = {image[0], image[1], q.out_height, q.out_width};
  return q;
}

}  // namespace fmk::ops
