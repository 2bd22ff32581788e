// Convolution operators: check, allocate, call.
#include <algorithm>
#include <charconv>
#include <memory>
#include <mutex>
#include <tuple>
#include <unordered_map>

#include "torch/conv_chain.h"
#include "torch/images.h"

namespace fmk::ops {
namespace {

// What a convolution needs to know of an image.
struct Image {
  DType dtype;
  bool channels_last;
  Ints size;

  bool operator==(const Image&) const = default;
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

Tensor conv_inference(const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                      const OptionalTensor& scale, const OptionalTensor& shift,
                      const OptionalTensor& residual, const OptionalTensor& packed_weight,
                      const std::string& options, bool exact) {
  OptionFields fields(options);
  const Options o(fields);
  fields.finish();
  return run_forward(input, weight, bias, scale, shift, residual, packed_weight, o.stride,
                     o.padding, o.dilation, o.groups, o.transposed, o.padding_mode, o.activation,
                     o.pool, o.window, exact, nullptr);
}

// A layer of a chain, see schema.py.
struct ChainLayer {
  Tensor weight;
  OptionalTensor bias, scale, shift, packed_weight;
  Options options;
  int64_t input, residual;
};

// Layers in a row, and how they are computed for images like those of the last call.
class KeptChain {
 public:
  KeptChain(const std::vector<Tensor>& weights, const std::vector<OptionalTensor>& vectors,
            const std::string& options, bool exact)
      : exact_(exact) {
    constexpr size_t kVectors = 4;
    const size_t count = weights.size();
    FMK_CHECK(count >= 1 && vectors.size() == count * kVectors,
              "weights: expected one per layer, and four vectors each");
    OptionFields fields(options);
    for (size_t i = 0; i < count; ++i) {
      const OptionalTensor* vector = &vectors[i * kVectors];
      const Options own(fields);
      const int64_t input = fields.integer(), residual = fields.integer();
      const int64_t known = static_cast<int64_t>(i);
      FMK_CHECK(input >= 0 && input <= known && residual >= -1 && residual <= known,
                "options: a layer reads what comes after it");
      layers_.push_back(
          {weights[i], vector[0], vector[1], vector[2], vector[3], own, input, residual});
    }
    fields.finish();
  }

  Tensor run(const Tensor& input, const OptionalTensor& residual) {
    const Image image = image_of(input);
    const std::shared_ptr<const ConvChain> chain = chain_for(image, input);
    std::vector<ConvForward> layers = chain->layers;
    // What was packed is nobody else's; a bias may have been given other memory since.
    for (size_t i = 0; i < layers.size(); ++i) {
      if (!layers_[i].bias) continue;
      check_parameter(layers_[i].bias, "bias", input, {chain->sizes[i + 1][1]});
      layers[i].bias = data_of(layers_[i].bias);
    }
    if (residual) {
      FMK_CHECK(layers_.back().residual < 0, "residual: the last layer has one already");
      const ConvShape& s = layers.back().shape;
      check_image(*residual, "residual", input.scalar_type(),
                  {s.batch, s.out_channels, s.out_height, s.out_width}, image.channels_last);
      layers.back().residual = data_of(*residual);
    }
    const bool channels_last = image.channels_last || chain->turns_output;
    Tensor output = allocate_image(input, chain->sizes.back(), channels_last);
    Tensor workspace = allocate(input, {chain->workspace_bytes}, ScalarType::Byte);
    chain->run(std::move(layers), data_of(input), mutable_data_of(output),
               mutable_data_of(workspace), torch_pool());
    if (!chain->turns_output) return output;
    Tensor turned = allocate_image(input, chain->sizes.back(), false);
    return torch::stable::copy_(turned, output);
  }

 private:
  std::vector<ChainLayer> layers_;
  bool exact_;
  std::mutex mutex_;  // of the two below
  Image image_;
  std::shared_ptr<const ConvChain> chain_;

  std::shared_ptr<const ConvChain> chain_for(const Image& image, const Tensor& input) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!chain_ || !(image == image_)) {
      chain_ = plan(image, input);
      image_ = image;
    }
    return chain_;
  }

