// Ceilings of one core, measured: arithmetic on registers and reads of memory.
#include "lab/peak.h"

#include <chrono>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>

#include "lab/lab.h"

namespace py = pybind11;

namespace fmk::lab {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

volatile double sink;  // results go here so that the compiler must compute them

// The best rate over bursts of about a millisecond: a ceiling is not lowered by an interruption.
template <class Kernel>
double best_gflops(Kernel kernel, double seconds) {
  constexpr int64_t kRounds = 1 << 17;
  double best = 0;
  const Clock::time_point begin = Clock::now();
  do {
    double flops = 0;
    const Clock::time_point start = Clock::now();
    sink = kernel(kRounds, &flops);
    const double rate = flops / seconds_since(start) * 1e-9;
    if (rate > best) best = rate;
  } while (seconds_since(begin) < seconds);
  return best;
}

const PeakKernels& kernels_of(const std::string& isa) {
  return peak_kernels(isa.empty() ? active_isa() : runnable_isa(isa));
}

double peak_gflops(const std::string& dtype, double seconds, const std::string& isa) {
  const PeakKernels& kernels = kernels_of(isa);
  if (dtype == "f32") return best_gflops(kernels.fma_f32, seconds);
  if (dtype == "f64") return best_gflops(kernels.fma_f64, seconds);
  if (dtype != "bf16") {
    throw std::invalid_argument("dtype must be 'f32', 'f64' or 'bf16', not '" + dtype + "'");
  }
  if (kernels.fma_bf16 == nullptr) throw std::runtime_error("this ISA has no bf16 multiply-add");
  return best_gflops(kernels.fma_bf16, seconds);
}

// The average over the whole time: threads that share the memory must all be counted while all of
// them read.
double read_bandwidth_gbs(int64_t bytes, double seconds, const std::string& isa) {
  constexpr int64_t kUnit = 256;
  bytes = bytes / kUnit * kUnit;
  if (bytes <= 0) throw std::invalid_argument("bytes must be at least 256");
  const PeakKernels& kernels = kernels_of(isa);
  std::unique_ptr<void, decltype(&std::free)> data(std::aligned_alloc(kUnit, bytes), &std::free);
  if (!data) throw std::bad_alloc();
  std::memset(data.get(), 1, bytes);
  int64_t passes = 0;
  const Clock::time_point begin = Clock::now();
  double elapsed = 0;
  do {
    sink = double(kernels.read(data.get(), bytes));
    ++passes;
    elapsed = seconds_since(begin);
  } while (elapsed < seconds);
  return double(passes) * double(bytes) / elapsed * 1e-9;
}

}  // namespace
}  // namespace fmk::lab

FMK_LAB_BINDINGS(module) {
  using Unlocked = py::call_guard<py::gil_scoped_release>;
  module.def("peak_gflops", &fmk::lab::peak_gflops, py::arg("dtype"), py::arg("seconds") = 0.2,
             py::arg("isa") = "", Unlocked(),
             "1e9 floating-point operations per second of this core, multiply-adds on registers, "
             "best burst.\n"
             "dtype: 'f32', 'f64' or 'bf16'; RuntimeError where the ISA has no bf16 arithmetic. "
             "isa: '' for the active one.");
  module.def("read_bandwidth_gbs", &fmk::lab::read_bandwidth_gbs, py::arg("bytes"),
             py::arg("seconds") = 0.2, py::arg("isa") = "", Unlocked(),
             "1e9 bytes per second that this core reads from a buffer of `bytes` bytes, average.");
}
