// The adjoint of a convolution, which is its gradient with respect to the input, and the transposed
// convolution: one correlation for every residue of positions modulo the strides.

#include "cpu/conv_parts.h"
#include "cpu/conv_winograd.h"

namespace fmk::FMK_ISA {
namespace {

FMK_INLINE int64_t common_divisor(int64_t a, int64_t b) {
  while (b) {
    const int64_t rest = a % b;
    a = b;
    b = rest;
  }
  return a;
}

// One axis of the convolution, in the adjoint's terms.
struct AdjointAxis {
  int64_t out_size, kernel, stride, padding, dilation;

  // The taps that reach positions with (position + padding) % stride == residue, last tap first.
  TapRange taps(int64_t residue) const {
    int64_t last = -1, count = 0;
    for (int64_t tap = 0; tap < kernel; ++tap)
      if ((residue - tap * dilation) % stride == 0) last = tap, ++count;
    return {last, -(stride / common_divisor(stride, dilation)), count};
  }
  int64_t residue(int64_t position) const { return (position + padding) % stride; }
  // The correlation that computes positions first, first + stride, ... before `end`.
  Axis axis(int64_t end, int64_t first, const TapRange& taps) const {
    Axis axis{out_size, ceil_div(end - first, stride), taps.count, 1, 0, 1};
    if (taps.count) axis.offset = (first + padding - taps.first * dilation) / stride;
    axis.step = dilation / common_divisor(stride, dilation);
    return axis;
  }
};

struct AdjointAxes {
  AdjointAxis z, y, x;
  FMK_INLINE AdjointAxes of(const ConvShape& s) {
    return {{s.out_depth, s.kernel_d, s.stride_d, s.padding_d, s.dilation_d},
            {s.out_height, s.kernel_h, s.stride_h, s.padding_h, s.dilation_h},
            {s.out_width, s.kernel_w, s.stride_w, s.padding_w, s.dilation_w}};
  }
  int64_t index(int64_t rz, int64_t ry, int64_t rx) const {
    return (rz * y.stride + ry) * x.stride + rx;
  }
  template <class T>
  WeightView<T> view_of(WeightView<T> view, int64_t rz, int64_t ry, int64_t rx) const {
    view.z = z.taps(rz);
    view.y = y.taps(ry);
    view.x = x.taps(rx);
    return view;
  }
  template <class T>
  WeightView<T> view_of(const WeightView<T>& view, int64_t index) const {
    return view_of(view, index / (y.stride * x.stride), index / x.stride % y.stride,
                   index % x.stride);
  }
};

// Whether the residues of x are computed by turns, block by block, so that rows are written in
// order: all have as many taps then, and their packed weights the same size.
template <class T>
bool residues_take_turns(const ConvShape& s, const Correlation<T>& c) {
  const bool depthwise = c.channels == 1 && c.out_channels == 1 && c.groups > 1;
  return s.stride_w > 1 && s.dilation_w == 1 && s.kernel_w % s.stride_w == 0 && !s.channels_last &&
         !depthwise;
}

// So many residues are packed ahead; with more, each is packed when it is needed.
constexpr int64_t kMaxResidues = 64;

FMK_INLINE int64_t residues(const ConvShape& s) {
  const bool few =
      s.stride_d <= kMaxResidues && s.stride_h <= kMaxResidues && s.stride_w <= kMaxResidues;
  const int64_t count = few ? s.stride_d * s.stride_h * s.stride_w : kMaxResidues + 1;
  return count <= kMaxResidues ? count : 0;
}

// Packed weights of the residues follow each other at whole cache lines.
template <class T>
size_t part_bytes(const WeightView<T>& view) {
  return (packed_correlation_bytes(view) + 63) / 64 * 64;
}

}  // namespace

template <class T>
WeightView<T> adjoint_view(const ConvShape& s, const void* weight, const Acc<T>* scale) {
  WeightView<T> view{};
  view.data = static_cast<const T*>(weight);
  view.groups = s.groups;
  view.columns = s.channels / s.groups;
  view.reduction = s.out_channels / s.groups;
  view.column_stride = s.taps();
  view.reduction_stride = view.columns * s.taps();
  view.group_stride = view.reduction * view.reduction_stride;
  view.kernel_w = s.kernel_w;
  view.kernel_h = s.kernel_h;
  view.reduction_scale = scale;
  return view;
}

template <class T>
size_t packed_adjoint_bytes(const ConvShape& s) {
  const AdjointAxes axes = AdjointAxes::of(s);
  const WeightView<T> view = adjoint_view<T>(s, nullptr, nullptr);
  size_t bytes = 0;
  for (int64_t i = 0; i < residues(s); ++i) bytes += part_bytes(axes.view_of(view, i));
  return bytes;
}

template <class T>
void pack_adjoint_weight(const ConvShape& s, const WeightView<T>& view, void* packed,
                         const Parallel& pool) {
  const AdjointAxes axes = AdjointAxes::of(s);
  auto* to = static_cast<char*>(packed);
  for (int64_t i = 0; i < residues(s); ++i) {
    const WeightView<T> part = axes.view_of(view, i);
    pack_correlation_weight(part, to, pool);
    to += part_bytes(part);
  }
}

template <class T>
void correlate_adjoint(const ConvShape& s, const WeightView<T>& view, const void* packed,
                       PositionRange z, PositionRange y, PositionRange x, Correlation<T> c,
                       const Parallel& pool) {
  const AdjointAxes axes = AdjointAxes::of(s);
  size_t offsets[kMaxResidues + 1] = {};
  for (int64_t i = 0; i < residues(s); ++i)
    offsets[i + 1] = offsets[i] + part_bytes(axes.view_of(view, i));
  c.channels_last = s.channels_last;
  c.batch = s.batch;
  c.groups = s.groups;
  c.channels = s.out_channels / s.groups;
  c.out_channels = s.channels / s.groups;
  const bool turns = residues(s) > 0 && residues_take_turns(s, c);
  const int64_t starts = turns ? 1 : s.stride_w;
  Correlation<T> parts[kMostParts];
  int64_t count = 0;
  const auto correlate_found = [&] {
    correlate_parts(parts, count, pool);
    count = 0;
  };
  for (int64_t z0 = z.begin; z0 < min_of(z.end, z.begin + s.stride_d); ++z0)
    for (int64_t y0 = y.begin; y0 < min_of(y.end, y.begin + s.stride_h); ++y0)
      for (int64_t x0 = x.begin; x0 < min_of(x.end, x.begin + starts); ++x0) {
        const int64_t rz = axes.z.residue(z0), ry = axes.y.residue(y0), rx = axes.x.residue(x0);
        const WeightView<T> part = axes.view_of(view, rz, ry, rx);
        if (turns) c.residues = {s.stride_w, rx, part_bytes(part)};
        if (residues(s)) {
          c.weight = static_cast<const char*>(packed) + offsets[axes.index(rz, ry, turns ? 0 : rx)];
        } else {
          void* here = scratch_bytes(Scratch::kCall, part_bytes(part));
          pack_correlation_weight(part, here, pool);
          c.weight = here;
        }
        c.z = axes.z.axis(z.end, z0, part.z);
        c.y = axes.y.axis(y.end, y0, part.y);
        c.x = axes.x.axis(x.end, x0, part.x);
        c.place_z = {z.end - z.begin, z0 - z.begin, s.stride_d};
        c.place_y = {y.end - y.begin, y0 - y.begin, s.stride_h};
        c.place_x = {x.end - x.begin, x0 - x.begin, s.stride_w};
        parts[count++] = c;
        // A weight that is packed here makes room for the next one.
        if (count == kMostParts || residues(s) == 0) correlate_found();
      }
  correlate_found();
}

#define FMK_INSTANTIATE(T)                                                                     \
  template WeightView<T> adjoint_view(const ConvShape&, const void*, const Acc<T>*);           \
  template size_t packed_adjoint_bytes<T>(const ConvShape&);                                   \
  template void pack_adjoint_weight(const ConvShape&, const WeightView<T>&, void*,             \
                                    const Parallel&);                                          \
  template void correlate_adjoint(const ConvShape&, const WeightView<T>&, const void*,         \
                                  PositionRange, PositionRange, PositionRange, Correlation<T>, \
                                  const Parallel&);
FMK_INSTANTIATE(float)
FMK_INSTANTIATE(bf16)
FMK_INSTANTIATE(f16)
FMK_INSTANTIATE(double)
#undef FMK_INSTANTIATE

}  // namespace fmk::FMK_ISA
