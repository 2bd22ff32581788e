// Convolution operators: check, allocate, call.
#include <algorithm>
#include <charconv>
#include <tuple>

#include "torch/conv_chain.h"
#include "torch/images.h"

namespace fmk::ops {
namespace {

// What a convolution needs to know of an image.
struct Image {
  DType dtype;
  bool channels_last;
  Ints size;
};
Image image_of(const Tensor& input) {
  const bool channels_last = image_layout(input, "input");
  return {dtype_of(input, "input"), channels_last, shape_of(input)};
}

struct Conv {
  ConvShape shape;
  PoolShape pool;
  Ints conv_size, output_size;
  int64_t output_channels;
};

PaddingMode padding_mode_from(const std::string& name) {
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

ConvShape check_weight(const Tensor& weight, const Ints& stride, const Ints& padding,
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
int64_t other_size(const ConvShape& s, const AxisOptions& a, int64_t size) {
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

Conv check_conv(const Image& input, const Tensor& weight, const Ints& stride, const Ints& padding,
                const Ints& dilation, int64_t groups, bool transposed,
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

PackedHeader header_of(const ConvShape& s, ConvAlgorithm algorithm) {
  return packed_header(PackedKind::kConv2d, s.dtype,
                       {s.out_channels, s.channels, s.kernel_d * s.kernel_h, s.kernel_w,
                        s.transposed ? -s.groups : s.groups},
                       static_cast<int32_t>(algorithm));
}

// The algorithm that a packed weight was packed for. panels_of checks everything else.
ConvAlgorithm packed_algorithm(const Tensor& packed) {
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
ConvForward bare_forward(const Conv& c, const Tensor& weight, const OptionalTensor& bias,
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

// What conv_forward saves for the backward.
struct Saved {
  OptionalTensor preactivation, argmax;
};

// conv_forward; `saved` is null where only the output is wanted.
Tensor run_forward(const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                   const OptionalTensor& scale, const OptionalTensor& shift,
                   const OptionalTensor& residual, const OptionalTensor& packed_weight,
                   const Ints& stride, const Ints& padding, const Ints& dilation, int64_t groups,
                   bool transposed, const std::string& padding_mode,
                   const std::optional<std::string>& activation,
                   const std::optional<std::string>& pool, const Ints& window, bool exact,
                   Saved* saved) {
  const Conv c = check_conv(image_of(input), weight, stride, padding, dilation, groups, transposed,
                            padding_mode, pool, window);
  const bool channels_last = c.shape.channels_last;
  check_parameter(bias, "bias", input, {c.output_channels});
  check_vector(scale, "scale", input, c.output_channels);
  check_vector(shift, "shift", input, c.output_channels);
  if (residual) check_image(*residual, "residual", input.scalar_type(), c.conv_size, channels_last);
  ConvForward p = bare_forward(c, weight, bias, packed_weight, exact);
  p.input = data_of(input);
  p.scale = data_of(scale);
  p.shift = data_of(shift);
  p.residual = data_of(residual);
  p.activation = activation_from(activation);
  Tensor output = allocate_image(input, c.output_size, channels_last);
  p.output = mutable_data_of(output);
  if (saved && needs_preactivation(p.activation)) {
    saved->preactivation = allocate_image(input, c.conv_size, channels_last);
    p.preactivation = mutable_data_of(*saved->preactivation);
  }
  // Of an average after relu, which values relu let through; else the positions of the maxima.
  const bool mask = pool && *pool == "avg";
  if (saved && pool && (!mask || p.activation == Activation::kRelu)) {
    saved->argmax =
        allocate_image(input, mask ? c.conv_size : c.output_size, channels_last, ScalarType::Byte);
    p.argmax = static_cast<uint8_t*>(mutable_data_of(*saved->argmax));
  }
  conv_kernels().forward(p, torch_pool());
  return output;
}

std::tuple<Tensor, Tensor, Tensor> conv_forward(
    const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
    const OptionalTensor& scale, const OptionalTensor& shift, const OptionalTensor& residual,
    const OptionalTensor& packed_weight, const Ints& stride, const Ints& padding,
    const Ints& dilation, int64_t groups, bool transposed, const std::string& padding_mode,
    const std::optional<std::string>& activation, const std::optional<std::string>& pool,
    const Ints& window, bool save_for_backward, bool exact) {
  Saved saved;
  Tensor output = run_forward(input, weight, bias, scale, shift, residual, packed_weight, stride,
                              padding, dilation, groups, transposed, padding_mode, activation, pool,
                              window, exact, save_for_backward ? &saved : nullptr);
  return {output, saved.preactivation ? *saved.preactivation : nothing(input),
          saved.argmax ? *saved.argmax : allocate(input, {0}, ScalarType::Byte)};
}

// The options of conv_inference, see schema.py: fields between semicolons.
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

Tensor conv_inference(const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                      const OptionalTensor& scale, const OptionalTensor& shift,
                      const OptionalTensor& residual, const OptionalTensor& packed_weight,
                      const std::string& options, bool exact) {
  OptionFields fields(options);
  const Ints stride = fields.integers(), padding = fields.integers(), dilation = fields.integers();
  const int64_t groups = fields.integer();
  const bool transposed = fields.integer() != 0;
  const std::string padding_mode = fields.name();
  const auto activation = fields.optional_name(), pool = fields.optional_name();
  const Ints window = fields.integers();
  fields.finish();
  return run_forward(input, weight, bias, scale, shift, residual, packed_weight, stride, padding,
                     dilation, groups, transposed, padding_mode, activation, pool, window, exact,
                     nullptr);
}

// Of a layer of a chain: its share of the lists, see schema.py.
constexpr size_t kChainNumbers = 17, kChainNames = 3, kChainVectors = 4;

Tensor conv_chain(const Tensor& input, const std::vector<Tensor>& weights,
                  const std::vector<OptionalTensor>& vectors, const OptionalTensor& residual,
                  const Ints& numbers, const std::vector<std::string>& names, bool exact) {
  const size_t count = weights.size();
  FMK_CHECK(count >= 1 && vectors.size() == count * kChainVectors &&
                numbers.size() == count * kChainNumbers && names.size() == count * kChainNames,
            "weights: expected one per layer, and as many settings");
  Image image = image_of(input);
  ConvChain chain;
  chain.add_value(image.size);
  for (size_t i = 0; i < count; ++i) {
    const OptionalTensor *bias = &vectors[i * kChainVectors], *scale = bias + 1, *shift = bias + 2;
    const int64_t* number = &numbers[i * kChainNumbers];
    const std::string* name = &names[i * kChainNames];
    const auto given = [](const std::string& text) {
      return text.empty() ? std::nullopt : std::optional<std::string>(text);
    };
    const int64_t from = number[15], added = number[16], known = static_cast<int64_t>(i);
    FMK_CHECK(from >= 0 && from <= known && added >= -1 && added <= known,
              "numbers: a layer reads what comes after it");
    image.size = chain.sizes[static_cast<size_t>(from)];
    const Conv c = check_conv(image, weights[i], {number, number + 2}, {number + 2, number + 6},
                              {number + 6, number + 8}, number[8], false, name[0], given(name[2]),
                              name[2].empty() ? Ints{} : Ints{number + 9, number + 15});
    check_parameter(*bias, "bias", input, {c.output_channels});
    check_vector(*scale, "scale", input, c.output_channels);
    check_vector(*shift, "shift", input, c.output_channels);
    ConvForward p = bare_forward(c, weights[i], *bias, bias[3], exact);
    p.scale = data_of(*scale);
    p.shift = data_of(*shift);
    p.activation = activation_from(given(name[1]));
    if (added >= 0)
      FMK_CHECK(chain.sizes[static_cast<size_t>(added)] == c.conv_size, "residual of layer ", i,
                ": expected shape ", to_string(c.conv_size), ", got ",
                to_string(chain.sizes[static_cast<size_t>(added)]));
    if (i + 1 == count && residual) {
      FMK_CHECK(added < 0, "residual: the last layer has one already");
      check_image(*residual, "residual", input.scalar_type(), c.conv_size, image.channels_last);
      p.residual = data_of(*residual);
    }
    chain.add_layer(p, from, added);
    chain.add_value(c.output_size);
  }
  Tensor output = allocate_image(input, chain.sizes.back(), image.channels_last);
  chain.plan(aoti_torch_dtype_element_size(
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(input.scalar_type()))));
  Tensor workspace = allocate(input, {chain.workspace_bytes}, ScalarType::Byte);
  chain.run(data_of(input), mutable_data_of(output), mutable_data_of(workspace), torch_pool());
  return output;
}

std::tuple<Tensor, Tensor, Tensor> conv_statistics(const Tensor& input, const Tensor& weight,
                                                   const OptionalTensor& bias,
                                                   const OptionalTensor& packed_weight,
                                                   const Ints& stride, const Ints& padding,
                                                   const Ints& dilation, int64_t groups,
                                                   const std::string& padding_mode, bool exact) {
  const Conv c = check_conv(image_of(input), weight, stride, padding, dilation, groups, false,
                            padding_mode, std::nullopt, {});
  check_parameter(bias, "bias", input, {c.output_channels});
  const Parallel pool = torch_pool();
  Tensor output = allocate_image(input, c.output_size, c.shape.channels_last);
  Tensor mean = allocate(input, {c.output_channels}, accumulated_as(input));
  Tensor variance = allocate(input, {c.output_channels}, accumulated_as(input));
  Tensor moments = allocate(input, {3 * pool.threads * c.output_channels}, ScalarType::Double);
  ConvForward p = bare_forward(c, weight, bias, packed_weight, exact);
  p.input = data_of(input);
  p.output = mutable_data_of(output);
  p.mean = mutable_data_of(mean);
  p.variance = mutable_data_of(variance);
  p.moments = static_cast<double*>(mutable_data_of(moments));
  conv_kernels().forward(p, pool);
  return {output, mean, variance};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> conv_backward(
    const Tensor& grad_output, const Tensor& input, const Tensor& weight,
    const OptionalTensor& bias, const OptionalTensor& scale, const Tensor& output,
    const Tensor& saved, const Tensor& argmax, const Ints& stride, const Ints& padding,
    const Ints& dilation, int64_t groups, bool transposed, const std::string& padding_mode,
    const std::optional<std::string>& activation, const std::optional<std::string>& pool,
    const Ints& window, bool need_input, bool need_weight, bool need_bias, bool need_scale,
    bool need_shift, bool need_residual, bool exact) {
  check_contiguous(weight, "weight");
  const Conv c = check_conv(image_of(input), weight, stride, padding, dilation, groups, transposed,
                            padding_mode, pool, window);
  const bool channels_last = c.shape.channels_last;
  const ScalarType dtype = input.scalar_type();
  check_image(grad_output, "grad_output", dtype, c.output_size, channels_last);
  check_parameter(bias, "bias", input, {c.output_channels});
  check_vector(scale, "scale", input, c.output_channels);

  ConvBackward p{};
  p.shape = c.shape;
  p.pool = c.pool;
  p.exact = exact;
  p.activation = activation_from(activation);
  if (needs_preactivation(p.activation)) {
    check_image(saved, "saved", dtype, c.conv_size, channels_last);
    p.saved = data_of(saved);
  } else if (p.activation != Activation::kNone && !pool) {
    check_image(output, "output", dtype, c.output_size, channels_last);
    p.saved = data_of(output);
  }
  const bool mask = pool && *pool == "avg";
  if (pool && (!mask || p.activation == Activation::kRelu)) {
    check_image(argmax, "argmax", ScalarType::Byte, mask ? c.conv_size : c.output_size,
                channels_last);
    p.argmax = static_cast<const uint8_t*>(data_of(argmax));
  }
  p.grad_output = data_of(grad_output);
  p.input = data_of(input);
  p.weight = data_of(weight);
  p.scale = data_of(scale);
  const bool changed = p.activation != Activation::kNone || pool;
  Tensor grad_preactivation =
      changed ? allocate_image(input, c.conv_size, channels_last) : nothing(input);
  Tensor grad_input =
      need_input ? allocate_image(input, shape_of(input), channels_last) : nothing(input);
  Tensor grad_weight = allocate_if(need_weight, input, shape_of(weight));
  Tensor grad_bias = allocate_if(need_bias, input, {c.output_channels});
  const ScalarType accumulated = accumulated_as(input);
  Tensor grad_scale = allocate(input, {need_scale ? c.output_channels : 0}, accumulated);
  Tensor grad_shift = allocate(input, {need_shift ? c.output_channels : 0}, accumulated);
  p.grad_preactivation = mutable_data_if(changed, grad_preactivation);
  p.grad_input = mutable_data_if(need_input, grad_input);
  p.grad_weight = mutable_data_if(need_weight, grad_weight);
  p.grad_bias = mutable_data_if(need_bias, grad_bias);
  p.bias = data_of(bias);
  p.grad_scale = mutable_data_if(need_scale, grad_scale);
  p.grad_shift = mutable_data_if(need_shift, grad_shift);
  conv_kernels().backward(p, torch_pool());
  // An operator may not return an argument: with nothing after the convolution the residual's
  // gradient is a copy of grad_output.
  Tensor grad_residual = nothing(input);
  if (need_residual) {
    grad_residual = grad_preactivation;
    if (!changed) {
      grad_residual = allocate_image(input, c.conv_size, channels_last);
      torch::stable::copy_(grad_residual, grad_output);
    }
  }
  return {grad_input, grad_weight, grad_bias, grad_scale, grad_shift, grad_residual};
}

Tensor conv_pack_weight(const Tensor& weight, const Ints& stride, const Ints& padding,
                        const Ints& dilation, int64_t groups, bool transposed,
                        const std::string& padding_mode, bool exact) {
  check_contiguous(weight, "weight");
  AllOptions options;
  const ConvShape shape =
      check_weight(weight, stride, padding, dilation, groups, transposed, padding_mode, &options);
  const ConvKernels& kernels = conv_kernels();
  const ConvAlgorithm algorithm = kernels.choose_algorithm(shape, exact);
  void* panels;
  Tensor packed = new_packed(weight, header_of(shape, algorithm),
                             kernels.packed_bytes(shape, algorithm), &panels);
  kernels.pack_weight(shape, algorithm, data_of(weight), panels, torch_pool());
  return packed;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fmkernels, CPU, m) {
  m.impl("conv_forward", TORCH_BOX(&conv_forward));
  m.impl("conv_inference", TORCH_BOX(&conv_inference));
  m.impl("conv_chain", TORCH_BOX(&conv_chain));
  m.impl("conv_statistics", TORCH_BOX(&conv_statistics));
  m.impl("conv_backward", TORCH_BOX(&conv_backward));
  m.impl("conv_pack_weight", TORCH_BOX(&conv_pack_weight));
}

}  // namespace fmk::ops
