// Python access to the building blocks. Arrays come in as addresses (torch.Tensor.data_ptr()),
// since numpy has no bfloat16; the caller answers for their sizes. For tests and measurements only.
#include "lab/blocks.h"

#include <chrono>
#include <stdexcept>
#include <string>

#include "lab/lab.h"

namespace py = pybind11;

namespace fmk::lab {
namespace {

const BlockKernels& kernels_of(const std::string& isa) {
  return block_kernels(isa.empty() ? active_isa() : runnable_isa(isa));
}

DType dtype_from(const std::string& name) {
  if (name == "f32") return DType::kF32;
  if (name == "bf16") return DType::kBF16;
  if (name == "f16") return DType::kF16;
  if (name == "f64") return DType::kF64;
  throw std::invalid_argument("dtype must be 'f32', 'bf16', 'f16' or 'f64', not '" + name + "'");
}

MathFunction math_from(const std::string& name) {
  if (name == "exp") return MathFunction::kExp;
  if (name == "exp2_nonpositive") return MathFunction::kExp2Nonpositive;
  if (name == "exp2_nonpositive_coarse") return MathFunction::kExp2NonpositiveCoarse;
  if (name == "tanh") return MathFunction::kTanh;
  if (name == "sigmoid") return MathFunction::kSigmoid;
  if (name == "erf") return MathFunction::kErf;
  if (name == "expm1") return MathFunction::kExpm1;
  throw std::invalid_argument("no vector function is called '" + name + "'");
}

void math(const std::string& name, uintptr_t x, uintptr_t y, int64_t n, const std::string& isa) {
  kernels_of(isa).math(math_from(name), reinterpret_cast<const float*>(x),
                       reinterpret_cast<float*>(y), n);
}

void activation(int index, bool derivative, const std::string& dtype, uintptr_t x, uintptr_t y,
                int64_t n, const std::string& isa) {
  const auto name = static_cast<Activation>(index);
  if (index < 0 || name > Activation::kMish) throw std::invalid_argument("no such activation");
  if (dtype_from(dtype) == DType::kF64) {
    kernels_of(isa).activation_f64(name, derivative, reinterpret_cast<const double*>(x),
                                   reinterpret_cast<double*>(y), n);
  } else if (dtype_from(dtype) == DType::kF32) {
    kernels_of(isa).activation(name, derivative, reinterpret_cast<const float*>(x),
                               reinterpret_cast<float*>(y), n);
  } else {
    throw std::invalid_argument("activations are computed in 'f32' or 'f64'");
  }
}

void gemm(const std::string& dtype, int64_t m, int64_t n, int64_t k, uintptr_t a, int64_t lda,
          bool a_reduction_major, uintptr_t b, int64_t ldb, bool b_transposed, uintptr_t c,
          const std::string& isa) {
  kernels_of(isa).gemm(BlockGemm{dtype_from(dtype), m, n, k, reinterpret_cast<const void*>(a), lda,
                                 a_reduction_major, reinterpret_cast<const void*>(b), ldb,
                                 b_transposed, reinterpret_cast<void*>(c)});
}

double gemm_gflops(const std::string& dtype, int64_t m, int64_t n, int64_t k, double seconds,
                   const std::string& isa) {
  using Clock = std::chrono::steady_clock;
  if (m < 1 || n < 1 || k < 1) throw std::invalid_argument("m, n and k must be positive");
  const BlockKernels& kernels = kernels_of(isa);
  const double flops =
      2.0 * static_cast<double>(m) * static_cast<double>(n) * static_cast<double>(k);
  const int64_t repeats = 1 + static_cast<int64_t>(2e8 / flops);
  kernels.repeat_packed_gemm(dtype_from(dtype), m, n, k, 1);
  double best = 0;
  const Clock::time_point begin = Clock::now();
  volatile double sink;  // so that the compiler must compute the products
  do {
    const Clock::time_point start = Clock::now();
    sink = kernels.repeat_packed_gemm(dtype_from(dtype), m, n, k, repeats);
    const double elapsed = std::chrono::duration<double>(Clock::now() - start).count();
    const double rate = flops * static_cast<double>(repeats) / elapsed * 1e-9;
    if (rate > best) best = rate;
  } while (std::chrono::duration<double>(Clock::now() - begin).count() < seconds);
  (void)sink;
  return best;
}

}  // namespace
}  // namespace fmk::lab

FMK_LAB_BINDINGS(module) {
  using namespace fmk::lab;
  using Unlocked = py::call_guard<py::gil_scoped_release>;
  module.def("math", &math, py::arg("name"), py::arg("x"), py::arg("y"), py::arg("n"),
             py::arg("isa") = "", Unlocked(),
             "y[i] = name(x[i]) for n floats at the addresses x and y; names: exp, "
             "exp2_nonpositive, exp2_nonpositive_coarse, tanh, sigmoid, erf, expm1.");
  module.def("activation", &activation, py::arg("index"), py::arg("derivative"), py::arg("dtype"),
             py::arg("x"), py::arg("y"), py::arg("n"), py::arg("isa") = "", Unlocked(),
             "y[i] = activation(x[i]) or its derivative; dtype 'f32' or 'f64'.");
  module.def("gemm", &gemm, py::arg("dtype"), py::arg("m"), py::arg("n"), py::arg("k"),
             py::arg("a"), py::arg("lda"), py::arg("a_reduction_major"), py::arg("b"),
             py::arg("ldb"), py::arg("b_transposed"), py::arg("c"), py::arg("isa") = "", Unlocked(),
             "C[m][n] = A B on addresses; see csrc/lab/blocks.h.");
  module.def(
      "tile_rows", [](int vecs, const std::string& isa) { return kernels_of(isa).tile_rows(vecs); },
      py::arg("vecs"), py::arg("isa") = "",
      "Rows of the largest micro-kernel tile `vecs` vectors wide; 0 where there is none.");
  module.def(
      "lanes", [](const std::string& isa) { return kernels_of(isa).lanes; }, py::arg("isa") = "",
      "Lanes of a vector of float.");
  module.def("gemm_gflops", &gemm_gflops, py::arg("dtype"), py::arg("m"), py::arg("n"),
             py::arg("k"), py::arg("seconds") = 0.2, py::arg("isa") = "", Unlocked(),
             "1e9 floating-point operations per second of the micro-kernel on one core with a "
             "prepacked B, best burst.");
}
