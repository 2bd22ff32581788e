// How a file of csrc/lab adds its functions to the Python module fmkernels._lab:
//
//   #include "lab/lab.h"
//   FMK_LAB_BINDINGS(module) { module.def("name", &function, "what it does"); }
//
// Nothing else has to be edited: the build takes every csrc/lab/*.cpp. Loops that need the vector
// instructions go to csrc/lab/isa/*.cpp, which is compiled once per ISA like csrc/cpu (see
// cpu/isa.h).
#pragma once

#include <pybind11/pybind11.h>

namespace fmk::lab {

struct Bindings {
  explicit Bindings(void (*bind)(pybind11::module_&));
};

}  // namespace fmk::lab

#define FMK_LAB_BINDINGS(module)                             \
  static void bind_to_lab(pybind11::module_& module);        \
  static const fmk::lab::Bindings lab_bindings(bind_to_lab); \
  static void bind_to_lab(pybind11::module_& module)