  std::shared_ptr<const ConvChain> plan(Image image, const Tensor& input) const {
    auto chain = std::make_shared<ConvChain>();
    chain->add_value(image.size);
    for (size_t i = 0; i < layers_.size(); ++i) {
      const ChainLayer& layer = layers_[i];
      const Options& o = layer.options;
      FMK_CHECK(!o.transposed && o.stride.size() == 2, "options: expected layers over two axes");
      image.size = chain->sizes[static_cast<size_t>(layer.input)];
      const Conv c = check_conv(image, layer.weight, o.stride, o.padding, o.dilation, o.groups,
                                o.transposed, o.padding_mode, o.pool, o.window);
      check_parameter(layer.bias, "bias", input, {c.output_channels});
      check_vector(layer.scale, "scale", input, c.output_channels);
      check_vector(layer.shift, "shift", input, c.output_channels);
      ConvForward p = bare_forward(c, layer.weight, layer.bias, layer.packed_weight, exact_);
      p.scale = data_of(layer.scale);
      p.shift = data_of(layer.shift);
      p.activation = activation_from(o.activation);
      if (layer.residual >= 0) {
        const Ints& added = chain->sizes[static_cast<size_t>(layer.residual)];
        FMK_CHECK(added == c.conv_size, "residual of layer ", i, ": expected shape ",
                  to_string(c.conv_size), ", got ", to_string(added));
      }
      chain->add_layer(p, layer.input, layer.residual);
      chain->add_value(c.output_size);
    }
    chain->plan(aoti_torch_dtype_element_size(
        torch::stable::detail::to<int32_t>(torch::stable::detail::from(input.scalar_type()))));
    return chain;
  }
};

Tensor conv_chain(const Tensor& input, const std::vector<Tensor>& weights,
                  const std::vector<OptionalTensor>& vectors, const OptionalTensor& residual,
                  const std::string& options, bool exact) {
  return KeptChain(weights, vectors, options, exact).run(input, residual);
}

// The chains that somebody keeps, by number.
class KeptChains {
 public:
  int64_t add(std::shared_ptr<KeptChain> chain) {
    const std::lock_guard<std::mutex> lock(mutex_);
    chains_.emplace(++last_, std::move(chain));
    return last_;
  }
  std::shared_ptr<KeptChain> find(int64_t number) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = chains_.find(number);
    FMK_CHECK(found != chains_.end(), "chain: ", number, " is not kept");
    return found->second;
  }
  void drop(int64_t number) {
    std::shared_ptr<KeptChain> dropped;  // its tensors are freed without the lock
    const std::lock_guard<std::mutex> lock(mutex_);
    if (const auto found = chains_.find(number); found != chains_.end()) {
      dropped = std::move(found->second);
      chains_.erase(found);
    }
  }

 private:
  std::mutex mutex_;
  std::unordered_map<int64_t, std::shared_ptr<KeptChain>> chains_;
  int64_t last_ = 0;
};
KeptChains& kept_chains() {
  static auto* chains = new KeptChains;  // tensors must not outlive torch at the end of the process
  return *chains;
}

int64_t conv_chain_keep(const std::vector<Tensor>& weights,
                        const std::vector<OptionalTensor>& vectors, const std::string& options,
                        bool exact) {
  return kept_chains().add(std::make_shared<KeptChain>(weights, vectors, options, exact));
}
Tensor conv_chain_run(const Tensor& input, int64_t chain, const OptionalTensor& residual) {
  return kept_chains().find(chain)->run(input, residual);
}
void conv_chain_drop(int64_t chain) { kept_chains().drop(chain); }

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
  m.impl("conv_chain_keep", TORCH_BOX(&conv_chain_keep));
  m.impl("conv_chain_run", TORCH_BOX(&conv_chain_run));
  m.impl("conv_statistics", TORCH_BOX(&conv_statistics));
  m.impl("conv_backward", TORCH_BOX(&conv_backward));
  m.impl("conv_pack_weight", TORCH_BOX(&conv_pack_weight));
}
STABLE_TORCH_LIBRARY_IMPL(fmkernels, CompositeExplicitAutograd, m) {
  m.impl("conv_chain_drop", TORCH_BOX(&conv_chain_drop));
}

}  // namespace fmk::ops
