// What the convolution's source files share: one correlation kernel serves the forward pass and the
// gradient of the input.
#pragma once

#include "cpu/channel_moments.h"
#include "cpu/conv.h"
#include "cpu/gemm.h"

namespace fmk::FMK_ISA {

// One axis of a correlation: out[o] = sum over t < taps of w[t] in[o * stride + offset + t * step],
// `in` being zero outside [0, in_size).
struct Axis {
  int64_t in_size, out_size, taps, stride, offset, step;
  int64_t position(int64_t out, int64_t tap) const { return out * stride + offset + tap * step; }
  // Elements of `in` under the windows, from the first tap of the first to the last of the last.
  int64_t span() const {
    return out_size == 0 || taps == 0 ? 0 : (out_size - 1) * stride + (taps - 1) * step + 1;
  }
};

// The position of an axis that `position` repeats, or -1: zeros. Those outside are close enough to
// be mirrored at most once.
FMK_INLINE int64_t padded_position(PaddingMode mode, int64_t position, int64_t size) {
  if (position >= 0 && position < size) return position;
  switch (mode) {
    case PaddingMode::kReplicate: return position < 0 ? 0 : size - 1;
    case PaddingMode::kCircular: return (position % size + size) % size;
    case PaddingMode::kReflect: return position < 0 ? -position : 2 * (size - 1) - position;
    default: return -1;
  }
}

// Output o of an axis is stored at first + o * step of an image of `size`: the gradient of a
// strided convolution's input is computed one residue class at a time.
struct Placement {
  int64_t size, first, step;
  bool whole(int64_t out_size) const { return size == out_size && first == 0 && step == 1; }
};

// The residues of an axis' positions modulo the stride of a convolution whose adjoint has as many
// taps for each: position o * count + i, placed there plus Placement::first, is computed by taps
// that lie at + (i >= late()), with the weight at weight_step * (residue of position i).
struct ResidueTurns {
  int64_t count = 1, first = 0;  // first: the residue of position 0
  size_t weight_step = 0;        // in bytes
  int64_t late() const { return count - first; }
  int64_t taps_shift(int64_t i) const { return i >= late() ? 1 : 0; }
  size_t weight_offset(int64_t i) const {
    return weight_step * static_cast<size_t>(i < late() ? i + first : i - late());
  }
};

// out = maxpool(activation(scale * correlation(input, weight) + shift + residual)); see conv.h for
// layouts and nulls.
template <class T>
struct Correlation {
  bool channels_last;
  int64_t batch, groups, channels, out_channels;  // channels per group
  PaddingMode padding;
  Axis y, x;
  Placement place_y,
      place_x;  // of output, residual and preactivation; a pool wants the whole image
  Axis z = {1, 1, 1, 1, 0, 1};
  Placement place_z = {1, 0, 1};
  const T* input;
  const void* weight;   // from pack_correlation_weight
  const Acc<T>* shift;  // [groups * out_channels] and kVectorSlack more
  const Acc<T>* scale;  // the same; null unless shift is there, too
  const T* residual;
  Activation activation;
  T* output;
  T* preactivation;
  PoolShape pool;  // kernel_h == 0: none
  uint8_t* argmax;
  ChannelMoments<T> moments;  // of the output, if wanted; without pool, and in order
  bool turns = false;         // the input has the other layout: channels_last says the output's
  // Output o of x stands for `residues` neighbouring ones, which take turns over the same input,
  // each with a weight of its own: see ResidueTurns. Staged, without pool and moments.
  ResidueTurns residues = {};

