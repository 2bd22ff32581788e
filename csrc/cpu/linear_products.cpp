#include "cpu/linear_products.h"

#include "cpu/gemm_blocked.h"

namespace fmk::FMK_ISA {
namespace {

template <class T>
void choose(const GemmProblem<T>& p, const Parallel& pool) {
  if (suits_blocks(p))
    blocked_gemm(p, pool);
  else
    gemm(p, pool);
}

}  // namespace

void multiply(const GemmProblem<float>& p, const Parallel& pool) { choose(p, pool); }
void multiply(const GemmProblem<double>& p, const Parallel& pool) { choose(p, pool); }
void multiply(const GemmProblem<bf16>& p, const Parallel& pool) { choose(p, pool); }
void multiply(const GemmProblem<f16>& p, const Parallel& pool) { choose(p, pool); }

}  // namespace fmk::FMK_ISA
