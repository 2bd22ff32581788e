// What the convolution operators check, and what they are told.
#pragma once

#include <algorithm>
#include <charconv>
#include <optional>
#include <string>

#include "torch/images.h"

namespace fmk::ops {

// What a convolution needs to know of an image.
struct Image {
  DType dtype;
  bool channels_last;
  Ints size;

  bool operator==(const Image&) const = default;
};
inline Image image_of(const Tensor& input) {
  const bool channels_last = image_layout(input, "input");
  return {dtype_of(input, "input"), channels_last, shape_of(input)};
}

struct Conv {
  ConvShape shape;
  PoolShape pool;
  Ints conv_size, output_size;
  int64_t output_channels;
};

inline PaddingMode padding_mode_from(const std::string& name) {
  static const std::array<const char*, 4> names{"zeros", "reflect", "replicate", "circular"};
  for (size_t i = 0; i < names.size(); ++i)
    if (name == names[i]) return static_cast<PaddingMode>(i);
  FMK_CHECK(false, "padding_mode: unknown name '", name, "'");
  return PaddingMode::kZeros;
}

// One axis of a convolution, in front of which others may be missing.
struct AxisOptions {
  int64_t kernel = 1, stride = 1, before = 0, after = 0, dilation = 1;
};
struct AllOptions {
  AxisOptions axis[3];  // depth, height, width
};

inline ConvShape check_weight(const Tensor& weight, const Ints& stride, const Ints& padding,
                              const Ints& dilation, int64_t groups, bool transposed,
                              const std::string& padding_mode, AllOptions* options) {
  check_cpu(weight, "weight");
  FMK_CHECK(weight.dim() >= 3 && weight.dim() <= 5 && weight.numel() > 0,
            "weight: expected three to five dimensions, none of them empty");
  const size_t axes = static_cast<size_t>(weight.dim() - 2);
  check_values(stride, "stride", axes, 1);
  check_values(padding, "padding", 2 * axes, transposed ? -INT32_MAX : 0);
  check_values(dilation, "dilation", axes, 1);
  FMK_CHECK(groups >= 1 && weight.size(0) % groups == 0,
            "groups: expected a divisor of the weight's first dimension, got ", groups);
  ConvShape s{};
  s.dtype = dtype_of(weight, "weight");
  s.transposed = transposed;
  s.padding_mode = padding_mode_from(padding_mode);
  FMK_CHECK(!transposed || s.padding_mode == PaddingMode::kZeros,
            "padding_mode: expected zeros if transposed");
  s.axes = static_cast<int32_t>(axes);
  s.channels = weight.size(1) * groups;
  s.out_channels = weight.size(0);
  s.groups = groups;
  AxisOptions* all = options->axis;
  for (size_t i = 0; i < axes; ++i) {
    AxisOptions& axis = all[3 - axes + i];
    axis = {weight.size(static_cast<int64_t>(i) + 2), stride[i], padding[2 * i], padding[2 * i + 1],
            dilation[i]};
    FMK_CHECK(axis.before >= 0, "padding: expected values from 0 on before an axis");
  }
  s.kernel_d = all[0].kernel, s.kernel_h = all[1].kernel, s.kernel_w = all[2].kernel;
  s.stride_d = all[0].stride, s.stride_h = all[1].stride, s.stride_w = all[2].stride;
  s.padding_d = all[0].before, s.padding_h = all[1].before, s.padding_w = all[2].before;
  s.dilation_d = all[0].dilation, s.dilation_h = all[1].dilation, s.dilation_w = all[2].dilation;
  return s;
}

// The sizes on the other side of the convolution, and the checks that keep kernels inside.
inline int64_t other_size(const ConvShape& s, const AxisOptions& a, int64_t size) {
  if (s.transposed) {
    const int64_t full = (size - 1) * a.stride + a.dilation * (a.kernel - 1) + 1;
    FMK_CHECK(full <= (int64_t(1) << 40), "stride: the output is too large");
    const int64_t out = full - a.before - a.after;
    // The convolution must come back to this size: what torch calls output_padding is small.
    FMK_CHECK(out > 0 && out <= INT32_MAX && a.before - a.after < std::max(a.stride, a.dilation) &&
                  places(out, a.kernel, a.stride, a.before, a.after, a.dilation) == size,
              "padding: leaves no output, or more than fits");
    return out;
  }
  const int64_t out = places(size, a.kernel, a.stride, a.before, a.after, a.dilation);
  FMK_CHECK(out > 0, "input: smaller than the kernel");
  const int64_t limit = s.padding_mode == PaddingMode::kReflect    ? size - 1
                        : s.padding_mode == PaddingMode::kCircular ? size
                                                                   : INT32_MAX;
  FMK_CHECK(a.before <= limit && a.after <= limit, "padding: too large for this padding_mode");
  return out;
}

inline Conv check_conv(const Image& input, const Tensor& weight, const Ints& stride,
                       const Ints& padding, const Ints& dilation, int64_t groups, bool transposed,
                       const std::string& padding_mode, const std::optional<std::string>& pool,
                       const Ints& window) {
  Conv c{};
  AllOptions options;
  c.shape =
      check_weight(weight, stride, padding, dilation, groups, transposed, padding_mode, &options);
  ConvShape& s = c.shape;
  s.channels_last = input.channels_last;
  FMK_CHECK(s.dtype == input.dtype, "weight: expected the dtype of input");
  const int64_t dims = weight.dim(), channels = transposed ? s.out_channels : s.channels;
  FMK_CHECK(static_cast<int64_t>(input.size.size()) == dims, "input: expected ", dims,
            " dimensions, got ", input.size.size());
  FMK_CHECK(input.size[1] == channels, "input: expected ", channels, " channels, got ",
            input.size[1]);
  s.batch = input.size[0];
  int64_t near[3] = {1, 1, 1}, far[3] = {1, 1, 1};
  c.output_channels = transposed ? s.channels : s.out_channels;
  c.conv_size = {s.batch, c.output_channels};
  for (int i = 3 - s.axes; i < 3; ++i) {
    near[i] = input.size[i - 3 + dims];
    far[i] = other_size(s, options.axis[i], near[i]);
    c.conv_size.push_back(far[i]);
  }
  const int64_t *in = transposed ? far : near, *out = transposed ? near : far;
  s.depth = in[0], s.height = in[1], s.width = in[2];
  s.out_depth = out[0], s.out_height = out[1], s.out_width = out[2];
  c.pool = check_pool(pool, window, c.conv_size, &c.output_size);
  FMK_CHECK(!pool || !transposed || (s.stride_h == 1 && s.stride_w == 1),
            "pool: not fused into a transposed convolution of a stride above 1");
  return c;
}

inline PackedHeader header_of(const ConvShape& s, ConvAlgorithm algorithm) {
  return packed_header(PackedKind::kConv2d, s.dtype,
                       {s.out_channels, s.channels, s.kernel_d * s.kernel_h, s.kernel_w,
                        s.transposed ? -s.groups : s.groups},
                       static_cast<int32_t>(algorithm));
}

// The algorithm that a packed weight was packed for. panels_of checks everything else.
inline ConvAlgorithm packed_algorithm(const Tensor& packed) {
  PackedHeader header;
  check_cpu(packed, "packed_weight");
  FMK_CHECK(packed.scalar_type() == ScalarType::Byte && packed.is_contiguous() &&
                packed.numel() >= static_cast<int64_t>(sizeof header),
            "packed_weight: expected the result of conv_pack_weight");
  std::memcpy(&header, packed.const_data_ptr(), sizeof header);
  FMK_CHECK(header.algorithm >= 0 && header.algorithm <= 1, "packed_weight: damaged");
  return static_cast<ConvAlgorithm>(header.algorithm);
}

// A convolution without what may follow it.
inline ConvForward bare_forward(const Conv& c, const Tensor& weight, const OptionalTensor& bias,
                                const OptionalTensor& packed_weight, bool exact) {
  const ConvKernels& kernels = conv_kernels();
  ConvForward p{};
  p.shape = c.shape;
  p.pool = c.pool;
  p.algorithm = kernels.choose_algorithm(c.shape, exact);
  if (packed_weight) {
    const ConvAlgorithm packed = packed_algorithm(*packed_weight);
    // What was packed for Winograd fits its form only, and is of no use to an exact call.
    ConvShape any_size = c.shape;
    any_size.batch = 0;
    const bool usable =
        packed == ConvAlgorithm::kDirect || kernels.choose_algorithm(any_size, exact) == packed;
    const void* panels =
        panels_of(packed_weight, header_of(c.shape, packed), kernels.packed_bytes(c.shape, packed));
    if (usable) {
      p.algorithm = packed;
      p.packed_weight = panels;
    }
  }
  // Where the kernel reads what was packed, the weight itself may lie as it likes. Kernels of 1x1
  // read either.
  const bool unread =
      p.packed_weight && c.shape.taps() > 1 && p.pool.stride_h <= kWinogradMaxPoolStride;
  if (!unread) check_contiguous(weight, "weight");
  p.weight = data_of(weight);
  p.bias = data_of(bias);
  return p;
}

// Options as text, see schema.py: fields between semicolons.
class OptionFields {
 public:
  explicit OptionFields(const std::string& text) : text_(text) {}