  bool reads_pixels() const { return channels_last != turns; }  // with their channels side by side
  // Depth and height as one axis of rows.
  int64_t out_rows() const { return z.out_size * y.out_size; }
  int64_t row_taps() const { return z.taps * y.taps; }
  int64_t placed_pixels() const { return place_z.size * place_y.size * place_x.size; }
  // Whether pixels lie in the output in the order in which they are computed.
  bool in_order() const {
    return place_z.whole(z.out_size) && place_y.whole(y.out_size) && place_x.whole(x.out_size);
  }
};
// Vectors per channel are read in whole vectors from any channel on.
template <class T>
constexpr int64_t kVectorSlack = kPanelVecs * Vec<T>::W;

// A weight as the correlation wants it: element (column, reduction, tap) of a group at data +
// group * group_stride + column * column_stride + reduction * reduction_stride + (tap_z * kernel_h
// + tap_y) * kernel_w + tap_x, where the i-th tap of an axis is tap first + i * step (step may be
// negative).
struct TapRange {
  int64_t first, step, count;
};
template <class T>
struct WeightView {
  const T* data;
  int64_t groups, columns, reduction;  // per group
  int64_t group_stride, column_stride, reduction_stride, kernel_w;
  TapRange y, x;
  const Acc<T>* reduction_scale;  // factor per (group, reduction), or null
  TapRange z = {0, 1, 1};
  int64_t kernel_h = 0;  // read only where there is more than one tap_z

  int64_t taps() const { return z.count * y.count * x.count; }

  // One input and one output channel per group: computed channel by channel instead of as a GEMM.
  bool depthwise() const { return columns == 1 && reduction == 1 && groups > 1; }
};
// Panels of a packed weight: where few input channels make the reduction short, narrow ones that
// stay in L1; else as wide as tiles go.
constexpr int64_t kNarrowVecs = 2;
template <class T>
FMK_INLINE PanelSplit<Vec<T>> panel_split(int64_t groups, int64_t columns, int64_t reduction,
                                          int64_t taps) {
  constexpr int64_t kFewWords = 16, kPanelBytes = 24 << 10;
  const int64_t words = words_of<T>(reduction), vecs = ceil_div(columns, int64_t{Vec<T>::W});
  const int64_t bytes = taps * words * kNarrowVecs * Vec<T>::W * sizeof(Word<T>);
  if (groups > 1 || taps <= 1 || words >= kFewWords || bytes > kPanelBytes)
    return PanelSplit<Vec<T>>::of(columns);
  const int64_t count = ceil_div(vecs, kNarrowVecs);
  return {vecs, count, 1, EvenSplit::of(vecs, count)};
}
// Packed: [group][panel][tap_z][tap_y][tap_x][words of the reduction][width], depthwise
// [tap_z][tap_y][tap_x][groups] in the compute type, padded to whole vectors.
template <class T>
size_t packed_correlation_bytes(const WeightView<T>&);
template <class T>
void pack_correlation_weight(const WeightView<T>&, void* packed, const Parallel&);
template <class T>
void correlate(const Correlation<T>&, const Parallel&);

// grad_weight[k][c][tap] = scale[k] * sum over pixels of grad[pixel][k] * input[pixel + tap][c],
// and the sums of grad per channel k. Results may be null.
template <class T>
struct WeightGradient {
  bool channels_last;
  int64_t batch, groups, channels, out_channels;  // channels per group
  PaddingMode padding;
  Axis y, x;
  Axis z = {1, 1, 1, 1, 0, 1};
  const T* input;
  const T* grad;
  const Acc<T>* scale;
  T* grad_weight;
  Acc<T>* grad_shift;  // sum of grad
  T* grad_bias;        // scale * sum of grad

