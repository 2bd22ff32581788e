// Loops that do one thing as fast as the ISA can: the ceilings that kernels are compared with.
#pragma once

#include <cstdint>

#include "cpu/isa.h"

namespace fmk {

struct PeakKernels {
  // Run `rounds` rounds of independent multiply-adds on registers. `flops` gets the floating-point
  // operations done (a multiply-add is two); the return value depends on all of them, so that none
  // is optimised away.
  float (*fma_f32)(int64_t rounds, double* flops);
  double (*fma_f64)(int64_t rounds, double* flops);
  // bf16 products summed in fp32 (vdpbf16ps); null where the ISA has no such instruction.
  float (*fma_bf16)(int64_t rounds, double* flops);
  // Reads `bytes` bytes once, a multiple of 256, 64-byte aligned. The return value depends on all
  // of them.
  uint64_t (*read)(const void* data, int64_t bytes);
};

FMK_KERNEL_TABLE(PeakKernels, peak_kernels)

}  // namespace fmk
