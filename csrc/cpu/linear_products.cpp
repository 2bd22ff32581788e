#include "cpu/linear_products.h"

namespace fmk::FMK_ISA {

void multiply(const GemmProblem<float>& p, const Parallel& pool) { gemm(p, pool); }
void multiply(const GemmProblem<double>& p, const Parallel& pool) { gemm(p, pool); }
void multiply(const GemmProblem<bf16>& p, const Parallel& pool) { gemm(p, pool); }
void multiply(const GemmProblem<f16>& p, const Parallel& pool) { gemm(p, pool); }

}  // namespace fmk::FMK_ISA