  int64_t out_rows() const { return z.out_size * y.out_size; }
  int64_t row_taps() const { return z.taps * y.taps; }
};
template <class T>
void weight_gradient(const WeightGradient<T>&, const Parallel&);

// The weight as the convolution itself reads it.
template <class T>
FMK_INLINE WeightView<T> weight_view(const ConvShape& s, const T* weight) {
  WeightView<T> view{};
  const int64_t taps = s.taps();
  view.data = weight;
  view.groups = s.groups;
  view.columns = s.out_channels / s.groups;
  view.reduction = s.channels / s.groups;
  view.column_stride = view.reduction * taps;
  view.group_stride = view.columns * view.column_stride;
  view.reduction_stride = taps;
  view.kernel_w = s.kernel_w;
  view.kernel_h = s.kernel_h;
  view.z = {0, 1, s.kernel_d};
  view.y = {0, 1, s.kernel_h};
  view.x = {0, 1, s.kernel_w};
  return view;
}

// The adjoint of the convolution `s`: from an image shaped like its output to one shaped like its
// input, of which the positions in the ranges, which may lie in the padding, are computed and
// stored as an image of their own. A position is reached from the output by the taps t with
// (position + padding - t * dilation) a multiple of the stride: one correlation per residue of
// positions modulo the strides.
struct PositionRange {
  int64_t begin, end;
};
// The weight as the adjoint reads it; `scale`, of the convolution's outputs, or null.
template <class T>
WeightView<T> adjoint_view(const ConvShape& s, const void* weight, const Acc<T>* scale);
// Packed: all residues, or nothing where there are very many.
template <class T>
size_t packed_adjoint_bytes(const ConvShape&);
template <class T>
void pack_adjoint_weight(const ConvShape&, const WeightView<T>&, void* packed, const Parallel&);
// c: what is not geometry: input, epilogue, output. May use Scratch::kCall if nothing is packed.
template <class T>
void correlate_adjoint(const ConvShape&, const WeightView<T>&, const void* packed, PositionRange z,
                       PositionRange y, PositionRange x, Correlation<T> c, const Parallel&);

// A convolution of stride 1 seen from the other side: the shape and the geometry of the convolution
// with turned taps that its adjoint is, for kernels of three taps in height and width, and any
// number along the depth.
FMK_INLINE ConvShape turned(const ConvShape& s) {
  ConvShape t = s;
  t.channels = s.out_channels;
  t.out_channels = s.channels;
  t.depth = s.out_depth;
  t.height = s.out_height;
  t.width = s.out_width;
  t.out_depth = s.depth;
  t.out_height = s.height;
  t.out_width = s.width;
  return t;
}
// The adjoint's weight, turned.
template <class T>
FMK_INLINE void turn(const ConvShape& s, WeightView<T>* adjoint) {
  adjoint->z = {s.kernel_d - 1, -1, s.kernel_d};
  adjoint->y = adjoint->x = {2, -1, 3};
}
template <class T>
FMK_INLINE void turn(const ConvShape& s, Correlation<T>* c) {
  c->channels = s.out_channels / s.groups;
  c->out_channels = s.channels / s.groups;
  c->z = {s.out_depth, s.depth, s.kernel_d, 1, s.padding_d - (s.kernel_d - 1) * s.dilation_d,
          s.dilation_d};
  c->y = {s.out_height, s.height, 3, 1, s.padding_h - 2, 1};
  c->x = {s.out_width, s.width, 3, 1, s.padding_w - 2, 1};
  c->place_z = {s.depth, 0, 1};
  c->place_y = {s.height, 0, 1};
  c->place_x = {s.width, 0, 1};
}

// sums[channel] = sum over pixels and images of an image; in the compute type.
template <class T>
void channel_sums(const T* image, bool channels_last, int64_t batch, int64_t channels,
                  int64_t pixels, Acc<T>* sums, const Parallel&);

// The entries of the kernel table.
void conv_backward(const ConvBackward&, const Parallel&);
void max_pool_forward(const Pooling&, const void* input, void* output, uint8_t* argmax,
                      const Parallel&);
void max_pool_backward(const Pooling&, const void* grad_output, const uint8_t* argmax,
                       void* grad_input, const Parallel&);
void avg_pool_forward(const Pooling&, const void* input, void* output, const Parallel&);
void avg_pool_backward(const Pooling&, const void* grad_output, void* grad_input, const Parallel&);

}  // namespace fmk::FMK_ISA
