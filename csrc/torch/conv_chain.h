// Convolutions that read one another's outputs, as one call: which of them are computed together,
// and where what lies between them is kept.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "core/parallel.h"
#include "cpu/conv.h"

namespace fmk::ops {

// Value 0 is the input of all, value i + 1 the output of layer i, the last value the result.
struct ConvChain {
  std::vector<std::vector<int64_t>> sizes;  // of the values
  std::vector<ConvForward> layers;
  std::vector<int64_t> inputs, residuals;  // values that layers read; -1: none, or not a value
  int64_t workspace_bytes = 0;
  bool turns_output = false;  // it is channels_last, unlike the input

  void add_value(const std::vector<int64_t>& size) { sizes.push_back(size); }
  void add_layer(const ConvForward& layer, int64_t input, int64_t residual) {
    layers.push_back(layer);
    inputs.push_back(input);
    residuals.push_back(residual);
  }

  // Sets parts_, offsets_, workspace_bytes and turns_output.
  void plan(int64_t element_bytes) {
    hold_pixels();
    const int64_t count = static_cast<int64_t>(layers.size());
    std::vector<int64_t> reads(layers.size() + 1), last_read(layers.size() + 1);
    for (int64_t i = 0; i < count; ++i)
      for (int64_t value : {inputs[i], residuals[i]})
        if (value >= 0) ++reads[value], last_read[value] = i;
    const ConvKernels& kernels = conv_kernels();
    for (int64_t i = 0, n; i < count; i += n) {
      n = 1;
      while (i + n < count && inputs[i + n] == i + n && reads[i + n] == 1 &&
             residuals[i + n - 1] < 0)
        ++n;
      if (n > 1) n = kernels.banded_layers(&layers[i], n);
      parts_.push_back(n);
    }
    place(element_bytes, last_read);
  }

  // `operands`: the layers, with the caller's pointers where they differ from the plan's.
  void run(std::vector<ConvForward> operands, const void* input, void* output, void* workspace,
           const Parallel& pool) const {
    const ConvKernels& kernels = conv_kernels();
    const int64_t count = static_cast<int64_t>(operands.size());
    const auto at = [&](int64_t value) -> void* {
      if (value == count) return output;
      return static_cast<char*>(workspace) + offsets_[value];
    };
    int64_t i = 0;
    for (int64_t n : parts_) {
      const int64_t last = i + n - 1;
      operands[i].input = inputs[i] == 0 ? input : at(inputs[i]);
      if (residuals[last] >= 0)
        operands[last].residual = residuals[last] == 0 ? input : at(residuals[last]);
      operands[last].output = at(last + 1);
      if (n == 1)
        kernels.forward(operands[i], pool);
      else
        kernels.banded_forward(&operands[i], n, pool);
      i += n;
    }
  }

 private:
  std::vector<int64_t> parts_;    // layers that are computed together, in order
  std::vector<int64_t> offsets_;  // of the values that lie in the workspace

  // What lies between the layers is channels_last, if all that are added up can be: so is the
  // output, where one of these values is added to it.
  void hold_pixels() {
    const size_t count = layers.size();
    if (layers[0].shape.channels_last) return;
    const int64_t last_residual = residuals[count - 1];
    const auto pixels = [&](size_t value) {
      return value > 0 && (value < count || last_residual > 0);
    };
    for (size_t i = 0; i < count; ++i)
      if (residuals[i] == 0 && pixels(i + 1)) return;
    for (size_t i = 0; i < count; ++i) {
      layers[i].shape.channels_last = pixels(i + 1);
      layers[i].turns = pixels(static_cast<size_t>(inputs[i])) != pixels(i + 1);
    }
    turns_output = pixels(count);
  }

  // A value lies in the first gap between those that are still to be read.
  void place(int64_t element_bytes, const std::vector<int64_t>& last_read) {
    constexpr int64_t kLine = 64;
    struct Placed {
      int64_t begin, end, last_read;
    };
    std::vector<Placed> live;  // by begin
    const int64_t count = static_cast<int64_t>(layers.size());
    offsets_.assign(layers.size() + 1, 0);
    int64_t i = 0;
    for (int64_t n : parts_) {
      const int64_t first = i, value = i + n;
      i += n;
      if (value == count) break;
      live.erase(std::remove_if(live.begin(), live.end(),
                                [&](const Placed& p) { return p.last_read < first; }),
                 live.end());
      int64_t bytes = element_bytes, begin = 0;
      for (int64_t size : sizes[value]) bytes *= size;
      bytes = (bytes + kLine - 1) / kLine * kLine;
      auto next = live.begin();
      for (; next != live.end() && next->begin < begin + bytes; ++next) begin = next->end;
      live.insert(next, {begin, begin + bytes, last_read[value]});
      offsets_[value] = begin;
      workspace_bytes = std::max(workspace_bytes, begin + bytes);
    }
  }
};

}  // namespace fmk::ops
