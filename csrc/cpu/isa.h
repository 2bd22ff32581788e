// Which instruction set the kernels run with, and how a family of kernels is reached through it.
//
// Every csrc/cpu/*.cpp except isa.cpp (and every csrc/lab/isa/*.cpp) is compiled once per ISA, each
// time with that ISA's compiler flags and -DFMK_ISA=<name>. Nothing else in the project may contain
// AVX code.
//
// A family has one header, which lists its kernels as function pointers:
//
//   // conv.h
//   #include "cpu/isa.h"
//   namespace fmk {
//   struct ConvKernels {
//     void (*forward)(const ConvProblem&, const ConvBuffers&);
//   };
//   FMK_KERNEL_TABLE(ConvKernels, conv_kernels)
//   }  // namespace fmk
//
// one kernel source, compiled per ISA, which defines the getter:
//
//   // conv.cpp
//   #include "cpu/conv.h"
//   namespace fmk::FMK_ISA {
//   namespace {
//   void forward(const ConvProblem& problem, const ConvBuffers& buffers) { ... }
//   }  // namespace
//   const ConvKernels& conv_kernels() {
//     static constexpr ConvKernels table{&forward};
//     return table;
//   }
//   }  // namespace fmk::FMK_ISA
//
// and callers compiled for the baseline (csrc/torch, csrc/lab), which choose at run time:
//
//   fmk::conv_kernels().forward(...)                                // the active ISA
//   fmk::conv_kernels(fmk::runnable_isa("avx2")).forward(...)       // a given one, for tests
//
// Code in a per-ISA source must live in namespace fmk::FMK_ISA. An inline function or a template of
// any other namespace (std:: containers and streams too) that is not inlined becomes one weak
// symbol shared by all ISAs, and the linker may keep the AVX-512 copy for everybody:
// tests/test_binary.py disassembles the libraries and fails on that. Functions that shared headers
// offer to kernels are therefore always_inline, or static.
#pragma once

#include <string>
#include <vector>

namespace fmk {

// In order of preference: the last one that is compiled in and that the processor runs is the
// default.
enum class Isa : int { kScalar = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3 };

// The name that FMKERNELS_ISA takes: "scalar", "avx2", "avx512" or "avx512_bf16".
const char* isa_name(Isa isa);

// Whether this library holds kernels for the ISA.
bool isa_compiled(Isa isa);

// Whether processor and operating system can execute the ISA's instructions (compiled in or not).
bool isa_supported(Isa isa);

// The ISAs that are compiled in, in order of preference, worst first.
std::vector<Isa> compiled_isas();

// The ISA called `name`. Throws std::runtime_error, naming the allowed values, when there is none,
// when it is not compiled in, or when the processor cannot run it.
Isa runnable_isa(const std::string& name);

// The ISA in use: FMKERNELS_ISA if that is set and not empty, else the best one. Decided at the
// first call; as long as FMKERNELS_ISA names an ISA that cannot run, every call throws as
// runnable_isa does.
Isa active_isa();

}  // namespace fmk

// --- FMK_KERNEL_TABLE(Struct, getter) ---
// Used inside namespace fmk. Declares `const Struct& getter()` in the namespace of each ISA that is
// compiled in and, for baseline code, the dispatchers `getter()` and `getter(Isa)`.

// FMK_HAVE_<ISA> comes from the build: 1 where that ISA's kernels are compiled in. scalar always
// is.
#if FMK_HAVE_AVX2
#define FMK_TABLE_DECLARE_AVX2(Struct, getter) \
  namespace avx2 {                             \
  const Struct& getter();                      \
  }
#define FMK_TABLE_CASE_AVX2(getter) \
  case Isa::kAvx2: return avx2::getter();
#else
#define FMK_TABLE_DECLARE_AVX2(Struct, getter)
#define FMK_TABLE_CASE_AVX2(getter)
#endif

#if FMK_HAVE_AVX512
#define FMK_TABLE_DECLARE_AVX512(Struct, getter) \
  namespace avx512 {                             \
  const Struct& getter();                        \
  }
#define FMK_TABLE_CASE_AVX512(getter) \
  case Isa::kAvx512: return avx512::getter();
#else
#define FMK_TABLE_DECLARE_AVX512(Struct, getter)
#define FMK_TABLE_CASE_AVX512(getter)
#endif

#if FMK_HAVE_AVX512_BF16
#define FMK_TABLE_DECLARE_AVX512_BF16(Struct, getter) \
  namespace avx512_bf16 {                             \
  const Struct& getter();                             \
  }
#define FMK_TABLE_CASE_AVX512_BF16(getter) \
  case Isa::kAvx512Bf16: return avx512_bf16::getter();
#else
#define FMK_TABLE_DECLARE_AVX512_BF16(Struct, getter)
#define FMK_TABLE_CASE_AVX512_BF16(getter)
#endif

#define FMK_TABLE_DECLARE(Struct, getter)  \
  namespace scalar {                       \
  const Struct& getter();                  \
  }                                        \
  FMK_TABLE_DECLARE_AVX2(Struct, getter)   \
  FMK_TABLE_DECLARE_AVX512(Struct, getter) \
  FMK_TABLE_DECLARE_AVX512_BF16(Struct, getter)

#ifdef FMK_ISA
// A kernel source never dispatches, and must not emit the dispatchers compiled with its own flags.
#define FMK_KERNEL_TABLE(Struct, getter) FMK_TABLE_DECLARE(Struct, getter)
#else
#define FMK_KERNEL_TABLE(Struct, getter)                                           \
  FMK_TABLE_DECLARE(Struct, getter)                                                \
  /* `isa` must be runnable: as returned by active_isa() or runnable_isa(name). */ \
  inline const Struct& getter(Isa isa) {                                           \
    switch (isa) {                                                                 \
      FMK_TABLE_CASE_AVX2(getter)                                                  \
      FMK_TABLE_CASE_AVX512(getter)                                                \
      FMK_TABLE_CASE_AVX512_BF16(getter)                                           \
      default: return scalar::getter();                                            \
    }                                                                              \
  }                                                                                \
  inline const Struct& getter() { return getter(active_isa()); }
#endif
