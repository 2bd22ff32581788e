#include "lab/blocks.h"

#include <type_traits>

#include "cpu/gemm.h"
#include "cpu/reduce.h"

namespace fmk::FMK_ISA {
namespace {

template <class V, class F>
void map(const typename V::Elem* x, typename V::Elem* y, int64_t n, const F& function) {
  for (int64_t i = 0; i < n; i += V::W) {
    const int lanes = static_cast<int>(min_of<int64_t>(V::W, n - i));
    store(y + i, function(load(x + i, lanes)), lanes);
  }
}

void math(MathFunction name, const float* x, float* y, int64_t n) {
  switch (name) {
    case MathFunction::kExp: return map<VecF>(x, y, n, [](VecF v) { return exp(v); });
    case MathFunction::kExp2Nonpositive:
      return map<VecF>(x, y, n, [](VecF v) { return exp2_nonpositive(v); });
    case MathFunction::kExp2NonpositiveCoarse:
      return map<VecF>(x, y, n, [](VecF v) { return exp2_nonpositive_coarse(v); });
    case MathFunction::kTanh: return map<VecF>(x, y, n, [](VecF v) { return tanh(v); });
    case MathFunction::kSigmoid: return map<VecF>(x, y, n, [](VecF v) { return sigmoid(v); });
    case MathFunction::kErf: return map<VecF>(x, y, n, [](VecF v) { return erf(v); });
    case MathFunction::kExpm1: return map<VecF>(x, y, n, [](VecF v) { return expm1(v); });
  }
}

template <class V>
void activation_of(Activation name, bool derivative, const typename V::Elem* x, typename V::Elem* y,
                   int64_t n) {
  map<V>(x, y, n, [=](V v) { return derivative ? activate_grad(name, v) : activate(name, v); });
}

void block_gemm(const BlockGemm& p) {
  with_type(p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    GemmProblem<T> g;
    g.m = p.m;
    g.n = p.n;
    g.k = p.k;
    g.a = static_cast<const T*>(p.a);
    g.lda = p.lda;
    g.a_reduction_major = p.a_reduction_major;
    g.b = static_cast<const T*>(p.b);
    g.ldb = p.ldb;
    g.b_transposed = p.b_transposed;
    g.epilogue.out = static_cast<T*>(p.c);
    g.epilogue.ld_out = p.n;
    gemm(g, Parallel{});
  });
}

int tile_rows(int vecs) { return vecs >= 1 && vecs <= kPanelVecs ? kTileRows[vecs] : 0; }

template <class T>
double repeat_typed(int64_t m, int64_t n, int64_t k, int64_t repeats) {
  auto* a = static_cast<T*>(scratch_bytes(Scratch::kCall, m * k * sizeof(T)));
  auto* b = static_cast<Word<T>*>(
      scratch_bytes(Scratch::kCall2, packed_words<T>(n, k) * sizeof(Word<T>)));
  auto* c = static_cast<T*>(scratch_bytes(Scratch::kExtra, m * n * sizeof(T)));
  for (int64_t i = 0; i < m * k; ++i) narrow(a + i, static_cast<Acc<T>>(i % 7) * Acc<T>(0.125));
  for (int64_t i = 0; i < packed_words<T>(n, k); ++i) {
    const auto value = static_cast<Acc<T>>(i % 5) * Acc<T>(0.25);
    make_word(b + i, value, value);
  }
  GemmProblem<T> g;
  g.m = m;
  g.n = n;
  g.k = k;
  g.a = a;
  g.lda = k;
  g.packed_b = b;
  g.epilogue.out = c;
  g.epilogue.ld_out = n;
  for (int64_t i = 0; i < repeats; ++i) gemm(g, Parallel{});
  return static_cast<double>(widen(c[0])) + static_cast<double>(widen(c[m * n - 1]));
}

double repeat_packed_gemm(DType dtype, int64_t m, int64_t n, int64_t k, int64_t repeats) {
  double result = 0;
  with_type(dtype, [&](auto* type) {
    result = repeat_typed<std::remove_pointer_t<decltype(type)>>(m, n, k, repeats);
  });
  return result;
}

}  // namespace

const BlockKernels& block_kernels() {
  static constexpr BlockKernels table{
      &math,   &activation_of<VecF>, &activation_of<VecD>, &block_gemm, &tile_rows,
      VecF::W, &repeat_packed_gemm};
  return table;
}

}  // namespace fmk::FMK_ISA
