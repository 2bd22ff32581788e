// conv_chain and the chains that are kept: several convolutions as one call, see schema.py.
#include <memory>
#include <mutex>
#include <unordered_map>

#include "torch/conv_chain.h"
#include "torch/conv_check.h"

namespace fmk::ops {
namespace {

// A layer, and the values that it reads.
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

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fmkernels, CPU, m) {
  m.impl("conv_chain", TORCH_BOX(&conv_chain));
  m.impl("conv_chain_keep", TORCH_BOX(&conv_chain_keep));
  m.impl("conv_chain_run", TORCH_BOX(&conv_chain_run));
}
STABLE_TORCH_LIBRARY_IMPL(fmkernels, CompositeExplicitAutograd, m) {
  m.impl("conv_chain_drop", TORCH_BOX(&conv_chain_drop));
}

}  // namespace fmk::ops