  std::string name() {
    FMK_CHECK(at_ <= text_.size(), "options: expected more fields");
    const size_t end = std::min(text_.find(';', at_), text_.size());
    const std::string field = text_.substr(at_, end - at_);
    at_ = end + 1;
    return field;
  }
  std::optional<std::string> optional_name() {
    std::string field = name();
    return field.empty() ? std::nullopt : std::optional<std::string>(std::move(field));
  }
  Ints integers() {
    const std::string field = name();
    Ints values;
    const char *at = field.data(), *end = at + field.size();
    while (at < end) {
      const auto [next, error] = std::from_chars(at, end, values.emplace_back());
      FMK_CHECK(error == std::errc() && (next == end || *next == ','),
                "options: expected integers, got '", field, "'");
      at = next + (next < end);
    }
    return values;
  }
  int64_t integer() {
    const Ints values = integers();
    FMK_CHECK(values.size() == 1, "options: expected one integer, got ", values.size());
    return values[0];
  }
  void finish() const { FMK_CHECK(at_ > text_.size(), "options: expected fewer fields"); }

 private:
  const std::string& text_;
  size_t at_ = 0;
};

struct Options {
  Ints stride, padding, dilation;
  int64_t groups;
  bool transposed;
  std::string padding_mode;
  std::optional<std::string> activation, pool;
  Ints window;

  explicit Options(OptionFields& fields)
      : stride(fields.integers()),
        padding(fields.integers()),
        dilation(fields.integers()),
        groups(fields.integer()),
        transposed(fields.integer() != 0),
        padding_mode(fields.name()),
        activation(fields.optional_name()),
        pool(fields.optional_name()),
        window(fields.integers()) {}
};

}  // namespace fmk::ops
